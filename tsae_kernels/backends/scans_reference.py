"""The definitions of the scans, in float64: `reference` for `interface.ScanBackend`, which documents them. Slow."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from tsae_kernels.backends.reference import pair_mask, segment_numbers
from tsae_kernels.dtypes import dtype_of_stats


def viterbi_path(z: Tensor, transition_cost: Tensor, start_cost: Tensor, segments: Tensor | None) -> Tensor:
    """See `interface.ScanBackend`."""
    (off_off, off_on), (on_off, on_on) = transition_cost.double()
    start = start_cost[1].double() - start_cost[0].double()
    cost = torch.where(z > 0, -z.double().square(), inf)  # of on rather than off; NaN is off
    continues = _continues(z, segments)
    excess = torch.empty_like(cost)  # of the best path that is on at t over the best that is off
    for t in range(z.shape[1]):
        before = excess[:, t - 1]
        to_off, to_on = before < off_off - on_off, before < off_on - on_on  # whether it comes from on
        difference = torch.where(to_on, before + on_on, off_on) - torch.where(to_off, before + on_off, off_off)
        difference = torch.where(to_off & to_on, on_on - on_off, difference)  # also where `before` is -inf
        excess[:, t] = torch.where(continues[:, t, None], difference, start) + cost[:, t]
    on = excess < 0
    for t in reversed(range(z.shape[1] - 1)):
        stays = torch.where(on[:, t + 1], off_on - on_on, off_off - on_off)
        on[:, t] = torch.where(continues[:, t + 1, None], excess[:, t] < stays, on[:, t])
    return on & _valid(z, segments)


def leaky_recurrence(a: Tensor, decay: Tensor, segments: Tensor | None) -> Tensor:
    """See `interface.ScanBackend`."""
    decay = decay.to(dtype_of_stats(a.dtype)).double()
    x = a.double().masked_fill(~_valid(a, segments), 0)
    continues = _continues(a, segments)
    h = torch.empty_like(x)
    for t in range(a.shape[1]):
        before = h[:, t - 1].masked_fill(~continues[:, t, None], 0)
        h[:, t] = decay * before + (1 - decay) * x[:, t]
    return h.to(a.dtype)


def leaky_recurrence_backward(
    grad_h: Tensor, decay: Tensor, a: Tensor | None, h: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `interface.ScanBackend`."""
    dtype = dtype_of_stats(grad_h.dtype)
    decay = decay.to(dtype).double()
    valid = _valid(grad_h, segments)
    g = grad_h.double().masked_fill(~valid, 0)  # with respect to h_t, directly and through later positions
    continues = _continues(grad_h, segments)
    for t in reversed(range(grad_h.shape[1] - 1)):
        g[:, t] += decay * g[:, t + 1].masked_fill(~continues[:, t + 1, None], 0)
    grad_decay = torch.zeros_like(decay)
    if a is not None and h is not None:
        before = torch.zeros_like(g)
        before[:, 1:] = h[:, :-1].double().masked_fill(~continues[:, 1:, None], 0)
        grad_decay = (g * (before - a.double()).masked_fill(~valid, 0)).sum((0, 1))
    return ((1 - decay) * g).to(grad_h.dtype), grad_decay.to(dtype)


def _valid(x: Tensor, segments: Tensor | None) -> Tensor:
    """[B, T, 1]: False at excluded positions."""
    return (segment_numbers(x, segments) >= 0)[..., None]


def _continues(x: Tensor, segments: Tensor | None) -> Tensor:
    """[B, T]: whether t - 1 and t lie in one segment."""
    continues = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    continues[:, 1:] = pair_mask(segment_numbers(x, segments), 1)[..., 0] > 0
    return continues
