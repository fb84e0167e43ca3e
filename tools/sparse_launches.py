"""The launches of a training step on lists of active features, for `compile_triton.py`: 16,384 features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tsae_kernels import MULTISCALE
from tsae_kernels.backends.triton import row_adam, sparse_launch

MODULES = ("sparse_lists", "sparse_rows", "sparse_stats", "row_adam")


def record_sparse(record: Callable[..., Any], empty: Callable[..., torch.Tensor]) -> None:
    """Record every launch of the functions in `sparse_launch` and of Adam, with and without Matryoshka prefixes.

    record: of `compile_triton.launches`, called with a label, a function and its arguments
    empty: makes a tensor on the meta device from its shape and dtype
    """
    B, T, d, k, C = 128, 128, 2304, 16_384, 64
    N, E = B * T, B * T * C
    integers, ids = {"dtype": torch.int32}, empty(B, T, dtype=torch.int64)
    indices, counts = empty(N, C, **integers), empty(N, **integers)
    features, tokens, offsets = empty(E, **integers), empty(E, **integers), empty(k + 1, **integers)
    order, grad_pre, W_dec = empty(E, dtype=torch.int64), empty(E), empty(k, d)
    by_feature = features, tokens, offsets
    shared, sums = empty(1, 3, k).expand(B, 3, k), empty(k).expand(B, k)
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        pre, values, weight, x = (empty(*shape, dtype=dtype) for shape in ((B, T, k), (N, C), (k, d), (N, d)))
        entries = empty(E, dtype=dtype)
        label = f"{{}}-{short}".format
        record(label("sparse-compress"), sparse_launch.compress, empty(B, 4, k, **integers), pre, empty(k), C)
        schmitt = empty(k), empty(k), empty(k)
        for segments, suffix in ((None, ""), (ids, "-segments")):
            gated = empty(B, 4, k, **integers), pre, *schmitt, segments, 0.5, C
            record(label(f"sparse-compress-gated{suffix}"), sparse_launch.compress_gated, *gated)
        record(label("sparse-order"), sparse_launch.sort_entries, indices, values, k)
        for segments, suffix in ((None, ""), (ids, "-segments")):
            sorted_entries = entries, order, features, tokens, k
            grads = values, shared, None if segments is None else sums, None if segments is None else sums
            how = MULTISCALE, segments, T
            record(label(f"sparse-statistics{suffix}"), sparse_launch.stats_backward, *sorted_entries, *grads, *how)
        for ends, suffix in (((k,), ""), ((1024, 4096, k), "-prefixes")):
            grad = empty(len(ends), N, d, dtype=dtype)
            lists = indices, counts, weight, ends, dtype
            record(label(f"sparse-decode{suffix}"), sparse_launch.decode, values, *lists)
            record(label(f"sparse-values{suffix}"), sparse_launch.decode_backward, grad, *lists)
            both = grad_pre, x, entries, grad, W_dec, ends, False
            record(label(f"sparse-weights{suffix}"), sparse_launch.weight_gradients, *by_feature, *both)
        decoder = None, None, entries, grad, None, ends, True
        record(label("sparse-decoder-weights"), sparse_launch.weight_gradients, *by_feature, *decoder)
        xhat = empty(N, d, dtype=dtype)
        record(label("sparse-errors"), sparse_launch.squared_errors, empty(N, d), xhat)
        record(label("sparse-errors-backward"), sparse_launch.squared_errors_backward, empty(N, d), xhat, empty(N))
    moments, fired = (empty(k, d), empty(k, d)), empty(k, dtype=torch.bool)
    for unit_norm, share, shadow, suffix in (
        (False, None, None, ""),
        (True, empty(k), empty(k, d, dtype=torch.bfloat16), "-unit-norm"),
    ):
        arguments = moments, empty(k, d), fired, share, shadow, empty(5), (0.9, 0.999), 1e-8, unit_norm
        record(f"sparse-adam{suffix}", row_adam.launch_row_adam, empty(k, d), *arguments)
