"""Every kind of launch once, for compute-sanitizer. Inputs come from the host, so that they count as initialized."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tsae_kernels import MULTISCALE, Bands, available_backends, window_consistency
from tsae_kernels.bands import flatten_bands

SHAPES = ((1, 2), (17, 5), (130, 66), (128, 64), (700, 66))  # T, k
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
BANDS: tuple[Bands, ...] = (MULTISCALE, ((1, 2), (5, 40)))
ACTIVATIONS = {"relu": (0.6, 0.1), "gelu": (None, None), "identity": (None, None)}  # threshold, release


class Case(NamedTuple):
    T: int
    k: int
    dtype: torch.dtype
    bands: Bands
    activation: str


def cases(backend: str) -> Iterator[Case]:
    """Fewer for triton, which compiles a kernel for almost every one."""
    for dtype, (T, k), bands, activation in itertools.product(DTYPES, SHAPES, BANDS, ACTIVATIONS):
        few = dtype in (torch.bfloat16, torch.float32) and T <= 130 and bands == MULTISCALE
        if backend != "triton" or few:
            yield Case(T, k, dtype, bands, activation)


def launch(case: Case, backend: str, device: torch.device, generator: torch.Generator) -> int:
    """Forward and statistics, also with transitions; backward, window loss, walks along T. Returns how many calls."""
    T, k, dtype, bands, activation = case
    ops, flat = torch.ops.tsae_kernels, flatten_bands(bands)

    def normal(
        *shape: int, dtype: torch.dtype = torch.float32 if case.dtype != torch.float64 else case.dtype
    ) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    segments = None
    if activation != "gelu":
        segments = (torch.arange(T) // 30 - int(T > 100)).expand(2, T).contiguous().to(device)  # [B, T]
    threshold, release = (None if x is None else torch.full((k,), x).to(device) for x in ACTIVATIONS[activation])
    pre, bias, grad_h = normal(2, T, k, dtype=dtype), normal(k), normal(2, T, k, dtype=dtype)
    h, *_ = ops.activate_with_stats(pre, bias, activation, threshold, release, flat, segments, backend)
    ops.activate_with_stats_counted(pre, bias, activation, threshold, release, flat, segments, backend)
    ops.temporal_stats(h, flat, segments, backend)
    ops.temporal_stats_counted(h, flat, segments, backend)
    masks = (ops.activate_with_mask, ops.activate_with_mask_counted) if activation == "relu" else ()
    for mask in masks:
        mask(pre, bias, threshold, release, flat, segments, backend)
    saved = pre if activation == "gelu" else h
    gradients = (normal(2, len(bands), k), normal(2, k), normal(2, k))
    ops.activate_with_stats_backward(saved, bias, grad_h, *gradients, activation, flat, segments, backend)
    window_consistency(pre.detach().requires_grad_(), 3, segments, backend=backend).backward()
    ops.viterbi_path(pre, normal(2, 2, k), normal(2, k), segments, backend)
    states = ops.leaky_recurrence(pre, torch.full((k,), 0.9).to(device), segments, backend)
    ops.leaky_recurrence_backward(grad_h, torch.full((k,), 0.9).to(device), pre, states, segments, backend)
    return 10 + len(masks)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.every_launch", description=__doc__)
    parser.add_argument("--backends", default="cuda", help="names separated by commas")
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args(arguments)
    device, count = torch.device(chosen.device), 0
    for backend in chosen.backends.split(","):
        state = available_backends().get(backend, "unknown")
        if state != "ok":
            print(f"error: the backend {backend} is {state}")
            return 1
        generator = torch.Generator().manual_seed(0)
        count += sum(launch(case, backend, device, generator) for case in cases(backend))
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{count} launches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
