"""Hysteresis beyond the kernels' causal trigger: two-sided, and with an exact threshold.

Derivations: docs/mathematics.md, section 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.parallel.axis import SINGLE_PROCESS, Ranks
from tsae.sae.thresholds import included, threshold_for, threshold_without_waiting
from tsae.utils.device import runs_behind
from tsae_kernels import activate_with_stats, viterbi_path


def mask_two_sided(
    pre: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    release: Tensor,
    segments: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``pre`` where the two-sided trigger is on; elsewhere so low that a ReLU gives 0, with no gradient.

    A stretch within a segment that stays above ``release`` is on if it exceeds ``threshold`` anywhere: the union of a
    causal pass from the left and one from the right. It looks ahead, so it cannot run on a stream of tokens; it
    measures what causality costs. It takes two more kernel passes than the causal trigger, and two flipped copies.

    pre: (B, T, d_sae); bias: (d_sae) or None; threshold, release: scalar or (d_sae); segments: (B, T) or None
    out: (B, T, d_sae), dtype of ``pre``; pass it to `activate_with_stats` with ``bias``, relu and no threshold
    """

    @torch.no_grad()
    def on(pre: Tensor, segments: Tensor | None) -> Tensor:
        h, _ = activate_with_stats(pre, bias, "relu", threshold, release, ((1, 1),), segments, backend=backend)
        return h != 0  # also NaN, which must not be hidden

    kept = on(pre, segments) | on(pre.flip(1), None if segments is None else segments.flip(1)).flip(1)
    return _only(pre, kept)


def mask_path(
    pre: Tensor,
    bias: Tensor | None,
    transition_cost: Tensor,
    start_cost: Tensor,
    segments: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``pre`` where each feature's cheapest path is on; elsewhere as `mask_two_sided`.

    The path minimizes the costs less the squares of the pre-activations that are on, over a whole segment: the
    non-causal bound of a trigger with thresholds from the same costs. It looks ahead.

    pre: (B, T, d_sae); bias: (d_sae) or None; transition_cost: (2, 2, d_sae), start_cost: (2, d_sae), as
        `tsae_kernels.viterbi_path`, in the square of the units of ``pre``; segments: (B, T) or None
    out: like `mask_two_sided`
    """
    z = pre.detach()
    if bias is not None:
        z = z.to(torch.promote_types(z.dtype, torch.float32)) + bias.detach()
    on = viterbi_path(z, transition_cost, start_cost, segments, backend=backend)
    return _only(pre, on | z.isnan())  # NaN must not be hidden


def _only(pre: Tensor, kept: Tensor) -> Tensor:
    return pre.masked_fill(~kept, torch.finfo(pre.dtype).min / 2)  # half, so that adding a bias does not overflow


@torch.no_grad()
def switch_on_levels(z: Tensor, ratio: float, segments: Tensor | None = None, *, two_sided: bool = False) -> Tensor:
    """For every entry, the threshold below which it is on if the release is ``ratio`` times the threshold.

        c_t = max(z_t, min(c_{t-1}, z_t / ratio))        c_{t-1} in the same segment

    since on_t = [z_t > theta] or (on_{t-1} and [z_t > ratio theta]). Two-sided hysteresis repeats this over c from
    right to left. An entry is active at theta if c > theta, so the threshold for a given number of active entries is
    an order statistic of c, as BatchTopK's is of z.

    z: (B, T, d_sae), pre-activations with bias; segments: (B, T) or None; ratio: from 0 to 1
    out: like z
    """
    tokens = z.shape[1]
    held = z / max(ratio, 1e-20)  # with ratio 0, everything above 0 is held
    levels = z.clone()
    joined = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)  # [B, T], with the position before
    if segments is not None:
        joined[:, 1:] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
    steps = [(t, t - 1, t) for t in range(1, tokens)]  # to, from, index into joined
    if two_sided:
        steps += [(t, t + 1, t + 1) for t in range(tokens - 2, -1, -1)]
    for to, source, index in steps:
        passed = torch.minimum(levels[:, source], held[:, to])
        passed = passed.masked_fill(~joined[:, index, None], -torch.inf)
        torch.maximum(levels[:, to], passed, out=levels[:, to])
    return levels


@torch.no_grad()
def exact_threshold(
    pre: Tensor,
    bias: Tensor | None,
    k: int,
    ratio: float,
    segments: Tensor | None = None,
    *,
    two_sided: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    candidates: int | None = None,
) -> Tensor:
    """The threshold at which the mean L0 of the batch is k, hysteresis included.

    It is the (k tokens + 1)-th largest of `switch_on_levels`, at least 0; with ``ratio`` 1 that is BatchTopK's. All
    entries of a stretch held on by one entry switch together, so the number active can fall short of k tokens by one
    stretch, or exceed it by one through rounding.

    pre: (B, T, d_sae); bias: (d_sae) or None; positions with negative segment ids do not count
    ranks: if there are several, ``pre`` is this rank's shard, and the threshold is for the global batch and dictionary
    candidates: on a GPU, see `threshold_without_waiting`
    out: scalar, float32 (float64 for float64), no gradient
    """
    dtype = torch.promote_types(pre.dtype, torch.float32)
    z = pre.to(dtype) if bias is None else pre.to(dtype) + bias
    levels = switch_on_levels(z, ratio, segments, two_sided=two_sided)
    if runs_behind(levels.device):
        return threshold_without_waiting(levels, segments, k, ranks, 0.0, candidates).clamp(min=0.0)
    levels = included(levels, segments)
    return threshold_for(levels, k, ranks, 0.0).clamp(min=0.0)
