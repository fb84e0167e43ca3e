"""The most instructions per element that a thread may issue: bfloat16, MULTISCALE's bands, sm_90.

Lower a budget when a kernel gets faster. Raise one only with a measurement that shows why.
"""

from __future__ import annotations

BUDGETS = {
    "cuda": {"statistics": 16.3, "forward": 25.0, "trigger": 26.6, "backward": 49.5},
    "triton": {"statistics": 25.3, "forward": 30.5, "trigger": 32.8, "backward": 50.2},
}
"""Of one segment of 128 positions."""

PACKED = {"cuda": {"3 runs": 2.8, "20 runs": 4.6}, "triton": {"3 runs": 2.0, "20 runs": 3.1}}
"""Of a sequence of several segments, in multiples of `BUDGETS`."""

LONGER = {"cuda": {512: 2.3, 2048: 9.0}, "triton": {512: 1.4, 2048: 1.4}}
"""Of one segment of T positions, in multiples of `BUDGETS`."""


def budget(backend: str, operation: str, text: str, T: int) -> float | None:
    """None where there is none."""
    base = BUDGETS[backend].get(operation)
    return None if base is None else base * PACKED[backend].get(text, 1.0) * LONGER[backend].get(T, 1.0)
