"""The filter and the smoother against the sum over all paths, and the linear filter against a search."""

import itertools

import pytest
import torch

from tsae.synthetic.bayes import filter_states, leak_for, leaky_mean, smooth_states
from tsae.synthetic.chains import Chain, Source

CHAIN = Chain(*(torch.tensor(each, dtype=torch.float64) for each in ([0.2, 0.4], [0.8, 0.3], [0.6, 0.9], [0.1, 0.02])))


def by_paths(observed: list[bool], feature: int, last: int) -> list[float]:
    """P(on at t | the first ``last`` observations) of one segment, for every t, by summing over all paths."""
    pi, _, emission, false_rate = (float(each[feature]) for each in CHAIN)
    onward = {True: float(CHAIN.on_after_on[feature]), False: float(CHAIN.on_after_off[feature])}
    total, on = 0.0, [0.0] * len(observed)
    for path in itertools.product((False, True), repeat=len(observed)):
        weight = pi if path[0] else 1 - pi
        for before, after in itertools.pairwise(path):
            weight *= onward[before] if after else 1 - onward[before]
        for state, seen in list(zip(path, observed, strict=True))[:last]:
            rate = emission if state else false_rate
            weight *= rate if seen else 1 - rate
        total += weight
        for t, state in enumerate(path):
            on[t] += weight * state
    return [each / total for each in on]


@pytest.mark.parametrize("seed", range(3))
def test_posteriors_are_those_of_all_paths(seed):
    generator = torch.Generator().manual_seed(seed)
    observed = torch.rand(2, 9, 2, generator=generator) < 0.4
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [3, 2, 2, 2, 2, 2, 2, 2, 2]])
    filtered, smoothed = filter_states(observed, segments, CHAIN), smooth_states(observed, segments, CHAIN)
    for row, feature in itertools.product(range(2), range(2)):
        for segment in segments[row].unique():
            places = (segments[row] == segment).nonzero().flatten().tolist()
            seen = observed[row, places, feature].tolist()
            wanted = by_paths(seen, feature, len(seen))
            assert smoothed[row, places, feature].tolist() == pytest.approx(wanted, abs=1e-5)
            wanted = [by_paths(seen, feature, t + 1)[t] for t in range(len(seen))]
            assert filtered[row, places, feature].tolist() == pytest.approx(wanted, abs=1e-5)


def test_without_false_observations_what_is_observed_is_on():
    source = Source(Chain.of(0.15, [0.1, 0.7, 0.9, 0.95] * 10, 0.625), width=4, segment=64)
    truth = next(source.batches(1, batch=16, length=500, seed=0))
    observed = truth.amplitude > 0
    for infer in (filter_states, smooth_states):
        posterior = infer(observed, truth.segments, source.chain)
        assert posterior.isfinite().all()
        assert posterior[observed].min() > 1 - 1e-5
        # A posterior is calibrated: of what it gives probability p, a share p is on.
        for low, high in ((0.05, 0.2), (0.2, 0.5), (0.5, 0.9)):
            near = (posterior > low) & (posterior <= high)
            assert truth.hidden[near].float().mean().item() == pytest.approx(posterior[near].mean().item(), abs=0.03)


@pytest.mark.parametrize("rho", [0.3, 0.853, 0.95])
def test_the_leak_is_the_best_of_all(rho):
    source = Source(Chain.of(0.15, [rho] * 40, 0.625), width=4, segment=1e9)
    truth = next(source.batches(1, batch=8, length=2000, seed=2))
    hidden, observed = truth.hidden.float(), (truth.amplitude > 0).float()

    def correlation(leak: float) -> float:
        values = leaky_mean(observed, truth.segments, torch.full((40,), leak))
        return torch.corrcoef(torch.stack([values.flatten(), hidden.flatten()]))[0, 1].item()

    leak = float(leak_for(source.chain)[0])
    assert 0 < leak < rho
    assert correlation(leak) >= max(correlation(leak + shift) for shift in (-0.1, -0.05, 0.05, 0.1)) - 1e-4


def test_a_leaky_mean_starts_anew_in_each_segment():
    values = torch.ones(1, 4, 1)
    out = leaky_mean(values, torch.tensor([[0, 0, 1, 1]]), torch.tensor([0.5]))
    assert out.flatten().tolist() == [0.5, 0.75, 0.5, 0.75]
