"""Adam that reads few gradient rows, against PyTorch's fused Adam with the dense gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsae_kernels import available_backends
from tsae_kernels.row_adam import AdamState, RowGradient, row_adam_

TRITON = available_backends()["triton"]
BACKENDS = ["eager", pytest.param("triton", marks=pytest.mark.skipif(TRITON != "ok", reason=TRITON))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K, STEPS, LR, BETAS, LIMIT = 23, 6, 0.01, (0.8, 0.95), 0.5


def gradients(d: int) -> list[RowGradient]:
    """Of a few steps. Rows that must not be read are NaN; one feature never fires, one fires once."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for step in range(STEPS):
        fired = torch.rand(K, generator=generator) < 0.3
        fired[3], fired[4] = False, step == 1
        rows = torch.randn(K, d, generator=generator)
        rows[~fired] = torch.nan
        out.append(RowGradient(rows.to(DEVICE), fired.to(DEVICE)))
    return out


def start(d: int) -> tuple[Tensor, AdamState]:
    weight = torch.nn.functional.normalize(torch.randn(K, d, generator=torch.Generator().manual_seed(1)), dim=1)
    weight = weight.to(DEVICE)
    zero = torch.zeros_like(weight)
    return weight, AdamState(zero, zero.clone(), torch.zeros((), device=DEVICE))


def update(weight: Tensor, state: AdamState, gradient: RowGradient, unit: bool, backend: str, **options) -> Tensor:
    """A step with clipping; the norm of the gradient."""
    g = torch.where(gradient.fired[:, None], gradient.rows, 0.0)
    share = (g * weight).sum(1) / weight.square().sum(1) if unit else None
    norm = (g if share is None else g - share[:, None] * weight).norm()
    clip = (LIMIT / (norm + 1e-6)).clamp(max=1.0)
    lr = torch.tensor(LR, device=DEVICE)
    row_adam_(
        weight, state, gradient, lr=lr, betas=BETAS, clip=clip, share=share, unit_norm=unit, backend=backend, **options
    )
    return norm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", [False, True], ids=["free", "unit norm"])
@pytest.mark.parametrize("decay", [0.0, 0.2], ids=["adam", "adamw"])
@pytest.mark.parametrize("d", [1, 37, 4100])
def test_it_is_fused_adam_with_the_dense_gradient(d: int, decay: float, unit: bool, backend: str) -> None:
    weight, state = start(d)
    shadow = torch.empty_like(weight, dtype=torch.bfloat16)
    dense = torch.nn.Parameter(weight.clone())
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    optimizer = kind([dense], lr=LR, betas=BETAS, weight_decay=decay, fused=True)
    for gradient in gradients(d):
        norm = update(weight, state, gradient, unit, backend, weight_decay=decay, shadow=shadow)
        g = torch.where(gradient.fired[:, None], gradient.rows, 0.0)
        if unit:
            w = dense.detach()
            g = g - (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
        dense.grad = g
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_([dense], LIMIT), rtol=1e-5, atol=1e-6)
        optimizer.step()
        if unit:
            with torch.no_grad():
                dense.div_(dense.norm(dim=1, keepdim=True))
        torch.testing.assert_close(weight, dense.detach(), rtol=2e-6, atol=2e-6 if d > 1 else 1e-5)
        for name in ("exp_avg", "exp_avg_sq"):
            atol = 1e-7 if d > 1 or not unit else 1e-5  # in one dimension the projected gradient is rounding alone
            torch.testing.assert_close(
                getattr(state, name), optimizer.state[dense][name], rtol=1e-5, atol=atol, msg=name
            )
        assert state.step == optimizer.state[dense]["step"]
        assert torch.equal(shadow, weight.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_gradient_still_moves(backend: str) -> None:
    """Feature 4 fires at step 1 only. Adam's moment moves it on, unlike a lazy Adam, and decays by its beta."""
    weight, state = start(8)
    for step, gradient in enumerate(gradients(8)):
        before, moment = weight[4].clone(), state.exp_avg[4].clone()
        update(weight, state, gradient, False, backend)
        if step > 1:
            assert not torch.equal(weight[4], before)
            torch.testing.assert_close(state.exp_avg[4], BETAS[0] * moment)
    assert torch.equal(weight[3], start(8)[0][3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_skipped_changes_no_bit(backend: str) -> None:
    weight, state = start(37)
    first, second, *_ = gradients(37)
    update(weight, state, first, True, backend)
    before = [tensor.clone() for tensor in (weight, *state)]
    update(weight, state, second, True, backend, skip=torch.tensor(True, device=DEVICE))
    assert all(torch.equal(new, old) for new, old in zip((weight, *state), before, strict=True))
    update(weight, state, second, True, backend, skip=torch.tensor(False, device=DEVICE))
    assert state.step == 2
    assert not torch.equal(weight, before[0])


def test_a_matrix_in_another_layout_is_refused() -> None:
    weight, state = start(5)
    gradient = RowGradient(torch.zeros_like(weight), torch.zeros(K, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match="weight must be a contiguous float32 matrix"):
        row_adam_(weight.T, state, gradient, lr=torch.tensor(LR))
    with pytest.raises(ValueError, match="gradient must be"):
        row_adam_(weight, state, gradient._replace(fired=gradient.fired[1:]), lr=torch.tensor(LR))
    with pytest.raises(ValueError, match="'triton' or 'eager'"):
        row_adam_(weight, state, gradient, lr=torch.tensor(LR), backend="cpp")
