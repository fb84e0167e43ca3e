"""Learned thresholds: pseudo-gradients against their formulas and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsae.config import OptimizerConfig, SAEConfig
from tsae.sae.model import SparseAutoencoder
from tsae.sae.straight_through import learned_thresholds, straight_through
from tsae.training.optimization import add_l0_lagrangian_gradient, build_optimizer, threshold_parameters
from tsae_kernels import activate_with_stats

B, T, K = 3, 11, 4
SEGMENTS = torch.tensor([[0] * 5 + [1] * 6, [0] * 11, [0] * 4 + [-1] + [0] * 6])


def correlated(b: int, t: int, k: int, seed: int = 0) -> Tensor:
    z = torch.randn(b, t, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for i in range(1, t):
        z[:, i] = 0.8 * z[:, i - 1] + 0.6 * z[:, i]
    return z


def features(z: Tensor, log_threshold: Tensor, release_logit: Tensor | None, segments: Tensor | None) -> Tensor:
    theta, release = learned_thresholds(log_threshold, release_logit)
    return activate_with_stats(z, None, "relu", theta, release, ((1, 1),), segments)[0]


def pseudo_gradients(
    z: Tensor, g: Tensor, log_threshold: Tensor, release_logit: Tensor | None, bandwidth: float, segments: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of sum(g h), and of the mean L0, with respect to the parameters."""
    parameters = [p.clone().requires_grad_() for p in (log_threshold, release_logit) if p is not None]
    release = parameters[1] if release_logit is not None else None
    h = features(z, log_threshold, release_logit, segments)
    out, l0 = straight_through(h, z, None, parameters[0], release, bandwidth, segments)
    assert torch.equal(out, h)
    kept = torch.ones(h.shape[:2], dtype=torch.bool) if segments is None else segments >= 0
    assert float(l0.detach()) == pytest.approx(float((h[kept] > 0).sum() / kept.sum()))
    counted = torch.autograd.grad(l0, parameters, retain_graph=True)
    return list(torch.autograd.grad((g * out).sum(), parameters)), list(counted)


def test_jumprelu_gradients_are_the_papers() -> None:
    z, g = correlated(B, T, K), correlated(B, T, K, 1)
    log_threshold = torch.tensor([-0.5, 0.0, 0.2, -1.0], dtype=torch.float64)
    width = 0.9
    (loss,), (count,) = pseudo_gradients(z, g, log_threshold, None, width, SEGMENTS)
    for j in range(K):
        theta = float(log_threshold[j].exp())
        e, value, number = width * theta, 0.0, 0
        for b in range(B):
            for t in range(T):
                if SEGMENTS[b, t] >= 0 and abs(float(z[b, t, j]) - theta) < e / 2:
                    value += float(g[b, t, j])
                    number += 1
        assert number > 0
        assert float(loss[j]) == pytest.approx(-theta / e * value * theta)  # with respect to log theta
        assert float(count[j]) == pytest.approx(-1 / e * number / int((SEGMENTS >= 0).sum()) * theta)


def test_schmitt_gradients_are_the_credit_of_runs() -> None:
    z, g = correlated(B, T, K), correlated(B, T, K, 1)
    log_threshold = torch.tensor([-0.5, 0.0, 0.2, -1.0], dtype=torch.float64)
    logit, width = torch.tensor([-1.0, 0.0, -0.5, 0.5], dtype=torch.float64), 0.9
    for wanted, gradients in zip(
        ("loss", "count"), pseudo_gradients(z, g, log_threshold, logit, width, SEGMENTS), strict=True
    ):
        for j in range(K):
            theta, ratio = float(log_threshold[j].exp()), float(logit[j].sigmoid())
            e, sets, holds = width * theta, 0.0, 0.0
            for b in range(B):
                on = False
                for t in range(T):
                    level = float(z[b, t, j])
                    before = on and t > 0 and bool(SEGMENTS[b, t] == SEGMENTS[b, t - 1] >= 0)
                    on = level > theta or (before and level > ratio * theta)
                    if SEGMENTS[b, t] < 0:
                        continue
                    credit, u = 0.0, t
                    while True:
                        credit += float(z[b, u, j] * g[b, u, j]) if wanted == "loss" else 1 / 32
                        u += 1
                        if u == T or SEGMENTS[b, u] != SEGMENTS[b, t] or not ratio * theta < z[b, u, j] <= theta:
                            break
                    if not before and abs(level - theta) < e / 2:
                        sets += credit
                    if before and level <= theta and abs(level - ratio * theta) < e / 2:
                        holds += credit
            dtheta, drelease = -sets / e, -holds / e
            assert sets != 0
            assert float(gradients[0][j]) == pytest.approx(theta * dtheta + ratio * theta * drelease)
            assert float(gradients[1][j]) == pytest.approx(theta * ratio * (1 - ratio) * drelease)


@pytest.mark.parametrize("schmitt", [False, True])
def test_pseudo_gradients_match_finite_differences(schmitt: bool) -> None:
    """On many tokens the estimate approaches the finite difference over the window's width."""
    z = correlated(6000, 40, 3)
    target = 0.05 * correlated(6000, 40, 3, 5).abs()
    log_threshold = torch.tensor([0.0, -0.4, 0.3], dtype=torch.float64)
    logit = torch.tensor([-0.8, 0.0, -0.4], dtype=torch.float64) if schmitt else None
    width = 0.05

    def loss(h: Tensor) -> Tensor:  # per feature; quadratic like the reconstruction loss
        return ((h - target) ** 2).sum((0, 1))

    h = features(z, log_threshold, logit, None)
    on_loss, on_count = pseudo_gradients(z, 2 * (h - target), log_threshold, logit, width, None)
    for index, parameter in enumerate((log_threshold, logit) if logit is not None else (log_threshold,)):
        assert parameter is not None
        step = torch.full_like(parameter, width / 2)
        if index == 1:  # the release moves by half a window
            ratio = parameter.sigmoid()
            step = width / 2 / (ratio * (1 - ratio))
        ends = []
        for sign in (1, -1):
            moved = [
                p if i != index else p + sign * step for i, p in enumerate((log_threshold, logit)) if p is not None
            ]
            shifted = features(z, moved[0], moved[1] if schmitt else None, None)
            ends.append((loss(shifted), (shifted > 0).sum((0, 1)).double() / (6000 * 40)))
        torch.testing.assert_close(on_loss[index], (ends[0][0] - ends[1][0]) / (2 * step), rtol=0.12, atol=0.0)
        torch.testing.assert_close(on_count[index], (ends[0][1] - ends[1][1]) / (2 * step), rtol=0.08, atol=0.0)


def test_the_l0_lagrangian_leaves_the_common_factor_unchanged() -> None:
    sae = SparseAutoencoder(SAEConfig(d_in=3, d_sae=4, k=1, activation="jumprelu_schmitt"))
    assert sae.log_threshold is not None
    assert sae.release_logit is not None
    sae.log_threshold.grad = torch.tensor([3.0, 1.0, 0.0, 4.0])
    sae.release_logit.grad = torch.zeros(4)
    add_l0_lagrangian_gradient(sae, [torch.tensor([-1.0, -1.0, -1.0, -1.0]), torch.tensor([-0.5, 0.0, 0.0, 0.0])])
    torch.testing.assert_close(sae.log_threshold.grad, torch.tensor([1.0, -1.0, -2.0, 2.0]))
    torch.testing.assert_close(sae.release_logit.grad, torch.tensor([-1.0, 0.0, 0.0, 0.0]))
    sae.log_threshold.grad = torch.tensor([-3.0, 1.0, 0.0, 1.0])  # a negative multiplier counts as 0
    add_l0_lagrangian_gradient(sae, [torch.full((4,), -1.0), torch.zeros(4)])
    torch.testing.assert_close(sae.log_threshold.grad, torch.tensor([-3.0, 1.0, 0.0, 1.0]))


def test_weight_decay_skips_learned_thresholds() -> None:
    sae = SparseAutoencoder(SAEConfig(d_in=3, d_sae=4, k=1, activation="jumprelu"))
    assert sae.log_threshold is not None
    with torch.no_grad():
        sae.log_threshold.fill_(2.0)
    optimizer = build_optimizer(sae, OptimizerConfig(name="adamw", weight_decay=0.5, lr=0.1))
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = sae.W_enc.detach().clone()
    optimizer.step()
    assert (sae.log_threshold == 2.0).all()
    torch.testing.assert_close(sae.W_enc, 0.95 * before)
    assert len(threshold_parameters(sae)) == 1


@pytest.mark.parametrize("activation", ["jumprelu", "jumprelu_schmitt"])
def test_training_uses_the_parameters_and_evaluation_the_buffers(activation: str) -> None:
    sae = SparseAutoencoder(SAEConfig(d_in=6, d_sae=20, k=3, activation=activation))  # type: ignore[arg-type]
    assert sae.log_threshold is not None
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.log_threshold.fill_(-0.3)
    pre = x @ sae.W_enc
    on = pre > torch.tensor(-0.3).exp()
    h = sae.encode(x)
    assert torch.equal(h[on], pre[on])
    assert activation == "jumprelu_schmitt" or torch.equal(h > 0, on)
    sae(x).square().sum().backward()
    for parameter in threshold_parameters(sae):
        assert parameter.grad is not None
        assert parameter.grad.any()
    with torch.no_grad():
        sae.log_threshold.fill_(5.0)
    assert not sae.eval().encode(x).any()  # `eval` has copied the parameters to the buffers
    assert not sae.train().encode(x).any()
    sae.eval()
    sae.threshold.fill_(0.1)
    sae.release.fill_(0.1)
    assert sae.encode(x).any()
    sae.update_threshold_parameters()
    torch.testing.assert_close(sae.log_threshold.exp(), torch.full((20,), 0.1))
