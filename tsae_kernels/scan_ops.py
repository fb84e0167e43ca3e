"""The operators behind `scans.py`: schema, fake implementation and autograd formula, as in `ops.py`.

    viterbi_path(z [B, T, k], transition_cost [2, 2, k], start_cost [2, k], ...) -> on [B, T, k] bool
    leaky_recurrence(a [B, T, k], decay [k], ...)                                -> h [B, T, k]
    leaky_recurrence_backward(grad_h [B, T, k], decay [k], a?, h?, ...)          -> grad_a [B, T, k], grad_decay [k]

Without `a` and `h`, which it needs for grad_decay alone, the backward operator returns zeros there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tsae_kernels.backends import scans_eager, scans_reference
from tsae_kernels.backends.interface import ScanBackend
from tsae_kernels.backends.registry import get_backend
from tsae_kernels.backends.triton import scan_launch
from tsae_kernels.dtypes import dtype_of_stats
from tsae_kernels.ops import _fake, _implement, _like, _no_double_backward, _register_autograd

_SCHEMAS = {
    "viterbi_path": "(Tensor z, Tensor transition_cost, Tensor start_cost, Tensor? segments, str backend) -> Tensor",
    "leaky_recurrence": "(Tensor a, Tensor decay, Tensor? segments, str backend) -> Tensor",
    "leaky_recurrence_backward": "(Tensor grad_h, Tensor decay, Tensor? a, Tensor? h, Tensor? segments, str backend) "
    "-> (Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"tsae_kernels::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


_MODULES: dict[str, ScanBackend] = {"reference": scans_reference, "eager": scans_eager, "triton": scan_launch}


def _backend(name: str) -> ScanBackend:
    """The scans of a backend: a module of their own, or with the other operators (`cpp`, `cuda`)."""
    return _MODULES.get(name) or cast(ScanBackend, get_backend(name))


@_implement("viterbi_path")
def _(z: Tensor, transition_cost: Tensor, start_cost: Tensor, segments: Tensor | None, backend: str) -> Tensor:
    return _backend(backend).viterbi_path(z, transition_cost, start_cost, segments)


@_fake("viterbi_path")
def _(z: Tensor, transition_cost: Tensor, start_cost: Tensor, segments: Tensor | None, backend: str) -> Tensor:
    return z.new_empty(z.shape, dtype=torch.bool)


@_implement("leaky_recurrence")
def _(a: Tensor, decay: Tensor, segments: Tensor | None, backend: str) -> Tensor:
    return _backend(backend).leaky_recurrence(a, decay, segments)


@_fake("leaky_recurrence")
def _(a: Tensor, decay: Tensor, segments: Tensor | None, backend: str) -> Tensor:
    return _like(a)


@_implement("leaky_recurrence_backward")
def _(
    grad_h: Tensor, decay: Tensor, a: Tensor | None, h: Tensor | None, segments: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return _backend(backend).leaky_recurrence_backward(grad_h, decay, a, h, segments)


@_fake("leaky_recurrence_backward")
def _(
    grad_h: Tensor, decay: Tensor, a: Tensor | None, h: Tensor | None, segments: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return _like(grad_h), grad_h.new_empty(grad_h.shape[2], dtype=dtype_of_stats(grad_h.dtype))


def _save_recurrence(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, decay, segments, ctx.backend = inputs
    features = (a, output) if ctx.needs_input_grad[1] else (None, None)
    ctx.save_for_backward(decay, *features, segments)


def _recurrence_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    decay, a, h, segments = ctx.saved_tensors
    grad_a, grad_decay = torch.ops.tsae_kernels.leaky_recurrence_backward(grad, decay, a, h, segments, ctx.backend)
    return grad_a, grad_decay.to(decay.dtype) if a is not None else None, None, None


_register_autograd("leaky_recurrence", _recurrence_backward, _save_recurrence)
_register_autograd("leaky_recurrence_backward", _no_double_backward)
