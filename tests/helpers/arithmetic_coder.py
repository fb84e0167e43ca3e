"""A binary arithmetic coder: bytes from bits and their probabilities, and the bits back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

_TOP, _SHORT = 1 << 64, 1 << 56  # the range is kept from 2^56 to 2^64
_PRECISION = 1 << 32


def _share(size: int, p: float) -> int:
    """The part of a range for a bit 1 of probability p."""
    return (size >> 32) * min(max(round(p * _PRECISION), 1), _PRECISION - 1)


def encode(bits: Iterable[tuple[bool, float]]) -> bytes:
    """The code of bits, each with the probability that it is 1."""
    low, size, out = 0, _TOP - 1, bytearray()
    for bit, p in bits:
        share = _share(size, p)
        if bit:
            size = share
        else:
            low, size = low + share, size - share
        if low >= _TOP:
            low -= _TOP
            place = len(out) - 1
            while out[place] == 255:  # carry
                out[place] = 0
                place -= 1
            out[place] += 1
        while size < _SHORT:
            out.append(low >> 56)
            low, size = (low << 8) % _TOP, size << 8
    return bytes(out) + low.to_bytes(8, "big")


def decoder(code: bytes) -> Callable[[float], bool]:
    """The bits of `code` one by one, given the probability of each that `encode` had."""
    value, size, place = int.from_bytes(code[:8], "big"), _TOP - 1, 8

    def decode(p: float) -> bool:
        nonlocal value, size, place
        share = _share(size, p)
        bit = value < share
        if bit:
            size = share
        else:
            value, size = value - share, size - share
        while size < _SHORT:
            value = (value << 8) + (code[place] if place < len(code) else 0)
            size, place = size << 8, place + 1
        return bit

    return decode
