"""The encoder and the decoder on lists of active features: a training step on a GPU with one dense product.

Of the five products of a dense step only ``x @ W_enc`` is needed. The activation reads its output and keeps one bit per
feature and the temporal statistics; the active features are then compressed into one list per token. Decoder and
gradients read and write the lists' entries alone. No shape depends on a value, so a step waits for nothing and can be
captured in one CUDA graph. Byte counts: docs/kernels.md, "Sparse training step".

    features, stats = encode_sparse(x, W_enc, b_enc, threshold, capacity=64)
    xhat = decode_sparse_features(features, W_dec)

differentiates like the dense functions. For an optimizer that updates rows, `DeferredGradients` keeps the gradients of
the weights out of autograd: `weight_gradients` (sparse_weights.py) then writes the rows of features that fired alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsae_kernels.arguments import check_activation, check_features, check_segments, check_tensor, check_weight
from tsae_kernels.backends.registry import choose_backend
from tsae_kernels.bands import MULTISCALE, Bands, check_bands, flatten_bands
from tsae_kernels.functions import CountedStats, TemporalStats
from tsae_kernels.sparse_ops import Entries, backend_for_lists
from tsae_kernels.sparse_weights import DeferredGradients, Piece

_ops = torch.ops.tsae_kernels


class SparseFeatures(NamedTuple):
    """The active features of N = B T tokens, at most C of each token, in ascending order.

    values:  [N, C] in the pre-activations' dtype and unit, 0 past the count; differentiable
    indices: [N, C] int32, k past the count
    counts:  [N] int32, how many features are active, which may be more than C
    """

    values: Tensor
    indices: Tensor
    counts: Tensor

    @property
    def overflow(self) -> Tensor:
        """[] bool: whether a token has more than C active features, so that its list lacks the last ones.

        Then no gradient computed from the lists is right: enlarge the capacity and repeat the step.
        """
        return (self.counts > self.values.shape[1]).any()


class GatedFeatures(NamedTuple):
    """The features of N = B T tokens that are active or nearly so, at most C of each token, in ascending order.

    values:  [N, C] in the pre-activations' dtype and unit, 0 where a feature is off and past the count; differentiable
    indices: [N, C] int32, k past the count
    counts:  [N] int32, how many features are in the list or would be, which may be more than C
    levels:  [N, C] float32, the threshold or release in whose window the entry is, active or not; 0 if in none
    active:  [N] int32, how many features are active
    """

    values: Tensor
    indices: Tensor
    counts: Tensor
    levels: Tensor
    active: Tensor


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pre: Tensor,
        levels: tuple[Tensor | None, Tensor | None],
        bands: list[int],
        segments: Tensor | None,
        capacity: int,
        transitions: bool,
        backend: str,
        deferred: DeferredGradients | None,
        anchor: Tensor | None,
        width: float | None,
    ) -> tuple[Tensor, ...]:
        activate = _ops.activate_with_mask_counted if transitions else _ops.activate_with_mask
        active, *stats = activate(pre, bias, *levels, bands, segments, backend)
        ctx.bands, ctx.backend, ctx.deferred, ctx.k = bands, backend_for_lists(backend), deferred, pre.shape[2]
        near: list[Tensor] = []
        if width is None:
            values, indices, counts = _ops.sparse_compress(active, pre, bias, capacity, ctx.backend)
        else:
            both = (level.expand(ctx.k) for level in levels if level is not None)
            options = segments, width, capacity, ctx.backend
            values, indices, counts, *near = _ops.sparse_compress_gated(active, pre, bias, *both, *options)
        ctx.save_for_backward(x, weight, segments, values, indices, counts)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(indices, counts, *stats[3:], *near)
        ctx.set_materialize_grads(False)
        return values, indices, counts, *stats, *near

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, segments, values, indices, counts = ctx.saved_tensors
        grads = rest[2:5]  # after indices and counts, without the transitions'
        tokens = x.reshape(-1, x.shape[2])  # [N, d]
        entries = Entries(*_ops.sparse_sort_entries(indices, values, ctx.k, ctx.backend))
        options = ctx.bands, segments, x.shape[1], ctx.backend
        by_feature = entries.values, entries.order, entries.features, entries.tokens
        grad_pre = _ops.sparse_stats_backward(*by_feature, ctx.k, grad_values, *grads, *options)
        if ctx.deferred is not None:
            ctx.deferred.record_encoder(Piece(entries, grad_pre, tokens.detach()), ctx.backend)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            by_token = torch.empty_like(grad_pre).index_copy_(0, entries.order, grad_pre).view(indices.shape)
            decoding = weight.T.contiguous(), [ctx.k], x.dtype, ctx.backend
            grad_x = _ops.sparse_decode(by_token, indices, counts, *decoding).view_as(x)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            arguments = grad_pre, tokens, None, None, None, [ctx.k], True, ctx.backend
            grad_rows, _, sums, _ = _ops.sparse_weight_gradients(
                entries.features, entries.tokens, entries.offsets, *arguments
            )
            grad_weight = grad_rows.to(weight.dtype).T
            grad_bias = None if ctx.bias_dtype is None else sums.to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, *[None] * 10


@overload
def encode_sparse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    threshold: float | Tensor | None = ...,
    release: float | Tensor | None = ...,
    bands: Bands = ...,
    segments: Tensor | None = ...,
    *,
    capacity: int,
    pre: Tensor | None = ...,
    deferred: DeferredGradients | None = ...,
    transitions: Literal[False] = ...,
    backend: str | None = ...,
) -> tuple[SparseFeatures, TemporalStats]: ...
@overload
def encode_sparse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    threshold: float | Tensor | None = ...,
    release: float | Tensor | None = ...,
    bands: Bands = ...,
    segments: Tensor | None = ...,
    *,
    capacity: int,
    pre: Tensor | None = ...,
    deferred: DeferredGradients | None = ...,
    transitions: Literal[True],
    backend: str | None = ...,
) -> tuple[SparseFeatures, CountedStats]: ...
@overload
def encode_sparse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    threshold: float | Tensor | None = ...,
    release: float | Tensor | None = ...,
    bands: Bands = ...,
    segments: Tensor | None = ...,
    *,
    capacity: int,
    pre: Tensor | None = ...,
    deferred: DeferredGradients | None = ...,
    transitions: bool,
    backend: str | None = ...,
) -> tuple[SparseFeatures, TemporalStats | CountedStats]: ...
def encode_sparse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    threshold: float | Tensor | None = None,
    release: float | Tensor | None = None,
    bands: Bands = MULTISCALE,
    segments: Tensor | None = None,
    *,
    capacity: int,
    pre: Tensor | None = None,
    deferred: DeferredGradients | None = None,
    transitions: bool = False,
    backend: str | None = None,
) -> tuple[SparseFeatures, TemporalStats | CountedStats]:
    """`encode_with_stats` with relu, as lists of active features: the one dense product of a sparse training step.

    x: [B, T, d] language-model activations; B may be 0
    weight: [d, k] in x's dtype, or in any dtype under autocast; stored by feature (``weight.T`` contiguous), or it is
        copied in the backward pass for the gradient of x
    bias, threshold, release, bands, segments: as in `activate_with_stats`
    capacity: C, the places of a token's list; check `SparseFeatures.overflow`
    pre: [B, T, k], ``x @ weight`` if the caller has it already, to choose a threshold; gradients pass by it
    deferred: where to leave the gradients of weight and bias, which then get none from autograd
    transitions, backend: as in `temporal_stats`; for the lists "triton", or "eager" where Triton is unavailable
    out: `SparseFeatures` of the N = B T tokens, whose values have the bits of `activate_with_stats`'s h;
        `TemporalStats` (or `CountedStats`) of h. Differentiable once in x, weight and bias. The statistics' gradient
        reaches active features only, as relu has it, and comes from the pairs of a feature in a band: only ``pre`` is
        [B, T, k].

    Raises the errors of `encode_with_stats`, and `ValueError` for a capacity below 1.
    """
    out = _encode(x, weight, bias, threshold, release, bands, segments, capacity, pre, deferred, transitions, backend)
    values, indices, counts, *stats = out
    features = SparseFeatures(values, indices, counts)
    return features, CountedStats(*stats) if transitions else TemporalStats(*stats)


def encode_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: float | Tensor,
    release: float | Tensor,
    bands: Bands = MULTISCALE,
    segments: Tensor | None = None,
    *,
    width: float,
    capacity: int,
    pre: Tensor | None = None,
    deferred: DeferredGradients | None = None,
    transitions: bool = False,
    backend: str | None = None,
) -> tuple[GatedFeatures, TemporalStats | CountedStats]:
    """`encode_sparse` of a Schmitt trigger whose lists also hold features that are nearly on.

    With z = pre + bias and l the level that decides (the release if the feature was on at the position before in its
    segment, else the threshold), these are the features with |z - l| < width l / 2 at positions that are not excluded.

    threshold, release: numbers, or tensors [] or [k]
    width: positive
    capacity: of active features and near misses together
    x, weight, bias, bands, segments, pre, deferred, transitions, backend: as in `encode_sparse`
    out: as of `encode_sparse`. The gradient of a value reaches its pre-activation even if it is 0; that of the
        statistics reaches active features only.

    Raises the errors of `encode_sparse`, and `ValueError` for a width that is not positive or other thresholds.
    """
    if not width > 0:
        raise ValueError(f"width must be positive, got {width!r}")
    if any(level is None or (isinstance(level, Tensor) and level.dim() > 1) for level in (threshold, release)):
        raise ValueError("threshold and release must be numbers or tensors of shape [] or [k]")
    options = capacity, pre, deferred, transitions, backend, float(width)
    values, indices, counts, *stats, levels, active = _encode(
        x, weight, bias, threshold, release, bands, segments, *options
    )
    features = GatedFeatures(values, indices, counts, levels, active)
    return features, CountedStats(*stats) if transitions else TemporalStats(*stats)


def _encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: float | Tensor | None,
    release: float | Tensor | None,
    bands: Bands,
    segments: Tensor | None,
    capacity: int,
    pre: Tensor | None,
    deferred: DeferredGradients | None,
    transitions: bool,
    backend: str | None,
    width: float | None = None,
) -> tuple[Tensor, ...]:
    """Check the arguments and apply `_Encode`."""
    check_features("x", x)
    check_weight(weight, x)
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
        raise ValueError(f"capacity must be an int of at least 1, got {capacity!r}")
    k = weight.shape[1]
    if pre is None:
        pre = torch.matmul(x.detach(), weight.detach())
    check_features("pre", pre)
    if pre.shape != (*x.shape[:2], k):
        raise ValueError(f"pre must be x @ weight of shape {[*x.shape[:2], k]}, got {list(pre.shape)}")
    if bias is not None:
        check_tensor("bias", bias, (k,), x.device)
    levels = check_activation(pre, "relu", threshold, release)
    flat_bands = flatten_bands(check_bands(bands))
    check_segments(segments, x)
    chosen = choose_backend(backend, x.device)
    anchor = None
    if deferred is not None:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        anchor = x.new_empty(0).requires_grad_()  # else autograd would not call the backward pass
    options = flat_bands, segments, capacity, transitions, chosen, deferred, anchor, width
    out: tuple[Tensor, ...] = _Encode.apply(x, weight, bias, pre.detach(), levels, *options)  # type: ignore[no-untyped-call]
    return out


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        indices: Tensor,
        counts: Tensor,
        ends: list[int],
        dtype: torch.dtype,
        backend: str,
        deferred: DeferredGradients | None,
    ) -> Tensor:
        ctx.save_for_backward(values, weight, indices, counts)
        ctx.ends, ctx.backend, ctx.deferred = ends, backend, deferred
        xhat: Tensor = _ops.sparse_decode(values, indices, counts, weight, ends, dtype, backend)
        return xhat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, indices, counts = ctx.saved_tensors
        if len(ctx.ends) > 1:  # a feature is in its group's prefix and in all larger ones
            grad = grad.flip(0).cumsum(0).flip(0)
        grad = grad.contiguous()
        grad_values = grad_weight = None
        if ctx.deferred is not None:
            ctx.deferred.record_decoder(grad, ctx.ends)
        if ctx.needs_input_grad[0]:
            decoding = ctx.ends, values.dtype, ctx.backend
            grad_values = _ops.sparse_decode_backward(grad, indices, counts, weight, *decoding)
        if ctx.needs_input_grad[1] and ctx.deferred is None:
            entries = Entries(*_ops.sparse_sort_entries(indices, values, weight.shape[0], ctx.backend))
            arguments = None, None, entries.values, grad, None, ctx.ends, True, ctx.backend
            _, rows, _, _ = _ops.sparse_weight_gradients(entries.features, entries.tokens, entries.offsets, *arguments)
            grad_weight = rows.to(weight.dtype)
        return grad_values, grad_weight, *[None] * 6


def decode_sparse_features(
    features: SparseFeatures,
    weight: Tensor,
    *,
    ends: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    deferred: DeferredGradients | None = None,
    backend: str | None = None,
) -> Tensor:
    """``h @ W_dec`` from lists of active features, accumulated in float32 (float64 where an operand is).

    features: of N tokens, from `encode_sparse`
    weight: W_dec [k, d], contiguous or copied, in any floating-point dtype
    ends: prefixes of a Matryoshka dictionary: ascending ends, the last of them k. None: the dictionary alone
    dtype: of the result; None: weight's
    deferred: where to leave the gradient of weight, which then gets none from autograd
    backend: as in `encode_sparse`
    out: [N, d]; with ``ends`` [G, N, d], the reconstructions from the first ``ends[g]`` features. Differentiable once
        in the values and weight.

    Raises `TypeError` or `ValueError` for an invalid argument, `RuntimeError` for an unavailable backend.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight must be a tensor of shape [k, d], got {got}")
    check_tensor("weight", weight, tuple(weight.shape), features.values.device)
    prefixes = [weight.shape[0]] if ends is None else [int(end) for end in ends]
    if prefixes != sorted(prefixes) or prefixes[:1] < [0] or prefixes[-1:] != [weight.shape[0]]:
        raise ValueError(f"ends must ascend to the number of features, {weight.shape[0]}, got {prefixes}")
    if deferred is not None:
        weight = weight.detach()
    values, indices, counts = features
    chosen = backend_for_lists(choose_backend(backend, values.device))
    how = prefixes, dtype or weight.dtype, chosen, deferred
    out: Tensor = _Decode.apply(values, weight.contiguous(), indices, counts, *how)  # type: ignore[no-untyped-call]
    return out[0] if ends is None else out


class _SquaredErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, xhat: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x, xhat)
        ctx.backend = backend
        errors: Tensor = _ops.squared_errors(x, xhat, backend)
        return errors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, xhat = ctx.saved_tensors
        return None, _ops.squared_errors_backward(x, xhat, grad.contiguous(), ctx.backend), None


def squared_errors(x: Tensor, xhat: Tensor, *, backend: str | None = None) -> Tensor:
    """``(x - xhat).square().sum(-1)`` in float32, in one pass forward and one back: each token's reconstruction error.

    In PyTorch's operators each pass reads and writes [..., d] several times, which counts beside one dense product.

    x: [..., d] floating point, taken as a constant
    xhat: like x, in any floating-point dtype
    backend: as in `encode_sparse`
    out: [...] float32 (float64 where an operand is). Differentiable once in xhat, whose gradient is 0 wherever that of
        the result is 0, even if the error is not finite

    Raises `TypeError` or `ValueError` for an invalid argument, `RuntimeError` for an unavailable backend.
    """
    check_tensor("x", x, tuple(x.shape), x.device)
    check_tensor("xhat", xhat, tuple(x.shape), x.device)
    chosen = backend_for_lists(choose_backend(backend, x.device))
    d = x.shape[-1]
    flat = x.detach().reshape(-1, d).contiguous(), xhat.reshape(-1, d).contiguous()
    errors: Tensor = _SquaredErrors.apply(*flat, chosen)  # type: ignore[no-untyped-call]
    return errors.view(x.shape[:-1])
