"""What every backend implements: a module, or an object, with the functions of `Backend`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from tsae_kernels.bands import Bands


class Activation(NamedTuple):
    """h = activation(pre + bias); see `tsae_kernels.activate_with_stats`.

    name: "relu", "gelu" or "identity"
    bias: [k] or None
    threshold: [], [k] or [B, T, 1], or None for 0; for "relu"
    release: [] or [k] for a Schmitt trigger, else None
    """

    name: str
    bias: Tensor | None = None
    threshold: Tensor | None = None
    release: Tensor | None = None


class Gradients(NamedTuple):
    """Gradients of the loss with respect to h and its statistics; None for an output that the loss does not use.

    h: [B, T, k]
    differences: [B, S, k], possibly with stride 0 over the batch
    total, square: [B, k]
    """

    h: Tensor | None
    differences: Tensor | None
    total: Tensor | None
    square: Tensor | None


class Backend(Protocol):
    """The operators of `ops.py`, without autograd. Statistics are in `dtype_of_stats`, h in the dtype of its input.

    A backend may also have `activate_with_mask`, with the arguments of `activate_with_stats` (relu only). It returns
    the active mask [B, W, k] of `sparse_eager.pack_active` instead of h, and statistics of the same bits. Without it
    the operator packs h.
    """

    def activate_with_stats(
        self, pre: Tensor, activation: Activation, bands: Bands, segments: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h [B, T, k], contiguous, and its statistics as in `temporal_stats`."""

    def temporal_stats(self, h: Tensor, bands: Bands, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """differences [B, S, k], total [B, k] and square [B, k] of h [B, T, k]."""

    def activate_with_stats_backward(
        self,
        saved: Tensor,
        grads: Gradients,
        activation: Activation,
        bands: Bands,
        segments: Tensor | None,
        total: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """grad_pre [B, T, k] and grad_bias [k]. `saved` is h, except for gelu, where it is pre.

        total: [B, k], the statistic of h if it is known. A backend may use it instead of another pass over h.
        """

    def step_energy(self, h: Tensor, weights: Tensor) -> Tensor:
        """[]: the sum of weights[b, t] * (h[b, t+1, j] - h[b, t, j])^2. weights: [B, T]."""

    def step_energy_backward(self, h: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        """grad_h [B, T, k]. grad: [], the gradient of the energy."""
