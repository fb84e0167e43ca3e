"""The activation buffer: shuffles complete sequences of activations within a fixed amount of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tsae.data.harvest import ActivationBatch
from tsae.data.norms import large_tokens


class ActivationBuffer:
    """Draws random batches of sequences and refills itself.

    It is filled by the first call of `next_batch` or `first`. When fewer than half of its sequences have uses left,
    used-up ones are replaced. It never harvests more than ``demand`` requires; when all is harvested it draws the
    sequences with the most uses left first.

    Args:
        harvest: ``harvest(n)`` yields the next n sequences in parts; each part is copied into the buffer before the
            next is requested, so that at most one is held besides it.
        capacity: sequences held: ``capacity * T * d * 4`` bytes for float32 activations [T, d].
        reuse: times each sequence is drawn.
        demand: sequences that will be drawn in all.
        generator: random numbers of the order (CPU).
    """

    def __init__(
        self,
        harvest: Callable[[int], Iterable[ActivationBatch]],
        capacity: int,
        reuse: int,
        demand: int,
        generator: torch.Generator,
    ) -> None:
        self.harvest, self.generator = harvest, generator
        self.reuse = reuse
        self.unharvested = -(-demand // reuse)  # sequences not yet harvested
        self.capacity = min(capacity, self.unharvested)
        self.uses = torch.zeros(self.capacity, dtype=torch.int64)  # [capacity], draws left of each sequence
        self.x: Tensor | None = None  # [capacity, T, d]
        self.segments: Tensor | None = None  # [capacity, T]
        self.refills = 0
        self.waited = 0.0  # seconds spent in refills
        self.norm_limit = 0.0  # tokens with a larger norm are excluded; 0: none are

    @property
    def filled(self) -> bool:
        """Whether it holds sequences yet."""
        return self.refills > 0

    def first(self, n: int) -> ActivationBatch:
        """The first ``n`` sequences, or all if it holds fewer, without counting as a use; fills the buffer."""
        if not self.filled:
            self._refill()
        assert self.x is not None
        assert self.segments is not None
        return ActivationBatch(self.x[:n], self.segments[:n])

    def exclude_above(self, limit: float) -> None:
        """Exclude tokens whose activation norm is above ``limit`` (segment -1), of the sequences held and of all to
        come."""
        self.norm_limit = limit
        if self.filled:
            self._exclude_large(torch.arange(self.capacity))

    def next_batch(self, n: int) -> Any:
        """``n`` sequences, distinct if the buffer holds as many; x in the storage dtype, on the CPU."""
        usable = int((self.uses > 0).sum())
        if self.unharvested > 0 and (usable < n or usable < self.capacity / 2):
            self._refill()
        order = torch.randperm(self.capacity, generator=self.generator)
        if self.unharvested > 0:  # uniformly among sequences with uses left
            chosen = order[self.uses[order] > 0][:n]
        else:  # most uses left first, so that the last batches still have distinct sequences
            chosen = order[torch.argsort(self.uses[order], descending=True, stable=True)][:n]
        if chosen.numel() < n:
            chosen = chosen.repeat(-(-n // chosen.numel()))[:n]
        self.uses[chosen] = (self.uses[chosen] - 1).clamp(min=0)
        return self._batch(chosen)

    def _batch(self, chosen: Tensor) -> Any:
        assert self.x is not None
        assert self.segments is not None
        return ActivationBatch(self.x[chosen], self.segments[chosen])

    def _refill(self) -> None:
        start = time.perf_counter()
        slots = (self.uses == 0).nonzero().squeeze(1)[: self.unharvested]
        done = 0
        for part in self.harvest(slots.numel()):
            self._store(slots[done : done + len(part.x)], part)
            done += len(part.x)
        assert done == slots.numel()
        self._refilled(slots)
        if self.norm_limit:
            self._exclude_large(slots)
        self.uses[slots] = self.reuse
        self.unharvested -= slots.numel()
        self.refills += 1
        self.waited += time.perf_counter() - start

    def _store(self, slots: Tensor, part: ActivationBatch) -> None:
        if self.x is None or self.segments is None:
            self.x = part.x.new_empty(self.capacity, *part.x.shape[1:])
            self.segments = part.segments.new_empty(self.capacity, *part.segments.shape[1:])
        self.x[slots], self.segments[slots] = part.x, part.segments

    def _refilled(self, slots: Tensor) -> None:
        """Called after a refill."""

    def _exclude_large(self, slots: Tensor) -> None:
        assert self.x is not None
        assert self.segments is not None
        for slot in slots.tolist():
            self.segments[slot].masked_fill_(large_tokens(self.x[slot : slot + 1], self.norm_limit)[0], -1)

    def memory(self, length: int, width: int, dtype: torch.dtype) -> int:
        """Bytes the buffer takes; while it refills, a part of the harvest comes on top."""
        return self.capacity * length * (width * dtype.itemsize + torch.int32.itemsize)

    def state_dict(self) -> dict[str, Any]:
        """State without the activations, which are `contents`."""
        return {
            "uses": self.uses,
            "unharvested": self.unharvested,
            "refills": self.refills,
            "norm_limit": self.norm_limit,
            "generator": self.generator.get_state(),
        }

    def contents(self) -> dict[str, Tensor]:
        """The activations held, which change only when ``refills`` does; empty before the first refill."""
        if self.x is None or self.segments is None:
            return {}
        return {"x": self.x, "segments": self.segments}

    def load_state_dict(self, state: dict[str, Any], contents: dict[str, Tensor]) -> None:
        """Continue from a `state_dict` and the `contents` of the same moment."""
        self.uses, self.unharvested, self.refills = state["uses"], state["unharvested"], state["refills"]
        self.norm_limit = state.get("norm_limit", 0.0)  # older checkpoints have none
        self.generator.set_state(state["generator"])
        self.x, self.segments = contents.get("x"), contents.get("segments")
