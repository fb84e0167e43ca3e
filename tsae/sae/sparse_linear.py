"""Matrix products that skip zero features, for CPUs.

With 32 of 2,560 features active, four of the five products in a training step (all but the encoder's forward) touch
1 % of the entries that dense products do. They add the same terms in another order. Under bfloat16 autocast the
encoder's forward runs in bfloat16, features and their gradients are bfloat16, and the four accumulate in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsae.utils.device import runs_behind
from tsae_kernels.sparse import CompressedRows, compress, matmul, sampled_matmul, sparse_products_available, transpose

MAX_DENSITY = 0.08  # above this share of active features the dense product is faster (measured on an AVX2 CPU)


def use_sparse_products(x: Tensor) -> bool:
    """Whether ``x`` is a case for sparse products: on a CPU with the compiled kernels, and float32, or bfloat16 under
    autocast."""
    autocast = torch.is_autocast_enabled("cpu")
    if autocast and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    return (
        x.device.type == "cpu"
        and not runs_behind(x.device)
        and (x.dtype == torch.float32 or (autocast and x.dtype == torch.bfloat16))
        and sparse_products_available()
        and not torch.compiler.is_compiling()
    )


def _compressed(dense: Tensor) -> CompressedRows | None:
    """``dense`` in compressed rows, or None if it is too dense."""
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

    The gradient of ``h`` is computed only where ``h`` is nonzero. Use it only for features from a thresholded ReLU,
    which passes no gradient elsewhere.

    h: (..., d_sae), float32, or bfloat16 under autocast; W_dec: (d_sae, d_in), float32
    out: (..., d_in), float32; under autocast bfloat16 if ``h`` is denser than `MAX_DENSITY`
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
        return (
            None if grad_x is None else grad_x.to(x.dtype),
            None if grad_W is None else grad_W.to(W_enc.dtype),
        )


def encode_linear(x: Tensor, W_enc: Tensor) -> Tensor:
    """``x @ W_enc`` with a backward pass that skips zeros of the incoming gradient.

    x: (..., d_in), float32; W_enc: (d_in, d_sae), float32
    out: (..., d_sae), bfloat16 under autocast
    """
    return _EncodeLinear.apply(x.reshape(-1, x.shape[-1]), W_enc).reshape(*x.shape[:-1], W_enc.shape[1])
