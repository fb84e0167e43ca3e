"""Features to bytes and back by arithmetic coding, with the probabilities of `CodeLength`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import arithmetic_coder
import torch
from torch import Tensor

from tsae.evaluation.metrics import CodeLength
from tsae.evaluation.metrics.bits import _EDGES, _WIDTHS, _AmplitudeCode, quantize

Put = Callable[[bool, float], bool]
"""Codes one bit and its probability of being 1; in decoding the bit is unknown, and returned."""


class FeatureCoder:
    """The code of one half of a text, by what was counted in the other.

    code: of the complete text
    counted: the half that the probabilities are from
    step, norms: of the quantization, as in `CodeLength.compute`
    """

    def __init__(self, code: CodeLength, counted: int, step: float, norms: Tensor) -> None:
        self.rates = [rate.tolist() for rate in code.rates(counted)]
        starts, lasting = (_AmplitudeCode(halves[counted], code.d_sae) for halves in code._levels(step, norms))
        self.amplitudes = (starts, lasting)
        self.shares = [(2.0**-each.cost * _WIDTHS).flatten(1).tolist() for each in self.amplitudes]
        self.scale = norms.double() / step

    def encode(self, h: Tensor) -> tuple[bytes, bytes]:
        """Support and amplitudes of features [B, T, d_sae], one document per row."""
        levels = torch.where(h > 0, quantize(h, self.scale), 0).tolist()
        on = (h > 0).tolist()
        support: list[tuple[bool, float]] = []
        amplitudes: list[tuple[bool, float]] = []
        for states, values in zip(on, levels, strict=True):
            for t, state in enumerate(states):
                before = states[t - 1] if t else None
                for j, bit in enumerate(state):
                    support.append((bit, self.probability(before, j)))
                    if bit:
                        lasts = t > 0 and states[t - 1][j]
                        amplitudes += self.events(j, lasts, values[t - 1][j] if lasts else 0, values[t][j])
        return arithmetic_coder.encode(support), arithmetic_coder.encode(amplitudes)

    def decode(self, support: bytes, amplitudes: bytes, B: int, T: int) -> Tensor:
        """The features from the bytes alone, as the levels that they were rounded to: [B, T, d_sae]."""
        bit, part = arithmetic_coder.decoder(support), arithmetic_coder.decoder(amplitudes)
        d_sae = len(self.rates[0])
        h = torch.zeros(B, T, d_sae, dtype=torch.float64)
        for b in range(B):
            before: list[bool] | None = None
            levels: list[int] = []
            for t in range(T):
                state = [bit(self.probability(before, j)) for j in range(d_sae)]
                now = [0] * d_sae
                for j in (j for j, one in enumerate(state) if one):
                    lasts = before is not None and before[j]
                    now[j] = self.level(part, j, lasts, levels[j] if lasts else 0)
                    h[b, t, j] = now[j] / self.scale[j]
                before, levels = state, now
        return h

    def probability(self, before: list[bool] | None, j: int) -> float:
        density, after_off, after_on = self.rates
        return density[j] if before is None else after_on[j] if before[j] else after_off[j]

    def expected(self, j: int, lasts: bool, before: int) -> int:
        prediction = self.amplitudes[lasts].prediction
        return int(prediction.expected(torch.tensor([j]), torch.tensor([before], dtype=torch.int64)))

    def events(self, j: int, lasts: bool, before: int, level: int) -> Iterator[tuple[bool, float]]:
        """The bits of one level: its cell of sign and bin, cell by cell, then its place in the bin."""
        residual = level - self.expected(j, lasts, before)
        bin = int(torch.bucketize(torch.tensor(abs(residual)), _EDGES, right=True)) - 1
        cell, left = (residual < 0) * len(_EDGES) + bin, 1.0
        shares = self.shares[lasts][self.amplitudes[lasts].kind[j]]
        for i in range(cell + 1):
            if shares[i] > 0:
                yield i == cell, min(shares[i] / left, 1.0)
                left -= shares[i]
        place = abs(residual) - int(_EDGES[bin])
        for i in range(int(_WIDTHS[bin]).bit_length() - 1):
            yield bool(place >> i & 1), 0.5

    def level(self, bit: Callable[[float], bool], j: int, lasts: bool, before: int) -> int:
        """Reads what `events` wrote."""
        shares, left, cell = self.shares[lasts][self.amplitudes[lasts].kind[j]], 1.0, -1
        for i, share in enumerate(shares):
            if share > 0:
                if bit(min(share / left, 1.0)):
                    cell = i
                    break
                left -= share
        sign, bin = divmod(cell, len(_EDGES))
        size = int(_EDGES[bin]) + sum(bit(0.5) << i for i in range(int(_WIDTHS[bin]).bit_length() - 1))
        return self.expected(j, lasts, before) + (-size if sign else size)
