"""What every backend implements: a module, or an object, with the functions of `Backend`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
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

    Without `activate_with_mask` of `MaskBackend`, which a backend may also have, the operator packs h.
    """

    def activate_with_stats(
        self, pre: Tensor, activation: Activation, bands: Bands, segments: Tensor | None, transitions: bool = False
    ) -> tuple[Tensor, ...]:
        """h [B, T, k], contiguous, and its statistics as in `temporal_stats`."""

    def temporal_stats(
        self, h: Tensor, bands: Bands, segments: Tensor | None, transitions: bool = False
    ) -> tuple[Tensor, ...]:
        """differences [B, S, k], total [B, k] and square [B, k] of h [B, T, k].

        With `transitions` also the counts [B, 3, k] int32 of `tsae_kernels.CountedStats`.
        """

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


@runtime_checkable
class MaskBackend(Protocol):
    """What a backend may have besides the functions of `Backend`."""

    def activate_with_mask(
        self, pre: Tensor, activation: Activation, bands: Bands, segments: Tensor | None, transitions: bool = False
    ) -> tuple[Tensor, ...]:
        """The active mask [B, W, k] of `sparse_eager.pack_active` instead of h, and statistics of the same bits.

        The arguments are those of `activate_with_stats`; relu only.
        """


class ScanBackend(Protocol):
    """The operators of `scan_ops.py`, which describes the tensors; `scans.py` defines the results."""

    def viterbi_path(self, z: Tensor, transition_cost: Tensor, start_cost: Tensor, segments: Tensor | None) -> Tensor:
        """[B, T, k] bool: the states of the cheapest path."""

    def leaky_recurrence(self, a: Tensor, decay: Tensor, segments: Tensor | None) -> Tensor:
        """h [B, T, k] in a's dtype, contiguous."""

    def leaky_recurrence_backward(
        self, grad_h: Tensor, decay: Tensor, a: Tensor | None, h: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """grad_a [B, T, k] and grad_decay [k], which is 0 without a and h, in `dtype_of_stats`."""


class ListBackend(Protocol):
    """The operators of `sparse_ops.py`, which describes the tensors: a module for lists of active features."""

    def compress(
        self, active: Tensor, pre: Tensor, bias: Tensor | None, capacity: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """values [N, C], indices [N, C] and counts [N] of the features in an active mask [B, W, k]."""

    def compress_gated(
        self,
        active: Tensor,
        pre: Tensor,
        bias: Tensor | None,
        threshold: Tensor,
        release: Tensor,
        segments: Tensor | None,
        width: float,
        capacity: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The same of active features and of those near a level [k]; levels [N, C]; the active features' counts [N]."""

    def decode(
        self, values: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, ends: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """[G, N, d]: a reconstruction from the features before each of `ends`."""

    def decode_backward(
        self, grad: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, ends: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """[N, C]: the gradient of every value. grad: [G, N, d], for the features of each group."""

    def sort_entries(self, indices: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fields of `sparse_ops.Entries`."""

    def stats_backward(
        self,
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
        """[E]: the gradient of every entry through itself and the statistics, in the order by feature."""

    def weight_gradients(
        self,
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
        """The gradients of W_enc.T [k, d], W_dec [k, d] and b_enc [k], and measures of the rows [4, k]."""

    def squared_errors(self, x: Tensor, xhat: Tensor) -> Tensor:
        """[N]: the sum over d of (x - xhat)^2."""

    def squared_errors_backward(self, x: Tensor, xhat: Tensor, grad: Tensor) -> Tensor:
        """[N, d]: the gradient of xhat."""
