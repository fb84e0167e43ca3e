"""The compiled backends, `cpp` (csrc/cpu/ops.cpp) and `cuda` (csrc/cuda/ops.cpp); both have the same operators.

Small tensors are converted here; the features go as they are, with any strides that leave neighbours along k
together (others are copied). Nothing waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsae_kernels.arguments import ACTIVATIONS, dtype_of_stats
from tsae_kernels.bands import Bands, flatten_bands

_CODES = {"identity": 0, "relu": 1, "gelu": 2}
assert set(_CODES) == set(ACTIVATIONS)


def _compute(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.to(dtype_of_stats(like.dtype)).contiguous()


def _ids(segments: Tensor | None) -> Tensor | None:
    return None if segments is None else segments.to(torch.int64).contiguous()


def _level(value: Tensor | None, like: Tensor) -> Tensor | None:
    """A threshold as [B, T] if it is [B, T, 1], else as [k]."""
    if value is None:
        return None
    value = value.to(dtype_of_stats(like.dtype)).clamp_min(0)
    return value.squeeze(2).contiguous() if value.dim() == 3 else value.expand(like.shape[2]).contiguous()


class CompiledBackend:
    """The functions of `reference.py` on the operators of one library.

    namespace: of the operators `forward`, `backward`, `step_energy` and `step_energy_backward` in `torch.ops`
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    @property
    def _ops(self) -> Any:
        return getattr(torch.ops, self._namespace)

    def activate_with_stats(
        self,
        pre: Tensor,
        bias: Tensor | None,
        activation: str,
        threshold: Tensor | None,
        release: Tensor | None,
        bands: Bands,
        segments: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h [B, T, k] = activation(pre + bias) and its statistics; see `ops.py`."""
        return self._ops.forward(
            pre,
            _compute(bias, pre),
            _CODES[activation],
            _level(threshold, pre),
            _level(release, pre),
            flatten_bands(bands),
            _ids(segments),
            True,
        )

    def temporal_stats(self, h: Tensor, bands: Bands, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """differences [B, S, k], total [B, k] and square [B, k] of h [B, T, k]; see `ops.py`."""
        identity = _CODES["identity"]
        _, *stats = self._ops.forward(h, None, identity, None, None, flatten_bands(bands), _ids(segments), False)
        return tuple(stats)

    def activate_with_stats_backward(
        self,
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
        if grad_differences is not None and grad_differences.shape[0] > 0 and grad_differences.stride(0) == 0:
            grad_differences = grad_differences[:1]  # one gradient for the whole batch, as a sum over b gives
        grad_pre, grad_bias = self._ops.backward(
            saved,
            _compute(bias, saved),
            None if grad_h is None else grad_h.to(saved.dtype),
            _compute(grad_differences, saved),
            _compute(grad_total, saved),
            _compute(grad_square, saved),
            _CODES[activation],
            flatten_bands(bands),
            _ids(segments),
        )
        return grad_pre, grad_bias.sum(0)

    def step_energy(self, h: Tensor, weights: Tensor) -> Tensor:
        """[]: the sum of weights[b, t] * (h[b, t+1, j] - h[b, t, j])^2."""
        return self._ops.step_energy(h, _compute(weights, h)).sum().to(dtype_of_stats(h.dtype))

    def step_energy_backward(self, h: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        """grad_h [B, T, k] for the gradient of the energy, a [] tensor."""
        return self._ops.step_energy_backward(h, _compute(weights, h), grad.double())


cpp = CompiledBackend("tsae_kernels_cpp")
cuda = CompiledBackend("tsae_kernels_cuda")
