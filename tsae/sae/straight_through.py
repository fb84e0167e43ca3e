"""Gradients of learned thresholds: JumpReLU's straight-through estimator, and its form for the Schmitt trigger.

Rajamanoharan et al. 2024 (arXiv 2407.14435), sections 3 and 4. The features are the kernels'; what is here is
identity on them, and runs on the way back. Ours differs from the paper in one reading: the width of the window is a
share of the threshold, so that it means the same in any unit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def thresholds(log_threshold: Tensor, release_logit: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Threshold and release (None without a logit) from what is learned; all (d_sae). 0 < release < threshold."""
    threshold = log_threshold.detach().exp()
    if release_logit is None:
        return threshold, None
    return threshold, torch.minimum(threshold * release_logit.detach().sigmoid(), threshold)


def straight_through(
    h: Tensor,
    pre: Tensor,
    bias: Tensor | None,
    log_threshold: Tensor,
    release_logit: Tensor | None,
    bandwidth: float,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``h`` unchanged, and the mean L0, both with pseudo-gradients to the thresholds.

    With z = pre + bias, the rectangular window of width e = bandwidth theta, and g the gradient that reaches h:

        dL / dtheta  = -(theta / e) sum_t [|z_t - theta| < e/2] g_t         (the paper's section 3)
        dL0 / dtheta = -(1 / e)     sum_t [|z_t - theta| < e/2] / positions (likewise)

    A Schmitt trigger's entry also decides on those that it would hold on after it. With the credit of an entry and of
    the run that hangs on it,

        C_t = z_t g_t + [t+1 is in the segment and release < z_{t+1} <= theta] C_{t+1}

    the sums of C_t over [|z_t - theta| < e/2, off before] and over [|z_t - release| < e/2, on before, z_t <= theta],
    divided by -e, are the gradients of theta and of the release; L0 likewise, with 1 / positions for z_t g_t.

    What reaches h by way of the activation's statistics is not seen here: temporal terms made from them move the
    weights, but not the thresholds.

    h: (B, T, d_sae), of `activate_with_stats`, for these thresholds; pre: (B, T, d_sae); bias: (d_sae) or None
    log_threshold: (d_sae); release_logit: (d_sae), the release is theta sigmoid(release_logit); None: JumpReLU
    bandwidth: positive; segments: (B, T) or None
    out: h, and a scalar. The gradient of h must be whole, also where h is 0.
    """
    return _StraightThrough.apply(h, pre.detach(), bias, log_threshold, release_logit, bandwidth, segments)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        pre: Tensor,
        bias: Tensor | None,
        log_threshold: Tensor,
        release_logit: Tensor | None,
        bandwidth: float,
        segments: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        theta, release = thresholds(log_threshold, release_logit)
        dtype = torch.promote_types(pre.dtype, torch.float32)
        z = pre.to(dtype) if bias is None else pre.to(dtype) + bias.detach()
        half = 0.5 * bandwidth * theta
        near = (z > theta - half) & (z < theta + half)  # [B, T, d_sae]
        on = h > 0
        if segments is None:
            segments = torch.zeros(h.shape[:2], dtype=torch.int32, device=h.device)
        kept = segments >= 0
        if h.is_cuda or not kept.all():  # a GPU is not waited for
            near &= kept[..., None]
            on = on & kept[..., None]
        positions = kept.sum().clamp(min=1)
        ctx.set_materialize_grads(False)
        ctx.bandwidth = bandwidth
        if release is None:
            ctx.save_for_backward(theta, positions, near)
        else:
            joined = torch.zeros_like(kept)
            joined[:, 1:] = (segments[:, 1:] == segments[:, :-1]) & kept[:, 1:]
            joined = joined[..., None]
            before = torch.zeros_like(on)
            before[:, 1:] = on[:, :-1]
            before &= joined
            below = z <= theta
            hangs = below & (z > release) & joined  # on only if the one before it is
            sets = near & ~before
            holds = before & below & (z > release - half) & (z < release + half)
            ctx.save_for_backward(theta, positions, sets, holds, hangs, z, release / theta)
        count = on.count_nonzero().to(dtype) / positions
        return h.view_as(h), count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_count: Tensor | None) -> tuple[Tensor | None, ...]:
        theta, positions, *saved = ctx.saved_tensors
        price = None if grad_count is None else grad_count / positions  # of one active entry
        if len(saved) == 1:
            return grad_h, None, None, _jumprelu(grad_h, price, theta, *saved) / -ctx.bandwidth, None, None, None
        sets, holds = _schmitt(grad_h, price, *saved[:4])
        ratio = saved[4]
        log_threshold = (sets + ratio * holds) / -ctx.bandwidth
        release_logit = ratio * (1.0 - ratio) * holds / -ctx.bandwidth
        return grad_h, None, None, log_threshold, release_logit, None, None


def _jumprelu(grad_h: Tensor | None, price: Tensor | None, theta: Tensor, near: Tensor) -> Tensor:
    """Sum over the window of what being active is worth; out: (d_sae)."""
    out = torch.zeros_like(theta)
    if grad_h is not None:
        out = out + theta * torch.where(near, grad_h, 0.0).sum((0, 1), dtype=theta.dtype)
    if price is not None:
        out = out + price * near.sum((0, 1))
    return out


def _schmitt(
    grad_h: Tensor | None, price: Tensor | None, sets: Tensor, holds: Tensor, hangs: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of the credit over the two windows; out: (d_sae) each."""
    credit = torch.zeros_like(z) if grad_h is None else z * grad_h  # [B, T, d_sae]
    if price is not None:
        credit += price
    rows, carried = credit.unbind(1), hangs.to(z.dtype).unbind(1)  # [B, d_sae] for every t
    for t in range(z.shape[1] - 2, -1, -1):
        rows[t].addcmul_(rows[t + 1], carried[t + 1])
    return torch.where(sets, credit, 0.0).sum((0, 1)), torch.where(holds, credit, 0.0).sum((0, 1))
