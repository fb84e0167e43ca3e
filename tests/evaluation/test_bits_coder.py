"""The bits of a trained autoencoder are those that an arithmetic coder writes; its bytes hold the reconstruction."""

from __future__ import annotations

import pytest
import torch
from feature_coder import FeatureCoder
from persistent_activations import Activations, D
from torch import Tensor

from tsae.config import SAEConfig
from tsae.evaluation.coding import ROUNDING, Sample, coding_step
from tsae.evaluation.metrics import CodeLength, shuffle_within_segments
from tsae.evaluation.metrics.bits import quantize
from tsae.sae.model import SparseAutoencoder

ROWS = 24  # of the activations, coded; the others train


@pytest.fixture(scope="module")
def trained() -> tuple[SparseAutoencoder, Tensor]:
    """An autoencoder with hysteresis after 300 steps, and held-out activations."""
    with pytest.MonkeyPatch.context() as patch:
        x = Activations(patch).x
    torch.manual_seed(0)
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=48, k=4, activation="schmitt"))
    sae.threshold.fill_(1.0)
    sae.release.fill_(0.4)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    segments = torch.zeros(len(x) - ROWS, x.shape[1], dtype=torch.int32)
    for _ in range(300):
        loss = (sae(x[ROWS:], segments) - x[ROWS:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sae.eval(), x[:ROWS]


@pytest.mark.parametrize("order", ["in order", "shuffled"])
@torch.no_grad()
def test_an_arithmetic_coder_writes_as_many_bits_and_its_bytes_reconstruct(trained, order):
    sae, x = trained
    segments = torch.zeros(x.shape[:2], dtype=torch.int32)
    if order == "shuffled":
        x = shuffle_within_segments(x, segments, torch.Generator().manual_seed(0))
    h = sae.encode(x, segments)
    half = (torch.arange(ROWS) >= ROWS // 2).int()[:, None].expand(segments.shape)
    code, norms = CodeLength(), sae.W_dec.double().norm(dim=1)
    code.update(h, segments, half)
    error = float((sae.decode(h) - x).square().mean())
    explained = 1 - error / float(x.var((0, 1), correction=0).mean())
    step = coding_step(sae, Sample(x, x, segments), error**0.5, norms)
    bits = code.compute(step, norms)

    written, parts = {"support_bits": 0, "amplitude_bits": 0}, []
    for side in (0, 1):
        rows = slice(side * ROWS // 2, (side + 1) * ROWS // 2)
        coder = FeatureCoder(code, 1 - side, step, norms)
        support, amplitudes = coder.encode(h[rows])
        written["support_bits"] += 8 * len(support)
        written["amplitude_bits"] += 8 * len(amplitudes)
        parts.append(coder.decode(support, amplitudes, ROWS // 2, x.shape[1]))
    for name, count in written.items():
        assert count / segments.numel() == pytest.approx(bits[name], rel=0.02), name
    assert sum(written.values()) / segments.numel() == pytest.approx(bits["total_bits"], rel=0.02)

    decoded = torch.cat(parts)
    rounded = torch.where(h > 0, quantize(h, norms / step), 0) / (norms / step)
    torch.testing.assert_close(decoded, rounded, rtol=1e-12, atol=0)
    rest = float((sae.decode(decoded.float()) - x).square().mean())
    assert rest <= (1 + ROUNDING) * error * (1 + 1e-4)  # the bytes alone give the explained variance
    assert explained > 0.5
    assert bits["support_bits"] > 2
    if order == "in order":
        assert bits["support_bits"] < 0.95 * bits["support_bits_memoryless"]
