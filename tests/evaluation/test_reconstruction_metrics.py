"""Reconstruction metrics against their definitions in float64, token by token."""

import math

import pytest
import torch
from torch import Tensor

from tsae.evaluation.metrics import ReconstructionMetrics


def sample(seed=0, B=4, T=9, d=6, k=7, mean=0.0):
    """x, xhat, h and segments with excluded positions; feature 0 is dead."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, d, generator=generator) * torch.linspace(0.5, 3, d) + mean
    xhat = x + 0.4 * torch.randn(B, T, d, generator=generator)
    h = torch.randn(B, T, k, generator=generator).relu() * 2
    h[..., 0] = 0
    segments = torch.randint(-1, 2, (B, T), generator=generator)
    return x, xhat, h, segments


def slow_metrics(batches: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> dict[str, float]:
    tokens, legacy = [], []
    for x, xhat, h, segments in batches:
        mine = [
            (x[b, t].double(), xhat[b, t].double(), h[b, t].double())
            for b in range(x.shape[0])
            for t in range(x.shape[1])
            if segments[b, t] >= 0
        ]
        batch_mean = torch.stack([one for one, _, _ in mine]).mean(0)
        legacy += [
            1 - float((one - other).square().sum() / (one - batch_mean).square().sum()) for one, other, _ in mine
        ]
        tokens += mine
    n, d = len(tokens), len(tokens[0][0])
    mean = torch.stack([one for one, _, _ in tokens]).mean(0)
    residual = sum(float((one - other).square().sum()) for one, other, _ in tokens)
    square = sum(float(one.square().sum()) for one, _, _ in tokens)
    return {
        "explained_variance": 1 - residual / sum(float((one - mean).square().sum()) for one, _, _ in tokens),
        "explained_variance_legacy": sum(legacy) / n,
        "explained_variance_saebench": 1 - (residual / n) / (square / n - (square / n / d) ** 2),
        "mse": residual / n / d,
        "cossim": sum(float(one @ other / one.norm() / other.norm()) for one, other, _ in tokens) / n,
        "l2_ratio": sum(float(other.norm() / one.norm()) for one, other, _ in tokens) / n,
        "relative_reconstruction_bias": sum(float(other @ other) for _, other, _ in tokens)
        / sum(float(one @ other) for one, other, _ in tokens),
        "l0": sum(int((h != 0).sum()) for _, _, h in tokens) / n,
        "l1": sum(float(h.sum()) for _, _, h in tokens) / n,
        "frac_alive": float(torch.stack([h != 0 for _, _, h in tokens]).any(0).double().mean()),
    }


def computed(*batches) -> dict[str, float]:
    metrics = ReconstructionMetrics()
    for batch in batches:
        metrics.update(*batch)
    return metrics.compute()


@pytest.mark.parametrize("mean", [0.0, 7.0, 6000.0])
def test_equals_the_definition(mean):
    batches = [sample(seed, mean=mean) for seed in range(3)]
    expected = slow_metrics(batches)
    actual = computed(*batches)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key


def test_explained_variance_survives_a_huge_mean():
    # The residual stream: |mean| of 6000 against deviations of 1. Predicting the mean explains nothing.
    generator = torch.Generator().manual_seed(0)
    deviation = torch.randn(8, 64, 16, generator=generator, dtype=torch.float64)
    mean = torch.full((16,), 6000.0, dtype=torch.float64)
    deviation[:4] += 0.5  # batches whose means differ
    h, segments = torch.zeros(8, 64, 3), torch.zeros(8, 64, dtype=torch.int32)
    x = deviation + mean
    halves = [(x[rows], mean + 0.5 * deviation[rows], h[rows], segments[rows]) for rows in (slice(4), slice(4, 8))]
    residual = (0.5 * deviation).square().sum()
    total = (deviation - deviation.mean((0, 1))).square().sum()
    assert computed(*halves)["explained_variance"] == pytest.approx(float(1 - residual / total), rel=1e-10)
    overall = x.mean((0, 1)).expand_as(x)
    halves = [(x[rows], overall[rows], h[rows], segments[rows]) for rows in (slice(4), slice(4, 8))]
    assert computed(*halves)["explained_variance"] == pytest.approx(0, abs=1e-10)


def test_saebench_variance_is_nearly_uncentred_for_small_values():
    # Means of 0.2 with deviations of 0.1: predicting the mean explains nothing, SAEBench 0.6.0 says 0.8.
    x = 0.2 + 0.1 * torch.randn(16, 64, 32, generator=torch.Generator().manual_seed(0))
    xhat = x.mean((0, 1)).expand_as(x)
    metrics = computed((x, xhat, torch.zeros(16, 64, 2), torch.zeros(16, 64, dtype=torch.int32)))
    assert metrics["explained_variance"] == pytest.approx(0, abs=1e-5)
    assert metrics["explained_variance_saebench"] > 0.75


def test_an_autoencoder_that_outputs_nothing():
    # A collapsed run: EV = -|mean|^2 / Var, all else 0.
    x = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(0)) + 3
    zeros = torch.zeros(4, 32, 5)
    metrics = computed((x, torch.zeros_like(x), zeros, torch.zeros(4, 32, dtype=torch.int32)))
    variance = x.double().var((0, 1), correction=0).sum()
    expected = -float(x.double().mean((0, 1)).square().sum() / variance)
    assert metrics["explained_variance"] == pytest.approx(expected)
    for key in ("cossim", "l2_ratio", "relative_reconstruction_bias", "l0", "l1", "frac_alive"):
        assert metrics[key] == 0


def test_the_papers_score_is_that_of_zeros():
    """TSAE's -0.785 with L0 and L2 ratio 0 is just the size of the mean: |mean|^2 = 0.785 Var."""
    deviation = torch.randn(8, 64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    deviation -= deviation.mean((0, 1))
    direction = torch.nn.functional.normalize(torch.linspace(-1, 2, 16, dtype=torch.float64), dim=0)
    x = deviation + direction * (0.785 * deviation.square().sum() / (8 * 64)).sqrt()
    h, segments = torch.zeros(8, 64, 4), torch.zeros(8, 64, dtype=torch.int32)
    metrics = computed((x, torch.zeros_like(x), h, segments))
    assert metrics["explained_variance"] == pytest.approx(-0.785, abs=1e-9)
    assert metrics["l0"] == metrics["l2_ratio"] == 0
    # The same on centred input: no worse than the mean.
    assert computed((deviation, torch.zeros_like(x), h, segments))["explained_variance"] == pytest.approx(0, abs=1e-9)


def test_merging_equals_one_pass():
    batches = [sample(seed, mean=5.0 * seed) for seed in range(4)]
    left, right, empty = ReconstructionMetrics(), ReconstructionMetrics(), ReconstructionMetrics()
    for i, batch in enumerate(batches):
        (left if i < 1 else right).update(*batch)
    left.merge(right)
    empty.merge(left)
    for merged in (left, empty):
        assert merged.compute() == pytest.approx(computed(*batches), rel=1e-12)
        tokens = sum(int((segments >= 0).sum()) for *_, segments in batches)
        assert merged.tokens == tokens
        expected = torch.cat([x[segments >= 0] for x, _, _, segments in batches]).double().mean(0)
        torch.testing.assert_close(merged.mean(), expected, rtol=1e-12, atol=1e-12)
    # Merging does not change its argument.
    assert right.compute() == pytest.approx(computed(*batches[1:]), rel=1e-12)


@pytest.mark.parametrize("garbage", [1e6, float("nan"), float("inf")])
def test_excluded_positions_have_no_influence(garbage):
    x, xhat, h, segments = sample()
    expected = computed((x, xhat, h, segments))
    spoiled = [tensor.clone() for tensor in (x, xhat, h)]
    for tensor in spoiled:
        tensor[segments < 0] = garbage
    assert computed((*spoiled, segments)) == expected


def test_density():
    x, xhat, h, segments = sample()
    metrics = ReconstructionMetrics()
    metrics.update(x, xhat, h, segments)
    expected = (h[segments >= 0] != 0).double().mean(0)
    torch.testing.assert_close(metrics.density(), expected)
    assert metrics.compute()["l0"] == pytest.approx(float(expected.sum()))


@pytest.mark.parametrize("case", ["no batch", "all excluded", "constant", "one token"])
def test_degenerate_sets_are_finite(case):
    metrics = ReconstructionMetrics()
    x, xhat, h, segments = sample()
    if case == "all excluded":
        metrics.update(x, xhat, h, torch.full_like(segments, -1))
    if case == "constant":
        metrics.update(torch.ones_like(x), xhat, h, segments)
    if case == "one token":
        metrics.update(x[:1, :1], xhat[:1, :1], h[:1, :1], torch.zeros(1, 1, dtype=torch.int32))
    result = metrics.compute()
    assert all(math.isfinite(value) for value in result.values())
    assert result["explained_variance"] == 0
    if case in ("no batch", "all excluded"):
        assert set(result.values()) == {0.0}
        with pytest.raises(ValueError, match="mean"):
            metrics.mean()


def test_half_precision_input_is_computed_in_double():
    x, xhat, h, segments = sample(mean=100.0)
    x, xhat = x.bfloat16(), xhat.bfloat16()
    assert computed((x, xhat, h, segments)) == pytest.approx(computed((x.double(), xhat.double(), h, segments)))
