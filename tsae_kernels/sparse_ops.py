"""The operators on lists of active features: schema and fake implementation. `sparse_features.py` adds autograd.

N = B T tokens, C the capacity of a list, k features, G prefixes of the dictionary, E = N C entries:

    sparse_compress(active [B, W, k], pre [B, T, k], bias [k]?)   -> values [N, C], indices [N, C], counts [N]
    sparse_compress_gated(active, pre, bias?, threshold [k], ...)  -> values, indices, counts, levels [N, C], active [N]
    sparse_decode(values, indices, counts, weight [k, d])         -> [G, N, d], a reconstruction from each prefix
    sparse_decode_backward(grad [G, N, d], ...)                   -> [N, C], of the values
    sparse_sort_entries(indices, values)                          -> `Entries`
    sparse_stats_backward(entries, grad_values [N, C]?, ...)      -> [E], of the pre-activations, by feature
    sparse_weight_gradients(entries, grad_pre [E]?, ...)          -> of W_enc.T [k, d], of W_dec [k, d], of b_enc [k],
                                                                     and measures of the rows [4, k]
    squared_errors(x [N, d], xhat [N, d])                         -> [N]
    squared_errors_backward(x, xhat, grad [N])                    -> [N, d], of xhat

Lists are those of `SparseFeatures`. `ends` [G] are the prefixes' ends, ascending; the last is k. Group g are the
features of prefix g that no smaller prefix has; the gradients [G, N, d] are those of the sum over each group.

`sparse_compress_gated` also lists features that are off within a window of the level at which they would switch: with
z = pre + bias and l the release of a feature that was on at the position before in its segment, else its threshold,

    |z - l| < width l / 2        at positions that are not excluded, in float32

Their value is 0. `levels` is l for entries in the window, active ones too, and 0 for all others. `backend`
is "eager" (`backends/sparse_eager.py`) or "triton" (`backends/triton/sparse_launch.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tsae_kernels.backends import sparse_eager as eager
from tsae_kernels.backends.interface import ListBackend
from tsae_kernels.backends.registry import OK, available_backends
from tsae_kernels.backends.sparse_eager import compute_dtype
from tsae_kernels.backends.triton import sparse_launch as triton
from tsae_kernels.bands import unflatten_bands
from tsae_kernels.dtypes import dtype_of_stats

_SCHEMAS = {
    "sparse_compress": "(Tensor active, Tensor pre, Tensor? bias, int capacity, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    "sparse_compress_gated": "(Tensor active, Tensor pre, Tensor? bias, Tensor threshold, Tensor release, "
    "Tensor? segments, float width, int capacity, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "sparse_decode": "(Tensor values, Tensor indices, Tensor counts, Tensor weight, int[] ends, ScalarType dtype, "
    "str backend) -> Tensor",
    "sparse_decode_backward": "(Tensor grad, Tensor indices, Tensor counts, Tensor weight, int[] ends, "
    "ScalarType dtype, str backend) -> Tensor",
    "sparse_sort_entries": "(Tensor indices, Tensor values, int k, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "sparse_stats_backward": "(Tensor values, Tensor order, Tensor features, Tensor tokens, int k, "
    "Tensor? grad_values, Tensor? grad_differences, Tensor? grad_total, Tensor? grad_square, int[] bands, "
    "Tensor? segments, int T, str backend) -> Tensor",
    "sparse_weight_gradients": "(Tensor features, Tensor tokens, Tensor offsets, Tensor? grad_pre, Tensor? x, "
    "Tensor? values, Tensor? grad_xhat, Tensor? W_dec, int[] ends, bool fill, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "squared_errors": "(Tensor x, Tensor xhat, str backend) -> Tensor",
    "squared_errors_backward": "(Tensor x, Tensor xhat, Tensor grad, str backend) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"tsae_kernels::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


def backend_for_lists(backend: str) -> str:
    """The backend of the operators here, given the one chosen for the activation: "triton" or "eager"."""
    on_gpu = backend in ("cuda", "triton") and available_backends()["triton"] == OK
    return "triton" if on_gpu else "eager"


def _module(backend: str) -> ListBackend:
    return triton if backend == "triton" else eager


def _implement(name: str) -> Callable[[Callable[..., object]], object]:
    return torch.library.impl(f"tsae_kernels::{name}", "CompositeExplicitAutograd")


def _fake(name: str) -> Callable[[Callable[..., object]], object]:
    register: Callable[[Callable[..., object]], object] = torch.library.register_fake(f"tsae_kernels::{name}")
    return register


class Entries(NamedTuple):
    """All E places of the lists by feature and then by token; those past the counts come last, as feature k.

    order:    [E] int64, n C + place in the token's list
    features: [E] int32
    tokens:   [E] int32
    values:   [E] in the values' dtype
    offsets:  [k + 1] int32, where each feature begins
    """

    order: Tensor
    features: Tensor
    tokens: Tensor
    values: Tensor
    offsets: Tensor


@_implement("sparse_compress")
def _(active: Tensor, pre: Tensor, bias: Tensor | None, capacity: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _module(backend).compress(active, pre, bias, capacity)


@_fake("sparse_compress")
def _(active: Tensor, pre: Tensor, bias: Tensor | None, capacity: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    N = pre.shape[0] * pre.shape[1]
    indices, counts = (pre.new_empty(*size, dtype=torch.int32) for size in ((N, capacity), (N,)))
    return pre.new_empty(N, capacity), indices, counts


@_implement("sparse_compress_gated")
def _(
    active: Tensor,
    pre: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    release: Tensor,
    segments: Tensor | None,
    width: float,
    capacity: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _module(backend).compress_gated(active, pre, bias, threshold, release, segments, width, capacity)


@_fake("sparse_compress_gated")
def _(
    active: Tensor,
    pre: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    release: Tensor,
    segments: Tensor | None,
    width: float,
    capacity: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N = pre.shape[0] * pre.shape[1]
    indices, counts, numbers = (active.new_empty(*size) for size in ((N, capacity), (N,), (N,)))
    return pre.new_empty(N, capacity), indices, counts, pre.new_empty(N, capacity, dtype=torch.float32), numbers


@_implement("sparse_decode")
def _(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    weight: Tensor,
    ends: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return _module(backend).decode(values, indices, counts, weight, ends, dtype)


@_fake("sparse_decode")
def _(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    weight: Tensor,
    ends: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return values.new_empty(len(ends), values.shape[0], weight.shape[1], dtype=dtype)


@_implement("sparse_decode_backward")
def _(
    grad: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, ends: Sequence[int], dtype: torch.dtype, backend: str
) -> Tensor:
    return _module(backend).decode_backward(grad, indices, counts, weight, ends, dtype)


@_fake("sparse_decode_backward")
def _(
    grad: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, ends: Sequence[int], dtype: torch.dtype, backend: str
) -> Tensor:
    return grad.new_empty(indices.shape, dtype=dtype)


@_implement("sparse_sort_entries")
def _(indices: Tensor, values: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _module(backend).sort_entries(indices, values, k)


@_fake("sparse_sort_entries")
def _(indices: Tensor, values: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    E = indices.shape[0] * indices.shape[1]
    order = indices.new_empty(E, dtype=torch.int64)
    return order, indices.new_empty(E), indices.new_empty(E), values.new_empty(E), indices.new_empty(k + 1)


@_implement("sparse_stats_backward")
def _(
    values: Tensor,
    order: Tensor,
    features: Tensor,
    tokens: Tensor,
    k: int,
    grad_values: Tensor | None,
    differences: Tensor | None,
    total: Tensor | None,
    square: Tensor | None,
    bands: Sequence[int],
    segments: Tensor | None,
    T: int,
    backend: str,
) -> Tensor:
    grads = grad_values, differences, total, square
    return _module(backend).stats_backward(
        values, order, features, tokens, k, *grads, unflatten_bands(bands), segments, T
    )


@_fake("sparse_stats_backward")
def _(
    values: Tensor,
    order: Tensor,
    features: Tensor,
    tokens: Tensor,
    k: int,
    grad_values: Tensor | None,
    differences: Tensor | None,
    total: Tensor | None,
    square: Tensor | None,
    bands: Sequence[int],
    segments: Tensor | None,
    T: int,
    backend: str,
) -> Tensor:
    return values.new_empty(values.shape, dtype=dtype_of_stats(values.dtype))


@_implement("sparse_weight_gradients")
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = grad_pre, x, values, grad_xhat, W_dec, ends, fill
    return _module(backend).weight_gradients(features, tokens, offsets, *arguments)


@_fake("sparse_weight_gradients")
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k = offsets.shape[0] - 1

    def rows(coefficients: Tensor | None, of_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        if coefficients is None or of_tokens is None:
            return tokens.new_empty(0, dtype=torch.float32), tokens.new_empty(0, dtype=torch.float32)
        dtype = compute_dtype(coefficients, of_tokens)
        return tokens.new_empty(k, of_tokens.shape[-1], dtype=dtype), tokens.new_empty(k, dtype=dtype)

    (encoder, bias), (decoder, _) = rows(grad_pre, x), rows(values, grad_xhat)
    sources = [each for each in (grad_pre, x, values, grad_xhat) if each is not None]
    return encoder, decoder, bias, tokens.new_empty(4, k, dtype=compute_dtype(*sources))


@_implement("squared_errors")
def _(x: Tensor, xhat: Tensor, backend: str) -> Tensor:
    return _module(backend).squared_errors(x, xhat)


@_fake("squared_errors")
def _(x: Tensor, xhat: Tensor, backend: str) -> Tensor:
    return xhat.new_empty(xhat.shape[0], dtype=compute_dtype(x, xhat))


@_implement("squared_errors_backward")
def _(x: Tensor, xhat: Tensor, grad: Tensor, backend: str) -> Tensor:
    return _module(backend).squared_errors_backward(x, xhat, grad)


@_fake("squared_errors_backward")
def _(x: Tensor, xhat: Tensor, grad: Tensor, backend: str) -> Tensor:
    return torch.empty_like(xhat)
