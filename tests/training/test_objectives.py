"""Loss terms against the papers' formulas, written out offset by offset."""

from __future__ import annotations

import pytest
import torch

from tsae.config import ObjectiveConfig
from tsae.training.objectives import LossInputs, auxk_loss, bands_for, objective
from tsae_kernels import TemporalStats, temporal_stats

B, T, K, D = 3, 23, 6, 5
BANDS = ((1, 3), (4, 15), (16, 127))
WEIGHTS = (0.01, 0.005, 0.001)


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    xhat = x + 0.3 * torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    h = torch.randn(B, T, K, generator=generator, dtype=torch.float64).relu()
    return x, xhat, h


def differences(h: torch.Tensor, segments: torch.Tensor | None = None) -> list[list[float]]:
    """[S][K]: sum over the batch and over pairs of a band, from the definition."""
    out = [[0.0] * K for _ in BANDS]
    for s, (low, high) in enumerate(BANDS):
        for lag in range(low, min(high, T - 1) + 1):
            for b in range(B):
                for t in range(T - lag):
                    if segments is not None:
                        window = segments[b, t : t + lag + 1]
                        if window[0] < 0 or not bool((window == window[0]).all()):
                            continue
                    for j in range(K):
                        out[s][j] += float((h[b, t + lag, j] - h[b, t, j]) ** 2)
    return out


def run(x: torch.Tensor, xhat: torch.Tensor, h: torch.Tensor, step: int, cfg: ObjectiveConfig, **kw: object):
    stats = temporal_stats(h, bands_for(cfg), kw.get("segments"))  # type: ignore[arg-type]
    return objective(LossInputs(x=x, xhat=xhat, h=h, stats=stats, **kw), step, cfg)  # type: ignore[arg-type]


def test_multiscale_loss_is_equations_2_and_3(data: tuple[torch.Tensor, ...]) -> None:
    x, xhat, h = data
    variance = torch.tensor([0.5, 0.2, 0.009, 0.01, 0.0, 3.0], dtype=torch.float64)
    passing = [0.5, 0.2, 0.0, 0.01, 0.0, 3.0]
    omega = [v / sum(passing) for v in passing]
    d = differences(h)
    expected = sum(WEIGHTS[s] * omega[j] * d[s][j] for s in range(3) for j in range(K)) / (B * T)
    terms = run(x, xhat, h, 2000, ObjectiveConfig(), variance=variance)
    assert float(terms.temporal) == pytest.approx(expected, rel=1e-9)
    reconstruction = float((x - xhat).square().sum(-1).mean())
    sparsity = float(h.abs().sum(-1).mean())
    assert float(terms.reconstruction) == pytest.approx(reconstruction)
    assert float(terms.sparsity) == pytest.approx(sparsity, rel=1e-6)
    assert float(terms.total) == pytest.approx(reconstruction + 0.04 * sparsity + expected, rel=1e-6)


def test_the_schedule_is_in_the_total(data: tuple[torch.Tensor, ...]) -> None:
    x, xhat, h = data
    variance = torch.ones(K, dtype=torch.float64)
    cfg = ObjectiveConfig(l1=0.0)
    late = run(x, xhat, h, 2000, cfg, variance=variance)
    half = run(x, xhat, h, 1500, cfg, variance=variance)
    early = run(x, xhat, h, 10, cfg, variance=variance)
    assert float(early.total) == pytest.approx(2 * float(late.reconstruction))
    assert float(half.total) == pytest.approx(1.5 * float(late.reconstruction) + 0.5 * float(late.temporal))
    assert float(late.total) == pytest.approx(float(late.reconstruction) + float(late.temporal))


def test_no_feature_above_the_variance_threshold_means_no_temporal_loss(data: tuple[torch.Tensor, ...]) -> None:
    x, xhat, h = data
    h = h.requires_grad_()
    cfg = ObjectiveConfig(l1=0.0)
    terms = run(x, xhat, h, 2000, cfg, variance=torch.full((K,), 0.0099, dtype=torch.float64))
    assert float(terms.temporal) == 0.0
    (gradient,) = torch.autograd.grad(terms.total, h, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_adaptive_weights_carry_no_gradient_and_can_be_switched_off(data: tuple[torch.Tensor, ...]) -> None:
    x, xhat, h = data
    d = differences(h)
    expected = sum(WEIGHTS[s] * d[s][j] / K for s in range(3) for j in range(K)) / (B * T)
    cfg = ObjectiveConfig(adaptive=False, min_variance=5.0)
    terms = run(x, xhat, h, 2000, cfg, variance=torch.zeros(K, dtype=torch.float64))
    assert float(terms.temporal) == pytest.approx(expected, rel=1e-6)


def test_segments_and_excluded_positions(data: tuple[torch.Tensor, ...]) -> None:
    x, xhat, h = data
    segments = torch.tensor([[0] * 10 + [1] * 13, [0] * 23, [-1] * 2 + [0] * 8 + [-1] + [0] * 12])
    kept = segments >= 0
    variance = torch.ones(K, dtype=torch.float64)
    d = differences(h, segments)
    n = int(kept.sum())
    expected = sum(WEIGHTS[s] * d[s][j] / K for s in range(3) for j in range(K)) / n
    terms = run(x, xhat, h, 2000, ObjectiveConfig(), variance=variance, segments=segments)
    assert float(terms.temporal) == pytest.approx(expected, rel=1e-6)
    assert float(terms.reconstruction) == pytest.approx(float((x - xhat)[kept].square().sum(-1).mean()), rel=1e-6)
    assert float(terms.sparsity) == pytest.approx(float(h[kept].sum(-1).mean()), rel=1e-6)
    x2, h2 = x.clone(), h.clone()
    x2[~kept], h2[~kept] = 1e6, 1e3
    again = run(x2, xhat, h2, 2000, ObjectiveConfig(), variance=variance, segments=segments)
    for a, b in zip(terms, again, strict=True):
        assert float(a) == pytest.approx(float(b))


@pytest.mark.parametrize("window", [2, 3, 5])
def test_window_loss_is_equation_3_of_tcsae(data: tuple[torch.Tensor, ...], window: int) -> None:
    x, xhat, h = data
    total, count = 0.0, 0
    for b in range(B):
        for t in range(T - window + 1):
            count += 1
            total += sum(float((h[b, t + i] - h[b, t + i - 1]).square().sum()) for i in range(1, window)) / (window - 1)
    cfg = ObjectiveConfig(temporal="window", window=window, l1=0.1, boost=1.0, hold_steps=0, ramp_steps=0)
    terms = run(x, xhat, h, 0, cfg)
    assert float(terms.temporal) == pytest.approx(0.01 * total / count, rel=1e-6)
    expected = float(terms.reconstruction) + 0.1 * float(terms.sparsity) + float(terms.temporal)
    assert float(terms.total) == pytest.approx(expected, rel=1e-6)


def test_objective_gradcheck(data: tuple[torch.Tensor, ...]) -> None:
    x, xhat, h = data
    h = (h + 0.2).requires_grad_()
    xhat = xhat.requires_grad_()
    variance = torch.rand(K, dtype=torch.float64)
    for cfg in (ObjectiveConfig(), ObjectiveConfig(temporal="window", hold_steps=0)):

        def total(xhat: torch.Tensor, h: torch.Tensor, cfg: ObjectiveConfig = cfg) -> torch.Tensor:
            return run(x, xhat, h, 1700, cfg, variance=variance).total

        assert torch.autograd.gradcheck(total, (xhat, h), atol=1e-6)


def test_auxk_uses_the_k_largest_dead_features_and_leaves_the_residual_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(2, 4, D, generator=generator, requires_grad=True)
    pre = torch.randn(2, 4, 7, generator=generator, requires_grad=True)
    W = torch.randn(7, D, generator=generator, requires_grad=True)
    top = torch.zeros(2, 4, 7).scatter(-1, pre.topk(3, -1).indices, 1.0) * pre.relu()
    expected = (residual - top @ W).square().sum() / residual.square().sum()
    loss = auxk_loss(residual, pre, W, 3)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = torch.autograd.grad(loss, (pre, W, residual), allow_unused=True)
    assert gradients[0].any()
    assert gradients[1].any()
    assert gradients[2] is None
    segments = torch.tensor([[0, 0, 0, 0], [0, -1, -1, 0]])
    damaged = residual.detach().clone()
    damaged[1, 1:3] = 1e4
    torch.testing.assert_close(auxk_loss(residual, pre, W, 3, segments), auxk_loss(damaged, pre, W, 3, segments))


def test_auxk_through_zero_reaches_features_below_it_and_changes_no_value() -> None:
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(2, 4, D, generator=generator)
    pre = (-torch.rand(2, 4, 7, generator=generator)).requires_grad_()
    W = torch.randn(7, D, generator=generator)
    plain, through = auxk_loss(residual, pre, W, 3), auxk_loss(residual, pre, W, 3, through_zero=True)
    assert float(plain.detach()) == float(through.detach()) == pytest.approx(1.0)
    assert not torch.autograd.grad(plain, pre)[0].any()
    (gradient,) = torch.autograd.grad(through, pre)
    assert int((gradient != 0).sum()) == 2 * 4 * 3
    chosen = gradient != 0
    expected = -2 * (residual @ W.T) / residual.square().sum()  # of a feature that starts from 0
    torch.testing.assert_close(gradient[chosen], expected[chosen])


def test_matryoshka_prefixes_are_averaged_and_the_whole_is_reported(data: tuple[torch.Tensor, ...]) -> None:
    x, xhat, h = data
    segments = torch.tensor([[0] * 10 + [1] * 13, [0] * 23, [-1] * 2 + [0] * 8 + [-1] + [0] * 12])
    kept = segments >= 0
    cfg = ObjectiveConfig(temporal="none", l1=0.0, boost=3.0, hold_steps=10)
    prefixes = [0.2 * xhat, 0.5 * xhat]
    parts = [float((x - p)[kept].square().sum(-1).mean()) for p in (*prefixes, xhat)]
    terms = run(x, xhat, h, 0, cfg, segments=segments, prefixes=prefixes)
    assert float(terms.total) == pytest.approx(3.0 * sum(parts) / 3, rel=1e-6)
    assert float(terms.reconstruction) == pytest.approx(parts[-1], rel=1e-6)


def test_l0_enters_the_total_with_its_weight(data: tuple[torch.Tensor, ...]) -> None:
    x, xhat, h = data
    l0 = torch.tensor(7.0, requires_grad=True)
    for weight in (0.0, 0.3):
        cfg = ObjectiveConfig(temporal="none", l1=0.0, boost=1.0, l0=weight)
        terms = run(x, xhat, h, 0, cfg, l0=l0)
        assert float(terms.total.detach()) == pytest.approx(float(terms.reconstruction) + 7.0 * weight)


def test_auxk_enters_the_total_on_the_scale_of_the_reconstruction(data: tuple[torch.Tensor, ...]) -> None:
    x, xhat, h = data
    cfg = ObjectiveConfig(temporal="none", l1=0.0, boost=1.0)
    stats = TemporalStats(h, h, h)
    auxiliary = torch.tensor(0.5, dtype=torch.float64)
    terms = objective(LossInputs(x=x, xhat=xhat, h=h, stats=stats, auxiliary=auxiliary), 0, cfg)
    assert float(terms.total) == pytest.approx(float(terms.reconstruction) * (1 + 0.5 / 32))
