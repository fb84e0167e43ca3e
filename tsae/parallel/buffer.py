"""The activation buffer over several processes: each holds the activations it harvested and sends them for batches.

The order of draws is that of a single process: all processes draw the same batch from generators in the same state and
hold the segments of all sequences. Activations are held by one process each and sent to the ranks that train on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tsae.data.buffer import ActivationBuffer
from tsae.data.harvest import ActivationBatch
from tsae.data.norms import large_tokens
from tsae.parallel.axis import Axis, Ranks

_GATHERED = 64  # sequences gathered at a time for a checkpoint


class BatchShard(NamedTuple):
    """The shard of a batch of this data rank.

    x: (b, T, d); segments: (b, T)
    full_segments: (B, T), of the full batch; first: index in it of the first sequence of the shard
    """

    x: Tensor
    segments: Tensor
    full_segments: Tensor
    first: int


class DistributedActivationBuffer(ActivationBuffer):
    """An `ActivationBuffer` whose sequences are distributed over the processes of a run.

    `next_batch`, `first` and `contents` are collective: all processes must call them.

    Args:
        harvest: as for `ActivationBuffer`, the same on all processes; activations held by another process are on the
            meta device.
        capacity, reuse, demand: as for `ActivationBuffer`, for all processes together.
        generator: source of the order (CPU), in the same state on all processes.
        ranks: position of this process.
    """

    def __init__(
        self,
        harvest: Callable[[int], Iterable[ActivationBatch]],
        capacity: int,
        reuse: int,
        demand: int,
        generator: torch.Generator,
        ranks: Ranks,
    ) -> None:
        super().__init__(harvest, capacity, reuse, demand, generator)
        self.ranks = ranks
        self.rows: dict[int, Tensor] = {}  # slot -> [T, d], held here
        self.row = torch.empty(0, device="meta")  # [T, d], shape and dtype of a sequence
        self.owner = torch.full((self.capacity,), -1, dtype=torch.int64)  # rank that holds the sequence of a slot

    def first(self, n: int) -> ActivationBatch:
        """As for a single process; the result is on every process."""
        if not self.filled:
            self._refill()
        assert self.segments is not None
        slots = torch.arange(min(n, self.capacity))
        return ActivationBatch(self._exchange([slots] * self.ranks.world.size), self.segments[: len(slots)])

    def _batch(self, chosen: Tensor) -> BatchShard:
        assert self.segments is not None
        data, features = self.ranks.data, self.ranks.features.size
        shares = [chosen[r * len(chosen) // data.size : (r + 1) * len(chosen) // data.size] for r in range(data.size)]
        x = self._exchange([shares[rank // features] for rank in range(self.ranks.world.size)])
        first, last = data.shard_bounds(len(chosen))
        return BatchShard(x, self.segments[chosen[first:last]], self.segments[chosen], first)

    def _store(self, slots: Tensor, part: ActivationBatch) -> None:
        if self.segments is None:
            self.segments = part.segments.new_empty(self.capacity, *part.segments.shape[1:])
            self.row = torch.empty(part.x.shape[1:], dtype=part.x.dtype, device="meta")
        self.segments[slots] = part.segments
        for slot, row in zip(slots.tolist(), part.x, strict=True):
            self.rows.pop(slot, None)
            if not row.is_meta:
                self.rows[slot] = row.clone()

    def _refilled(self, slots: Tensor) -> None:
        here = torch.zeros(self.capacity, dtype=torch.int64)
        here[list(self.rows)] = self.ranks.world.rank + 1
        self.owner[slots] = self.ranks.world.sum_no_grad(here)[slots] - 1

    def _exclude_large(self, slots: Tensor) -> None:
        assert self.segments is not None
        large = torch.zeros(len(slots), self.segments.shape[1], dtype=torch.int32)
        for i, slot in enumerate(slots.tolist()):
            if slot in self.rows:
                large[i] = large_tokens(self.rows[slot][None], self.norm_limit)[0]
        large = self.ranks.world.sum_no_grad(large)
        self.segments[slots] = self.segments[slots].masked_fill(large > 0, -1)

    def _exchange(self, wanted: list[Tensor]) -> Tensor:
        """Activations [n, T, d] of the slots that this rank wants; ``wanted`` lists the slots of every rank."""
        axis = self.ranks.world
        owners = self.owner[wanted[axis.rank]]
        sent = [slots[self.owner[slots] == axis.rank].tolist() for slots in wanted]
        rows = [self.rows[slot] for slots in sent for slot in slots]
        counts = torch.bincount(owners, minlength=axis.size).tolist()
        received = _all_to_all(rows, [len(slots) for slots in sent], counts, self.row, axis)
        out = torch.empty_like(received)
        out[torch.argsort(owners, stable=True)] = received  # received rank by rank, each in the order of the slots
        return out

    def contents(self) -> dict[str, Tensor]:
        """As for a single process, gathered in the memory of rank 0; empty on the others."""
        if not self.filled or self.segments is None:
            return {}
        none = torch.empty(0, dtype=torch.int64)
        x = self.row.new_empty(self.capacity, *self.row.shape, device="cpu") if self.ranks.is_rank0 else None
        for start in range(0, self.capacity, _GATHERED):
            slots = torch.arange(start, min(start + _GATHERED, self.capacity))
            part = self._exchange([slots, *[none] * (self.ranks.world.size - 1)])
            if x is not None:
                x[slots] = part
        return {} if x is None else {"x": x, "segments": self.segments}

    def load_state_dict(self, state: dict[str, Any], contents: dict[str, Tensor]) -> None:
        """Continue from `state_dict` and `contents`, saved by any number of processes; each gets all ``contents``."""
        super().load_state_dict(state, contents)
        x, self.x, self.rows = self.x, None, {}
        if x is None:
            return
        axis = self.ranks.world
        self.row = torch.empty(x.shape[1:], dtype=x.dtype, device="meta")
        self.owner = torch.arange(self.capacity) % axis.size
        self.rows = {slot: x[slot].clone() for slot in range(axis.rank, self.capacity, axis.size)}


def _all_to_all(rows: list[Tensor], sent: list[int], received: list[int], like: Tensor, axis: Axis) -> Tensor:
    """Send ``sent[r]`` of the ``rows`` to each rank r and receive ``received[r]``; as bytes, for any dtype."""
    outgoing = torch.stack(rows) if rows else like.new_empty(0, *like.shape, device="cpu")
    incoming = like.new_empty(sum(received), *like.shape, device="cpu")
    dist.all_to_all_single(incoming.view(torch.uint8), outgoing.view(torch.uint8), received, sent, group=axis.group)
    return incoming
