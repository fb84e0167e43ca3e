"""What might buy bits without being worth them costs no less than honest features at equal explained variance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from persistent_activations import FEATURES, Activations, Code, least_squares
from torch import Tensor

from tsae.evaluation.coding import ROUNDING, Sample, coding_step
from tsae.reports.frontier import SUPPORT, TOTAL, Frontier

KEPT = {"k1": 0.0, "k2": 1.3, "k3": 1.6, "k4": 2.0, "k5": 2.6, "k6": 3.4}
"""Sizes of the honest code, and the value that a feature must reach in it."""


@pytest.fixture(scope="module")
def world() -> Iterator[Activations]:
    with pytest.MonkeyPatch.context() as patch:
        yield Activations(patch)


@pytest.fixture(scope="module")
def measure(world: Activations):
    """The metrics of features [B, T, d_sae] with the decoder that is best for them, or a given one."""

    def metrics(h: Tensor, W_dec: Tensor | None = None, b_dec: Tensor | None = None) -> dict:
        if W_dec is None:
            W_dec, b_dec = least_squares(h, world.x)
        return world.metrics(Code(world.x, h, W_dec, b_dec))

    return metrics


@pytest.fixture(scope="module")
def honest(world: Activations, measure) -> dict[str, dict]:
    """The features that made the activations, without small values, or, in k0, with amplitudes that fit the noise."""
    runs = {f"honest-{size}": measure(torch.where(world.h > least, world.h, 0)) for size, least in KEPT.items()}
    fitted = world.h
    for _ in range(3):
        fitted = (fitted + 0.3 * (world.x - fitted @ world.W_dec) @ world.W_dec.T).clamp(min=0) * (world.h > 0)
    return runs | {"honest-k0": measure(fitted)}


def against_honest(honest: dict[str, dict], metrics: dict, bits: str = TOTAL) -> float:
    """Share of the honest bits that a code takes more, at its own explained variance."""
    found = Frontier([*honest.items(), ("other-k9", metrics)], bits).relative("other-k9", ["honest"])
    assert found.difference.value is not None, found.notes
    return found.difference.value


def held(h: Tensor, tokens: int, value: Tensor) -> Tensor:
    """Features that stay on for more tokens after their last, with `value` there."""
    on = h > 0
    late = on.clone()
    for _ in range(tokens):
        late[:, 1:] |= late[:, :-1].clone()
    return torch.where(on, h, torch.where(late, value, 0))


@pytest.mark.parametrize("least", [0.0, 2.0])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("value", ["what is there", "hardly anything", "the last"])
def test_holding_features_on_without_need(world, measure, honest, tokens, value, least):
    h = torch.where(world.h > least, world.h, 0)
    values = torch.full_like(h, 1e-3)
    if value == "what is there":
        values = (world.x @ torch.linalg.pinv(world.W_dec)).clamp(min=1e-3)
    if value == "the last":
        values = h.clone()
        for t in range(1, h.shape[1]):
            values[:, t] = torch.where(h[:, t] > 0, h[:, t], values[:, t - 1])
    metrics = measure(held(h, tokens, values))
    assert metrics["temporal"]["persistence"] > measure(h)["temporal"]["persistence"]  # which this does buy
    assert against_honest(honest, metrics) > 0.01


def test_a_feature_that_never_switches_off_hides_its_support_in_its_amplitudes(world, measure, honest):
    """Support bits alone can be bought. Total bits cannot."""
    metrics = measure(torch.where(world.h > 0, world.h, 1e-3))
    assert against_honest(honest, metrics, SUPPORT) < -0.99
    assert against_honest(honest, metrics) > 0.2


@pytest.mark.parametrize("tau", [4.0, 8.0])
def test_features_of_a_running_mean(world, measure, honest, tau):
    """A quarter of the features of a running mean of the activations: they last, and say less than they cost."""
    mean = torch.zeros_like(world.h)
    decay = 1 - 1 / tau
    for t in range(1, mean.shape[1]):
        mean[:, t] = decay * mean[:, t - 1] + (1 - decay) * world.h[:, t]
    slow = mean[..., : FEATURES // 4]
    slow = torch.where(slow > 0.4, slow, 0)
    for fast in (world.h[..., FEATURES // 4 :], world.h):
        metrics = measure(torch.cat([slow, fast], dim=2))
        assert metrics["temporal"]["persistence"] > honest["honest-k1"]["temporal"]["persistence"] + 0.02
        assert against_honest(honest, metrics) > 0.03


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_duplicated_features(world, measure, honest, share):
    h = torch.cat([share * world.h, (1 - share) * world.h], dim=2)
    metrics = measure(h, torch.cat([world.W_dec, world.W_dec]))
    for bits in (SUPPORT, TOTAL):
        assert against_honest(honest, metrics, bits) > 0.3


@pytest.mark.parametrize("into", ["even and odd tokens", "small and large"])
def test_a_feature_split_into_two(world, measure, honest, into):
    first = torch.arange(world.h.shape[1])[:, None] % 2 == 0 if into == "even and odd tokens" else world.h > 1.7
    h = torch.cat([world.h * first, world.h * ~first], dim=2)
    metrics = measure(h, torch.cat([world.W_dec, world.W_dec]))
    for bits in (SUPPORT, TOTAL):
        assert against_honest(honest, metrics, bits) > 0.03


def test_time_permuted(world, measure, honest):
    """Features and activations in another order: the order was worth something."""
    order = torch.randperm(world.h.shape[1], generator=torch.Generator().manual_seed(0))
    permuted = Activations.__new__(Activations)
    permuted.__dict__ |= world.__dict__ | {"x": world.x[:, order], "h": world.h[:, order]}
    with pytest.MonkeyPatch.context() as patch:
        permuted.patch(patch)  # undone at the end
        metrics = permuted.metrics(Code(permuted.x, permuted.h, *least_squares(permuted.h, permuted.x)))
    for bits in (SUPPORT, TOTAL):
        assert against_honest(honest, metrics, bits) > 0.03
    assert metrics["temporal"]["support_bits_memoryless"] == pytest.approx(
        honest["honest-k1"]["temporal"]["support_bits_memoryless"], rel=1e-6
    )


def test_rescaled_features_are_no_cheaper(world, measure, honest):
    scale = torch.exp2(torch.randint(-12, 13, (FEATURES,), generator=torch.Generator().manual_seed(0)).float())
    metrics = measure(world.h * scale, world.W_dec / scale[:, None])
    plain = measure(world.h, world.W_dec)
    assert metrics["temporal"]["total_bits"] == pytest.approx(plain["temporal"]["total_bits"], rel=1e-3)
    assert abs(against_honest(honest, plain)) < 0.05


@pytest.mark.parametrize("copies", [1, 8, 64, 200])
def test_always_on_features_below_a_step(world, measure, copies):
    """A dense code in shares that each vary by less than a step: rounded away, they would cost nothing."""
    rotation = torch.linalg.svd(world.x.flatten(0, 1), full_matrices=False).Vh  # [d, d]
    scores = world.x @ rotation.T
    dense = 0.98 * (scores - scores.amin((0, 1)) + 1) / copies  # always on; 2 % of each value is left out
    shift = (1 - scores.amin((0, 1))) @ rotation
    metrics = measure(dense.repeat(1, 1, copies), rotation.repeat(copies, 1), -0.98 * shift)
    temporal = metrics["temporal"]
    step = metrics["mse"] ** 0.5
    # What rate and distortion ask for: half a bit per dimension and factor of 2 of its variance over the error.
    least = 0.5 * (scores.flatten(0, 1).var(0) / step**2).log2().clamp(min=0).sum()
    assert metrics["explained_variance"] > 0.99
    assert temporal["support_bits"] < 0.01
    assert temporal["total_bits"] > 0.9 * float(least)


@pytest.mark.parametrize("copies", [1, 100])
def test_the_code_holds_what_the_explained_variance_says(world, copies):
    """Rounding to the step adds at most 1 % to the error, and a step that is fine enough is kept."""
    h = (world.h + 0.5).repeat(1, 1, copies) / copies if copies > 1 else torch.where(world.h > 2.5, world.h, 0)
    W_dec, b_dec = least_squares(h, world.x)
    sae, segments = Code(world.x, h, W_dec, b_dec), world.batch.segments
    norms, rms = W_dec.norm(dim=1).double(), float((sae(world.x) - world.x).square().mean().detach().sqrt())
    step = coding_step(sae, Sample(world.x, world.x, segments), rms, norms)
    scale = norms / step
    rounded = ((h.double() * scale).round() / scale).float()
    error = (sae.decode(rounded) - world.x).square().mean()
    assert float(error.detach()) <= (1 + ROUNDING) * rms**2 * (1 + 1e-6)
    assert (step == rms) == (copies == 1)
