"""Hysteresis beyond the kernels' causal trigger: held on from both sides, and its threshold found exactly.

docs/mathematics.md, section 7, derives both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.parallel.axis import SINGLE_PROCESS, Ranks
from tsae.sae.thresholds import threshold_for
from tsae_kernels import activate_with_stats


def keep_two_sided(
    pre: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    release: Tensor,
    segments: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``pre`` where the two-sided trigger is on, and elsewhere so low that relu gives 0, with no gradient.

    On is every stretch, as long as a segment allows, above ``release`` that is somewhere above ``threshold``: what a
    causal walk from the left or one from the right keeps. It looks ahead, so it is no activation to use on a stream of
    tokens; what it is for is to say what causality costs. It takes two passes of the kernel more than the causal one,
    and two flipped copies.

    pre: (B, T, d_sae); bias: (d_sae) or None; threshold, release: scalar or (d_sae); segments: (B, T) or None
    out: (B, T, d_sae), in the dtype of ``pre``; for `activate_with_stats` with ``bias``, relu, and no threshold
    """

    @torch.no_grad()
    def on(pre: Tensor, segments: Tensor | None) -> Tensor:
        h, _ = activate_with_stats(pre, bias, "relu", threshold, release, ((1, 1),), segments, backend=backend)
        return h != 0  # NaN too, so that it stays to be seen

    kept = on(pre, segments) | on(pre.flip(1), None if segments is None else segments.flip(1)).flip(1)
    return pre.masked_fill(~kept, torch.finfo(pre.dtype).min / 2)  # half, so that a bias does not take it to infinity


@torch.no_grad()
def switch_on_levels(z: Tensor, ratio: float, segments: Tensor | None = None, *, two_sided: bool = False) -> Tensor:
    """For every entry the threshold below which it is on, if the release is ``ratio`` times the threshold.

        c_t = max(z_t, min(c_{t-1}, z_t / ratio))        c_{t-1} of the same segment

    since on_t = [z_t > theta] or (on_{t-1} and [z_t > ratio theta]); two-sided, the same walk back over c. So the
    features active at theta are those with c > theta, and a threshold for a wanted number of them is an order
    statistic of c, as BatchTopK's is of z.

    z: (B, T, d_sae), pre-activations with their bias; segments: (B, T) or None
    ratio: from 0 to 1
    out: like z
    """
    tokens = z.shape[1]
    held = z / max(ratio, 1e-20)  # with ratio 0 whatever is above 0 is held
    levels = z.clone()
    joined = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)  # [B, T] to the position before
    if segments is not None:
        joined[:, 1:] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
    steps = [(t, t - 1, t) for t in range(1, tokens)]  # to, from, and where it says whether the two are joined
    if two_sided:
        steps += [(t, t + 1, t + 1) for t in range(tokens - 2, -1, -1)]
    for to, source, place in steps:
        passed = torch.minimum(levels[:, source], held[:, to])
        passed = passed.masked_fill(~joined[:, place, None], -torch.inf)
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
) -> Tensor:
    """The threshold at which k features a token are active on average over the batch, hysteresis included.

    No search: the (k tokens + 1)-th largest of `switch_on_levels`. With ``ratio`` 1 it is BatchTopK's, and at least 0.
    With hysteresis features switch in stretches, those that hang on one entry all at once: the number active may be
    less than k a token, or for the rounding of a product more, by one such stretch.

    pre: (B, T, d_sae); bias: (d_sae) or None; positions of negative segment id do not count
    ranks: with several, ``pre`` is a share of the batch and the dictionary, and the threshold that of the whole
    out: scalar in the dtype of the comparison, float32 (float64 for float64), no gradient
    """
    dtype = torch.promote_types(pre.dtype, torch.float32)
    z = pre.to(dtype) if bias is None else pre.to(dtype) + bias
    levels = switch_on_levels(z, ratio, segments, two_sided=two_sided)
    levels = levels.flatten(0, 1) if segments is None else levels[segments >= 0]
    return threshold_for(levels, k, ranks, 0.0).clamp(min=0.0)
