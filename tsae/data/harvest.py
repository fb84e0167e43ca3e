"""Tokens to activations: the language model's half of the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.data.sequences import SequenceStream
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

    def take(self, n: int, progress: Callable[[int], None] | None = None) -> Harvest:
        """The next ``n`` sequences, on the CPU; ``progress`` is called with the tokens of each forward pass.

        The position of the prefix (BOS) is fed to the model and dropped here.
        """
        x: Tensor | None = None
        segments = torch.empty(n, self.stream.length, dtype=torch.int32)
        for start in range(0, n, self.batch):
            count = min(self.batch, n - start)
            tokens = self.stream.next_batch(count)
            out = activations(self.lm, tokens.tokens.to(self.lm.device), self.layer)[:, -self.stream.length :]
            if x is None:
                x = torch.empty(n, self.stream.length, out.shape[-1], dtype=self.dtype)
            x[start : start + count] = out.to("cpu", self.dtype)
            segments[start : start + count] = tokens.segments
            if progress is not None:
                progress(count * self.stream.length)
        assert x is not None
        return Harvest(x, segments)
