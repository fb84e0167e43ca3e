"""The scans in PyTorch for any device, a walk along T over [rows, k] slices: `eager` for `interface.ScanBackend`."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from tsae_kernels.backends.eager import _chunks
from tsae_kernels.backends.two_state import path_levels
from tsae_kernels.backends.windows import ChunkSegments, rows_by_time
from tsae_kernels.dtypes import dtype_of_stats


def _ends(segments: ChunkSegments) -> list[Tensor | None]:
    """For every t, the rows where a segment ends at t, or None."""
    following = torch.arange(1, segments.end.shape[1] + 1, device=segments.end.device)
    return rows_by_time((segments.end == following) & segments.valid)


def viterbi_path(z: Tensor, transition_cost: Tensor, start_cost: Tensor, segments: Tensor | None) -> Tensor:
    """See `interface.ScanBackend`."""
    levels = path_levels(transition_cost, start_cost, dtype_of_stats(z.dtype))
    on = torch.empty(z.shape, dtype=torch.bool, device=z.device)
    for rows, chunk in _chunks(z, segments):
        _find_path(z[rows].unbind(1), on[rows].unbind(1), levels, chunk)
    return on


def _find_path(z: Sequence[Tensor], on: Sequence[Tensor], levels: Tensor, segments: ChunkSegments | None) -> None:
    """Write on[t]. z, on: T slices [rows, k]; levels: of `path_levels`."""
    stay_off, stay_on, sign, offset, start = levels
    low, high = torch.minimum(stay_off, stay_on), torch.maximum(stay_off, stay_on)
    ends = [None] * len(z) if segments is None else _ends(segments)
    # Whether the best path to off (0) and to on (1) at t + 1 is on at t; both whether it is on at a segment's end.
    from_on = torch.empty(len(z), 2, *z[0].shape, dtype=torch.bool, device=z[0].device)
    excess: Tensor | None = None
    for t, z_t in enumerate(z):
        x = z_t.to(levels.dtype)
        cost = torch.where(x > 0, -x.square(), inf)
        if excess is None:
            excess = start + cost
        else:
            excess = excess.clamp_(low, high).mul_(sign).add_(offset)
            begins = None if segments is None else segments.begins[t]
            if begins is not None:
                excess[begins] = start
            excess += cost
        to_off, to_on = from_on[t]
        torch.lt(excess, stay_off, out=to_off)
        torch.lt(excess, stay_on, out=to_on)
        last = ends[t]
        if last is not None:
            from_on[t].index_copy_(1, last, (excess[last] < 0).expand(2, -1, -1))
    assert excess is not None
    after = excess < 0
    if segments is None:
        from_on[-1] = after  # with segments, the last position ends one or is excluded
    for t in reversed(range(len(z))):
        to_off, to_on = from_on[t]
        after = to_off ^ (after & (to_off ^ to_on))
        if segments is not None:
            after = segments.zero_excluded(after, t)
        on[t].copy_(after)


def leaky_recurrence(a: Tensor, decay: Tensor, segments: Tensor | None) -> Tensor:
    """See `interface.ScanBackend`."""
    decay = decay.to(dtype_of_stats(a.dtype))
    h = torch.empty_like(a, memory_format=torch.contiguous_format)
    for rows, chunk in _chunks(a, segments):
        state: Tensor | None = None  # h[t - 1], [rows, k]
        for t, (a_t, out) in enumerate(zip(a[rows].unbind(1), h[rows].unbind(1), strict=True)):
            x = a_t.to(decay.dtype) * (1 - decay)
            if state is not None:
                begins = None if chunk is None else chunk.begins[t]
                if begins is not None:
                    state.index_fill_(0, begins, 0)
                x.addcmul_(state, decay)
            state = x
            out.copy_(state if chunk is None else chunk.zero_excluded(state, t))
    return h


def leaky_recurrence_backward(
    grad_h: Tensor, decay: Tensor, a: Tensor | None, h: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `interface.ScanBackend`."""
    dtype = dtype_of_stats(grad_h.dtype)
    decay = decay.to(dtype)
    grad_a = torch.empty_like(grad_h, memory_format=torch.contiguous_format)
    grad_decay = torch.zeros(grad_h.shape[2], dtype=dtype, device=grad_h.device)
    for rows, chunk in _chunks(grad_h, segments):
        ends = None if chunk is None else _ends(chunk)
        incoming, outgoing = grad_h[rows].unbind(1), grad_a[rows].unbind(1)
        g = torch.zeros(incoming[0].shape, dtype=dtype, device=grad_h.device)  # of h[t], [rows, k]
        sums = torch.zeros_like(g)
        for t in reversed(range(len(incoming))):
            last = None if ends is None else ends[t]
            if last is not None:
                g.index_fill_(0, last, 0)
            g = g.mul_(decay).add_(incoming[t])
            if chunk is not None:
                g = chunk.zero_excluded(g, t)
            if a is not None and h is not None:
                sums.addcmul_(g, _steps(a[rows], h[rows], t, chunk, dtype))
            outgoing[t].copy_(g * (1 - decay))
        grad_decay += sums.sum(0)
    return grad_a, grad_decay


def _steps(a: Tensor, h: Tensor, t: int, segments: ChunkSegments | None, dtype: torch.dtype) -> Tensor:
    """h[t - 1] - a[t], [rows, k], with h = 0 before a segment; 0 where t is excluded."""
    now = a[:, t].to(dtype)
    if t == 0:
        before = torch.zeros_like(now)
    else:
        before = h[:, t - 1].to(dtype)
        begins = None if segments is None else segments.begins[t]
        if begins is not None:
            before = before.index_fill(0, begins, 0)
    return before - now if segments is None else segments.zero_excluded(before - now, t)
