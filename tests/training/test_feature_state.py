"""Thresholds, temporal buffer, dead features, lag-1 correlation, gradient treatment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tsae.config import SAEConfig
from tsae.sae.model import SparseAutoencoder
from tsae.sae.thresholds import ThresholdController, initial_threshold, mean_l0
from tsae.training.feature_state import DeadFeatures, TemporalBuffer, lag1_correlation
from tsae.training.optimization import add_gradient_noise, project_decoder_gradient, renormalize_decoder
from tsae_kernels import temporal_stats


def test_controller_steers_a_noisy_l0_to_its_target() -> None:
    generator = torch.Generator().manual_seed(0)
    controller = ThresholdController(target=32.0)
    controller.start(torch.tensor(5.0))

    def l0(theta: torch.Tensor) -> torch.Tensor:  # falls with the threshold, with 10 % noise
        return 100 * torch.exp(-theta) * (1 + 0.1 * torch.randn((), generator=generator))

    for _ in range(200):
        controller.update(l0(controller.theta))
    assert float(controller.frozen) == pytest.approx(math.log(100 / 32), rel=0.05)
    restored = ThresholdController(32.0)
    restored.load_state_dict(controller.state_dict())
    assert restored.started
    assert torch.equal(restored.update(torch.tensor(30.0)), controller.update(torch.tensor(30.0)))


def test_controller_moves_the_right_way_and_never_more_than_its_gain() -> None:
    controller = ThresholdController(target=10.0, gain=0.3)
    controller.start(torch.tensor(1.0))
    assert float(controller.update(torch.tensor(1e6))) == pytest.approx(math.exp(0.3))
    assert float(controller.update(torch.tensor(0.0))) == pytest.approx(1.0)


def test_initial_threshold_passes_k_a_token() -> None:
    pre = torch.randn(4, 10, 50, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, 50)
    theta = initial_threshold(pre, bias, 3)
    assert float(mean_l0((pre + bias > theta).float())) == pytest.approx(3.0)


def test_mean_l0_counts_positive_features_at_kept_positions() -> None:
    h = torch.tensor([[[1.0, 0.0, -2.0], [1.0, 1.0, 1.0]]])
    assert float(mean_l0(h)) == 2.0
    assert float(mean_l0(h, torch.tensor([[0, -1]]))) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d_sae", [0, 1, 37, 128, 2040, 2048, 2056, 8 * 257, 4096])
def test_mean_l0_counts_at_every_width(d_sae: int, dtype: torch.dtype) -> None:
    """Where the width allows it eight counts are added as one number; a full row must not carry between them."""
    h = torch.randn(2, 3, d_sae, generator=torch.Generator().manual_seed(d_sae)).to(dtype)
    h[0, 0] = 1.0
    h[1, 1, ::2] = -0.0
    for x in (h, h.transpose(0, 1)):
        assert torch.equal(mean_l0(x), (x > 0).sum(-1, dtype=torch.float32).mean())


def test_temporal_buffer_starts_at_the_threshold_and_mixes() -> None:
    buffer = TemporalBuffer(2000, std=0.1, generator=torch.Generator().manual_seed(0))
    assert float(buffer.variance.mean()) == pytest.approx(0.01, rel=0.02)
    assert float(buffer.variance.std()) == pytest.approx(0.01 * (2 / 127) ** 0.5, rel=0.1)  # of 128 draws
    before = buffer.variance.clone()
    buffer.update(torch.full((2000,), 2.0), 0.25)
    torch.testing.assert_close(buffer.variance, 0.75 * before + 0.5)
    buffer.update(torch.full((2000,), 3.0), 1.0)
    torch.testing.assert_close(buffer.variance, torch.full((2000,), 3.0))


def test_dead_features_are_those_silent_for_long() -> None:
    dead = DeadFeatures(3)
    h = torch.zeros(1, 4, 3)
    h[0, 2, 1] = 0.5
    for _ in range(5):
        dead.update(temporal_stats(h, ((1, 1),)).square, 4)
    assert dead.silent.tolist() == [20, 0, 20]
    assert dead.indices(19).tolist() == [0, 2]
    assert dead.indices(20).tolist() == []


@pytest.mark.parametrize("with_segments", [False, True])
def test_lag1_correlation_equals_the_definition(with_segments: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(4, 30, 5, generator=generator)
    for t in range(1, 30):  # AR(1), coefficient 0.8
        h[:, t] = 0.8 * h[:, t - 1] + 0.6 * h[:, t]
    h[..., 3] = 7.0  # constant
    h[..., 4] += 10.0
    segments = torch.tensor([[0] * 12 + [1] * 18, [0] * 30, [-1] * 3 + [0] * 26 + [-1], [0] * 30])
    if not with_segments:
        segments = torch.zeros(4, 30, dtype=torch.int64)
    out = lag1_correlation(h, segments if with_segments else None)
    values, kept = h.double().numpy(), (segments >= 0).numpy()
    for j in (0, 1, 2, 4):
        mean, variance = values[..., j][kept].mean(), values[..., j][kept].var()
        products = [
            (values[b, t, j] - mean) * (values[b, t + 1, j] - mean)
            for b in range(4)
            for t in range(29)
            if segments[b, t] == segments[b, t + 1] and segments[b, t] >= 0
        ]
        assert float(out[j]) == pytest.approx(np.mean(products) / variance, abs=2e-4 if j == 4 else 1e-5)
    assert out[3] == 0.0
    assert 0.5 < float(out[0]) < 0.95


def make() -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(d_in=6, d_sae=20, k=4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return sae


def test_projection_removes_only_the_parallel_component() -> None:
    sae = make()
    before = sae.W_dec.grad.clone()
    project_decoder_gradient(sae)
    after = sae.W_dec.grad
    torch.testing.assert_close((after * sae.W_dec).sum(1), torch.zeros(20), atol=1e-6, rtol=0)
    torch.testing.assert_close(after + (before * sae.W_dec).sum(1, keepdim=True) * sae.W_dec, before)


def test_renormalization_gives_unit_rows() -> None:
    sae = make()
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(20, 1) + 0.5)
    renormalize_decoder(sae)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))


def test_gradient_noise_has_the_wanted_size_relative_to_the_gradient() -> None:
    sae = SparseAutoencoder(SAEConfig(d_in=200, d_sae=200, k=4))
    sae.W_dec.grad = torch.full((200, 200), 5.0)
    add_gradient_noise(sae, 0.3, torch.Generator().manual_seed(0))
    noise = sae.W_dec.grad - 5.0
    assert float(noise.std()) == pytest.approx(0.3 * 5.0, rel=0.02)
    assert abs(float(noise.mean())) < 0.03
