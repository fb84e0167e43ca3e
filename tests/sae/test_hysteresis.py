"""Two-sided hysteresis and exact thresholds, against plain loops over positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tsae.config import SAEConfig
from tsae.sae.hysteresis import exact_threshold, switch_on_levels
from tsae.sae.model import SparseAutoencoder
from tsae.sae.thresholds import batch_topk_threshold, mean_l0
from tsae_kernels import temporal_stats

B, T, D_IN, K = 3, 17, 8, 30
SEGMENTS = torch.tensor([[0] * 9 + [1] * 8, [0] * 17, [0] * 5 + [-1] + [2] * 6 + [-1] * 2 + [2] * 3])


def numbers(seed: int = 0) -> Tensor:
    return torch.randn(B, T, K, generator=torch.Generator().manual_seed(seed))


def stretches(z: Tensor, theta: float, release: float, segments: Tensor) -> Tensor:
    """[B, T, K]: in a stretch above the release, within a segment, that exceeds the threshold somewhere."""
    on = torch.zeros(z.shape, dtype=torch.bool)
    rows, ids = z.transpose(1, 2).tolist(), segments.tolist()
    for b in range(B):
        for j, row in enumerate(rows[b]):
            for t in range(T):
                for step in (-1, 1):
                    u = t
                    while row[u] > release and not row[u] > theta:
                        if not (0 <= u + step < T and ids[b][u + step] == ids[b][t] >= 0):
                            break
                        u += step
                    on[b, t, j] |= row[u] > theta
    return on


def causal(z: Tensor, theta: float, release: float, segments: Tensor) -> Tensor:
    on = torch.zeros(z.shape, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            held = on[b, t - 1] & (t > 0 and bool(segments[b, t] == segments[b, t - 1] >= 0))
            on[b, t] = (z[b, t] > theta) | (held & (z[b, t] > release))
    return on


def make(**options: Any) -> SparseAutoencoder:
    cfg = SAEConfig(**({"d_in": D_IN, "d_sae": K, "k": 4, "activation": "schmitt"} | options))
    sae = SparseAutoencoder(cfg, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        sae.b_enc.copy_(0.3 * torch.randn(K, generator=torch.Generator().manual_seed(1)))
    return sae


def inputs(seed: int = 2) -> Tensor:
    return torch.randn(B, T, D_IN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_two_sided_keeps_stretches_and_passes_gradient_through_them(segments: Tensor | None) -> None:
    sae = make(hysteresis="two-sided")
    sae.threshold.fill_(1.2)
    sae.release.fill_(0.3)
    z = numbers().requires_grad_()
    ids = torch.zeros(B, T, dtype=torch.int64) if segments is None else segments
    on = stretches(z.detach() + sae.b_enc.detach(), 1.2, 0.3, ids)
    h, stats = sae.activate(z, ((1, 2), (3, 9)), segments)
    expected = torch.where(on, z + sae.b_enc, 0.0)
    torch.testing.assert_close(h, expected)
    forward = causal(z.detach() + sae.b_enc.detach(), 1.2, 0.3, ids)
    assert bool((on >= forward).all())
    assert int(on.sum()) > int(forward.sum()) + 20
    for got, wanted in zip(stats, temporal_stats(expected, ((1, 2), (3, 9)), segments), strict=True):
        torch.testing.assert_close(got, wanted)
    weight = numbers(5)
    loss = (h * weight).sum() + stats.differences.sum()
    reference = (expected * weight).sum() + temporal_stats(expected, ((1, 2), (3, 9)), segments).differences.sum()
    for got, wanted in zip(*(torch.autograd.grad(part, (z, sae.b_enc)) for part in (loss, reference)), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_sided_without_hysteresis_is_the_causal_one_bit_for_bit(dtype: torch.dtype) -> None:
    z = numbers().to(dtype)
    out = []
    for hysteresis in ("causal", "two-sided"):
        sae = make(hysteresis=hysteresis)
        with torch.no_grad():
            sae.b_enc[0] = -30.0
        sae.threshold.fill_(0.7)
        sae.release.fill_(0.7)
        out.append(sae.activate(z, segments=SEGMENTS))
    assert torch.equal(out[0][0], out[1][0])
    assert out[0][0].any()
    assert all(torch.equal(a, b) for a, b in zip(out[0][1], out[1][1], strict=True))


def test_two_sided_does_not_hide_nan() -> None:
    sae = make(hysteresis="two-sided")
    sae.threshold.fill_(1.0)
    z = numbers()
    z[1, 3, 4] = torch.nan
    assert sae.activate(z)[0].isnan().nonzero().tolist() == [[1, 3, 4]]


def test_two_sided_has_its_own_architecture_name_on_disk(tmp_path: Path) -> None:
    sae, x = make(hysteresis="two-sided", steering="exact"), inputs()
    sae.threshold.fill_(1.0)
    sae.release.fill_(0.2)
    sae.folded(torch.full((D_IN,), 3.0), 2.0).save(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "tsae_schmitt_two_sided"
    loaded = SparseAutoencoder.load(tmp_path)
    assert (loaded.cfg.hysteresis, loaded.cfg.steering) == ("two-sided", "exact")
    h = loaded.encode(2.0 * x + 3.0, SEGMENTS)
    torch.testing.assert_close(h, 2.0 * sae.encode(x, SEGMENTS), rtol=1e-4, atol=1e-4)
    assert not torch.equal(h > 0, make_causal(sae).encode(x, SEGMENTS) > 0)


def make_causal(sae: SparseAutoencoder) -> SparseAutoencoder:
    out = make()
    out.load_state_dict(sae.state_dict())
    return out


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.8, 1.0])
def test_levels_are_the_thresholds_at_which_entries_switch(ratio: float, two_sided: bool) -> None:
    z = numbers().double()
    levels = switch_on_levels(z, ratio, SEGMENTS, two_sided=two_sided)
    walk = stretches if two_sided else causal
    for theta in (0.0, 0.2, 0.9, 1.7):
        assert torch.equal(levels > theta, walk(z, theta, ratio * theta, SEGMENTS))


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_the_exact_threshold_meets_the_target_l0(ratio: float, segments: Tensor | None, two_sided: bool) -> None:
    z, bias = numbers(), 0.2 * numbers(4)[0, 0]
    theta = exact_threshold(z, bias, 4, ratio, segments, two_sided=two_sided)
    walk = stretches if two_sided else causal
    ids = torch.zeros(B, T, dtype=torch.int64) if segments is None else segments

    def active(theta: float) -> int:
        return int(walk(z + bias, theta, ratio * theta, ids)[ids >= 0].sum())

    tokens = int((ids >= 0).sum())
    above, below = active(1.000001 * float(theta)), active(0.999999 * float(theta))
    assert above <= 4 * tokens < below
    assert below - above <= T  # all entries of a stretch switch together
    if ratio == 1.0:
        assert torch.equal(theta, batch_topk_threshold(z, bias, 4, segments))


def test_exact_thresholds_at_the_edges() -> None:
    z = numbers()
    assert float(exact_threshold(z, None, K, 0.3)) == 0.0
    assert float(exact_threshold(-z.abs(), None, 4, 0.3)) == 0.0  # nothing to switch on; never below 0
    assert float(exact_threshold(z, None, 4, 0.3, torch.full((B, T), -1))) == 0.0
    half = exact_threshold(z.bfloat16(), 0.01 * z[0, 0], 4, 0.3)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact_threshold(z.bfloat16().float(), 0.01 * z[0, 0], 4, 0.3))


def test_exact_steering_without_hysteresis_is_batchtopk_in_training_and_inference() -> None:
    exact, batch = make(steering="exact", release_ratio=1.0).train(), make(activation="batchtopk").train()
    for seed in range(3):
        x = inputs(seed)
        assert torch.equal(exact.encode(x, SEGMENTS), batch.encode(x, SEGMENTS))
        assert torch.equal(exact.threshold, batch.threshold)
    assert torch.equal(exact.eval().encode(x, SEGMENTS), batch.eval().encode(x, SEGMENTS))


@pytest.mark.parametrize("hysteresis", ["causal", "two-sided"])
def test_exact_steering_meets_k_on_every_batch_and_keeps_a_running_mean(hysteresis: str) -> None:
    sae = make(steering="exact", release_ratio=0.4, hysteresis=hysteresis).train()
    seen = []
    for seed in range(3):
        x = inputs(seed) * (1.0 + seed)  # a different threshold for each batch
        h, _, l0 = sae.activate_counted(sae.pre_activation(x), segments=SEGMENTS)
        tokens = int((SEGMENTS >= 0).sum())
        assert abs(float(l0) - 4.0) <= 5.0 / tokens  # all entries of a stretch switch together
        assert torch.equal(l0, mean_l0(h, SEGMENTS))
        two_sided = hysteresis == "two-sided"
        pre = sae.pre_activation(x).detach()
        seen.append(float(exact_threshold(pre, sae.b_enc.detach(), 4, 0.4, SEGMENTS, two_sided=two_sided)))
    expected = 0.95 * (0.95 * seen[0] + 0.05 * seen[1]) + 0.05 * seen[2]
    assert float(sae.threshold[0]) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(sae.release, 0.4 * sae.threshold)
    sae.eval()
    before = sae.threshold.clone()
    sae.encode(inputs(9), SEGMENTS)
    assert torch.equal(sae.threshold, before)
