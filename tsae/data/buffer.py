"""The activation buffer: holds whole sequences, mixes sequences and never tokens, bounded in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tsae.data.harvest import ActivationBatch


class ActivationBuffer:
    """Serves random batches of sequences and refills itself.

    The buffer is filled at the first draw or by `first`. Whenever fewer than half of its sequences have uses left,
    the spent ones are replaced by new ones. It never harvests more than ``demand`` draws need, and once nothing is
    left to harvest it evens out the remaining uses.

    Args:
        harvest: ``harvest(n)`` gives the next n sequences, in parts; each is copied to its slots before the next
            one is asked for, so that no more than a part is held beside the buffer.
        capacity: sequences held; with float32 activations of width d this is ``capacity * 128 * d * 4`` bytes.
        reuse: times each sequence is served.
        demand: sequences that will be drawn in all.
        generator: source of the order (CPU).
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
        self.unharvested = -(-demand // reuse)  # sequences still to come from the language model
        self.capacity = min(capacity, self.unharvested)
        self.uses = torch.zeros(self.capacity, dtype=torch.int64)  # uses left of each slot
        self.x: Tensor | None = None  # [capacity, T, d]
        self.segments: Tensor | None = None  # [capacity, T]
        self.refills = 0
        self.waited = 0.0  # seconds in refills

    @property
    def filled(self) -> bool:
        """Whether it holds anything yet."""
        return self.refills > 0

    def first(self, n: int) -> ActivationBatch:
        """The first ``n`` sequences (or all, where fewer are held), without using them up; fills the buffer."""
        if not self.filled:
            self._refill()
        assert self.x is not None
        assert self.segments is not None
        return ActivationBatch(self.x[:n], self.segments[:n])

    def next_batch(self, n: int) -> Any:
        """``n`` distinct sequences where the buffer holds as many; x in the storage dtype, on the CPU."""
        live = int((self.uses > 0).sum())
        if self.unharvested > 0 and (live < n or live < self.capacity / 2):
            self._refill()
        order = torch.randperm(self.capacity, generator=self.generator)
        if self.unharvested > 0:  # any sequence with uses left, all alike
            chosen = order[self.uses[order] > 0][:n]
        else:  # most uses left first, so that the last batches still find distinct sequences
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
        spent = (self.uses == 0).nonzero().squeeze(1)[: self.unharvested]
        done = 0
        for part in self.harvest(spent.numel()):
            self._store(spent[done : done + len(part.x)], part)
            done += len(part.x)
        assert done == spent.numel()
        self._stored(spent)
        self.uses[spent] = self.reuse
        self.unharvested -= spent.numel()
        self.refills += 1
        self.waited += time.perf_counter() - start

    def _store(self, slots: Tensor, part: ActivationBatch) -> None:
        if self.x is None or self.segments is None:
            self.x = part.x.new_empty(self.capacity, *part.x.shape[1:])
            self.segments = part.segments.new_empty(self.capacity, *part.segments.shape[1:])
        self.x[slots], self.segments[slots] = part.x, part.segments

    def _stored(self, slots: Tensor) -> None:
        """All of a refill came."""

    def memory(self, length: int, d_model: int, dtype: torch.dtype) -> int:
        """Bytes the buffer takes, also while it refills; a part of the harvest comes on top."""
        return self.capacity * length * (d_model * dtype.itemsize + torch.int32.itemsize)

    def state_dict(self) -> dict[str, Any]:
        """The small state; the activations themselves are `contents`."""
        return {
            "uses": self.uses,
            "unharvested": self.unharvested,
            "refills": self.refills,
            "generator": self.generator.get_state(),
        }

    def contents(self) -> dict[str, Tensor]:
        """The held activations, which change only with ``refills``; empty before the first draw."""
        if self.x is None or self.segments is None:
            return {}
        return {"x": self.x, "segments": self.segments}

    def load_state_dict(self, state: dict[str, Any], contents: dict[str, Tensor]) -> None:
        """Go on where `state_dict` and `contents` were taken."""
        self.uses, self.unharvested, self.refills = state["uses"], state["unharvested"], state["refills"]
        self.generator.set_state(state["generator"])
        self.x, self.segments = contents.get("x"), contents.get("segments")
