"""Brute-force statistics, activations and losses that the kernels must agree with, and the backends under test."""

from __future__ import annotations

import functools
import math
import sys

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

import tsae_kernels
from tsae_kernels import available_backends
from tsae_kernels.backends.registry import _DEVICE_TYPES
from tsae_kernels.backends.triton import launch

_STATES = available_backends()
FAST = ("eager", "cpp", "cuda", "triton")  # the backends under test; `reference` is the definition
HERE = tuple(name for name in ("reference", *FAST) if _STATES[name] == "ok")

INTERPRETED = _STATES["triton"] == "ok" and launch.interpreting()
COUNTING = "triton_compilations" in sys.modules  # the results are not Triton's
DEVICE = {name: _DEVICE_TYPES.get(name, "cpu") if _STATES[name] == "ok" else "cpu" for name in FAST}


def too_slow(backend, reason):
    """Skip a case that takes Triton's interpreter too long: it needs about 1 ms per row, operation and program."""
    if backend == "triton" and INTERPRETED and reason:
        pytest.skip("takes Triton's interpreter too long")


GAPS = ((2, 7), (9, 40))


def few(backend, bands, gaps=False):
    """`bands`, but one of two sets for compiled Triton kernels, which are compiled anew for every set of bands."""
    if backend != "triton" or INTERPRETED:
        return bands
    return GAPS if gaps else tsae_kernels.MULTISCALE


def compiles_too_much(backend, needless):
    """Skip a case that only adds a combination of what other cases test, where it costs Triton a compilation."""
    if backend == "triton" and not INTERPRETED and needless:
        pytest.skip("other cases test this with kernels that are compiled anyway")


def carried(tree, backend):
    """`tree` with its tensors on the backend's device, or on the CPU if `backend` is None."""
    device = DEVICE.get(backend, "cpu")
    return _pytree.tree_map_only(Tensor, lambda x: x.to(device), tree)


def _carried(function):
    """`function` on the device of its backend, with arguments and results on the CPU."""

    @functools.wraps(function)
    def call(*args, backend=None, **kwargs):
        if DEVICE.get(backend, "cpu") == "cpu":
            return function(*args, backend=backend, **kwargs)
        args, kwargs = carried((args, kwargs), backend)
        return carried(function(*args, backend=backend, **kwargs), None)

    return call


activate_with_stats = _carried(tsae_kernels.activate_with_stats)
encode_with_stats = _carried(tsae_kernels.encode_with_stats)
leaky_recurrence = _carried(tsae_kernels.leaky_recurrence)
temporal_loss = _carried(tsae_kernels.temporal_loss)
temporal_stats = _carried(tsae_kernels.temporal_stats)
viterbi_path = _carried(tsae_kernels.viterbi_path)
window_consistency = _carried(tsae_kernels.window_consistency)


def parameters(names):
    """Parameters of a test: unavailable backends are skipped with the reason."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(_STATES[name] != "ok", reason=f"{name} is {_STATES[name]}"))
        for name in names
    ]


BACKENDS = parameters(("reference", *FAST))
FAST_BACKENDS = parameters(FAST)
# For tests of many random samples; test_kernels_triton.py has smaller ones.
SAMPLED_BACKENDS = parameters([name for name in ("reference", *FAST) if not (name == "triton" and INTERPRETED)])


def same_segment(ids, t, u) -> bool:
    """Whether positions t <= u are in one maximal run of equal, non-negative ids. ids: a row's list, or None."""
    return ids is None or (ids[t] >= 0 and all(ids[v] == ids[t] for v in range(t, u + 1)))


def rows_of(segments, B):
    return [None] * B if segments is None else segments.tolist()


def stats(h, bands, segments=None):
    """h: [B, T, k]. out: differences [B, S, k], total [B, k], square [B, k], all float64."""
    h = h.detach().double()
    B, T, k = h.shape
    differences = torch.zeros(B, len(bands), k, dtype=torch.float64)
    total, square = torch.zeros(2, B, k, dtype=torch.float64)
    for b, ids in enumerate(rows_of(segments, B)):
        for t in range(T):
            if not same_segment(ids, t, t):
                continue
            total[b] += h[b, t]
            square[b] += h[b, t] ** 2
            end = t + 1  # of t's segment
            while end < T and (ids is None or ids[end] == ids[t]):
                end += 1
            for s, (first, last) in enumerate(bands):
                partners = h[b, t + first : min(t + last + 1, end)]
                differences[b, s] += ((partners - h[b, t]) ** 2).sum(0)
    return differences, total, square


def activation(pre, bias=None, name="relu", threshold=None, release=None, segments=None):
    """Entry by entry, in pre's own precision."""
    z = pre.detach() + (0 if bias is None else bias.detach())
    if name == "identity":
        return z
    out = torch.zeros_like(z)
    B, T, k = z.shape
    zero = torch.zeros(B, T, k, dtype=z.dtype)
    level = zero if threshold is None else zero + threshold
    low = None if release is None else zero + release
    rows = rows_of(segments, B)
    for b in range(B):
        for j in range(k):
            on = False
            for t in range(T):
                value = z[b, t, j].item()
                if name == "gelu":
                    out[b, t, j] = 0.5 * value * (1 + math.erf(value / math.sqrt(2)))
                    continue
                carried = t > 0 and same_segment(rows[b], t - 1, t) and on
                on = value > max(level[b, t, j].item(), 0)
                if low is not None and carried and value > low[b, t, j].item():
                    on = True
                out[b, t, j] = value if on else 0
    return out


def active_words(h: torch.Tensor) -> torch.Tensor:
    """The mask of `activate_with_mask` [B, ceil(T / 32), k] int32 from h [B, T, k]."""
    B, T, k = h.shape
    bits = torch.zeros(B, -(-T // 32) * 32, k, dtype=torch.int64)
    bits[:, :T] = h != 0
    words = (bits.unflatten(1, (-1, 32)) << torch.arange(32)[:, None]).sum(2)
    return torch.where(words < 2**31, words, words - 2**32).int()


def window_loss(h, window, segments=None):
    """The mean over all windows, one by one."""
    h = h.detach().double()
    B, T, _ = h.shape
    losses = []
    for b, ids in enumerate(rows_of(segments, B)):
        for t in range(T - window + 1):
            if same_segment(ids, t, t + window - 1):
                steps = h[b, t + 1 : t + window] - h[b, t : t + window - 1]
                losses.append((steps**2).sum() / (window - 1))
    return torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64)


def paper_loss(h, weights, bands, variance=None, min_variance=0.01, segments=None):
    differences, _, _ = stats(h, bands, segments)
    h = h.detach().double()
    B, T, _ = h.shape
    positions, variances = 0, []
    for b, ids in enumerate(rows_of(segments, B)):
        kept = [t for t in range(T) if ids is None or ids[t] >= 0]
        positions += len(kept)
        if kept:
            variances.append(h[b, kept].var(0, correction=0))
    if variance is None:
        variance = torch.stack(variances).mean(0)
    variance = torch.where(variance >= min_variance, variance.double(), 0)
    if variance.sum() == 0:
        return torch.zeros((), dtype=torch.float64)
    omega = variance / variance.sum()
    scale = torch.tensor(weights, dtype=torch.float64)
    return (differences.sum(0) * scale[:, None] * omega).sum() / positions


def random_segments(B, T, generator=None, longest=40):
    """Segments of random length with ids that recur, and excluded runs."""
    rows = []
    for _ in range(B):
        row = []
        while len(row) < T:
            length = int(torch.randint(1, longest, (), generator=generator))
            row += [int(torch.randint(-1, 3, (), generator=generator))] * length
        rows.append(row[:T])
    return torch.tensor(rows).reshape(B, T)
