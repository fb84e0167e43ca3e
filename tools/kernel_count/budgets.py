"""The most instructions per element that a thread may issue: bfloat16, MULTISCALE's bands, sm_90.

Lower a budget when a kernel gets faster. Raise one only with a measurement that shows why.
"""

from __future__ import annotations

OPERATIONS = (
    "statistics", "forward", "trigger", "backward", "mask", "counted statistics", "counted trigger", "counted mask"
)  # fmt: skip

BUDGETS: dict[str, dict[tuple[str, int], tuple[float, ...]]] = {
    "cuda": {
        ("one run", 128): (12.8, 20.0, 21.2, 25.8, 22.0, 16.3, 25.1, 23.0),
        ("3 runs", 128): (17.3, 24.7, 26.0, 34.0, 27.2, 21.6, 30.7, 28.5),
        ("20 runs", 128): (20.3, 29.1, 30.9, 47.5, 33.9, 28.2, 39.2, 36.9),
        ("one run", 512): (21.4, 31.6, 32.7, 47.8, 33.2, 24.8, 36.2, 34.1),
        ("one run", 2048): (21.6, 31.8, 32.9, 44.6, 33.3, 24.9, 36.3, 34.2),
    },
    "triton": {
        ("one run", 128): (26.7, 35.3, 35.3, 60.0, 47.9),
        ("3 runs", 128): (37.2, 47.6, 47.6, 67.5, 63.1),
        ("20 runs", 128): (60.4, 83.8, 83.8, 108.5, 94.5),
        ("one run", 512): (35.1, 42.9, 42.9, 75.6, 73.6),
        ("one run", 2048): (36.7, 44.4, 44.4, 76.6, 81.2),
    },
}
"""Of one backend, by text and number of positions: one number for each of `OPERATIONS`, or for the first of them."""


def budget(backend: str, operation: str, text: str, T: int) -> float | None:
    """None where there is none."""
    limits = BUDGETS[backend].get((text, T), ())
    return dict(zip(OPERATIONS, limits, strict=False)).get(operation)
