"""Tokens to activations: the language model's half of the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.data.sequences import SequenceStream, TokenBatch
from tsae.lm.hooks import activations
from tsae.lm.loading import LanguageModel

__all__ = ["Harvest", "Harvester"]


class Harvest(NamedTuple):
    """Activations of whole sequences.

    x: (N, T, d_model); segments: (N, T) int32, negative ids excluded
    """

    x: Tensor
    segments: Tensor


class Harvester:
    """Draws sequences from a stream and runs the language model up to one layer on them.

    Args:
        lm, layer: the model and the block whose output is kept.
        stream: source of sequences.
        batch: sequences per forward pass.
        dtype: storage type of the activations.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        stream: SequenceStream,
        *,
        batch: int = 16,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.lm, self.layer, self.stream, self.batch = lm, layer, stream, batch
        self.dtype = dtype or lm.dtype

    def tokenize(self, n: int, progress: Callable[[int], None] | None = None) -> TokenBatch:
        """The next ``n`` sequences of the stream, as tokens; ``progress`` is called with tokens as they come."""
        parts = []
        for start in range(0, n, self.batch):
            part = self.stream.next_batch(min(self.batch, n - start))
            parts.append(part)
            if progress is not None:
                progress(part.segments.numel())
        return TokenBatch(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def harvest(self, tokens: TokenBatch, progress: Callable[[int], None] | None = None) -> Harvest:
        """Activations of sequences, on the CPU; ``progress`` is called with the tokens of each forward pass.

        The position of the prefix (BOS) is fed to the model and dropped here.
        """
        n, length = tokens.segments.shape
        x = torch.empty(n, length, self.lm.d_model, dtype=self.dtype)
        for start in range(0, n, self.batch):
            rows = slice(start, start + self.batch)
            out = activations(self.lm, tokens.tokens[rows].to(self.lm.device), self.layer)
            x[rows] = out[:, -length:].to("cpu", self.dtype)
            if progress is not None:
                progress(out.shape[0] * length)
        return Harvest(x, tokens.segments)

    def take(self, n: int) -> Harvest:
        """Activations of the next ``n`` sequences."""
        return self.harvest(self.tokenize(n))
