"""Launches of the Triton kernels on lists of active features: `sparse_ops.py` says what each function computes.

Every docstring gives the bytes read and written, with N tokens, k features, d columns, C places and A active features a
token, G prefixes, and e, w, g, x the bytes of an element of pre, of the weight, of the gradient of xhat and of x. Rows
that are gathered count each time; a cut to a block of columns comes from the L2 cache after the first time.
Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tsae_kernels.backends.sparse_eager import compute_dtype
from tsae_kernels.backends.triton.launch import _on_device_of, _strides, _triton_dtype, interpreting
from tsae_kernels.bands import Bands
from tsae_kernels.dtypes import dtype_of_stats

_WIDE = 8192  # features; a row of a wider active mask is cut into more ranges
_RANGES = (4, 32)  # of narrow and wide rows. Two numbers, since each compiles; a program reads all ranges' counts
_CACHED = 24 * 2**20  # bytes of gathered rows that stay in an H100's L2 cache (50 MB, in two halves)
_ENTRIES = 256  # entries by feature for a program of `weight_gradients`
_UNROLL = 8  # rows requested at a time


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _rounding(dtype: torch.dtype) -> str:
    """The constant ROUNDING of the kernels, see `forward.narrow`; here a cast, since some round single numbers."""
    return "bits" if dtype == torch.bfloat16 and interpreting() else "cast"


def _block_d(d: int, rows: int, element_size: int) -> int:
    """Columns of a program: one warp's 16-byte loads, or fewer so that two thirds of the gathered rows are cached."""
    block = min(512 // element_size, max(_power_of_2(d), 32))
    while block > 128 and rows * block * element_size > 1.5 * _CACHED:
        block //= 2
    return block


def compress(active: Tensor, pre: Tensor, bias: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three launches: the mask's counts, the indices, the values.

    Bytes: N k / 4 + 36 N A + N C (8 + e) + 8 N, where an entry of pre costs a sector of 32. The mask (N k / 8) is read
    twice, the second time from the L2 cache if it fits.
    """
    from tsae_kernels.backends.triton.sparse_lists import values_kernel

    (B, T, k), values = pre.shape, pre.new_empty(pre.shape[0] * pre.shape[1], capacity)
    indices, counts = _places(active, T, capacity)
    if B == 0:
        return values, indices, counts
    E, block = B * T * capacity, 512
    with _on_device_of(pre):
        values_kernel[(-(-E // block),)](
            pre, bias, counts, indices, values, T, k, capacity, E, *pre.stride(),
            COMPUTE=_triton_dtype(dtype_of_stats(pre.dtype)), ROUNDING=_rounding(pre.dtype), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return values, indices, counts


def _places(active: Tensor, T: int, capacity: int) -> tuple[Tensor, Tensor]:
    """indices [N, C], written up to the counts [N], of the features in a mask [B, W, k]: two launches."""
    from tsae_kernels.backends.triton.sparse_lists import list_kernel

    (B, W, k), chunks = active.shape, _RANGES[active.shape[2] > _WIDE]
    indices, counts = active.new_empty(B * T, capacity), active.new_empty(B * T)
    if B == 0:
        return indices, counts
    chunk_counts = active.new_empty(B * W, chunks, 32)
    lists = active.contiguous(), chunk_counts, indices, counts, T, W, k, capacity
    with _on_device_of(active):
        for writes in (False, True):
            list_kernel[(B * W * chunks,)](*lists, CHUNKS=chunks, WRITES=writes, num_warps=1, enable_fp_fusion=True)
    return indices, counts


def _count(active: Tensor, T: int) -> Tensor:
    """[N] int32: the features of each token in a mask [B, W, k]. One launch and a sum over the ranges of columns."""
    from tsae_kernels.backends.triton.sparse_lists import list_kernel

    (B, W, k), chunks = active.shape, _RANGES[active.shape[2] > _WIDE]
    chunk_counts = active.new_empty(B, W, chunks, 32)
    with _on_device_of(active):
        list_kernel[(B * W * chunks,)](
            active, chunk_counts, None, None, T, W, k, 0,
            CHUNKS=chunks, WRITES=False, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return chunk_counts.sum(2, dtype=torch.int32).view(B, W * 32)[:, :T].flatten()


def compress_gated(
    active: Tensor,
    pre: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    release: Tensor,
    segments: Tensor | None,
    width: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Five launches and a sum: the window, the lists of what it adds to the mask, the active features' counts.

    Bytes: N k (e + 1 / 4) for the window, then as `compress` with A the entries of a token, N k / 8 for the counts, and
    64 N A + 4 N C, where the two words that an entry reads cost a sector of 32 each. Levels come from the caches.
    """
    from tsae_kernels.backends.triton.sparse_lists import gated_values_kernel, window_kernel

    (B, T, k), W = pre.shape, active.shape[1]
    values = pre.new_empty(B * T, capacity)
    levels = pre.new_empty(B * T, capacity, dtype=torch.float32)
    active = active.contiguous()
    if B == 0:
        return values, *_places(active, T, capacity), levels, active.new_empty(0)
    listed, half = torch.empty_like(active), width / 2
    strides = *pre.stride(), *_strides(threshold, 1), *_strides(release, 1), *_strides(segments, 2)
    E, block, columns = B * T * capacity, 512, 256
    with _on_device_of(pre):
        window_kernel[(B * W * -(-k // columns),)](
            active, pre, bias, threshold, release, segments, listed, T, W, k, half, *strides,
            BLOCK=columns, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
        indices, counts = _places(listed, T, capacity)
        gated_values_kernel[(-(-E // block),)](
            active, pre, bias, threshold, release, segments, counts, indices, values, levels,
            T, W, k, capacity, E, half, *strides,
            COMPUTE=_triton_dtype(dtype_of_stats(pre.dtype)), ROUNDING=_rounding(pre.dtype), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return values, indices, counts, levels, _count(active, T)


def decode(
    values: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, ends: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """One launch. Bytes: N A d w gathered + G N d (bytes of dtype) written + N A (4 + e) ceil(d / block)."""
    from tsae_kernels.backends.triton.sparse_rows import decode_kernel

    (N, C), (k, d) = indices.shape, weight.shape
    out = values.new_empty(len(ends), N, d, dtype=dtype)
    if N == 0 or d == 0:
        return out
    block = _block_d(d, k, weight.element_size())
    with _on_device_of(weight):
        decode_kernel[(N, -(-d // block))](
            values, indices, counts, weight, out, N, C, d,
            ENDS=tuple(ends[:-1]), PLACES=_power_of_2(C), BLOCK_D=block, EVEN_D=d % block == 0, UNROLL=_UNROLL,
            COMPUTE=_triton_dtype(compute_dtype(values, weight)), ROUNDING=_rounding(dtype), num_warps=1,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def decode_backward(
    grad: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, ends: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """One launch, and a sum over P parts if the weight does not fit in the cache.

    Bytes: N A d w gathered + G N d g + N A (4 + e) + 8 P N C for the parts.
    """
    from tsae_kernels.backends.triton.sparse_rows import decode_backward_kernel

    (N, C), (k, d) = indices.shape, weight.shape
    block = _block_d(d, k, weight.element_size())
    blocks = -(-d // block)  # of columns
    most = max(_CACHED // max(k * block * weight.element_size(), 1), 1)
    parts = -(-blocks // most)
    each = -(-blocks // parts)
    parts = -(-blocks // each)
    compute = compute_dtype(grad, weight)
    out = grad.new_empty(parts, N, C, dtype=dtype if parts == 1 else compute)
    if N > 0 and d > 0:
        with _on_device_of(weight):
            decode_backward_kernel[(N, parts)](
                grad, indices, counts, weight, out, N, C, d, each,
                ENDS=tuple(ends[:-1]), PLACES=_power_of_2(C), BLOCK_D=block,
                EVEN_D=d % (block * each) == 0, UNROLL=_UNROLL // 2, COMPUTE=_triton_dtype(compute),
                ROUNDING=_rounding(out.dtype), num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0).to(dtype)


def sort_entries(indices: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """torch.sort, a search for the offsets, and one launch. Bytes: about 24 N C for each of the sort's 4 passes,
    N C (12 + 32), where a value costs a sector, and 8 k."""
    from tsae_kernels.backends.triton.sparse_lists import entries_kernel

    features, order = torch.sort(indices.flatten(), stable=True)
    first = torch.arange(k + 1, dtype=torch.int32, device=indices.device)
    offsets = torch.searchsorted(features, first, out_int32=True)
    tokens, sorted_values = torch.empty_like(features), values.new_empty(features.shape)
    E, block = features.numel(), 1024
    if E > 0:
        with _on_device_of(indices):
            entries_kernel[(-(-E // block),)](
                order,
                values,
                tokens,
                sorted_values,
                E,
                indices.shape[1],
                BLOCK=block,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return order, features, tokens, sorted_values, offsets


def _segment_bounds(segments: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """One launch. Bytes: 2 N (bytes of an id) + 12 N."""
    from tsae_kernels.backends.triton.sparse_lists import segment_bounds_kernel

    if segments is None:
        return None, None
    B, T = segments.shape
    starts, ends = torch.empty(2, B * T, dtype=torch.int32, device=segments.device).unbind(0)
    with _on_device_of(segments):
        segment_bounds_kernel[(B,)](
            segments,
            starts,
            ends,
            T,
            *segments.stride(),
            BLOCK=min(_power_of_2(T), 1024),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return starts, ends


def stats_backward(
    values: Tensor,
    order: Tensor,
    features: Tensor,
    tokens: Tensor,
    k: int,
    grad_values: Tensor | None,
    grad_differences: Tensor | None,
    grad_total: Tensor | None,
    grad_square: Tensor | None,
    bands: Bands,
    segments: Tensor | None,
    T: int,
) -> Tensor:
    """One launch, and one for the bounds of segments.

    Bytes: N A (20 + e) + 4 (N C - N A) + 32 N A for grad_values, and 32 N A for each gradient of a statistic (a sector
    an entry; S of them for S bands). Partners come from the L1 cache.
    """
    from tsae_kernels.backends.triton.sparse_stats import stats_backward_kernel

    E = values.numel()
    grad_pre = values.new_empty(E, dtype=dtype_of_stats(values.dtype))
    if E == 0:
        return grad_pre
    C = 1 if grad_values is None else grad_values.shape[1]
    grads = grad_differences, grad_total, grad_square
    reached = [(first, min(last, T - 1)) for first, last in bands]
    block = 32  # one warp: the search for partners needs no barrier
    with _on_device_of(values):
        stats_backward_kernel[(-(-E // block),)](
            values, order, features, tokens, None if grad_values is None else grad_values.contiguous(), *grads,
            *_segment_bounds(segments), grad_pre, E, C, T, k,
            *_strides(grad_differences, 3), *_strides(grad_total, 2), *_strides(grad_square, 2),
            FIRST=tuple(first for first, _ in reached), LAST=tuple(last for _, last in reached), BLOCK=block,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return grad_pre


def weight_gradients(
    features: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    grad_pre: Tensor | None,
    x: Tensor | None,
    values: Tensor | None,
    grad_xhat: Tensor | None,
    W_dec: Tensor | None,
    ends: Sequence[int],
    fill: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two launches for both matrices, one to clear the vectors and one to add them; `fill` adds one per matrix.

    Bytes, with F features that fired: N A d (x + g) gathered + 8 F d written + N A (12 + e) ceil(d / block), and 4 F d
    for W_dec. Each of the at most 2 N A / 256 sums that cross a chunk of 256 entries adds 16 d.
    """
    from tsae_kernels.backends.triton.sparse_rows import finish_weight_gradients_kernel, weight_gradients_kernel

    k, E = len(offsets) - 1, features.numel()
    sources = [source for source in (x, grad_xhat) if source is not None]
    assert sources
    N, d = sources[0].shape[-2:]
    compute = compute_dtype(*sources, *(each for each in (grad_pre, values) if each is not None))
    options: dict[str, Any] = {"dtype": compute, "device": tokens.device}
    new = torch.zeros if fill else torch.empty
    encoder = None if grad_pre is None else new(k, d, **options)
    decoder = None if values is None else new(k, d, **options)
    bias = None if grad_pre is None else torch.zeros(k, **options)
    block = _block_d(d, max(N, 1) * len(sources), max(source.element_size() for source in sources))
    blocks = -(-d // block)
    measures = torch.zeros(4, blocks, k, **options)
    if E > 0 and d > 0:
        chunks = -(-E // _ENTRIES)
        gradients = encoder, decoder, bias
        partials = tuple(None if o is None else torch.empty(chunks, 2, *o.shape[1:], **options) for o in gradients)
        outputs = *gradients, measures[0], measures[1], measures[2:]
        W_dec = None if W_dec is None else W_dec.contiguous()
        constants = {"CHUNK": _ENTRIES, "BLOCK_D": block, "EVEN_D": d % block == 0, "num_warps": 1}
        constants["enable_fp_fusion"] = True
        with _on_device_of(tokens):
            weight_gradients_kernel[(chunks, blocks)](
                features, tokens, offsets, grad_pre, None if x is None else x.contiguous(), values, grad_xhat, W_dec,
                *outputs, *partials, N, k, d, ENDS=tuple(ends[:-1]), UNROLL=_UNROLL // len(sources), **constants,
            )  # fmt: skip
            finish_weight_gradients_kernel[(chunks, blocks)](
                features, offsets, W_dec, *outputs, *partials, k, d, **constants
            )

    def or_empty(x: Tensor | None) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device=tokens.device) if x is None else x

    return or_empty(encoder), or_empty(decoder), or_empty(bias), measures.sum(1)


def squared_errors(x: Tensor, xhat: Tensor) -> Tensor:
    """One launch. Bytes: N d (x + bytes of xhat)."""
    from tsae_kernels.backends.triton.sparse_rows import squared_errors_kernel

    N, d = xhat.shape
    compute = compute_dtype(x, xhat)
    out = xhat.new_empty(N, dtype=compute)
    if N > 0:
        with _on_device_of(xhat):
            squared_errors_kernel[(N,)](
                x, xhat, out, N, d, BLOCK_D=min(_power_of_2(d), 1024), COMPUTE=_triton_dtype(compute), num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out


def squared_errors_backward(x: Tensor, xhat: Tensor, grad: Tensor) -> Tensor:
    """One launch. Bytes: N d (x + 2 bytes of xhat)."""
    from tsae_kernels.backends.triton.sparse_rows import squared_errors_backward_kernel

    N, d = xhat.shape
    out = torch.empty_like(xhat)
    if N > 0:
        with _on_device_of(xhat):
            squared_errors_backward_kernel[(N,)](
                x, xhat, grad, out, N, d, BLOCK_D=min(_power_of_2(d), 1024),
                COMPUTE=_triton_dtype(compute_dtype(x, xhat)), ROUNDING=_rounding(xhat.dtype), num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out
