"""Adam for a weight matrix of which few rows have a gradient: one pass over the matrix, no dense gradient.

With few of k features active in a batch, row j of the gradient of W_dec [k, d] and of W_enc.T [k, d] is exactly 0
unless feature j fired. `row_adam_` reads gradient rows of features that fired only. For the others it takes g = 0 in

    m <- beta1 m + (1 - beta1) g         v <- beta2 v + (1 - beta2) g^2
    w <- w (1 - lr decay) - lr m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps)

so their moments decay and the weight still moves: it is the update of PyTorch's fused Adam (Kingma and Ba 2015; AdamW:
Loshchilov and Hutter 2019) with a dense gradient, to rounding, and not a lazy Adam that skips rows. Its state is
PyTorch's too. The same pass removes the gradient's component along its row, scales rows to norm 1 and writes a bfloat16
copy. It reads and writes 24 bytes a parameter, 2 more for the copy and 4 more in rows that fired.

`step`, `lr`, `clip` and `skip` are tensors on the device and nothing depends on their values on the host, so a step can
be captured in a CUDA graph. **The Triton kernel has not run on a GPU.**
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae_kernels.backends.registry import available_backends, choose_backend


class RowGradient(NamedTuple):
    """The gradient of a matrix [k, d]: 0 in the rows of features that did not fire.

    rows: [k, d] float32, contiguous. The rows of features that did not fire are never read and may hold anything.
    fired: [k] bool
    """

    rows: Tensor
    fired: Tensor


class AdamState(NamedTuple):
    """What PyTorch's Adam keeps for a matrix, and what a step needs of it; updated in place.

    exp_avg, exp_avg_sq: [k, d] float32, contiguous
    step: [] float32, updates made so far
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


@torch.no_grad()
def row_adam_(
    weight: Tensor,
    state: AdamState,
    gradient: RowGradient,
    *,
    lr: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: Tensor | None = None,
    share: Tensor | None = None,
    unit_norm: bool = False,
    shadow: Tensor | None = None,
    skip: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One Adam step on ``weight`` [k, d] float32, contiguous, in place.

    state: ``step`` is raised by 1
    lr: [] float32
    weight_decay: decoupled, as in AdamW
    clip: [] float32, a factor on the gradient; None: 1
    share: [k] float32, g w / |w|^2 of each row (0 where not fired), whose component along w is removed first
    unit_norm: scale each row to norm 1 after the step
    shadow: [k, d] bfloat16 or None; receives the new weight, rounded
    skip: [] bool or None; where true, nothing is changed
    backend: "triton" or "eager"; None: triton on a CUDA device where it is available
    """
    _check(gradient, weight)
    go = torch.ones_like(state.step) if skip is None else (~skip).to(state.step.dtype)
    state.step.add_(go)
    # In float64: 1 - 0.999^n loses four digits in float32.
    n = state.step.double().clamp(min=1.0)
    first = 1.0 - torch.pow(betas[0], n)
    second = 1.0 - torch.pow(betas[1], n)
    rate = lr.double()
    factor = torch.ones_like(n) if clip is None else clip.double()
    scalars = torch.stack([rate / first, second.sqrt(), 1.0 - rate * weight_decay, factor, go.double()]).float()
    if _uses_triton(backend, weight.device):
        from tsae_kernels.backends.triton.row_adam import launch_row_adam

        launch_row_adam(weight, state[:2], *gradient, share, shadow, scalars, betas, eps, unit_norm)
        return
    step_size, root, keep, factor, go = scalars.unbind()
    g = torch.where(gradient.fired[:, None], gradient.rows, 0.0)
    if share is not None:
        g = g.addcmul(weight, share[:, None], value=-1)
    g = g * factor
    exp_avg = betas[0] * state.exp_avg + (1.0 - betas[0]) * g
    exp_avg_sq = betas[1] * state.exp_avg_sq + (1.0 - betas[1]) * g.square()
    moved = weight * keep - step_size * exp_avg / (exp_avg_sq.sqrt() / root + eps)
    if unit_norm:
        moved = moved / torch.linalg.vector_norm(moved, dim=1, keepdim=True).clamp(min=1e-12)
    for old, new in ((weight, moved), (state.exp_avg, exp_avg), (state.exp_avg_sq, exp_avg_sq)):
        old.copy_(new if skip is None else torch.where(skip, old, new))
    if shadow is not None:
        shadow.copy_(weight)


def _check(gradient: RowGradient, weight: Tensor) -> None:
    for name, tensor in (("weight", weight), ("gradient.rows", gradient.rows)):
        if tensor.dim() != 2 or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            shape = list(tensor.shape)
            raise ValueError(f"{name} must be a contiguous float32 matrix, got {tensor.dtype} of shape {shape}")
    if gradient.rows.shape != weight.shape or gradient.fired.shape != weight.shape[:1]:
        shapes = [list(gradient.rows.shape), list(gradient.fired.shape)]
        raise ValueError(f"gradient must be [k, d] and [k] for a weight of shape {list(weight.shape)}, got {shapes}")


def _uses_triton(backend: str | None, device: torch.device) -> bool:
    if backend is None:
        return device.type == "cuda" and available_backends()["triton"] == "ok"
    if backend not in ("triton", "eager"):
        raise ValueError(f"backend must be None, 'triton' or 'eager', got {backend!r}")
    return choose_backend(backend, device) == "triton"
