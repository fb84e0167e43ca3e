"""Correctness check before timing: every variant is compared with the definition in float64.

A large batch is checked on sequences spread over it, because the definition in float64 of all of them takes longer than
what is timed and more memory than a GPU has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsae_kernels import MULTISCALE, Bands, activate_with_stats

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""The largest relative error allowed, by the dtype of the input."""

SEQUENCES = 64
"""How many sequences of a batch are compared with the definition."""


class WrongResultError(AssertionError):
    """A variant computes a wrong result, so its time means nothing."""


def reference(
    x: Tensor,
    activation: str,
    threshold: Tensor | None,
    release: Tensor | None,
    grad_h: Tensor | None,
    grad_differences: Tensor | None,
    bands: Bands = MULTISCALE,
    segments: Tensor | None = None,
) -> dict[str, Tensor]:
    """The definition in float64, in blocks of rows and features to limit memory.

    x: [B, T, k]; threshold, release: [k] or None; grad_h: [B, T, k] or None; grad_differences: [S, k] or None;
    segments: [B, T] or None
    out: `h`, `differences`, `total`, `square`, and `grad` if there is a gradient
    """
    B, T, k = x.shape
    elements = 2**17 if x.device.type == "cpu" else 2**27  # per block: fits a CPU's cache, limits a GPU's memory
    columns = min(k, max(1, elements // T))
    rows = max(1, elements // (T * columns))
    blocks: list[list[dict[str, Tensor]]] = []
    for b in range(0, B, rows):
        blocks.append([])
        for j in range(0, k, columns):
            chosen, features = (slice(b, b + rows), slice(None), slice(j, j + columns)), (..., slice(j, j + columns))
            block = x[chosen].detach().double().requires_grad_(True)
            on, off = (None if level is None else level[features] for level in (threshold, release))
            ids = None if segments is None else segments[b : b + rows]
            h, stats = activate_with_stats(block, None, activation, on, off, bands, ids, backend="reference")
            found = {"h": h.detach()} | {name: value.detach() for name, value in stats._asdict().items()}
            used = []
            if grad_h is not None:
                used.append((h, grad_h[chosen].double()))
            if grad_differences is not None:
                used.append((stats.differences, grad_differences[features].double().expand_as(stats.differences)))
            if used:
                outputs, grads = zip(*used, strict=True)
                (found["grad"],) = torch.autograd.grad(outputs, block, grads)
            blocks[-1].append(found)
    names = blocks[0][0]
    return {name: torch.cat([torch.cat([f[name] for f in line], -1) for line in blocks]) for name in names}


def checked_sequences(batch: int, device: torch.device | str = "cpu") -> Tensor:
    """Indices of the sequences to check: all of a small batch, else `SEQUENCES` from the first to the last."""
    count = min(batch, SEQUENCES)
    return torch.linspace(0, batch - 1, count, device=device, dtype=torch.float64).round().long()


def check(variant: str, found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise `WrongResultError` with the variant, quantity and error unless every result is accurate and finite."""
    allowed = TOLERANCE[dtype]
    for name, value in found.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            raise WrongResultError(f"{variant}: {name} is {list(value.shape)}, not {list(wanted.shape)}")
        error = largest_error(name, value, wanted)
        if not error <= allowed:  # not `>`, so that NaN fails too
            raise WrongResultError(f"{variant}: {name} is off by {error:.1e}, allowed is {allowed:.0e}")


def largest_error(name: str, value: Tensor, wanted: Tensor) -> float:
    """The largest error relative to the expected value or its typical magnitude, whichever is larger.

    The typical magnitude is the feature's RMS over time for `h` and `grad`, and the median feature's for statistics.
    """
    if name in ("h", "grad"):
        usual = wanted.square().mean(1, keepdim=True).sqrt()
    else:
        usual = wanted.abs().median(-1, keepdim=True).values
    scale = torch.maximum(wanted.abs(), usual).clamp_min(1e-30)
    return ((value.double() - wanted).abs() / scale).max().item()
