"""The time of a sparse training step on a GPU by its bytes and operations: a model, not a measurement.

    python -m benchmarks.sparse_model [--gate] [D_SAE ...]        default: 16384 65536 262144

prints a Markdown table; with `--gate` of a step with the gate's gradient, whose lists also hold features that are
nearly on. The bytes are those of the docstrings in `tsae_kernels/backends/triton/sparse_launch.py`. Rows that are
gathered count for the L2 cache each time; for memory once if a column block of the gathered matrix fits in the cache,
and otherwise as often as they are missed.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

ENTRIES = 256  # by feature, for a program of weight_gradients


class Device(NamedTuple):
    """What the model takes a GPU to achieve. bytes per second, operations per second, bytes, seconds."""

    memory: float
    l2: float
    products: float  # dense, bfloat16
    cached: float
    launch: float


H100 = Device(memory=3.0e12, l2=5.5e12, products=600e12, cached=24 * 2**20, launch=2e-6)


class Step(NamedTuple):
    """A training step in bfloat16 with float32 gradients and optimizer state."""

    tokens: int = 16_384
    d: int = 2304
    features: int = 16_384
    active: int = 40  # mean per token
    capacity: int = 64
    fired: float = 1.0  # share of the features
    bands: int = 3
    length: int = 128
    near: int = 0  # features in the lists beside the active ones, mean per token


GATED = {"near": 17, "capacity": 240}  # the most that a trained dictionary of 2,560 features had; the initial capacity


class Kernel(NamedTuple):
    """memory, l2: bytes; operations: of a dense product; launches: of kernels, those of torch.sort included."""

    name: str
    memory: float
    l2: float = 0.0
    operations: float = 0.0
    launches: int = 1

    def seconds(self, device: Device) -> float:
        slowest = max(self.memory / device.memory, self.l2 / device.l2, self.operations / device.products)
        return slowest + self.launches * device.launch


def _columns(rows: int, element: int, device: Device) -> int:
    """In a block of columns of a gathered matrix [rows, d]: `_block_d` in sparse_launch.py."""
    columns = 512 // element
    while columns > 128 and rows * columns * element > 1.5 * device.cached:
        columns //= 2
    return columns


def _gathered(step: Step, rows: int, element: int, device: Device) -> tuple[float, float]:
    """Bytes from memory and from the L2 cache for one row of d elements per entry, out of a matrix [rows, d]."""
    missed = max(1 - device.cached / (rows * _columns(rows, element, device) * element), 0.0)
    total = step.tokens * (step.active + step.near) * step.d * element
    return max(rows * step.d * element, missed * total), float(total)


def kernels(step: Step, device: Device = H100) -> list[Kernel]:
    """Every kernel of the step in order. The optimizer: Adam on both matrices, a bfloat16 copy in the same pass."""
    N, d, k, A, C = step.tokens, step.d, step.features, step.active + step.near, step.capacity
    entries, listed = N * A, N * C
    blocks = -(-d // _columns(2 * N, 2, device))  # of x and the gradient of xhat
    columns = _columns(k, 2, device)  # of W_dec
    decoder_blocks = -(-d // columns)
    parts = -(-decoder_blocks // max(int(device.cached // (k * columns * 2)), 1))
    sequences = N // step.length
    mask, stats = N * k / 8, 4 * sequences * (step.bands + 2) * k
    weight, weight_l2 = _gathered(step, k, 2, device)
    rows, rows_l2 = _gathered(step, 2 * N, 2, device)
    written = 8 * step.fired * k * d
    partials = 2 * entries / ENTRIES * 16 * d
    lists = entries * 6 * decoder_blocks
    # The window, the active features' counts, masks and levels of entries; the gradient in PyTorch, 100 bytes a place.
    gate = Kernel("features that are nearly on", 2 * N * k + 3 * mask + 64 * entries + 104 * listed, launches=18)
    return [
        Kernel("x W_enc", 2 * (N * d + k * d + N * k), operations=2.0 * N * d * k),
        Kernel("activation, statistics, mask", 2 * N * k + mask + stats),
        Kernel("lists", 2 * mask + 36 * entries + 10 * listed + 8 * N, launches=3),
        *([gate] if step.near else []),
        Kernel("decoder", weight + 2 * N * d, weight_l2 + lists),
        Kernel("reconstruction error", 16 * N * d, launches=4),  # both passes, b_dec added and its gradient
        Kernel("gradient of values", weight + 2 * N * d + 8 * parts * listed, weight_l2 + lists, launches=3),
        Kernel("order by feature", 4 * 24 * listed + 44 * listed + 8 * k, launches=10),
        Kernel("gradient of statistics", entries * (54 + 32 * step.bands) + 4 * listed, launches=2),
        Kernel(
            "gradients of weights",
            rows + rows + 1.5 * written + partials,  # W_dec is read, for the components along its rows
            2 * rows_l2 + 1.5 * written + partials + 14 * entries * blocks,
            launches=3,
        ),
        Kernel("gradient of b_dec through the encoder", 2 * k * d),
        Kernel("Adam", 2 * k * d * (24 + 2) + written, launches=2),
    ]


def dense_kernels(step: Step) -> list[Kernel]:
    """The same step with five dense products; activation and its gradient by the fused kernels."""
    N, d, k = step.tokens, step.d, step.features
    stats = 4 * N // step.length * (step.bands + 2) * k
    product = 2.0 * N * d * k
    inner, outer = 2 * (N * d + k * d + N * k), 2 * (N * d + N * k) + 4 * k * d
    return [
        Kernel("x W_enc", inner, operations=product),
        Kernel("activation, statistics", 4 * N * k + stats),
        Kernel("decoder", inner, operations=product),
        Kernel("reconstruction error", 16 * N * d, launches=4),
        Kernel("gradient of h", inner, operations=product),
        Kernel("gradient of W_dec", outer, operations=product),
        Kernel("gradient of statistics and activation", 6 * N * k + stats),
        Kernel("gradient of W_enc", outer, operations=product),
        # The operators of `_Gate` in tsae/sae/straight_through.py where the host must not wait.
        *([Kernel("features that are nearly on", 136 * N * k, launches=27)] if step.near else []),
        Kernel("Adam", 2 * k * d * (24 + 2 + 4), launches=2),
    ]


def table(widths: list[int], device: Device = H100, *, gate: bool = False) -> str:
    """Milliseconds of every kernel by the model, for dictionaries of these widths, as a Markdown table."""
    steps = [Step(features=k, **(GATED if gate else {})) for k in widths]
    sparse = [kernels(step, device) for step in steps]
    totals = [sum(kernel.seconds(device) for kernel in column) for column in sparse]
    dense = [sum(kernel.seconds(device) for kernel in dense_kernels(step)) for step in steps]
    lines = [["kernel", *(f"{k:,} features" for k in widths)], ["---", *["---:"] * len(widths)]]
    lines += [
        [row[0].name, *(f"{1e3 * kernel.seconds(device):.2f}" for kernel in row)] for row in zip(*sparse, strict=True)
    ]
    lines.append(["**sparse step**", *(f"**{1e3 * seconds:.2f}**" for seconds in totals)])
    lines.append(
        ["relative to its encoder", *(f"{t / c[0].seconds(device):.2f}" for t, c in zip(totals, sparse, strict=True))]
    )
    lines.append(["dense step", *(f"{1e3 * seconds:.2f}" for seconds in dense)])
    lines.append(["speedup", *(f"{d / t:.2f}" for d, t in zip(dense, totals, strict=True))])
    lines.append(["million tokens/s", *(f"{s.tokens / t / 1e6:.2f}" for s, t in zip(steps, totals, strict=True))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    gate = "--gate" in sys.argv[1:]
    print(table([int(each) for each in sys.argv[1:] if each != "--gate"] or [16_384, 65_536, 262_144], gate=gate))
