"""Harvesting: from tokens to activations of the language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.data.sequences import SequenceStream, TokenBatch
from tsae.lm.hooks import activations, activations_at
from tsae.lm.loading import LanguageModel
from tsae.lm.site import Site
from tsae.lm.trial_run import width


class ActivationBatch(NamedTuple):
    """Activations of complete sequences.

    x: (N, T, d), for a transcoder (N, T, d_in + d_out), its target behind its input
    segments: (N, T) int32, negative ids excluded
    """

    x: Tensor
    segments: Tensor

    @property
    def full_segments(self) -> Tensor:
        """``segments``; of a `BatchShard` those of the full batch."""
        return self.segments

    @property
    def first(self) -> int:
        """0; of a `BatchShard` the index of its first sequence in the full batch."""
        return 0


def content_activations(lm: LanguageModel, batch: TokenBatch, place: int | Site, target: Site | None = None) -> Tensor:
    """The activations at a place at content positions: the model sees the prefix (BOS), we do not.

    place: a block, for its output, or a `Site`
    target: a second place, read in the same forward pass
    out: [N, T, d] in the model's dtype, on its device; with a target [N, T, d_in + d_out], its activations last
    """
    if target is None:
        x = activations(lm, batch.tokens, place)
    else:
        source, y = activations_at(lm, batch.tokens, place, target)
        x = torch.cat([source, y.to(source)], dim=-1)
    return x[:, -batch.segments.shape[1] :]


class Harvester:
    """Runs the language model, up to one place, on the sequences of a stream.

    Args:
        lm, place: the model and the place whose activations are kept; a block's number is that of its output.
        stream: source of sequences.
        batch: sequences per forward pass.
        dtype: storage dtype of the activations.
        target: a second place, whose activations follow along the last dimension.
    """

    def __init__(
        self,
        lm: LanguageModel,
        place: int | Site,
        stream: SequenceStream,
        *,
        batch: int = 16,
        dtype: torch.dtype | None = None,
        target: Site | None = None,
    ) -> None:
        self.target = target
        self.lm, self.place, self.stream, self.batch = lm, place, stream, batch
        self.dtype = dtype or lm.dtype

    def tokenize(self, n: int) -> TokenBatch:
        """The next ``n`` sequences of the stream, as tokens."""
        sizes = [min(self.batch, n - start) for start in range(0, n, self.batch)]
        return TokenBatch.concat(self.stream.next_batch(size) for size in sizes)

    def batches(self, tokens: TokenBatch) -> Iterator[ActivationBatch]:
        """Activations of sequences, on the CPU, one forward pass at a time.

        The position of the prefix (BOS) is fed to the model and dropped here.
        """
        for part in tokens.split(self.batch):
            x = content_activations(self.lm, part, self.place, self.target)
            yield ActivationBatch(x.to("cpu", self.dtype), part.segments)

    def placeholders(self, tokens: TokenBatch) -> Iterator[ActivationBatch]:
        """`batches` without running the model: x has the right shape and dtype, on the meta device."""
        for segments in tokens.segments.split(self.batch):
            x = torch.empty(*segments.shape, width(self.lm, self.place, self.target), dtype=self.dtype, device="meta")
            yield ActivationBatch(x, segments)

    def take(self, n: int) -> ActivationBatch:
        """Activations of the next ``n`` sequences."""
        parts = list(self.batches(self.tokenize(n)))
        return ActivationBatch(*(torch.cat(column) for column in zip(*parts, strict=True)))
