"""Chains estimated from observations alone."""

import pytest
import torch

from tsae.synthetic.bayes import filter_states, starts_of
from tsae.synthetic.chains import Chain, Source
from tsae.synthetic.estimate import chain_from_moments, fit_chain

RHOS = (0.5, 0.85, 0.96)


@pytest.fixture(scope="module")
def seen() -> tuple[torch.Tensor, torch.Tensor]:
    source = Source(Chain.of(0.15, [rho for rho in RHOS for _ in range(12)], 0.625), width=4, segment=256)
    truth = next(source.batches(1, batch=16, length=1000, seed=4))
    return truth.amplitude > 0, truth.segments


def medians(values: torch.Tensor) -> list[float]:
    return values.view(len(RHOS), -1).median(1).values.tolist()


@pytest.mark.parametrize("estimate", [chain_from_moments, fit_chain])
def test_known_chains_are_found(seen, estimate):
    chain = estimate(*seen)
    assert medians(chain.rho) == pytest.approx(RHOS, abs=0.035)
    assert medians(chain.pi) == pytest.approx([0.15] * 3, rel=0.15)
    assert medians(chain.emission) == pytest.approx([0.625] * 3, rel=0.1)
    assert max(medians(chain.false_rate)) < 0.006


def test_false_observations_are_told_from_others(seen):
    observed, segments = seen
    false = torch.rand(observed.shape, generator=torch.Generator().manual_seed(0)) < 0.02
    chain = fit_chain(observed | false, segments, iterations=12)
    assert medians(chain.false_rate)[1:] == pytest.approx([0.02] * 2, rel=0.25)
    assert medians(chain.rho)[1:] == pytest.approx(RHOS[1:], abs=0.035)


def test_baum_welch_never_lowers_the_likelihood(seen):
    """Checked through the predictions: the mean log-probability of each observation given those before it."""
    observed, segments = seen

    def log_likelihood(chain: Chain) -> float:
        filtered = filter_states(observed, segments, chain)
        before = torch.roll(filtered, 1, 1)
        on = torch.where(starts_of(segments)[..., None], chain.pi.float(), chain.on_after_off + chain.rho * before)
        rate = chain.emission * on + chain.false_rate * (1 - on)
        return float(torch.where(observed, rate.log(), torch.log1p(-rate)).mean())

    found = [log_likelihood(fit_chain(observed, segments, iterations)) for iterations in (0, 1, 3, 6)]
    assert all(later > earlier - 1e-5 for earlier, later in zip(found[:-1], found[1:], strict=True))
    assert found[-1] > found[0]


def test_features_that_are_never_or_always_on():
    observed = torch.zeros(4, 50, 2, dtype=torch.bool)
    observed[..., 1] = True
    chain = fit_chain(observed, torch.zeros(4, 50))
    for each in chain:
        assert each.isfinite().all()
        assert ((each >= 0) & (each <= 1)).all()
    assert chain.pi[0] * chain.emission[0] < 0.05
    assert chain.pi[1] * chain.emission[1] > 0.8
