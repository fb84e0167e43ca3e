"""Matrix products that skip the zeros of the features, for CPUs.

With 32 of 2,560 features active, four of the five products of a training step (all but the encoder's forward) touch
1 % of what the dense ones do. The sums are the same, in another order. Under bfloat16 autocast the encoder's forward
runs in bfloat16, features and their gradient are bfloat16, and the four are summed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsae_kernels.sparse import CompressedRows, compress, matmul, sampled_matmul, sparse_products_available, transpose

MAX_DENSITY = 0.08  # of features: above, the dense product is faster (measured on an AVX2 CPU)


def worthwhile(x: Tensor) -> bool:
    """Whether sparse products are available and may pay for tensors like ``x``: on a CPU with the compiled kernels,
    float32, or bfloat16 under autocast."""
    autocast = torch.is_autocast_enabled("cpu")
    if autocast and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    return (
        x.device.type == "cpu"
        and (x.dtype == torch.float32 or (autocast and x.dtype == torch.bfloat16))
        and sparse_products_available()
        and not torch.compiler.is_compiling()
    )


def _compressed(dense: Tensor) -> CompressedRows | None:
    """``dense`` compressed, or None if too much of it is not 0."""
    rows = compress(dense)
    return rows if rows.values.numel() <= MAX_DENSITY * dense.numel() else None


class _DecodeSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, W_dec: Tensor) -> Tensor:
        rows = _compressed(h.detach())
        ctx.sparse = rows is not None
        if rows is None:
            ctx.save_for_backward(h, W_dec)
            return h @ W_dec
        ctx.save_for_backward(*rows, W_dec)
        ctx.dtype = h.dtype
        return matmul(rows, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not ctx.sparse:
            h, W_dec = ctx.saved_tensors
            grad_h = grad @ W_dec.to(grad.dtype).T
            return grad_h.to(h.dtype), (h.to(grad.dtype).T @ grad).to(W_dec.dtype)
        *saved, W_dec = ctx.saved_tensors
        rows = CompressedRows(*saved)
        grad_h = sampled_matmul(rows, grad, W_dec, ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_W = matmul(transpose(rows, len(W_dec)), grad) if ctx.needs_input_grad[1] else None
        return grad_h, grad_W


def decode_sparse(h: Tensor, W_dec: Tensor) -> Tensor:
    """``h @ W_dec`` for features that are mostly 0.

    The gradient of ``h`` is computed only where ``h`` is not 0. It is exact for features that come out of a
    thresholded relu, whose own gradient is 0 there; do not use it for others.

    h: (..., d_sae), float32, or bfloat16 under autocast; W_dec: (d_sae, d_in), float32
    out: (..., d_in), float32 unless too little of h is 0 under autocast
    """
    return _DecodeSparse.apply(h.reshape(-1, h.shape[-1]), W_dec).reshape(*h.shape[:-1], W_dec.shape[1])


class _EncodeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        return x @ W_enc

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, W_enc = ctx.saved_tensors
        rows = _compressed(grad)
        grad_x = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ W_enc.to(grad.dtype).T if rows is None else matmul(rows, W_enc.T)
        if ctx.needs_input_grad[1]:
            grad_W = x.to(grad.dtype).T @ grad if rows is None else matmul(transpose(rows, grad.shape[1]), x).T
        return _as(grad_x, x), _as(grad_W, W_enc)


def _as(gradient: Tensor | None, of: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(of.dtype)


def encode_linear(x: Tensor, W_enc: Tensor) -> Tensor:
    """``x @ W_enc``, whose backward skips the zeros of the incoming gradient.

    x: (..., d_in), float32; W_enc: (d_in, d_sae), float32
    out: (..., d_sae), bfloat16 under autocast
    """
    return _EncodeLinear.apply(x.reshape(-1, x.shape[-1]), W_enc).reshape(*x.shape[:-1], W_enc.shape[1])
