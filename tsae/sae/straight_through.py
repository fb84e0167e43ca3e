"""Gradients of learned thresholds: JumpReLU's straight-through estimator, and one for the Schmitt trigger.

Rajamanoharan et al. 2024 (arXiv 2407.14435), sections 3 and 4. The kernels compute the features; here the forward pass
is the identity on them, and the backward pass adds the gradients of the thresholds. Unlike in the paper, the window's
width is a share of the threshold, so it does not depend on units.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsae.utils.device import runs_behind


def learned_thresholds(log_threshold: Tensor, release_logit: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Threshold and release (None without a logit) from their parameters, all (d_sae), with 0 < release < threshold."""
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
    """``h`` unchanged and the mean L0, both with pseudo-gradients to the thresholds.

    Let z = pre + bias, theta the threshold, e = bandwidth theta the width of a rectangular window, and g the gradient
    of h. For JumpReLU (the paper's section 3)

        dL / dtheta  = -(theta / e) sum_t [|z_t - theta| < e/2] g_t
        dL0 / dtheta = -(1 / e)     sum_t [|z_t - theta| < e/2] / positions

    In a Schmitt trigger, switching on at t also holds the positions after it on. The credit of position t and of the
    run that depends on it is

        C_t = z_t g_t + [t+1 is in the segment and release < z_{t+1} <= theta] C_{t+1}

    The gradient of theta is -1/e times the sum of C_t over [|z_t - theta| < e/2, off before]; that of the release is
    -1/e times the sum over [|z_t - release| < e/2, on before, z_t <= theta]. For L0, 1 / positions replaces z_t g_t.

    Gradients that reach h through the activation's statistics bypass this function: temporal terms computed from them
    train the weights but not the thresholds.

    h: (B, T, d_sae), from `activate_with_stats` with these thresholds; pre: (B, T, d_sae); bias: (d_sae) or None
    log_threshold: (d_sae); release_logit: (d_sae), with release = theta sigmoid(release_logit), or None for JumpReLU
    bandwidth: positive; segments: (B, T) or None
    out: h (its gradient must be complete, also where h is 0), and a scalar
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
        theta, release = learned_thresholds(log_threshold, release_logit)
        dtype = torch.promote_types(pre.dtype, torch.float32)
        z = pre.to(dtype) if bias is None else pre.to(dtype) + bias.detach()
        half = 0.5 * bandwidth * theta
        near = (z > theta - half) & (z < theta + half)  # [B, T, d_sae]
        on = h > 0
        if segments is None:
            segments = torch.zeros(h.shape[:2], dtype=torch.int32, device=h.device)
        kept = segments >= 0
        if runs_behind(h.device) or not kept.all():
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
            held = below & (z > release) & joined  # on only if the position before it is
            near_threshold = near & ~before
            near_release = before & below & (z > release - half) & (z < release + half)
            ctx.save_for_backward(theta, positions, near_threshold, near_release, held, z, release / theta)
        count = on.count_nonzero().to(dtype) / positions
        return h.view_as(h), count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_count: Tensor | None) -> tuple[Tensor | None, ...]:
        theta, positions, *saved = ctx.saved_tensors
        grad_active = None if grad_count is None else grad_count / positions  # of L0, per active entry
        if len(saved) == 1:
            grad = _jumprelu_credit(grad_h, grad_active, theta, *saved) / -ctx.bandwidth
            return grad_h, None, None, grad, None, None, None
        *saved, ratio = saved
        on_threshold, on_release = _schmitt_credit(grad_h, grad_active, *saved)
        log_threshold = (on_threshold + ratio * on_release) / -ctx.bandwidth
        release_logit = ratio * (1.0 - ratio) * on_release / -ctx.bandwidth
        return grad_h, None, None, log_threshold, release_logit, None, None


def _jumprelu_credit(grad_h: Tensor | None, grad_active: Tensor | None, theta: Tensor, near: Tensor) -> Tensor:
    """(d_sae), the sum over the window of the gradient of being active."""
    out = torch.zeros_like(theta)
    if grad_h is not None:
        out = out + theta * torch.where(near, grad_h, 0.0).sum((0, 1), dtype=theta.dtype)
    if grad_active is not None:
        out = out + grad_active * near.sum((0, 1))
    return out


def _schmitt_credit(
    grad_h: Tensor | None,
    grad_active: Tensor | None,
    near_threshold: Tensor,
    near_release: Tensor,
    held: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor]:
    """(d_sae) each, the sums of the credit over the two windows."""
    credit = torch.zeros_like(z) if grad_h is None else z * grad_h  # [B, T, d_sae]
    if grad_active is not None:
        credit += grad_active
    rows, carried = credit.unbind(1), held.to(z.dtype).unbind(1)  # [B, d_sae] for every t
    for t in range(z.shape[1] - 2, -1, -1):
        rows[t].addcmul_(rows[t + 1], carried[t + 1])
    return torch.where(near_threshold, credit, 0.0).sum((0, 1)), torch.where(near_release, credit, 0.0).sum((0, 1))


NEAR_MISS = 1e-30  # of an entry that is off: it marks that the decoder computes its gradient, and adds nothing


class GateLevels(NamedTuple):
    """What decides whether features are on, (d_sae) each: bias or None, threshold, and release, 0 to threshold."""

    bias: Tensor | None
    threshold: Tensor
    release: Tensor


def gate_gradient(
    h: Tensor,
    pre: Tensor,
    levels: GateLevels,
    segments: Tensor,
    width: float,
    strength: float,
    price: float | Tensor,
) -> Tensor:
    """``h`` for the decoder, with a pseudo-gradient to ``pre`` of entries that are nearly on or nearly off.

    With z = pre + bias and l the level that decides (the release if the feature was on at the position before, else the
    threshold), the loss jumps at z = l. A rectangular window of width ``width`` l replaces the delta in its derivative,
    as in JumpReLU's estimator (Rajamanoharan et al. 2024, section 3), where it reaches the thresholds and here the
    pre-activations. The jump is that of the squared error, which is quadratic in h, and of the price l^2 of being on at
    the best thresholds (section 9 of docs/mathematics.md): l (g + 2 price l) if the feature is off, l g if it is on, so

        dL / dz += strength / width (g + 2 price l [off])        where |z - l| < width l / 2

    with g the gradient of h through the reconstruction, also where h is 0. The effect on later positions is left out.

    h: (B, T, d_sae), from `activate_with_stats` with these levels; pre: (B, T, d_sae), without bias
    segments: (B, T); width, strength: positive
    price: what a unit of squared error of one position weighs in the loss; a scalar or (d_sae)
    out: (B, T, d_sae), ``h`` with `NEAR_MISS` at entries in the window that are 0; for the decoder alone
    """
    return _Gate.apply(h, pre, *levels, segments, width, strength, price)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        pre: Tensor,
        bias: Tensor | None,
        threshold: Tensor,
        release: Tensor,
        segments: Tensor,
        width: float,
        strength: float,
        price: float | Tensor,
    ) -> Tensor:
        ctx.price, ctx.factor, ctx.has_bias = price, strength / width, bias is not None
        ctx.dense = runs_behind(h.device)
        joined = torch.zeros_like(segments, dtype=torch.bool)
        joined[:, 1:] = segments[:, 1:] == segments[:, :-1]
        if ctx.dense:
            on_before = torch.zeros_like(h, dtype=torch.bool)
            on_before[:, 1:] = h[:, :-1] > 0
            level = torch.where(on_before & joined[..., None], release, threshold).float()
            z = pre.float() if bias is None else pre.float() + bias.detach()
            near = ((z - level).abs() < width / 2 * level) & (segments >= 0)[..., None]
            ctx.save_for_backward(near, torch.where(h > 0, 0.0, 2.0 * level))
            return torch.where(near & (h == 0), NEAR_MISS, h).to(h.dtype)
        d_sae = ctx.d_sae = h.shape[2]
        low = torch.where(release > 0, release, threshold) * (1 - width / 2)
        if bias is not None:
            low = low - bias
        maybe = pre >= low.to(pre.dtype)  # [B, T, d_sae], all entries in the window and few others
        place = maybe.flatten().nonzero().squeeze(1)  # [n]
        position, feature = place // d_sae, place % d_sae
        flat = h.flatten()
        on_before = joined.flatten()[position] & (flat[(place - d_sae).clamp(min=0)] > 0)
        z = pre.flatten()[place].float()
        if bias is not None:
            z = z + bias.detach()[feature]
        level = torch.where(on_before, release[feature], threshold[feature]).float()
        near = ((z - level).abs() < width / 2 * level) & (segments.flatten()[position] >= 0)
        place, level, feature = place[near], level[near], feature[near]
        out = h.clone()
        missed = place[flat[place] == 0]
        out.view(-1)[missed] = NEAR_MISS
        ctx.save_for_backward(place, torch.where(flat[place] > 0, 0.0, 2.0 * level), feature)
        if isinstance(price, Tensor) and price.dim():
            ctx.price = price[feature]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.dense:
            near, jump = ctx.saved_tensors
            dense = torch.where(near, ctx.factor * (grad.float() + ctx.price * jump), 0.0)
            grad_bias = dense.sum((0, 1)) if ctx.has_bias and ctx.needs_input_grad[2] else None
            return grad, dense.to(grad.dtype), grad_bias, None, None, None, None, None, None
        place, jump, feature = ctx.saved_tensors
        extra = ctx.factor * (grad.flatten()[place].float() + ctx.price * jump)
        grad_pre = torch.zeros_like(grad)
        grad_pre.view(-1)[place] = extra.to(grad.dtype)
        grad_bias = None
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = torch.zeros(ctx.d_sae, device=grad.device).index_add_(0, feature, extra)
        return grad, grad_pre, grad_bias, None, None, None, None, None, None


class GatedEntries(NamedTuple):
    """What `gate_gradient` needs of features in lists of capacity C, from `tsae_kernels.sparse_features.encode_gated`.

    values: (B * T, C), 0 at entries that are off; levels: (B * T, C) float32, 0 outside of the windows
    """

    values: Tensor
    levels: Tensor


def gate_gradient_of_lists(entries: GatedEntries, width: float, strength: float, price: float | Tensor) -> Tensor:
    """`gate_gradient` for lists: the values for the decoder, (B * T, C).

    price: as there, a scalar, or of every entry (B * T, C)
    """
    return _GateOfLists.apply(*entries, strength / width, price)


class _GateOfLists(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, levels: Tensor, factor: float, price: float | Tensor) -> Tensor:
        ctx.save_for_backward(values, levels)
        ctx.factor, ctx.price = factor, price
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, levels = ctx.saved_tensors
        wide, on = grad.float(), values != 0
        jump = torch.where(on, 0.0, 2.0 * levels)
        extra = torch.where(levels > 0, ctx.factor * (wide + ctx.price * jump), 0.0)
        return (torch.where(on, wide, 0.0) + extra).to(grad.dtype), None, None, None
