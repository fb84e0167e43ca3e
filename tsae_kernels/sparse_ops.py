"""The operators on lists of active features: schema and fake implementation. `sparse_features.py` adds autograd.

N = B T tokens, C the capacity of a list, k features, G prefixes of the dictionary, E = N C entries:

    sparse_compress(active [B, W, k], pre [B, T, k], bias [k]?)   -> values [N, C], indices [N, C], counts [N]
    sparse_decode(values, indices, counts, weight [k, d])         -> [G, N, d]
    sparse_decode_backward(grad [G, N, d], ...)                   -> [N, C], of the values
    sparse_stats_backward(values, order [E], offsets [k + 1] ...) -> [N, C], of the pre-activations in the lists
    sparse_weight_gradients(order, offsets, ...)                  -> of W_enc.T [k, d], of W_dec [k, d], of b_enc [k]

Lists are those of `SparseFeatures`. `order` lists entries (n C + place in the token's list) by feature and then by
token, `offsets` where each feature begins in it; see `feature_order`. `ends` [G] are the prefixes' ends, ascending; the
last is k. `backend` is "eager" (`backends/sparse_eager.py`) or "triton" (`backends/triton/sparse_launch.py`).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from tsae_kernels.backends import sparse_eager as eager
from tsae_kernels.backends.registry import OK, available_backends
from tsae_kernels.backends.sparse_eager import compute_dtype
from tsae_kernels.bands import unflatten_bands
from tsae_kernels.dtypes import dtype_of_stats

_SCHEMAS = {
    "sparse_compress": "(Tensor active, Tensor pre, Tensor? bias, int capacity, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    "sparse_decode": "(Tensor values, Tensor indices, Tensor counts, Tensor weight, int[] ends, ScalarType dtype, "
    "str backend) -> Tensor",
    "sparse_decode_backward": "(Tensor grad, Tensor indices, Tensor counts, Tensor weight, int[] ends, "
    "ScalarType dtype, str backend) -> Tensor",
    "sparse_stats_backward": "(Tensor values, Tensor order, Tensor offsets, Tensor? grad_values, "
    "Tensor? grad_differences, Tensor? grad_total, Tensor? grad_square, int[] bands, Tensor? segments, int T, "
    "str backend) -> Tensor",
    "sparse_weight_gradients": "(Tensor order, Tensor offsets, Tensor? grad_pre, Tensor? x, Tensor? values, "
    "Tensor? grad_xhat, int[] ends, bool fill, str backend) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"tsae_kernels::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


def backend_for_lists(backend: str) -> str:
    """The backend of the operators here, given the one chosen for the activation: "triton" or "eager"."""
    on_gpu = backend in ("cuda", "triton") and available_backends()["triton"] == OK
    return "triton" if on_gpu else "eager"


def _module(backend: str) -> ModuleType:
    return eager


def _implement(name: str):
    return torch.library.impl(f"tsae_kernels::{name}", "CompositeExplicitAutograd")


def _fake(name: str):
    return torch.library.register_fake(f"tsae_kernels::{name}")


def feature_order(indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The entries of all lists by feature, and by token within a feature.

    indices: [N, C] int32, k past the count
    out: order [N C] int64, positions in `indices.flatten()`, those past the counts last; offsets [k + 1] int32
    """
    keys, order = torch.sort(indices.flatten(), stable=True)
    features = torch.arange(k + 1, dtype=torch.int32, device=indices.device)
    return order, torch.searchsorted(keys, features, out_int32=True)


@_implement("sparse_compress")
def _(active, pre, bias, capacity, backend):
    return _module(backend).compress(active, pre, bias, capacity)


@_fake("sparse_compress")
def _(active, pre, bias, capacity, backend):
    N = pre.shape[0] * pre.shape[1]
    integers = {"dtype": torch.int32}
    return pre.new_empty(N, capacity), pre.new_empty(N, capacity, **integers), pre.new_empty(N, **integers)


@_implement("sparse_decode")
def _(values, indices, counts, weight, ends, dtype, backend):
    return _module(backend).decode(values, indices, counts, weight, ends, dtype)


@_fake("sparse_decode")
def _(values, indices, counts, weight, ends, dtype, backend):
    return values.new_empty(len(ends), values.shape[0], weight.shape[1], dtype=dtype)


@_implement("sparse_decode_backward")
def _(grad, indices, counts, weight, ends, dtype, backend):
    return _module(backend).decode_backward(grad, indices, counts, weight, ends, dtype)


@_fake("sparse_decode_backward")
def _(grad, indices, counts, weight, ends, dtype, backend):
    return grad.new_empty(indices.shape, dtype=dtype)


@_implement("sparse_stats_backward")
def _(values, order, offsets, grad_values, differences, total, square, bands, segments, T, backend):
    grads = grad_values, differences, total, square
    return _module(backend).stats_backward(values, order, offsets, *grads, unflatten_bands(bands), segments, T)


@_fake("sparse_stats_backward")
def _(values, order, offsets, grad_values, differences, total, square, bands, segments, T, backend):
    return values.new_empty(values.shape, dtype=dtype_of_stats(values.dtype))


@_implement("sparse_weight_gradients")
def _(order, offsets, grad_pre, x, values, grad_xhat, ends, fill, backend):
    return _module(backend).weight_gradients(order, offsets, grad_pre, x, values, grad_xhat, ends, fill)


@_fake("sparse_weight_gradients")
def _(order, offsets, grad_pre, x, values, grad_xhat, ends, fill, backend):
    k = offsets.shape[0] - 1

    def rows(coefficients, tokens):
        if coefficients is None:
            return order.new_empty(0, dtype=torch.float32), order.new_empty(0, dtype=torch.float32)
        dtype = compute_dtype(coefficients, tokens)
        return order.new_empty(k, tokens.shape[-1], dtype=dtype), order.new_empty(k, dtype=dtype)

    (encoder, bias), (decoder, _) = rows(grad_pre, x), rows(values, grad_xhat)
    return encoder, decoder, bias
