"""A model of the time of a training step on a GPU, kernel by kernel, from operations and bytes. Nothing is measured.

    python -m benchmarks.step_model [--device H100] [--d-sae 16384 65536 262144]

The step on lists of active features (docs/kernels.md, "Sparse training step") beside the dense one, in bfloat16 with
float32 master weights and Adam, with the temporal loss and the trigger. Each part takes the longer of its operations at
`Device.flops` and its bytes: those of DRAM at `Device.dram`; those of rows gathered in blocks of columns at `Device.l2`
if a block of 128 columns of all rows stays in the cache, else also at `Device.dram`. The sum of the parts is the floor:
launches, overlap and cache conflicts are not in it.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple


class Device(NamedTuple):
    """Rates that the model assumes.

    flops: of a large bfloat16 product, operations/s; dram: of a copy, bytes/s; l2: of reads that hit the L2 cache,
    bytes/s; cache: bytes of gathered rows that stay in it, half of 50 MB
    """

    name: str
    flops: float
    dram: float
    l2: float
    cache: float


DEVICES = {
    "H100": Device("H100", 600e12, 3.0e12, 5.5e12, 24 * 2**20),
    "H200": Device("H200", 600e12, 4.3e12, 5.5e12, 24 * 2**20),
}


class Step(NamedTuple):
    """The sizes of a step: N tokens of sequences of T, d_in = d, k features of which A are active, capacity C."""

    k: int
    d: int = 2304
    N: int = 16384
    T: int = 128
    A: int = 40
    C: int = 64
    bands: int = 3


class Part(NamedTuple):
    """Operations, bytes of DRAM, and bytes gathered from a matrix of so many rows, of one kernel or product."""

    name: str
    flops: float = 0.0
    dram: float = 0.0
    gathered: float = 0.0
    rows: int = 0

    def milliseconds(self, device: Device) -> float:
        """The longer of computing and moving."""
        rate = device.l2 if 2 * 128 * self.rows <= device.cache else device.dram
        return 1e3 * max(self.flops / device.flops, self.dram / device.dram + self.gathered / rate)


def fired(step: Step) -> float:
    """Features that fire at least once in a batch, for independent features of equal density."""
    return step.k * (1.0 - (1.0 - step.A / step.k) ** step.N)


def sparse_parts(step: Step) -> list[Part]:
    """The step on lists; bytes as in the launchers' docstrings (tsae_kernels/backends/triton/sparse_launch.py)."""
    k, d, N, T, A, C, S = step
    statistics = 4 * N / T * (S + 2) * k
    entries = N * C
    F = fired(step)
    return [
        Part("encoder, forward", 2 * N * d * k, 2 * N * d + 2 * d * k + 2 * N * k),
        Part("activation, statistics, active mask", dram=2 * N * k + N * k / 8 + statistics),
        Part("lists by token", dram=N * k / 4 + 36 * N * A + entries * 10 + 8 * N),
        Part("decoder, forward", dram=2 * N * d + 2 * F * d, gathered=2 * N * A * d, rows=k),
        Part("loss and its gradient", dram=4 * 2 * N * d),
        Part("temporal loss from the statistics, and its gradient", dram=3 * statistics),
        Part("gradient of the features", dram=2 * N * d + 2 * F * d + 6 * N * A, gathered=2 * N * A * d, rows=k),
        Part("lists by feature", dram=4 * 24 * entries + 44 * entries + 8 * k),
        Part("gradient of the statistics at active features", dram=22 * N * A + 32 * N * A * (1 + S)),
        Part("gradients of the weights", dram=8 * F * d + 4 * N * d, gathered=2 * 2 * N * A * d, rows=2 * N),
        Part("norm of the gradients", dram=12 * F * d),
        Part("Adam, unit norm, bfloat16 copies", dram=2 * (24 + 2) * k * d + 8 * F * d),
    ]


def dense_parts(step: Step) -> list[Part]:
    """The step with five dense products (six with the input's gradient for b_dec), as PyTorch computes it."""
    k, d, N, T, _, _, S = step
    product, weight = 2 * N * d * k, 2 * d * k
    statistics = 4 * N / T * (S + 2) * k
    return [
        Part("weights to bfloat16", dram=2 * 6 * d * k),
        Part("encoder, forward", product, 2 * N * d + weight + 2 * N * k),
        Part("activation and statistics", dram=4 * N * k + statistics),
        Part("decoder, forward", product, 2 * N * k + weight + 2 * N * d),
        Part("loss and its gradient", dram=4 * 2 * N * d),
        Part("temporal loss from the statistics, and its gradient", dram=3 * statistics),
        Part("gradient of the features", product, 2 * N * d + weight + 2 * N * k),
        Part("gradient of W_dec", product, 2 * N * k + 2 * N * d + weight),
        Part("gradient of the activation and the statistics", dram=6 * N * k + statistics),
        Part("gradient of W_enc", product, 2 * N * k + 2 * N * d + weight),
        Part("gradients to float32", dram=2 * 6 * d * k),
        Part("norm, projection, clipping", dram=2 * 12 * d * k + 12 * d * k),
        Part("fused Adam, unit norm", dram=2 * 28 * d * k + 8 * d * k),
    ]


def total(parts: list[Part], device: Device) -> float:
    """Milliseconds of all parts."""
    return sum(part.milliseconds(device) for part in parts)


def encoder(parts: list[Part], device: Device) -> float:
    """Milliseconds of the encoder's product."""
    return next(part for part in parts if part.name == "encoder, forward").milliseconds(device)


def table(sizes: list[int], device: Device) -> str:
    """The Markdown tables of docs/scale.md."""
    steps = [Step(k) for k in sizes]
    lines = [f"| on lists, ms on an {device.name} | " + " | ".join(f"{k:,} features" for k in sizes) + " |"]
    lines.append("| --- |" + " --- |" * len(sizes))
    for rows in zip(*(sparse_parts(step) for step in steps), strict=True):
        lines.append(f"| {rows[0].name} | " + " | ".join(f"{row.milliseconds(device):.2f}" for row in rows) + " |")
    sparse = [total(sparse_parts(step), device) for step in steps]
    dense = [total(dense_parts(step), device) for step in steps]
    gemm = [encoder(sparse_parts(step), device) for step in steps]
    summary = {
        "in all": [f"{ms:.1f}" for ms in sparse],
        "over the encoder's product": [f"{ms / one:.2f}" for ms, one in zip(sparse, gemm, strict=True)],
        "the dense step": [f"{ms:.1f}" for ms in dense],
        "dense over lists": [f"{ms / fast:.2f}" for ms, fast in zip(dense, sparse, strict=True)],
        "tokens/s on lists, million": [f"{step.N / ms / 1e3:.2f}" for step, ms in zip(steps, sparse, strict=True)],
    }
    lines += [f"| **{name}** | " + " | ".join(cells) + " |" for name, cells in summary.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=sorted(DEVICES), default="H100")
    parser.add_argument("--d-sae", type=int, nargs="+", default=[16384, 65536, 262144])
    arguments = parser.parse_args()
    print(table(arguments.d_sae, DEVICES[arguments.device]))


if __name__ == "__main__":
    main()
