"""The compiled backends, `cpp` (csrc/cpu/ops.cpp) and `cuda` (csrc/cuda/ops.cpp), which have the same operators.

Small tensors are converted here. Features are passed as they are: the operators take any strides, but copy features
whose neighbours along k are not adjacent in memory. Nothing waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsae_kernels.arguments import ACTIVATIONS
from tsae_kernels.backends.interface import Activation, Gradients
from tsae_kernels.backends.two_state import path_levels
from tsae_kernels.bands import Bands, flatten_bands
from tsae_kernels.dtypes import dtype_of_stats

_CODES = {"identity": 0, "relu": 1, "gelu": 2}  # enum Activation in csrc/shared/operands.h
assert set(_CODES) == set(ACTIVATIONS)


def _compute(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.to(dtype_of_stats(like.dtype)).contiguous()


def _ids(segments: Tensor | None) -> Tensor | None:
    return None if segments is None else segments.to(torch.int64).contiguous()


def _threshold(value: Tensor | None, like: Tensor) -> Tensor | None:
    """A threshold or release, at least 0: [B, T] if it is [B, T, 1], else [k]."""
    if value is None:
        return None
    value = value.to(dtype_of_stats(like.dtype)).clamp_min(0)
    return value.squeeze(2).contiguous() if value.dim() == 3 else value.expand(like.shape[2]).contiguous()


class CompiledBackend:
    """`interface.Backend` and `interface.ScanBackend` on the operators of one library.

    namespace: of the operators of `define_operators` in csrc/shared/arguments.h, in `torch.ops`
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    @property
    def _ops(self) -> Any:
        return getattr(torch.ops, self._namespace)

    def _forward(
        self, x: Tensor, activation: Activation, bands: Bands, segments: Tensor | None, transitions: bool, with_h: bool
    ) -> tuple[Tensor, ...]:
        name, bias, threshold, release = activation
        bias, threshold, release = _compute(bias, x), _threshold(threshold, x), _threshold(release, x)
        offsets, ids = flatten_bands(bands), _ids(segments)
        function = self._ops.forward_counted if transitions else self._ops.forward
        return tuple(function(x, bias, _CODES[name], threshold, release, offsets, ids, with_h))

    def activate_with_stats(
        self, pre: Tensor, activation: Activation, bands: Bands, segments: Tensor | None, transitions: bool = False
    ) -> tuple[Tensor, ...]:
        """See `interface.Backend`."""
        return self._forward(pre, activation, bands, segments, transitions, True)

    def temporal_stats(
        self, h: Tensor, bands: Bands, segments: Tensor | None, transitions: bool = False
    ) -> tuple[Tensor, ...]:
        """See `interface.Backend`."""
        return self._forward(h, Activation("identity"), bands, segments, transitions, False)[1:]

    def activate_with_stats_backward(
        self,
        saved: Tensor,
        grads: Gradients,
        activation: Activation,
        bands: Bands,
        segments: Tensor | None,
        total: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `interface.Backend`."""
        differences = grads.differences
        if differences is not None and differences.shape[0] > 0 and differences.stride(0) == 0:
            differences = differences[:1]  # one gradient for the whole batch, as a sum over b gives
        stats = (_compute(grad, saved) for grad in (differences, grads.total, grads.square))
        grad_h = None if grads.h is None else grads.h.to(saved.dtype)
        how = _CODES[activation.name], flatten_bands(bands), _ids(segments), _compute(total, saved)
        grad_pre, grad_bias = self._ops.backward(saved, _compute(activation.bias, saved), grad_h, *stats, *how)
        return grad_pre, grad_bias.sum(0)

    def step_energy(self, h: Tensor, weights: Tensor) -> Tensor:
        """See `interface.Backend`."""
        energies: Tensor = self._ops.step_energy(h, _compute(weights, h))
        return energies.sum().to(dtype_of_stats(h.dtype))

    def step_energy_backward(self, h: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        """See `interface.Backend`."""
        grad_h: Tensor = self._ops.step_energy_backward(h, _compute(weights, h), grad.double())
        return grad_h

    def viterbi_path(self, z: Tensor, transition_cost: Tensor, start_cost: Tensor, segments: Tensor | None) -> Tensor:
        """See `interface.ScanBackend`."""
        levels = path_levels(transition_cost, start_cost, dtype_of_stats(z.dtype))
        on: Tensor = self._ops.viterbi_path(z, levels, _ids(segments))
        return on

    def leaky_recurrence(self, a: Tensor, decay: Tensor, segments: Tensor | None) -> Tensor:
        """See `interface.ScanBackend`."""
        h: Tensor = self._ops.leaky_recurrence(a, _compute(decay, a), _ids(segments))
        return h

    def leaky_recurrence_backward(
        self, grad_h: Tensor, decay: Tensor, a: Tensor | None, h: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `interface.ScanBackend`."""
        arguments = _compute(decay, grad_h), a, h, _ids(segments)
        grad_a, grad_decay = self._ops.leaky_recurrence_backward(grad_h, *arguments)
        return grad_a, grad_decay.sum(0)


class CudaBackend(CompiledBackend):
    """`CompiledBackend` with the operators `forward_with_mask` and `forward_with_mask_counted` besides."""

    def activate_with_mask(
        self, pre: Tensor, activation: Activation, bands: Bands, segments: Tensor | None, transitions: bool = False
    ) -> tuple[Tensor, ...]:
        """The mask of relu's active features instead of h, and h's statistics.

        The mask is int32 [B, ceil(T / 32), k]: bit i (of value 2^i) of word w is 1 if h, rounded to the dtype of `pre`,
        is not 0 at position 32 w + i. Bits beyond T are 0. With the bands and shapes of the tuned kernels h is never
        written.
        """
        name, bias, threshold, release = activation
        assert name == "relu"
        bias, threshold, release = _compute(bias, pre), _threshold(threshold, pre), _threshold(release, pre)
        function = self._ops.forward_with_mask_counted if transitions else self._ops.forward_with_mask
        return tuple(function(pre, bias, threshold, release, flatten_bands(bands), _ids(segments)))


cpp = CompiledBackend("tsae_kernels_cpp")
cuda = CudaBackend("tsae_kernels_cuda")
