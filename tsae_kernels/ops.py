"""The operators: schema, fake implementation and autograd formula. In Python, so that they exist without a compiler.

    activate_with_stats(pre [B, T, k], bias [k]?, ...) -> h [B, T, k], and the statistics of h
    activate_with_mask(pre [B, T, k], bias [k]?, ...)  -> active [B, W, k], and the statistics of h; relu
    temporal_stats(h [B, T, k], ...)                   -> differences [B, S, k], total [B, k], square [B, k]
    {one of these three}_counted(...)                  -> the same, and the transitions of h [B, 3, k] int32
    activate_with_stats_backward(saved [B, T, k], ...) -> grad_pre [B, T, k], grad_bias [k]
    step_energy(h [B, T, k], weights [B, T])           -> [], sum of weights[b, t] * (h[b, t+1, j] - h[b, t, j])^2
    step_energy_backward(h, weights, grad [])          -> grad_h [B, T, k]

`activate_with_mask` is `activate_with_stats` with one bit per feature instead of h: `pack_active` says which. It has no
autograd formula; `sparse_features.py` is the differentiable function around it.

`bands` is the flat list [a_1, b_1, a_2, b_2, ...]; `backend` names the backend that computes the result. In the
backward operator

* `saved` is the output h for relu and identity (h > 0 shows which entries were kept) and the input pre for gelu;
* each gradient is optional, and `grad_differences` may have stride 0 over the batch;
* `total` is that statistic of h, if it is known: a backend may use it instead of another pass over h;
* a feature whose `grad_differences` are all exactly 0, as a variance mask makes them, gets exactly act'(pre) * grad_h
  plus the terms of total and square: its window arithmetic is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from tsae_kernels.backends.interface import Activation, Gradients, MaskBackend
from tsae_kernels.backends.registry import get_backend
from tsae_kernels.backends.sparse_eager import WORD, pack_active
from tsae_kernels.bands import unflatten_bands
from tsae_kernels.dtypes import dtype_of_stats

_SCHEMAS = {
    "activate_with_stats": "(Tensor pre, Tensor? bias, str activation, Tensor? threshold, Tensor? release, "
    "int[] bands, Tensor? segments, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "activate_with_mask": "(Tensor pre, Tensor? bias, Tensor? threshold, Tensor? release, int[] bands, "
    "Tensor? segments, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "temporal_stats": "(Tensor h, int[] bands, Tensor? segments, str backend) -> (Tensor, Tensor, Tensor)",
    "activate_with_stats_backward": "(Tensor saved, Tensor? bias, Tensor? grad_h, Tensor? grad_differences, "
    "Tensor? grad_total, Tensor? grad_square, str activation, int[] bands, Tensor? segments, str backend, "
    "Tensor? total=None) -> (Tensor, Tensor)",
    "step_energy": "(Tensor h, Tensor weights, str backend) -> Tensor",
    "step_energy_backward": "(Tensor h, Tensor weights, Tensor grad, str backend) -> Tensor",
}
# Operators of their own, because the number of an operator's results is fixed.
_COUNTED = {"": False, "_counted": True}
for _name in ("activate_with_stats", "activate_with_mask", "temporal_stats"):
    _SCHEMAS[f"{_name}_counted"] = f"{_SCHEMAS[_name].removesuffix(')')}, Tensor)"
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"tsae_kernels::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))

_DIFFERENTIABLE_ONCE = (
    "tsae_kernels is differentiable once: the gradients of its functions have no derivative. "
    "Do not use create_graph=True through them, or detach the gradients first."
)


def _stats_like(h: Tensor, bands: Sequence[int], transitions: bool) -> tuple[Tensor, ...]:
    B, _, k = h.shape
    dtype = dtype_of_stats(h.dtype)
    stats = (
        h.new_empty(B, len(bands) // 2, k, dtype=dtype),
        h.new_empty(B, k, dtype=dtype),
        h.new_empty(B, k, dtype=dtype),
    )
    return (*stats, h.new_empty(B, 3, k, dtype=torch.int32)) if transitions else stats


def _like(h: Tensor) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _implement(name: str) -> Callable[[Callable[..., object]], object]:
    return torch.library.impl(f"tsae_kernels::{name}", "CompositeExplicitAutograd")


def _fake(name: str) -> Callable[[Callable[..., object]], object]:
    register: Callable[[Callable[..., object]], object] = torch.library.register_fake(f"tsae_kernels::{name}")
    return register


def _activate_with_stats(
    transitions: bool,
    pre: Tensor,
    bias: Tensor | None,
    activation: str,
    threshold: Tensor | None,
    release: Tensor | None,
    bands: Sequence[int],
    segments: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    arguments = Activation(activation, bias, threshold, release), unflatten_bands(bands), segments, transitions
    return get_backend(backend).activate_with_stats(pre, *arguments)


def _fake_activate_with_stats(
    transitions: bool,
    pre: Tensor,
    bias: Tensor | None,
    activation: str,
    threshold: Tensor | None,
    release: Tensor | None,
    bands: Sequence[int],
    segments: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    return _like(pre), *_stats_like(pre, bands, transitions)


def _activate_with_mask(
    transitions: bool,
    pre: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    release: Tensor | None,
    bands: Sequence[int],
    segments: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    arguments = Activation("relu", bias, threshold, release), unflatten_bands(bands), segments, transitions
    chosen = get_backend(backend)
    if isinstance(chosen, MaskBackend):
        return chosen.activate_with_mask(pre, *arguments)
    h, *stats = chosen.activate_with_stats(pre, *arguments)
    return pack_active(h), *stats


def _fake_activate_with_mask(
    transitions: bool,
    pre: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    release: Tensor | None,
    bands: Sequence[int],
    segments: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    B, T, k = pre.shape
    return pre.new_empty(B, -(-T // WORD), k, dtype=torch.int32), *_stats_like(pre, bands, transitions)


def _temporal_stats(
    transitions: bool, h: Tensor, bands: Sequence[int], segments: Tensor | None, backend: str
) -> tuple[Tensor, ...]:
    return get_backend(backend).temporal_stats(h, unflatten_bands(bands), segments, transitions)


def _fake_temporal_stats(
    transitions: bool, h: Tensor, bands: Sequence[int], segments: Tensor | None, backend: str
) -> tuple[Tensor, ...]:
    return _stats_like(h, bands, transitions)


for _suffix, _transitions in _COUNTED.items():
    for _name, _function, _shapes in (
        ("activate_with_stats", _activate_with_stats, _fake_activate_with_stats),
        ("activate_with_mask", _activate_with_mask, _fake_activate_with_mask),
        ("temporal_stats", _temporal_stats, _fake_temporal_stats),
    ):
        _implement(_name + _suffix)(partial(_function, _transitions))
        _fake(_name + _suffix)(partial(_shapes, _transitions))


@_implement("activate_with_stats_backward")
def _(
    saved: Tensor,
    bias: Tensor | None,
    grad_h: Tensor | None,
    grad_differences: Tensor | None,
    grad_total: Tensor | None,
    grad_square: Tensor | None,
    activation: str,
    bands: Sequence[int],
    segments: Tensor | None,
    backend: str,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grads = Gradients(grad_h, grad_differences, grad_total, grad_square)
    arguments = Activation(activation, bias), unflatten_bands(bands), segments, total
    return get_backend(backend).activate_with_stats_backward(saved, grads, *arguments)


@_fake("activate_with_stats_backward")
def _(
    saved: Tensor,
    bias: Tensor | None,
    grad_h: Tensor | None,
    grad_differences: Tensor | None,
    grad_total: Tensor | None,
    grad_square: Tensor | None,
    activation: str,
    bands: Sequence[int],
    segments: Tensor | None,
    backend: str,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _like(saved), saved.new_empty(saved.shape[2], dtype=dtype_of_stats(saved.dtype))


@_implement("step_energy")
def _(h: Tensor, weights: Tensor, backend: str) -> Tensor:
    return get_backend(backend).step_energy(h, weights)


@_fake("step_energy")
def _(h: Tensor, weights: Tensor, backend: str) -> Tensor:
    return h.new_empty((), dtype=dtype_of_stats(h.dtype))


@_implement("step_energy_backward")
def _(h: Tensor, weights: Tensor, grad: Tensor, backend: str) -> Tensor:
    return get_backend(backend).step_energy_backward(h, weights, grad)


@_fake("step_energy_backward")
def _(h: Tensor, weights: Tensor, grad: Tensor, backend: str) -> Tensor:
    return _like(h)


def _save_activation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pre, bias, ctx.activation, _, _, ctx.bands, segments, ctx.backend = inputs
    gelu = ctx.activation == "gelu"
    ctx.save_for_backward(pre if gelu else output[0], bias if gelu else None, segments, output[2])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


# The counts are integers, which autograd does not differentiate: their gradient, the last, is None.


def _activation_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, bias, segments, total = ctx.saved_tensors
    grad_pre, grad_bias = torch.ops.tsae_kernels.activate_with_stats_backward(
        saved, bias, *grads[:4], ctx.activation, ctx.bands, segments, ctx.backend, total
    )
    wants_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
    return grad_pre, grad_bias.to(ctx.bias_dtype) if wants_bias else None, *[None] * 6


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, ctx.bands, segments, ctx.backend = inputs
    ctx.save_for_backward(h, segments, output[1])
    ctx.set_materialize_grads(False)


def _stats_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    h, segments, total = ctx.saved_tensors
    grad, _ = torch.ops.tsae_kernels.activate_with_stats_backward(
        h, None, None, *grads[:3], "identity", ctx.bands, segments, ctx.backend, total
    )
    return grad, None, None, None


def _save_energy(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, weights, ctx.backend = inputs
    ctx.save_for_backward(h, weights)


def _energy_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, weights = ctx.saved_tensors
    return torch.ops.tsae_kernels.step_energy_backward(h, weights, grad, ctx.backend), None, None


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError(_DIFFERENTIABLE_ONCE)


def _register_autograd(
    name: str, backward: Callable[..., object], setup_context: Callable[..., None] | None = None
) -> None:
    torch.library.register_autograd(f"tsae_kernels::{name}", backward, setup_context=setup_context)


for _suffix in _COUNTED:
    _register_autograd(f"activate_with_stats{_suffix}", _activation_backward, _save_activation)
    _register_autograd(f"temporal_stats{_suffix}", _stats_backward, _save_stats)
_register_autograd("step_energy", _energy_backward, _save_energy)
_register_autograd("activate_with_stats_backward", _no_double_backward)
_register_autograd("step_energy_backward", _no_double_backward)
