"""The most instructions per element that a thread may issue: bfloat16, MULTISCALE's bands, sm_90.

Lower a budget when a kernel gets faster. Raise one only with a measurement that shows why.
"""

from __future__ import annotations

BUDGETS = {
    "cuda": {"statistics": 12.8, "forward": 20.0, "trigger": 21.2, "mask": 22.0, "backward": 25.8},
    "triton": {"statistics": 25.3, "forward": 30.5, "trigger": 32.8, "backward": 50.2},
}
"""Of one segment of 128 positions."""

PACKED = {"cuda": {"3 runs": 1.35, "20 runs": 1.85}, "triton": {"3 runs": 1.95, "20 runs": 3.05}}
"""Of a sequence of several segments, in multiples of `BUDGETS`."""

LONGER = {"cuda": {512: 1.90, 2048: 1.78}, "triton": {512: 1.28, 2048: 1.31}}
"""Of one segment of T positions, in multiples of `BUDGETS`."""


def budget(backend: str, operation: str, text: str, T: int) -> float | None:
    """None where there is none."""
    base = BUDGETS[backend].get(operation)
    return None if base is None else base * PACKED[backend].get(text, 1.0) * LONGER[backend].get(T, 1.0)
