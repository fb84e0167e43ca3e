"""The definition, offset by offset, which every other backend is tested against. Slow.

Activations are compared with their thresholds in `dtype_of_stats`, as in every backend; sums here are float64.
`interface.Backend` documents the functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tsae_kernels.backends.interface import Activation, Gradients
from tsae_kernels.bands import Bands
from tsae_kernels.dtypes import dtype_of_stats


def segment_numbers(h: Tensor, segments: Tensor | None) -> Tensor:
    """[B, T]: a number for each segment, the same at all its positions; -1 where excluded."""
    if segments is None:
        return torch.zeros(h.shape[:2], dtype=torch.int64, device=h.device)
    changes = torch.zeros_like(segments, dtype=torch.int64)
    changes[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(segments >= 0, changes.cumsum(1), -1)


def pair_mask(numbers: Tensor, offset: int) -> Tensor:
    """[B, T - offset, 1]: 1 where t and t + offset lie in one segment."""
    early, late = numbers[:, :-offset], numbers[:, offset:]
    return ((early == late) & (early >= 0))[..., None].double()


def activate(pre: Tensor, activation: Activation, segments: Tensor | None) -> Tensor:
    """h [B, T, k] = activation(pre + bias), in pre's dtype."""
    name, bias, threshold, release = activation
    z = pre.to(dtype_of_stats(pre.dtype))
    if bias is not None:
        z = z + bias.to(z.dtype)
    if name == "identity":
        return z.to(pre.dtype, copy=True)
    if name == "gelu":
        return F.gelu(z).to(pre.dtype)
    on_threshold = torch.zeros((), dtype=z.dtype, device=z.device)
    if threshold is not None:
        on_threshold = threshold.to(z.dtype).clamp_min(0)
    off = z <= on_threshold  # [B, T, k]; NaN compares false, so it stays on and visible
    if release is not None:
        numbers = segment_numbers(pre, segments)
        below_release = z <= release.to(z.dtype).clamp_min(0)
        for t in range(1, pre.shape[1]):
            carried = ((numbers[:, t] == numbers[:, t - 1]) & (numbers[:, t] >= 0))[:, None]
            off[:, t] &= below_release[:, t] | off[:, t - 1] | ~carried
    return z.masked_fill(off, 0).to(pre.dtype)


def count_transitions(h: Tensor, segments: Tensor | None) -> Tensor:
    """[B, 3, k] int32: on to on, on to off and off to on over the pairs (t, t+1) in one segment; NaN is on."""
    on = ~(h <= 0)
    early, late = on[:, :-1], on[:, 1:]
    connected = pair_mask(segment_numbers(h, segments), 1) > 0
    counts = [(change & connected).sum(1) for change in (early & late, early & ~late, ~early & late)]
    return torch.stack(counts, 1).int()


def temporal_stats(h: Tensor, bands: Bands, segments: Tensor | None, transitions: bool = False) -> tuple[Tensor, ...]:
    """See `interface.Backend`."""
    numbers = segment_numbers(h, segments)
    x = h.double().masked_fill(numbers[..., None] < 0, 0)
    B, T, k = h.shape
    differences = x.new_zeros(B, len(bands), k)
    for s, (first, last) in enumerate(bands):
        for offset in range(first, min(last, T - 1) + 1):
            step = x[:, offset:] - x[:, :-offset]
            differences[:, s] += (pair_mask(numbers, offset) * step**2).sum(1)
    out = dtype_of_stats(h.dtype)
    stats = differences.to(out), x.sum(1).to(out), (x**2).sum(1).to(out)
    return (*stats, count_transitions(h, segments)) if transitions else stats


def activate_with_stats(
    pre: Tensor, activation: Activation, bands: Bands, segments: Tensor | None, transitions: bool = False
) -> tuple[Tensor, ...]:
    """See `interface.Backend`."""
    h = activate(pre, activation, segments)
    return h, *temporal_stats(h, bands, segments, transitions)


def activate_with_stats_backward(
    saved: Tensor,
    grads: Gradients,
    activation: Activation,
    bands: Bands,
    segments: Tensor | None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `interface.Backend`."""
    h = activate(saved, activation, segments) if activation.name == "gelu" else saved
    numbers = segment_numbers(h, segments)
    excluded = numbers[..., None] < 0
    x = h.double().masked_fill(excluded, 0)
    grad = torch.zeros_like(x)  # with respect to h
    if grads.differences is not None:
        for s, (first, last) in enumerate(bands):
            for offset in range(first, min(last, x.shape[1] - 1) + 1):
                step = x[:, offset:] - x[:, :-offset]
                pull = 2 * grads.differences[:, s, None].double() * pair_mask(numbers, offset) * step
                pull = torch.where(grads.differences[:, s, None] == 0, 0, pull)  # a zero gradient masks inf and NaN
                grad[:, offset:] += pull
                grad[:, :-offset] -= pull
    if grads.total is not None:
        grad += grads.total.double()[:, None].masked_fill(excluded, 0)
    if grads.square is not None:
        grad += 2 * x * grads.square.double()[:, None]
    if grads.h is not None:
        grad += grads.h
    if activation.name == "relu":
        grad = grad.masked_fill(h <= 0, 0)
    elif activation.name == "gelu":
        z = saved.to(dtype_of_stats(saved.dtype)).double()
        if activation.bias is not None:
            z = z + activation.bias
        cdf = 0.5 * (1 + torch.erf(z / 2**0.5))
        grad = grad * (cdf + z * torch.exp(-0.5 * z**2) / (2 * torch.pi) ** 0.5)
    return grad.to(saved.dtype), grad.sum((0, 1)).to(dtype_of_stats(saved.dtype))


def step_energy(h: Tensor, weights: Tensor) -> Tensor:
    """See `interface.Backend`."""
    x = h.double()
    energy = x.new_zeros(())
    for t in range(h.shape[1] - 1):
        step = (x[:, t + 1] - x[:, t]).masked_fill(weights[:, t, None] == 0, 0)
        energy += (weights[:, t, None].double() * step**2).sum()
    return energy.to(dtype_of_stats(h.dtype))


def step_energy_backward(h: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    """See `interface.Backend`."""
    x = h.double()
    grad_h = torch.zeros_like(x)
    for t in range(h.shape[1] - 1):
        step = (x[:, t + 1] - x[:, t]).masked_fill(weights[:, t, None] == 0, 0)
        pull = 2 * grad.double() * weights[:, t, None] * step
        grad_h[:, t + 1] += pull
        grad_h[:, t] -= pull
    return grad_h.to(h.dtype)
