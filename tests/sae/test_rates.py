"""Thresholds from transition rates: the formulas, their optimality on chains, and the running estimates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tsae.sae.rates import MEMORY, TransitionRates, decision_rates, path_costs, switch_costs


def rates(p01: list[float], p11: list[float]) -> torch.Tensor:
    return torch.tensor([p01, p11], dtype=torch.float64)


def test_costs_are_those_of_the_formula() -> None:
    # The rates of a typical feature in DESIGN's words: seldom on, and on again with probability 0.43.
    costs = switch_costs(rates([0.008], [0.43]), 0.0)
    assert float(costs.from_off) == pytest.approx(math.log2(0.992 / 0.008))
    assert float(costs.from_on) == pytest.approx(math.log2(0.57 / 0.43))
    assert float((costs.from_on / costs.from_off).sqrt()) == pytest.approx(0.24, abs=0.01)
    priced = switch_costs(rates([0.008], [0.43]), 3.0)
    assert float((priced.from_on / priced.from_off).sqrt()) == pytest.approx(0.59, abs=0.01)


def test_a_feature_without_memory_has_no_hysteresis() -> None:
    costs = switch_costs(rates([0.02, 0.02], [0.02, 0.001]), 2.0)  # a p11 below p01 counts as p01
    assert torch.allclose(costs.from_on, costs.from_off)
    assert torch.allclose(costs.from_off, torch.full((2,), math.log2(0.98 / 0.02) + 2.0).double())


def test_the_longer_a_feature_lasts_the_lower_its_release() -> None:
    p11 = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    costs = switch_costs(torch.stack([torch.full_like(p11, 0.01), p11]), 4.0)
    assert bool((costs.from_on.diff() <= 0).all())
    assert bool((costs.from_on <= costs.from_off).all())
    assert bool((costs.from_on >= 0).all())
    assert bool((costs.from_off > 0).all())


def test_a_rare_feature_is_decided_by_common_rates() -> None:
    """Its threshold is bounded, however seldom it is on, and its release has the common ratio."""
    own = rates([1e-6, 0.01, 0.02, 0.1], [0.3, 0.2, 0.6, 0.9])
    found = decision_rates(own, 4.0, 0.4)
    mean = float((own[0] / (1 - own[1] + own[0])).mean())
    assert float(found[0, 0]) == pytest.approx(mean / 2)
    costs = switch_costs(found, 4.0)
    assert float((costs.from_on / costs.from_off).sqrt()[0]) == pytest.approx(0.4, abs=1e-4)
    rarer = switch_costs(decision_rates(torch.where(own == 1e-6, 1e-9, own), 4.0, 0.4), 4.0)
    assert float(rarer.from_off[0]) == pytest.approx(float(costs.from_off[0]), rel=1e-3)
    assert float(switch_costs(own, 4.0).from_off[0]) > 1.5 * float(costs.from_off[0])


def test_a_frequent_feature_is_decided_by_its_own_rates() -> None:
    own = torch.cat([rates([0.2], [0.95]), rates([1e-5], [0.1]).expand(2, 999)], 1)
    assert torch.allclose(decision_rates(own, 4.0, 0.4)[:, 0], own[:, 0], rtol=1e-3)


def test_the_weight_of_common_rates_is_four_times_the_mean_density() -> None:
    own = rates([0.02] * 5, [0.5] * 5)
    found = decision_rates(own, 4.0, 0.4)
    assert torch.equal(found[0], own[0])  # above 0.019, half of the mean density
    wanted = 0.16 * (math.log2(0.98 / 0.02) + 4.0) - 4.0
    assert torch.allclose(found[1], torch.full((5,), (0.5 + 4 / (1 + 2.0**wanted)) / 5, dtype=torch.float64))


@pytest.mark.parametrize("release_ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("amplitude_bits", [0.0, 4.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_common_rates_give_usable_costs(release_ratio: float, amplitude_bits: float, dtype: torch.dtype) -> None:
    p = torch.logspace(-8, -0.001, 40, dtype=torch.float64).to(dtype)
    found = decision_rates(torch.stack([p, p.flip(0)]), amplitude_bits, release_ratio)
    assert bool(((found > 0) & (found < 1)).all())
    assert bool((found[1] >= found[0]).all())
    costs = switch_costs(found, amplitude_bits)
    assert bool(costs.from_off.isfinite().all())
    assert bool((costs.from_on <= costs.from_off).all())


def test_a_feature_that_is_never_on_keeps_a_bounded_threshold() -> None:
    found = TransitionRates(100)
    pairs, counts = torch.tensor(1000.0), torch.tensor([[8.0], [12.0], [12.0]]).repeat(1, 100)
    counts[:, 0] = 0
    for _ in range(20 * MEMORY):
        found.update(counts, pairs)
    bits = switch_costs(decision_rates(found.rates, 4.0, 0.25), 4.0).from_off
    density = 0.99 * 0.02
    assert float(bits[0]) == pytest.approx(math.log2((1 - density / 2) / (density / 2)) + 4.0, rel=0.02)
    assert float(switch_costs(found.rates, 4.0).from_off[0]) > 1.4 * float(bits[0])


def test_path_costs_are_the_code_length_of_a_chain() -> None:
    p01, p11, a = 0.1, 0.6, 1.5
    transition, start = path_costs(rates([p01], [p11]), a)
    total = 0.0
    for path in itertools.product((0, 1), repeat=4):
        bits = float(start[path[0], 0]) + sum(float(transition[i, j, 0]) for i, j in itertools.pairwise(path))
        total += 2.0 ** -(bits - a * sum(path))
    assert total == pytest.approx(1.0)  # probabilities of all paths
    density = p01 / (1 - p11 + p01)
    assert float(start[1, 0]) == pytest.approx(-math.log2(density) + a)


def test_running_rates_find_those_of_a_chain_and_follow_a_change() -> None:
    found = TransitionRates(2)
    pairs = torch.tensor(10_000.0)
    for p01, p11 in (([0.02, 0.2], [0.8, 0.2]), ([0.1, 0.01], [0.5, 0.9])):
        p01, p11 = torch.tensor(p01), torch.tensor(p11)
        on = pairs * p01 / (1 - p11 + p01)
        counts = torch.stack([on * p11, on * (1 - p11), (pairs - on) * p01])
        for _ in range(5 * MEMORY):
            found.update(counts, pairs)
        assert torch.allclose(found.rates, torch.stack([p01, p11]), rtol=0.15)
    entropy = -(p11 * p11.log2() + (1 - p11) * (1 - p11).log2()) * on / pairs
    entropy -= (p01 * p01.log2() + (1 - p01) * (1 - p01).log2()) * (1 - on / pairs)
    assert float(found.support_bits(counts, pairs)) == pytest.approx(float(entropy.sum()), rel=0.02)


def test_a_feature_never_seen_has_the_prior_rates() -> None:
    found = TransitionRates(3)
    found.update(torch.zeros(3, 3), torch.tensor(0.0))
    assert torch.allclose(found.rates, torch.tensor([[0.013] * 3, [0.3] * 3]))


def test_a_warm_start_has_exactly_the_rates_it_is_given() -> None:
    found, wanted = TransitionRates(3), torch.tensor([[0.001, 0.02, 0.4], [0.05, 0.9, 0.41]])
    found.start(wanted, 200_000.0)
    assert torch.allclose(found.rates, wanted, rtol=1e-5)
    again = TransitionRates(3)
    again.load_state_dict(found.state_dict())
    assert again.settled
    assert torch.equal(again.rates, found.rates)
