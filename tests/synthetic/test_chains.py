"""Made-up activations: their chains, emissions, segments and directions against closed forms."""

import pytest
import torch

from tsae.synthetic.chains import Chain, Source, rho_for

PI, EMISSION, DWELLS = 0.15, 0.625, (2, 8, 32)


@pytest.fixture(scope="module")
def source() -> Source:
    rhos = [rho_for(dwell, PI) for dwell in DWELLS for _ in range(40)]
    return Source(Chain.of(PI, rhos, EMISSION), width=16, segment=1e9)


@pytest.fixture(scope="module")
def truth(source):
    return next(source.batches(1, batch=16, length=2000, seed=1))


def by_dwell(values: torch.Tensor) -> list[float]:
    """The mean over the features of each dwell time."""
    return values.double().view(len(DWELLS), -1).mean(1).tolist()


def test_dwell_times_and_transitions(source, truth):
    assert source.chain.dwell.view(3, -1)[:, 0].tolist() == pytest.approx(DWELLS)
    hidden = truth.hidden.float()
    on, before = hidden[:, 1:], hidden[:, :-1]
    ended = (before * (1 - on)).sum((0, 1))
    lengths = [a / b for a, b in zip(by_dwell(before.sum((0, 1))), by_dwell(ended), strict=True)]
    assert lengths == pytest.approx(DWELLS, rel=0.05)
    began = ((1 - before) * on).sum((0, 1)) / (1 - before).sum((0, 1))
    assert by_dwell(began) == pytest.approx(by_dwell(source.chain.on_after_off), rel=0.05)


def test_densities_and_autocorrelations(source, truth):
    assert by_dwell(truth.hidden.float().mean((0, 1))) == pytest.approx([PI] * 3, rel=0.06)
    observed = (truth.amplitude > 0).float()
    assert by_dwell(observed.mean((0, 1))) == pytest.approx([PI * EMISSION] * 3, rel=0.06)
    assert not (observed.bool() & ~truth.hidden).any()  # never where the hidden state is off
    for lag in (1, 3):
        for values, gain in ((truth.hidden.float() - PI, 1.0), (observed - PI * EMISSION, EMISSION**2)):
            products = (values[:, lag:] * values[:, :-lag]).mean((0, 1))
            wanted = [gain * PI * (1 - PI) * rho_for(dwell, PI) ** lag for dwell in DWELLS]
            assert by_dwell(products) == pytest.approx(wanted, rel=0.1)


def test_the_observed_state_correlates_as_its_closed_form(source, truth):
    hidden, observed = truth.hidden.float().flatten(0, 1), (truth.amplitude > 0).float().flatten(0, 1)
    found = [torch.corrcoef(torch.stack([hidden[:, j], observed[:, j]]))[0, 1].item() for j in range(0, 120, 10)]
    assert sum(found) / len(found) == pytest.approx(float(source.chain.observed_correlation[0]), abs=0.01)
    assert float(source.chain.observed_correlation[0]) == pytest.approx(0.7656, abs=1e-4)  # the paper's 0.77


def test_amplitudes_and_directions(source, truth):
    observed = truth.amplitude[truth.amplitude > 0]
    assert observed.mean().item() == pytest.approx(1.0, abs=0.01)
    assert observed.std().item() == pytest.approx(0.15, abs=0.01)
    assert source.directions.norm(dim=1).tolist() == pytest.approx([1.0] * source.features)
    torch.testing.assert_close(truth.x, truth.amplitude @ source.directions)
    assert source.observed_l0 == pytest.approx(source.features * PI * EMISSION)


def test_segments_are_independent():
    """With rho near 1 a state changes at the start of a segment alone."""
    source = Source(Chain.of(0.5, [0.999999] * 64, 1.0), width=8, segment=20)
    truth = next(source.batches(1, batch=8, length=400, seed=3))
    changed = truth.hidden[:, 1:] != truth.hidden[:, :-1]
    new = truth.segments[:, 1:] != truth.segments[:, :-1]
    assert new.float().mean().item() == pytest.approx(1 / 20, rel=0.15)
    assert changed[new].float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert changed[~new].float().mean().item() < 1e-3


def test_a_stream_is_a_function_of_its_seed(source):
    again = Source(source.chain, source.width, source.segment)
    first, second, other = (
        list(stream) for stream in (source.batches(2, 2, 8, 5), again.batches(2, 2, 8, 5), again.batches(2, 2, 8, 6))
    )
    for one, two in zip(first, second, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(first[0].x, other[0].x)
    assert not torch.equal(first[0].x, first[1].x)
    assert not torch.equal(Source(source.chain, source.width, source.segment, seed=1).directions, source.directions)
