"""The public functions on [B, T, k] features: activation and temporal statistics."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from tsae_kernels import ops as _ops  # noqa: F401  (registers the operators)
from tsae_kernels.arguments import check_activation, check_features, check_segments, check_tensor, check_weight
from tsae_kernels.backends.registry import choose_backend
from tsae_kernels.bands import MULTISCALE, Bands, check_bands, flatten_bands


class TemporalStats(NamedTuple):
    """Sums over time, per sequence and feature; float32, or float64 for float64 features.

    With bands (a_s, b_s), over pairs within a segment and over non-excluded positions:

    differences: [B, S, k]  sum over pairs (t, u) with a_s <= u - t <= b_s of (h[b,u,j] - h[b,t,j])^2
    total:       [B, k]     sum over t of h[b,t,j]
    square:      [B, k]     sum over t of h[b,t,j]^2
    """

    differences: Tensor
    total: Tensor
    square: Tensor


class CountedStats(NamedTuple):
    """`TemporalStats`, and how often each feature switches on and off.

    differences, total, square: as in `TemporalStats`
    transitions: [B, 3, k]  int32, without gradient: the number of pairs (t, t + 1) in one segment in which the feature
        is on at both, turns off, and turns on. On means h > 0; NaN counts as on.

    The transition rates of the feature's two-state Markov chain are p11 = on_on / (on_on + on_off) and p01 = off_on /
    (pairs - on_on - on_off), with pairs from `count_pairs`, or T - 1 without segments.
    """

    differences: Tensor
    total: Tensor
    square: Tensor
    transitions: Tensor

    @property
    def temporal(self) -> TemporalStats:
        """The statistics without the counts."""
        return TemporalStats(*self[:3])


@overload
def temporal_stats(
    h: Tensor,
    bands: Bands = ...,
    segments: Tensor | None = ...,
    *,
    transitions: Literal[False] = ...,
    backend: str | None = ...,
) -> TemporalStats: ...
@overload
def temporal_stats(
    h: Tensor,
    bands: Bands = ...,
    segments: Tensor | None = ...,
    *,
    transitions: Literal[True],
    backend: str | None = ...,
) -> CountedStats: ...
@overload
def temporal_stats(
    h: Tensor, bands: Bands = ..., segments: Tensor | None = ..., *, transitions: bool, backend: str | None = ...
) -> TemporalStats | CountedStats: ...
def temporal_stats(
    h: Tensor,
    bands: Bands = MULTISCALE,
    segments: Tensor | None = None,
    *,
    transitions: bool = False,
    backend: str | None = None,
) -> TemporalStats | CountedStats:
    """Squared temporal differences of `h` in every band, and its first two moments (TSAE, section 4.1).

    h: [B, T, k] float64, float32, bfloat16 or float16; any strides; B may be 0
    bands: disjoint ascending inclusive ranges of offsets >= 1; they may reach past T; at most 8 for `cuda`
    segments: [B, T] integers or None. A segment is a maximal run of equal non-negative ids; a negative id
        excludes the position. None: every row is one segment.
    transitions: also count how often each feature switches on and off, in the same pass
    backend: a name from `available_backends()`; None for `TSAE_BACKEND` or, if unset, the fastest on h's device
    out: `TemporalStats`, or with `transitions` `CountedStats`, in the square of h's unit (`total` in h's unit).
        Differentiable once in h.

    Raises `TypeError` or `ValueError` for an invalid argument, `RuntimeError` for an unavailable backend and for a
    second derivative.
    """
    check_features("h", h)
    bands = check_bands(bands)
    check_segments(segments, h)
    chosen = choose_backend(backend, h.device)
    arguments = h, flatten_bands(bands), segments, chosen
    if transitions:
        return CountedStats(*torch.ops.tsae_kernels.temporal_stats_counted(*arguments))
    return TemporalStats(*torch.ops.tsae_kernels.temporal_stats(*arguments))


@overload
def activate_with_stats(
    pre: Tensor,
    bias: Tensor | None = ...,
    activation: str = ...,
    threshold: float | Tensor | None = ...,
    release: float | Tensor | None = ...,
    bands: Bands = ...,
    segments: Tensor | None = ...,
    *,
    transitions: Literal[False] = ...,
    backend: str | None = ...,
) -> tuple[Tensor, TemporalStats]: ...
@overload
def activate_with_stats(
    pre: Tensor,
    bias: Tensor | None = ...,
    activation: str = ...,
    threshold: float | Tensor | None = ...,
    release: float | Tensor | None = ...,
    bands: Bands = ...,
    segments: Tensor | None = ...,
    *,
    transitions: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, CountedStats]: ...
@overload
def activate_with_stats(
    pre: Tensor,
    bias: Tensor | None = ...,
    activation: str = ...,
    threshold: float | Tensor | None = ...,
    release: float | Tensor | None = ...,
    bands: Bands = ...,
    segments: Tensor | None = ...,
    *,
    transitions: bool,
    backend: str | None = ...,
) -> tuple[Tensor, TemporalStats | CountedStats]: ...
def activate_with_stats(
    pre: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    threshold: float | Tensor | None = None,
    release: float | Tensor | None = None,
    bands: Bands = MULTISCALE,
    segments: Tensor | None = None,
    *,
    transitions: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, TemporalStats | CountedStats]:
    """h = activation(pre + bias) and `temporal_stats(h, bands, segments)` in one pass.

    For the statistics see TSAE, section 4.1; for the Schmitt trigger, docs/mathematics.md, section 7.

    pre: [B, T, k] float64, float32, bfloat16 or float16; any strides; B may be 0
    bias: [k] floating point or None
    activation: "relu", "gelu" (erf) or "identity"
    threshold: None, a number or [], [k] or [B, T, 1]; only with "relu", which then keeps pre + bias where it is
        greater than max(threshold, 0). This covers TopK (threshold: the (K+1)-th value of each token), BatchTopK (one
        number) and the forward pass of JumpReLU.
    release: None, a number or [], [k]; 0 <= release <= threshold. Makes the activation a Schmitt trigger along T: a
        feature turns on above `threshold` and stays on while it is above `release`. Every segment starts off. An
        excluded position neither reads nor passes on the state: it is kept if above `threshold`. Where a [B, T, 1]
        threshold is below `release`, only the threshold applies.
    bands, segments, transitions, backend: as in `temporal_stats`
    out: h [B, T, k] in pre's dtype and unit, contiguous; `TemporalStats` (or `CountedStats`) of h as returned (rounded
        to pre's dtype)

    Sum, comparison and activation are computed in float32 (float64 for float64), and NaN is kept. The gradient flows to
    pre and bias through kept entries, as in TopK; `threshold` and `release` get none. Every output is differentiable
    once.

    Raises `TypeError` or `ValueError` for an invalid argument, `RuntimeError` for an unavailable backend and for a
    second derivative. That release <= threshold is not checked on an accelerator or under torch.compile, where the
    check would wait for the device.
    """
    check_features("pre", pre)
    if bias is not None:
        check_tensor("bias", bias, (pre.shape[2],), pre.device)
    levels = check_activation(pre, activation, threshold, release)
    bands = check_bands(bands)
    check_segments(segments, pre)
    chosen = choose_backend(backend, pre.device)
    arguments = pre, bias, activation, *levels, flatten_bands(bands), segments, chosen
    if transitions:
        h, *stats = torch.ops.tsae_kernels.activate_with_stats_counted(*arguments)
        return h, CountedStats(*stats)
    h, *stats = torch.ops.tsae_kernels.activate_with_stats(*arguments)
    return h, TemporalStats(*stats)


@overload
def encode_with_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    activation: str = ...,
    threshold: float | Tensor | None = ...,
    release: float | Tensor | None = ...,
    bands: Bands = ...,
    segments: Tensor | None = ...,
    *,
    transitions: Literal[False] = ...,
    backend: str | None = ...,
) -> tuple[Tensor, TemporalStats]: ...
@overload
def encode_with_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    activation: str = ...,
    threshold: float | Tensor | None = ...,
    release: float | Tensor | None = ...,
    bands: Bands = ...,
    segments: Tensor | None = ...,
    *,
    transitions: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, CountedStats]: ...
@overload
def encode_with_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    activation: str = ...,
    threshold: float | Tensor | None = ...,
    release: float | Tensor | None = ...,
    bands: Bands = ...,
    segments: Tensor | None = ...,
    *,
    transitions: bool,
    backend: str | None = ...,
) -> tuple[Tensor, TemporalStats | CountedStats]: ...
def encode_with_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    threshold: float | Tensor | None = None,
    release: float | Tensor | None = None,
    bands: Bands = MULTISCALE,
    segments: Tensor | None = None,
    *,
    transitions: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, TemporalStats | CountedStats]:
    """The SAE encoder h = activation(x W_enc + b_enc): `activate_with_stats(x @ weight, bias, ...)`.

    x: [B, T, d] language-model activations, in any dtype that `activate_with_stats` takes
    weight: [d, k] in x's dtype, or in any dtype under autocast, which then also decides h's dtype
    bias, activation, threshold, release, bands, segments, transitions, backend, out: as in `activate_with_stats`;
        differentiable in x, weight and bias

    Raises the errors of `activate_with_stats`.
    """
    check_features("x", x)
    check_weight(weight, x)
    pre, options = torch.matmul(x, weight), (activation, threshold, release, bands, segments)
    return activate_with_stats(pre, bias, *options, transitions=transitions, backend=backend)
