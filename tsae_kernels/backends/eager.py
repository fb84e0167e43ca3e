"""Linear-time PyTorch for any device: a walk along T over [B, k] slices.

Per band, the sum of y over a window is the difference of two rows of the prefix sum P of y = h - (segment mean); see
docs/mathematics.md, section 2. On a CPU the slices stay in cache, so the walk costs less than one `cumsum` over
[B, T, k]. Besides the results, the only tensor of size [B, T, k] is P, for a bounded number of rows at a time. Masks
are 0 or 1 in the features' dtype, because PyTorch does not vectorize boolean masks on a CPU (a `masked_fill` takes 20
times as long as a product).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from math import inf, nan

import torch
import torch.nn.functional as F
from torch import Tensor

from tsae_kernels.backends.interface import Activation, Gradients
from tsae_kernels.backends.transitions import TransitionCounts
from tsae_kernels.backends.windows import ChunkSegments, WindowSums, rows_by_time
from tsae_kernels.bands import Bands
from tsae_kernels.dtypes import dtype_of_stats, sum_scale
from tsae_kernels.segments import find_runs


def _slice_elements(device: torch.device) -> int:
    """The largest number of elements of a [rows, k] slice: enough to hide the overhead of a call.

    From 2^15 elements on, PyTorch splits an elementwise operation over the CPU's threads. For slices that small, waking
    the threads costs as much as the work, and far more if other processes want the cores (600 ms a step instead of 170,
    measured on two busy ones), so with several threads a slice stays just below.
    """
    if device.type != "cpu":
        return 2**22
    return 2**16 if torch.get_num_threads() == 1 else 2**15 - 1


def _chunks(h: Tensor, segments: Tensor | None) -> Iterator[tuple[slice, ChunkSegments | None]]:
    """Ranges of rows to process together, with their segments."""
    B, _, k = h.shape
    chunks = math.ceil(B * k / _slice_elements(h.device))
    step = math.ceil(B / max(chunks, 1)) or 1
    runs = None if segments is None else find_runs(segments)
    for begin in range(0, B, step):
        rows = slice(begin, min(begin + step, B))
        yield rows, None if runs is None else ChunkSegments(runs, rows)


def _activated(
    pre: Sequence[Tensor], h: Sequence[Tensor], activation: Activation, segments: ChunkSegments | None
) -> Iterator[Tensor]:
    """Write h[t] for t = 0, 1, ... and yield it. pre, h: T slices [B, k]."""
    dtype = dtype_of_stats(pre[0].dtype)
    name, bias, threshold, release = activation
    bias = None if bias is None else bias.to(dtype)
    on_threshold: Sequence[Tensor] | None = None
    if threshold is not None:
        threshold = threshold.to(dtype).clamp_min(0)
        on_threshold = threshold.unbind(1) if threshold.dim() == 3 else [threshold] * len(pre)
    carries: Sequence[Tensor] | None = None  # T of [B, 1]: 1 where the trigger's state at t - 1 carries over to t
    if release is not None:
        release = release.to(dtype).clamp_min(0)
        if segments is not None:
            positions = torch.arange(len(pre), device=segments.start.device)
            carries = ((segments.start < positions) & segments.valid).to(dtype)[..., None].unbind(1)
    on: Tensor | None = None  # [B, k], the trigger's state at t - 1
    for t in range(len(pre)):
        z = pre[t].to(dtype)
        if bias is not None:
            z = z + bias
        if on_threshold is not None:
            now_on = torch.gt(z, on_threshold[t], out=torch.empty_like(z))
            if release is not None:
                if on is not None:
                    on.mul_(torch.gt(z, release, out=torch.empty_like(z)))
                    if carries is not None:
                        on.mul_(carries[t])
                    torch.maximum(now_on, on, out=now_on)
                on = now_on
            z = z.clamp_min(0) * now_on  # NaN stays NaN
        elif name == "relu":
            z = z.clamp_min(0)
        elif name == "gelu":
            z = F.gelu(z)
        h[t].copy_(z)
        yield h[t]


def _stats(
    slices: Iterable[Tensor], h: Tensor, bands: Bands, segments: ChunkSegments | None, transitions: bool
) -> tuple[Tensor, ...]:
    """The statistics of h. `slices` yields h[:, t] in order and may write them to h first."""
    B, T, k = h.shape
    dtype = dtype_of_stats(h.dtype)
    total = torch.zeros(B, k, dtype=dtype, device=h.device)
    square = torch.zeros_like(total)
    counts = TransitionCounts(T, total, segments) if transitions else None
    for t, h_t in enumerate(slices):
        x = h_t.to(dtype)
        if segments is not None:
            x = segments.zero_excluded(x, t)
        total.add_(x, alpha=sum_scale(dtype))
        square.addcmul_(x, x)
        if counts is not None:
            counts.add(t, x)
    total /= sum_scale(dtype)
    differences = _differences(h, square, bands, segments)
    return (differences, total, square) if counts is None else (differences, total, square, counts.counts())


def _differences(h: Tensor, square: Tensor, bands: Bands, segments: ChunkSegments | None) -> Tensor:
    """[B, S, k], given the sum of squares."""
    B, _, k = h.shape
    dtype = square.dtype
    differences = torch.zeros(len(bands), B, k, dtype=dtype, device=h.device)
    if not bands:
        return differences.transpose(0, 1)

    windows = WindowSums(h.unbind(1), bands, segments, dtype)
    half_degree = windows.degrees() / 2
    per_band = differences.unbind(0)
    if segments is None:
        weights = half_degree[0].tolist()  # [T][S] numbers
    else:
        weights = [at_t.split(1, dim=1) for at_t in half_degree.unbind(1)]  # [T][S] of [B, 1]
    reaches = {reach for first, last in bands for reach in (first - 1, last)}
    # D = -2 sum_t y_t (F_t - degree_t y_t / 2), where F_t is the sum of y over [t - last, t - first]. Taking the
    # difference before the product keeps the terms of a slowly changing feature, and their rounding errors, small.
    for t, y in enumerate(windows.fill()):
        low = {reach: windows.low_row(t, reach) for reach in reaches}
        for difference, weight, (first, last) in zip(per_band, weights[t], bands, strict=True):
            term = low[first - 1] - low[last]
            if segments is None:
                term.sub_(y, alpha=weight)
            else:
                term.addcmul_(y, weight, value=-1)
            difference.addcmul_(y, term, value=-2)
    # Overflowing squares can give inf - inf = NaN. Unless a feature is NaN, the true value is then infinite.
    differences = differences.clamp_min_(0).where(differences == differences, torch.where(square == square, inf, nan))
    return differences.transpose(0, 1)


def temporal_stats(h: Tensor, bands: Bands, segments: Tensor | None, transitions: bool = False) -> tuple[Tensor, ...]:
    """See `interface.Backend`."""
    chunks = _chunks(h, segments)
    stats = (_stats(h[rows].unbind(1), h[rows], bands, chunk, transitions) for rows, chunk in chunks)
    return _concatenated(h, bands, stats, transitions)


def activate_with_stats(
    pre: Tensor, activation: Activation, bands: Bands, segments: Tensor | None, transitions: bool = False
) -> tuple[Tensor, ...]:
    """See `interface.Backend`."""
    h = torch.empty_like(pre, memory_format=torch.contiguous_format)
    threshold = activation.threshold

    def stats_of_chunks() -> Iterator[tuple[Tensor, ...]]:
        for rows, chunk in _chunks(pre, segments):
            of_rows = activation
            if threshold is not None and threshold.dim() == 3:  # [B, T, 1]
                of_rows = activation._replace(threshold=threshold[rows])
            slices = _activated(pre[rows].unbind(1), h[rows].unbind(1), of_rows, chunk)
            yield _stats(slices, h[rows], bands, chunk, transitions)

    return h, *_concatenated(pre, bands, stats_of_chunks(), transitions)


def _concatenated(
    h: Tensor, bands: Bands, chunks: Iterable[tuple[Tensor, ...]], transitions: bool
) -> tuple[Tensor, ...]:
    """The statistics of all chunks in one tensor each; empty tensors for an empty batch."""
    k, dtype = h.shape[2], dtype_of_stats(h.dtype)
    columns = list(zip(*chunks, strict=True))
    if not columns:
        shapes = (0, len(bands), k), (0, k), (0, k)
        columns = [(h.new_zeros(shape, dtype=dtype),) for shape in shapes]
        columns += [(h.new_zeros(0, 3, k, dtype=torch.int32),)] * transitions
    return tuple(torch.cat(column).contiguous() for column in columns)


def _window_gradient(
    slices: Sequence[Tensor], coefficient: Tensor, bands: Bands, segments: ChunkSegments | None, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield coefficient * (degree * y - N) summed over bands, [B, k], for t = 0, 1, ...

    N is the sum of y at the band's offsets, before and after t. slices: T of [B, k]. coefficient: [1 or B, S, k].
    """
    windows = WindowSums(slices, bands, segments, dtype, sum_scale(dtype))
    coefficient = coefficient / sum_scale(dtype)
    for _ in windows.fill():
        pass
    degrees = windows.degrees()[..., None].unbind(1)  # T of [1 or B, S, 1]
    # N of band (a, b) is (sum over |u-t| <= b) - (sum over |u-t| <= a-1), so adjacent bands share a window.
    shares: dict[int, Tensor] = {}
    for s, (first, last) in enumerate(bands):
        shares[first - 1] = shares.get(first - 1, 0) - coefficient[:, s]
        shares[last] = coefficient[:, s]
    own_share = shares.pop(0, None)  # the window |u-t| <= 0 is y_t
    if degrees[0].shape[0] == coefficient.shape[0] == 1:  # one diagonal for all rows
        diagonals: Iterable[Tensor] = (torch.stack(degrees) * coefficient).sum(2)  # [T, 1, k]
    else:
        diagonals = ((degree * coefficient).sum(1) for degree in degrees)  # [B, k] each
    for t, (y, diagonal) in enumerate(zip(windows.centred(), diagonals, strict=True)):
        w = y.mul_(diagonal if own_share is None else diagonal - own_share)
        for reach, share in shares.items():
            w.addcmul_(windows.high_row(t, reach) - windows.low_row(t, reach), share, value=-1)
        yield w


def activate_with_stats_backward(
    saved: Tensor,
    grads: Gradients,
    activation: Activation,
    bands: Bands,
    segments: Tensor | None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `interface.Backend`."""
    dtype = dtype_of_stats(saved.dtype)
    grad_pre = torch.empty_like(saved, memory_format=torch.contiguous_format)
    grad_bias = torch.zeros(saved.shape[2], dtype=dtype, device=saved.device)
    bias = None if activation.bias is None else activation.bias.to(dtype)
    coefficient, active = _active_features(grads.differences, dtype)
    for rows, chunk in _chunks(saved, segments):
        inputs = saved[rows].unbind(1)
        h: Sequence[Tensor] = inputs
        if activation.name == "gelu":
            h = [torch.empty_like(x) for x in inputs]
            for _ in _activated(inputs, h, activation, None):
                pass
        window_terms: Iterable[Tensor | None] = [None] * len(h)
        if coefficient is not None:
            compared = h if active is None else [h_t.index_select(1, active) for h_t in h]
            of_rows = coefficient if coefficient.shape[0] == 1 else coefficient[rows]
            window_terms = _window_gradient(compared, of_rows, bands, chunk, dtype)
        grads_of_rows = Gradients(*(None if grad is None else grad[rows] for grad in grads))
        outputs = grad_pre[rows].unbind(1)
        sum_over_time = torch.zeros(rows.stop - rows.start, saved.shape[2], dtype=dtype, device=saved.device)
        for t, grad in enumerate(_gradients_of_h(h, grads_of_rows, window_terms, active, chunk)):
            if activation.name == "relu":
                grad = torch.ops.aten.threshold_backward(grad, h[t].to(dtype), 0)
            elif activation.name == "gelu":
                z = inputs[t].to(dtype)
                grad = torch.ops.aten.gelu_backward(grad, z if bias is None else z + bias)
            outputs[t].copy_(grad)
            sum_over_time += grad
        grad_bias += sum_over_time.sum(0)
    return grad_pre, grad_bias


def _gradients_of_h(
    h: Sequence[Tensor],
    grads: Gradients,
    window_terms: Iterable[Tensor | None],
    active: Tensor | None,
    segments: ChunkSegments | None,
) -> Iterator[Tensor]:
    """Yield the gradient with respect to h[t], through h and through its statistics, [B, k], for t = 0, 1, ...

    window_terms: the gradient through the differences, of the `active` features (None: of all), or None for zero
    """
    dtype = dtype_of_stats(h[0].dtype)
    incoming = None if grads.h is None else grads.h.unbind(1)
    total_term = None if grads.total is None else grads.total.to(dtype)
    square_term = None if grads.square is None else 2 * grads.square.to(dtype)
    for t, window_term in enumerate(window_terms):
        if window_term is None or active is not None:
            grad = torch.zeros_like(h[t], dtype=dtype, memory_format=torch.contiguous_format)
        else:
            grad = window_term
        if active is not None and window_term is not None:
            grad.index_add_(1, active, window_term)
        if total_term is not None:
            grad += total_term
        if square_term is not None:
            grad.addcmul_(square_term, h[t].to(dtype))
        if segments is not None:
            grad = segments.zero_excluded(grad, t)  # excluded positions are in no statistic
        if incoming is not None:
            grad += incoming[t]
        yield grad


def _active_features(grad_differences: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The coefficients 2 * dL/dD of the features that have a nonzero one; all other features are skipped.

    out: [1 or B, S, k'], or None if no feature has any; and the indices of those k' features, or None for all.
    """
    if grad_differences is None or grad_differences.numel() == 0:
        return None, None
    if grad_differences.stride(0) == 0:  # one gradient for the whole batch, as a sum over b gives
        grad_differences = grad_differences[:1]
    coefficient = 2 * grad_differences.to(dtype)
    has_any = (coefficient != 0).any(0).any(0)
    active = has_any.nonzero().squeeze(1)
    if len(active) == 0:
        return None, None
    if len(active) == len(has_any):
        return coefficient, None
    return coefficient.index_select(2, active), active


def step_energy(h: Tensor, weights: Tensor) -> Tensor:
    """See `interface.Backend`."""
    dtype = dtype_of_stats(h.dtype)
    energy = torch.zeros(h.shape[0], dtype=dtype, device=h.device)
    for t, step in enumerate(_steps(h, weights, dtype)):
        energy.addcmul_(weights[:, t], step.square_().sum(1))
    return energy.sum()


def step_energy_backward(h: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    """See `interface.Backend`."""
    dtype = dtype_of_stats(h.dtype)
    grad_h = torch.empty_like(h, memory_format=torch.contiguous_format)
    scale = 2 * grad.to(dtype) * weights[..., None]  # [B, T, 1]
    before = torch.zeros((), dtype=dtype, device=h.device)
    outgoing = grad_h.unbind(1)
    for t, step in enumerate(_steps(h, weights, dtype)):
        after = step.mul_(scale[:, t])
        outgoing[t].copy_(before - after)
        before = after
    outgoing[-1].copy_(before)
    return grad_h


def _steps(h: Tensor, weights: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield h[:, t+1] - h[:, t], [B, k], zero where the pair has no weight, for t = 0, ..., T - 2."""
    slices = h.unbind(1)
    unused = rows_by_time(weights == 0)
    for t in range(len(slices) - 1):
        step, rows = slices[t + 1].to(dtype) - slices[t].to(dtype), unused[t]
        yield step if rows is None else step.index_fill_(0, rows, 0)
