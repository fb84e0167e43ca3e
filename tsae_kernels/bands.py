"""Offset bands: which pairs of positions the temporal statistics compare."""

from __future__ import annotations

from collections.abc import Sequence

Bands = tuple[tuple[int, int], ...]
"""Disjoint, ascending, inclusive ranges of offsets; every offset is at least 1."""

MULTISCALE: Bands = ((1, 3), (4, 15), (16, 127))
"""The short, medium and long scale of TSAE, section 4.1."""


def check_bands(bands: Bands) -> Bands:
    """`bands` as a tuple of tuples of int. Raises `TypeError` or `ValueError` if they are not valid bands."""
    wanted = "a tuple of (first, last) offset pairs such as ((1, 3), (4, 15))"
    if not isinstance(bands, Sequence) or isinstance(bands, str):
        raise TypeError(f"bands must be {wanted}, got {type(bands).__name__}")
    checked = []
    reached = 0
    for band in bands:
        if not isinstance(band, Sequence) or isinstance(band, str) or len(band) != 2:
            raise ValueError(f"bands must be {wanted}, got the element {band!r}")
        first, last = band
        if any(isinstance(offset, bool) or not isinstance(offset, int) for offset in band):
            raise TypeError(f"bands must hold integer offsets, got {band!r}")
        if first < 1 or last < first:
            raise ValueError(f"bands must have 1 <= first <= last, got {band!r}")
        if first <= reached:
            raise ValueError(f"bands must be disjoint and ascending, got {tuple(bands)!r}")
        reached = last
        checked.append((first, last))
    return tuple(checked)


def flatten_bands(bands: Bands) -> list[int]:
    """((1, 3), (4, 15)) -> [1, 3, 4, 15], because operator schemas have no nested lists."""
    return [offset for band in bands for offset in band]


def unflatten_bands(offsets: Sequence[int]) -> Bands:
    """The inverse of `flatten_bands`."""
    return tuple(zip(offsets[::2], offsets[1::2], strict=True))
