"""Tokens to activations: the language model's half of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.data.sequences import SequenceStream, TokenBatch
from tsae.lm.hooks import activations
from tsae.lm.loading import LanguageModel


class ActivationBatch(NamedTuple):
    """Activations of whole sequences.

    x: (N, T, d_model); segments: (N, T) int32, negative ids excluded
    """

    x: Tensor
    segments: Tensor


def content_activations(lm: LanguageModel, batch: TokenBatch, layer: int) -> Tensor:
    """The residual stream after block ``layer`` at content positions: the model sees the prefix (BOS), we do not.

    out: [N, T, d_model] in the model's dtype, on its device
    """
    return activations(lm, batch.tokens, layer)[:, -batch.segments.shape[1] :]


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
        return TokenBatch.joined(parts)

    def batches(self, tokens: TokenBatch, progress: Callable[[int], None] | None = None) -> Iterator[ActivationBatch]:
        """Activations of sequences, on the CPU, one forward pass at a time; ``progress`` is called with its tokens.

        The position of the prefix (BOS) is fed to the model and dropped here.
        """
        for part in tokens.split(self.batch):
            x = content_activations(self.lm, part, self.layer)
            yield ActivationBatch(x.to("cpu", self.dtype), part.segments)
            if progress is not None:
                progress(part.segments.numel())

    def absent(self, tokens: TokenBatch, progress: Callable[[int], None] | None = None) -> Iterator[ActivationBatch]:
        """`batches` without running the model: x is on the meta device, of the right shape and dtype."""
        for segments in tokens.segments.split(self.batch):
            yield ActivationBatch(
                torch.empty(*segments.shape, self.lm.d_model, dtype=self.dtype, device="meta"), segments
            )
            if progress is not None:
                progress(segments.numel())

    def take(self, n: int) -> ActivationBatch:
        """Activations of the next ``n`` sequences."""
        parts = list(self.batches(self.tokenize(n)))
        return ActivationBatch(*(torch.cat(column) for column in zip(*parts, strict=True)))
