"""Linear-time PyTorch: a walk along T over [B, k] slices, which runs on any device.

Per band, the sum of y over a window is a difference of two rows of the running sum P of y = h - (segment
mean); see docs/mathematics.md for the identities. On a CPU the slices stay in cache, so the walk costs less
than one `cumsum` over [B, T, k]; nothing of size [B, T, k] is made but P (for a bounded number of rows at a
time) and the results. Masks are 0 or 1 in the features' dtype, because PyTorch vectorises those on a CPU and
boolean ones not (a `masked_fill` takes 20 times as long as a product).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from math import inf, nan

import torch
import torch.nn.functional as F
from torch import Tensor

from tsae_kernels.arguments import dtype_of_stats
from tsae_kernels.backends.windows import ChunkRuns, Windows, rows_by_time, shrink
from tsae_kernels.bands import Bands
from tsae_kernels.segments import find_runs


def _slice_elements(device: torch.device) -> int:
    """How large a [rows, k] slice of the walk may be: large enough to hide the cost of a call.

    From 2^15 elements PyTorch splits an elementwise operation over the CPU's threads. For slices that small waking
    them costs as much as the work, and far more if other processes want the cores (measured on two busy ones: 600 ms
    a step instead of 170), so with several threads a slice stays just below.
    """
    if device.type != "cpu":
        return 2**22
    return 2**16 if torch.get_num_threads() == 1 else 2**15 - 1


def _chunks(h: Tensor, segments: Tensor | None) -> Iterator[tuple[slice, ChunkRuns | None]]:
    """Ranges of rows to walk together, with their runs."""
    B, _, k = h.shape
    chunks = math.ceil(B * k / _slice_elements(h.device))
    step = math.ceil(B / max(chunks, 1)) or 1
    runs = None if segments is None else find_runs(segments)
    for begin in range(0, B, step):
        rows = slice(begin, min(begin + step, B))
        yield rows, None if runs is None else ChunkRuns(runs, rows)


def _activated(
    pre: Sequence[Tensor],
    h: Sequence[Tensor],
    bias: Tensor | None,
    activation: str,
    threshold: Tensor | None,
    release: Tensor | None,
    runs: ChunkRuns | None,
) -> Iterator[Tensor]:
    """Write h[t] for every t in turn, and yield it."""
    dtype = dtype_of_stats(pre[0].dtype)
    on_threshold: Sequence[Tensor] | None = None
    if threshold is not None:
        threshold = threshold.to(dtype).clamp_min(0)
        on_threshold = threshold.unbind(1) if threshold.dim() == 3 else [threshold] * len(pre)
    carries: Sequence[Tensor] | None = None  # [B, 1] each: does the state before t reach t
    if release is not None:
        release = release.to(dtype).clamp_min(0)
        if runs is not None:
            positions = torch.arange(len(pre), device=runs.start.device)
            carries = ((runs.start < positions) & runs.valid).to(dtype)[..., None].unbind(1)
    on: Tensor | None = None  # [B, k], the state before t
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
            z = z.clamp_min(0) * now_on  # NaN stays NaN, to be seen
        elif activation == "relu":
            z = z.clamp_min(0)
        elif activation == "gelu":
            z = F.gelu(z)
        h[t].copy_(z)
        yield h[t]


def _stats(slices: Iterable[Tensor], h: Tensor, bands: Bands, runs: ChunkRuns | None) -> tuple[Tensor, Tensor, Tensor]:
    """`slices` yields h[:, t] in order; it may compute them on the way."""
    B, _, k = h.shape
    dtype = dtype_of_stats(h.dtype)
    total = torch.zeros(B, k, dtype=dtype, device=h.device)
    square = torch.zeros_like(total)
    for t, h_t in enumerate(slices):
        x = h_t.to(dtype)
        if runs is not None:
            x = runs.clear(x, t)
        total.add_(x, alpha=shrink(dtype))
        square.addcmul_(x, x)
    total /= shrink(dtype)
    differences = torch.zeros(len(bands), B, k, dtype=dtype, device=h.device)
    if not bands:
        return differences.transpose(0, 1), total, square

    windows = Windows(h.unbind(1), bands, runs, dtype)
    half_degree = windows.degrees() / 2
    per_band = differences.unbind(0)
    if runs is None:
        weights = half_degree[0].tolist()  # [T][S] numbers
    else:
        weights = [at_t.split(1, dim=1) for at_t in half_degree.unbind(1)]  # [T][S] of [B, 1]
    reaches = {reach for first, last in bands for reach in (first - 1, last)}
    # D = -2 sum_t y_t (F_t - degree_t y_t / 2), F_t the sum of y over [t - last, t - first]: difference first,
    # then product, because a slowly changing feature then has small terms and small rounding errors.
    for t, y in enumerate(windows.fill()):
        low = {reach: windows.low_row(t, reach) for reach in reaches}
        for difference, weight, (first, last) in zip(per_band, weights[t], bands, strict=True):
            term = low[first - 1] - low[last]
            if runs is None:
                term.sub_(y, alpha=weight)
            else:
                term.addcmul_(y, weight, value=-1)
            difference.addcmul_(y, term, value=-2)
    # Where squares overflow infinities may have met. Without a NaN among the features the true value is then infinite.
    differences = differences.clamp_min_(0).where(differences == differences, torch.where(square == square, inf, nan))
    return differences.transpose(0, 1), total, square


def temporal_stats(h: Tensor, bands: Bands, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """differences [B, S, k], total [B, k] and square [B, k] of h [B, T, k]; see `ops.py`."""
    return _gather_chunks(
        h, bands, (_stats(h[rows].unbind(1), h[rows], bands, runs) for rows, runs in _chunks(h, segments))
    )


def activate_with_stats(
    pre: Tensor,
    bias: Tensor | None,
    activation: str,
    threshold: Tensor | None,
    release: Tensor | None,
    bands: Bands,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [B, T, k] = activation(pre + bias) and its statistics; see `ops.py`."""
    h = torch.empty_like(pre, memory_format=torch.contiguous_format)
    dtype = dtype_of_stats(pre.dtype)
    bias = None if bias is None else bias.to(dtype)

    def parts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for rows, runs in _chunks(pre, segments):
            per_position = threshold is not None and threshold.dim() == 3
            level = threshold[rows] if per_position else threshold
            slices = pre[rows].unbind(1), h[rows].unbind(1)
            yield _stats(_activated(*slices, bias, activation, level, release, runs), h[rows], bands, runs)

    return h, *_gather_chunks(pre, bands, parts())


def _gather_chunks(
    h: Tensor, bands: Bands, parts: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    k = h.shape[2]
    options = {"dtype": dtype_of_stats(h.dtype), "device": h.device}
    columns = list(zip(*parts, strict=True)) or [
        (torch.zeros(0, len(bands), k, **options),),
        (torch.zeros(0, k, **options),),
        (torch.zeros(0, k, **options),),
    ]
    return tuple(torch.cat(column).contiguous() for column in columns)


def _window_gradient(
    slices: Sequence[Tensor], coefficient: Tensor, bands: Bands, runs: ChunkRuns | None, dtype: torch.dtype
) -> Iterator[Tensor]:
    """coefficient * (degree * y - N) summed over bands: [B, k] for every t in turn.

    slices: T of [B, k]. coefficient: [1 or B, S, k].
    """
    windows = Windows(slices, bands, runs, dtype, shrink(dtype))
    coefficient = coefficient / shrink(dtype)
    for _ in windows.fill():
        pass
    degrees = windows.degrees()[..., None].unbind(1)  # T of [1 or B, S, 1]
    # N of band (a, b) is (sum over |u-t| <= b) - (sum over |u-t| <= a-1): neighbouring bands share a window.
    shares: dict[int, Tensor] = {}
    for s, (first, last) in enumerate(bands):
        shares[first - 1] = shares.get(first - 1, 0) - coefficient[:, s]
        shares[last] = coefficient[:, s]
    itself = shares.pop(0, None)  # the window |u-t| <= 0 is y_t
    if degrees[0].shape[0] == coefficient.shape[0] == 1:  # one diagonal for all rows
        diagonals: Iterable[Tensor] = (torch.stack(degrees) * coefficient).sum(2)  # [T, 1, k]
    else:
        diagonals = ((degree * coefficient).sum(1) for degree in degrees)  # [B, k] each
    for t, (y, diagonal) in enumerate(zip(windows.centred(), diagonals, strict=True)):
        w = y.mul_(diagonal if itself is None else diagonal - itself)
        for reach, share in shares.items():
            w.addcmul_(windows.high_row(t, reach) - windows.low_row(t, reach), share, value=-1)
        yield w


def activate_with_stats_backward(
    saved: Tensor,
    bias: Tensor | None,
    grad_h: Tensor | None,
    grad_differences: Tensor | None,
    grad_total: Tensor | None,
    grad_square: Tensor | None,
    activation: str,
    bands: Bands,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """grad_pre [B, T, k] and grad_bias [k]; `saved` is h, or for gelu pre; see `ops.py`."""
    dtype = dtype_of_stats(saved.dtype)
    _, T, k = saved.shape
    grad_pre = torch.empty_like(saved, memory_format=torch.contiguous_format)
    grad_bias = torch.zeros(k, dtype=dtype, device=saved.device)
    bias = None if bias is None else bias.to(dtype)
    coefficient, active = _active_features(grad_differences, dtype)

    for rows, runs in _chunks(saved, segments):
        chunk = saved[rows].unbind(1)
        if activation == "gelu":
            h = [torch.empty_like(s) for s in chunk]
            for _ in _activated(chunk, h, bias, "gelu", None, None, None):
                pass
        else:
            h = chunk
        window_terms: Iterable[Tensor | None] = [None] * T
        if coefficient is not None:
            compared = h if active is None else [h_t.index_select(1, active) for h_t in h]
            shared = coefficient.shape[0] == 1
            window_terms = _window_gradient(compared, coefficient if shared else coefficient[rows], bands, runs, dtype)
        incoming = None if grad_h is None else grad_h[rows].unbind(1)
        outgoing = grad_pre[rows].unbind(1)
        accumulated = torch.zeros(rows.stop - rows.start, k, dtype=dtype, device=saved.device)
        total_term = None if grad_total is None else grad_total[rows].to(dtype)
        square_term = None if grad_square is None else 2 * grad_square[rows].to(dtype)
        for t, window_term in enumerate(window_terms):
            if window_term is None or active is not None:
                grad = torch.zeros_like(accumulated)
            else:
                grad = window_term
            if active is not None and window_term is not None:
                grad.index_add_(1, active, window_term)
            if total_term is not None:
                grad += total_term
            if square_term is not None:
                grad.addcmul_(square_term, h[t].to(dtype))
            if runs is not None:
                grad = runs.clear(grad, t)  # excluded positions are in no statistic
            if incoming is not None:
                grad += incoming[t]
            if activation == "relu":
                grad = torch.ops.aten.threshold_backward(grad, h[t].to(dtype), 0)
            elif activation == "gelu":
                z = chunk[t].to(dtype)
                grad = torch.ops.aten.gelu_backward(grad, z if bias is None else z + bias)
            outgoing[t].copy_(grad)
            accumulated += grad
        grad_bias += accumulated.sum(0)
    return grad_pre, grad_bias


def _active_features(grad_differences: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The coefficients 2 * dL/dD, and the features that have any: others are skipped.

    out: [1 or B, S, k'] (None: no feature has any), and the indices of the k' features (None: all of them).
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
    """[]: the sum of weights[b, t] * (h[b, t+1, j] - h[b, t, j])^2."""
    dtype = dtype_of_stats(h.dtype)
    energy = torch.zeros(h.shape[0], dtype=dtype, device=h.device)
    for t, step in enumerate(_steps(h, weights, dtype)):
        energy.addcmul_(weights[:, t], step.square_().sum(1))
    return energy.sum()


def step_energy_backward(h: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    """grad_h [B, T, k] for the gradient of the energy, a [] tensor."""
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
    """h[:, t+1] - h[:, t], zero where the pair has no weight: [B, k] for every t < T - 1."""
    slices = h.unbind(1)
    unused = rows_by_time(weights == 0)
    for t in range(len(slices) - 1):
        step = slices[t + 1].to(dtype) - slices[t].to(dtype)
        yield step if unused[t] is None else step.index_fill_(0, unused[t], 0)
