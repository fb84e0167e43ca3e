"""The leaky recurrence of the activation `persistent` (Persistent SAE, arXiv 2607.17117).

    h_t = l_j h_{t-1} + (1 - l_j) a_t        h_{t-1} = 0 at the start of a segment

a is the sparse code of single tokens, and l_j in [0, 0.999) a decay per feature, learned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGEST_DECAY = 0.999


def decay_of(logit: Tensor) -> Tensor:
    """l = 0.999 sigmoid(logit), of any shape."""
    return LARGEST_DECAY * logit.sigmoid()


def logit_of(decay: Tensor) -> Tensor:
    """The inverse of `decay_of`, finite for every decay from 0 to 0.999."""
    return (decay / LARGEST_DECAY).logit(1e-6)


def leaky_recurrence(a: Tensor, decay: Tensor, segments: Tensor | None = None) -> Tensor:
    """h of the module docstring, along T and within segments; an excluded position is 0 and ends a segment.

    a:        (B, T, d_sae) floating point
    decay:    (d_sae), from 0 to 1
    segments: (B, T) integers or None; positions with negative ids are excluded
    out:      (B, T, d_sae), dtype of ``a``; the recurrence is computed in float32 (float64 for float64)
    """
    return _LeakyRecurrence.apply(a, decay, segments)  # type: ignore[no-any-return,no-untyped-call]


class _LeakyRecurrence(torch.autograd.Function):
    """One loop over T forward and one back, without a graph of T steps."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, decay: Tensor, segments: Tensor | None) -> Tensor:
        wide = a.to(torch.promote_types(a.dtype, torch.float32))
        ctx.dtypes = a.dtype, decay.dtype
        decay = decay.to(wide.dtype)
        kept, joined = _masks(a, segments)
        steps = (1 - decay) * wide * kept[..., None]
        h = torch.empty_like(wide)
        h[:, 0] = steps[:, 0]
        for t in range(1, a.shape[1]):
            torch.addcmul(steps[:, t], h[:, t - 1] * joined[:, t, None], decay, out=h[:, t])
        ctx.save_for_backward(wide, decay, h, kept, joined)
        return h.to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        a, decay, h, kept, joined = ctx.saved_tensors
        reached = grads[0].to(a.dtype, copy=True)  # dL / dh_t, through all later positions
        for t in range(a.shape[1] - 2, -1, -1):
            reached[:, t].addcmul_(reached[:, t + 1] * joined[:, t + 1, None], decay)
        of_decay = -(reached * a * kept[..., None]).sum(dim=(0, 1))
        of_decay += (reached[:, 1:] * h[:, :-1] * joined[:, 1:, None]).sum(dim=(0, 1))
        return ((1 - decay) * reached * kept[..., None]).to(ctx.dtypes[0]), of_decay.to(ctx.dtypes[1]), None


def _masks(a: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, T) float each: 1 where a position counts, and where it continues the segment of the position before."""
    kept = a.new_ones(a.shape[:2], dtype=torch.promote_types(a.dtype, torch.float32))
    joined = kept.clone()
    joined[:, 0] = 0
    if segments is not None:
        kept = (segments >= 0).to(kept)
        joined[:, 1:] = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)).to(kept)
    return kept, joined
