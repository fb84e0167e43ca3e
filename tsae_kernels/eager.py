"""Linear-time PyTorch: a walk along T over [B, k] slices, which runs on any device.

Per band, the sum of y over a window is a difference of two rows of the running sum P of y = h - (segment
mean); see docs/mathematics.md for the identities. On a CPU the slices stay in cache, so the walk costs less
than one `cumsum` over [B, T, k]; nothing of size [B, T, k] is made but P (for a bounded number of rows at a
time) and the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tsae_kernels.bands import Bands
from tsae_kernels.reference import dtype_of_stats
from tsae_kernels.segments import Runs, find_runs

# Rows of the batch are walked together until a slice is this large: enough to hide the cost of a call.
_SLICE_ELEMENTS = {"cpu": 2**16}
_SLICE_ELEMENTS_ELSEWHERE = 2**22


class _Windows:
    """Running sums of the centred rows of one chunk, and the bounds of the windows that bands ask for."""

    def __init__(self, slices: Sequence[Tensor], sums: Tensor, runs: Runs | None, dtype: torch.dtype) -> None:
        """slices: T of [B, k]. sums: [B, k], or [B, R, k] with the sum of each of R runs. runs: [B, T]."""
        self.slices, self.runs, self.dtype = slices, runs, dtype
        self.T, (self.B, self.k) = len(slices), slices[0].shape
        self.P = sums.new_empty(self.T + 1, self.B, self.k)  # P[t] = y[0] + ... + y[t-1]
        self.P[0] = 0
        self.rows = self.P.unbind(0)
        if runs is None:
            self.mean = sums / self.T
            return
        self.lanes = torch.arange(self.B, device=sums.device)
        lengths = (runs.end - runs.start).clamp_min(1)
        count = torch.ones_like(sums[..., :1]).scatter_(
            1, runs.index[..., None], lengths[..., None].to(dtype)
        )
        self.run_means = (sums / count).flatten(0, 1)  # [B * R, k]
        self.run_of = (runs.index + self.lanes[:, None] * sums.shape[1]).unbind(1)
        self.excluded = (~runs.valid)[..., None].unbind(1)
        self.start, self.end = runs.start.unbind(1), runs.end.unbind(1)

    def centred(self, t: int) -> Tensor:
        """y[t]: [B, k], zero at excluded positions."""
        x = self.slices[t].to(self.dtype)
        if self.runs is None:
            return x - self.mean
        return (x - self.run_means.index_select(0, self.run_of[t])).masked_fill_(self.excluded[t], 0)

    def push(self, t: int, y: Tensor) -> None:
        torch.add(self.rows[t], y, out=self.rows[t + 1])

    def below(self, t: int, reach: int) -> Tensor:
        """P at t - reach, but not before the segment's start: [B, k]."""
        if self.runs is None:
            return self.rows[max(t - reach, 0)]
        return self._gather(self.start[t].clamp_min(t - reach))

    def above(self, t: int, reach: int) -> Tensor:
        """P at t + reach + 1, but not after the segment's end: [B, k]."""
        if self.runs is None:
            return self.rows[min(t + reach + 1, self.T)]
        return self._gather(self.end[t].clamp_max(t + reach + 1))

    def _gather(self, row: Tensor) -> Tensor:
        return self.P.flatten(0, 1).index_select(0, row * self.B + self.lanes)

    def degrees(self, bands: Bands) -> Tensor:
        """[1 or B, T, S]: how many positions of t's segment lie at each band's offsets, on both sides."""
        t = torch.arange(self.T, device=self.P.device)
        start = t.new_zeros(1, self.T) if self.runs is None else self.runs.start
        end = t.new_full((1, self.T), self.T) if self.runs is None else self.runs.end
        counts = [
            torch.maximum(t - first + 1, start)
            - torch.maximum(t - last, start)
            + torch.minimum(t + last + 1, end)
            - torch.minimum(t + first, end)
            for first, last in bands
        ]
        return torch.stack(counts, dim=2).to(self.dtype) if counts else start.new_zeros(*start.shape, 0)


def _chunks(h: Tensor, segments: Tensor | None) -> Iterator[tuple[slice, Runs | None]]:
    """Ranges of rows to walk together, with their runs."""
    B, _, k = h.shape
    step = max(1, _SLICE_ELEMENTS.get(h.device.type, _SLICE_ELEMENTS_ELSEWHERE) // k)
    runs = None if segments is None else find_runs(segments)
    for begin in range(0, B, step):
        rows = slice(begin, min(begin + step, B))
        yield rows, runs and Runs(*(field[rows] for field in runs))


def _run_sums(slices: Iterable[Tensor], runs: Runs, k: int, dtype: torch.dtype) -> Tensor:
    """[B, R, k]: the sum of every run."""
    B = runs.index.shape[0]
    R = int(runs.index.max()) + 1
    lanes = torch.arange(B, device=runs.index.device)
    sums = torch.zeros(B * R, k, dtype=dtype, device=runs.index.device)
    for t, h_t in enumerate(slices):
        sums.index_add_(0, runs.index[:, t] + lanes * R, h_t.to(dtype))
    return sums.view(B, R, k)


def _activated(
    pre: Sequence[Tensor],
    h: Sequence[Tensor],
    bias: Tensor | None,
    activation: str,
    threshold: Tensor | None,
    release: Tensor | None,
    runs: Runs | None,
) -> Iterator[Tensor]:
    """Write h[t] for every t in turn, and yield it."""
    dtype = dtype_of_stats(pre[0].dtype)
    on_threshold: Sequence[Tensor] | None = None
    if threshold is not None:
        threshold = threshold.to(dtype).clamp_min(0)
        on_threshold = threshold.unbind(1) if threshold.dim() == 3 else [threshold] * len(pre)
    if release is not None:
        release = release.to(dtype).clamp_min(0)
        if runs is not None:
            positions = torch.arange(len(pre), device=runs.start.device)
            begins = ((runs.start == positions) | ~runs.valid)[..., None].unbind(1)  # nothing is carried over
    off = None  # [B, k], the state before t
    for t in range(len(pre)):
        z = pre[t].to(dtype)
        if bias is not None:
            z = z + bias
        if on_threshold is not None:
            now_off = z <= on_threshold[t]  # so that NaN stays on and is seen
            if release is not None:
                if off is not None:
                    off = (z <= release).bitwise_or_(off)
                    if runs is not None:
                        off.bitwise_or_(begins[t])
                    now_off.bitwise_and_(off)
                off = now_off
            z = z.masked_fill(now_off, 0)
        elif activation == "relu":
            z = z.clamp_min(0)
        elif activation == "gelu":
            z = F.gelu(z)
        h[t].copy_(z)
        yield h[t]


def _stats(
    slices: Iterable[Tensor], h: Tensor, bands: Bands, runs: Runs | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`slices` yields h[:, t] in order; it may compute them on the way."""
    B, T, k = h.shape
    dtype = dtype_of_stats(h.dtype)
    total = torch.zeros(B, k, dtype=dtype, device=h.device)
    square = torch.zeros_like(total)
    for t, h_t in enumerate(slices):
        x = h_t.to(dtype)
        if runs is not None:
            x = x.masked_fill(~runs.valid[:, t, None], 0)
        total += x
        square.addcmul_(x, x)
    differences = torch.zeros(len(bands), B, k, dtype=dtype, device=h.device)
    if not bands:
        return differences.transpose(0, 1), total, square

    h_slices = h.unbind(1)
    windows = _Windows(h_slices, total if runs is None else _run_sums(h_slices, runs, k, dtype), runs, dtype)
    degree = windows.degrees(bands)
    weights = degree[0].tolist() if runs is None else degree[..., None].unbind(1)  # per t
    # products[m] = sum over t of y_t * (sum of y before t - m in the segment).
    products = {reach: torch.zeros_like(total) for first, last in bands for reach in (first - 1, last)}
    for t in range(T):
        y = windows.centred(t)
        windows.push(t, y)
        y2 = y * y
        for s in range(len(bands)):
            if runs is None:
                differences[s].add_(y2, alpha=weights[t][s])
            else:
                differences[s].addcmul_(y2, weights[t][:, s])
        for reach, product in products.items():
            product.addcmul_(y, windows.below(t, reach))
    for s, (first, last) in enumerate(bands):
        differences[s].sub_(products[first - 1] - products[last], alpha=2)
    return differences.clamp_min_(0).transpose(0, 1), total, square


def temporal_stats(h: Tensor, bands: Bands, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
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
    slices: Sequence[Tensor], coefficient: Tensor, bands: Bands, runs: Runs | None, dtype: torch.dtype
) -> Iterator[Tensor]:
    """coefficient * (degree * y - N) summed over bands: [B, k] for every t in turn.

    slices: T of [B, k]. coefficient: [1 or B, S, k].
    """
    k = slices[0].shape[1]
    if runs is None:
        sums = torch.zeros(slices[0].shape, dtype=dtype, device=slices[0].device)
        for h_t in slices:
            sums += h_t
    else:
        sums = _run_sums(slices, runs, k, dtype)
    windows = _Windows(slices, sums, runs, dtype)
    for t in range(len(slices)):
        windows.push(t, windows.centred(t))
    degree = windows.degrees(bands)
    # N of band (a, b) is (sum over |u-t| <= b) - (sum over |u-t| <= a-1), so neighbouring bands share a
    # window.
    shares: dict[int, Tensor] = {}
    for s, (first, last) in enumerate(bands):
        shares[first - 1] = shares.get(first - 1, 0) - coefficient[:, s]
        shares[last] = coefficient[:, s]
    itself = shares.pop(0, None)  # the window |u-t| <= 0 is y_t
    for t in range(len(slices)):
        diagonal = torch.matmul(degree[:, t : t + 1], coefficient)[:, 0]
        if itself is not None:
            diagonal = diagonal - itself
        w = windows.centred(t).mul_(diagonal)
        for reach, share in shares.items():
            w.addcmul_(windows.above(t, reach) - windows.below(t, reach), share, value=-1)
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
            window_terms = _window_gradient(
                compared, coefficient if shared else coefficient[rows], bands, runs, dtype
            )
        incoming = None if grad_h is None else grad_h[rows].unbind(1)
        outgoing = grad_pre[rows].unbind(1)
        accumulated = torch.zeros(rows.stop - rows.start, k, dtype=dtype, device=saved.device)
        for t, window_term in enumerate(window_terms):
            if incoming is None:
                grad = torch.zeros_like(accumulated)
            else:
                grad = incoming[t].to(dtype, copy=True)
            if window_term is not None:
                if active is None:
                    grad += window_term
                else:
                    grad.index_add_(1, active, window_term)
            for gradient, factor in ((grad_total, None), (grad_square, 2 * h[t].to(dtype))):
                if gradient is None:
                    continue
                term = gradient[rows].to(dtype) if factor is None else gradient[rows] * factor
                grad += term if runs is None else term.masked_fill(~runs.valid[:, t, None], 0)
            if activation == "relu":
                grad.masked_fill_(h[t] <= 0, 0)
            elif activation == "gelu":
                z = chunk[t].to(dtype)
                grad = torch.ops.aten.gelu_backward(grad, z if bias is None else z + bias)
            outgoing[t].copy_(grad)
            accumulated += grad
        grad_bias += accumulated.sum(0)
    return grad_pre, grad_bias


def _active_features(
    grad_differences: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The coefficients 2 * dL/dD and the features that have any: features without one are skipped, not
    multiplied.

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
    dtype = dtype_of_stats(h.dtype)
    energy = torch.zeros(h.shape[0], dtype=dtype, device=h.device)
    for t, step in enumerate(_steps(h, weights, dtype)):
        energy.addcmul_(weights[:, t], step.square_().sum(1))
    return energy.sum()


def step_energy_backward(h: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
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
    unused = (weights == 0)[..., None].unbind(1)
    for t in range(len(slices) - 1):
        yield (slices[t + 1].to(dtype) - slices[t].to(dtype)).masked_fill_(unused[t], 0)
