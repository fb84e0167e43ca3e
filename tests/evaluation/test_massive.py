"""Explained variance without massive tokens, against its definition token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsae.evaluation.metrics import MassiveActivations, ReconstructionMetrics

B, T, D = 8, 128, 32


def sample(seed: int = 0, massive: int = 2, size: float = 1000.0) -> tuple[Tensor, Tensor, Tensor]:
    """x, xhat and segments; the first counted tokens hold the norm and are reconstructed well, the others badly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64) + 0.5
    xhat = x + 1.4 * torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    segments = torch.zeros(B, T, dtype=torch.int32)
    segments[3, 40:] = 1
    segments[5, 7:9] = -1
    for i in range(massive):
        x[i, i] *= size
        xhat[i, i] = x[i, i] * 0.9999
    return x, xhat, segments


def computed(*batches: tuple[Tensor, Tensor, Tensor], ratio: float = 4.0) -> dict[str, float]:
    metrics = MassiveActivations(ratio)
    for batch in batches:
        metrics.update(*batch)
    return metrics.compute()


def explained_variance(x: Tensor, xhat: Tensor) -> float:
    return 1 - float((x - xhat).square().sum() / (x - x.mean(0)).square().sum())


def test_two_of_a_thousand_tokens_hold_the_norm() -> None:
    """dictionary_learning#52: explained variance 1.0000 in all, and worse than the mean on the rest."""
    x, xhat, segments = sample()
    every = ReconstructionMetrics()
    every.update(x, xhat, torch.zeros(B, T, 3), segments)
    assert every.compute()["explained_variance"] > 0.999
    metrics = computed((x, xhat, segments))
    counted = segments >= 0
    massive = torch.zeros_like(counted)
    massive[0, 0] = massive[1, 1] = True
    kept = counted & ~massive
    assert metrics["explained_variance_without"] == pytest.approx(explained_variance(x[kept], xhat[kept]), rel=1e-9)
    assert metrics["explained_variance_without"] < -0.9
    assert metrics["tokens"] == pytest.approx(2 / int(counted.sum()))
    square = x.square().sum(-1)
    assert metrics["norm_share"] == pytest.approx(float(square[massive].sum() / square[counted].sum()))
    assert metrics["norm_share"] > 0.99
    assert metrics["norm_ratio"] == 4.0


def test_without_massive_tokens_it_is_the_explained_variance() -> None:
    x, xhat, segments = sample(massive=0)
    every = ReconstructionMetrics()
    every.update(x, xhat, torch.zeros(B, T, 3), segments)
    metrics = computed((x, xhat, segments))
    assert metrics["explained_variance_without"] == pytest.approx(every.compute()["explained_variance"], rel=1e-9)
    assert metrics["tokens"] == metrics["norm_share"] == 0


@pytest.mark.parametrize(("size", "found"), [(3.5, 0), (4.5, 2), (7.9, 2), (8.5, 2)])
def test_the_ratio_is_to_the_median_norm(size: float, found: int) -> None:
    x = torch.ones(1, 101, D, dtype=torch.float64)
    x[0, :2] *= size
    segments = torch.zeros(1, 101, dtype=torch.int32)
    assert computed((x, x, segments))["tokens"] == pytest.approx(found / 101)
    assert computed((x, x, segments), ratio=8.0)["tokens"] == pytest.approx((found if size > 8 else 0) / 101)


def test_it_does_not_depend_on_the_batches_or_on_their_order() -> None:
    batches = [sample(seed, massive=seed) for seed in range(3)]
    whole = computed(tuple(torch.cat(column) for column in zip(*batches, strict=True)))
    assert computed(*batches) == pytest.approx(whole, rel=1e-9)
    rows = [tuple(tensor[i : i + 1] for tensor in batch) for batch in reversed(batches) for i in range(B)]
    assert computed(*rows) == pytest.approx(whole, rel=1e-9)
    left, right, empty = MassiveActivations(), MassiveActivations(), MassiveActivations()
    left.update(*batches[0])
    for batch in batches[1:]:
        right.update(*batch)
    left.merge(right)
    empty.merge(left)
    left.merge(MassiveActivations())
    for merged in (left, empty):
        assert merged.compute() == pytest.approx(whole, rel=1e-9)


def test_a_huge_mean_does_not_cancel() -> None:
    x, xhat, segments = sample(size=1e5)
    shifted = computed((x + 6000, xhat + 6000, segments))
    kept = segments >= 0
    kept[0, 0] = kept[1, 1] = False
    assert shifted["explained_variance_without"] == pytest.approx(explained_variance(x[kept], xhat[kept]), rel=1e-6)


def test_degenerate_sets_are_finite() -> None:
    nothing = torch.zeros(2, 5, D)
    for segments in (torch.zeros(2, 5, dtype=torch.int32), torch.full((2, 5), -1)):
        assert computed((nothing, nothing, segments)) == {
            "explained_variance_without": 0.0,
            "tokens": 0.0,
            "norm_share": 0.0,
            "norm_ratio": 4.0,
        }
    broken = torch.full((1, 3, D), float("nan"))
    assert computed((broken, broken, torch.zeros(1, 3, dtype=torch.int32)))["tokens"] == 0.0
