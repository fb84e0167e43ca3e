"""The processes of a run as a mesh, and the reductions over them.

All code follows one rule: a scalar of the loss is summed over the processes where it is computed, so every process
holds the value of the full batch and the full dictionary, and its gradient reaches only that process's shard. Gradients
of weights are then sums over the shards of the batch, never means.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Axis:
    """The processes along one dimension of the mesh. With one process values are unchanged.

    Sums differ in their gradient: `sum_identity_grad`, `identity_sum_grad` (the reverse), `sum_no_grad`, and
    `sum_in_place` without autograd.

    Args:
        group: torch's process group; None is this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def __repr__(self) -> str:
        return f"Axis({self.rank} of {self.size})"

    def sum_identity_grad(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The sum over the processes; backward, the gradient passes through unchanged.

        For a value that is the same on all processes from here on. With several processes it is summed in ``dtype``
        (None: its own).
        """
        return tensor if self.size == 1 else _Sum.apply(tensor.to(dtype or tensor.dtype), self.group)

    def identity_sum_grad(self, tensor: Tensor) -> Tensor:
        """``tensor``, which is the same on all processes; backward, the gradient is summed over them.

        For a value that each process uses differently from here on.
        """
        return tensor if self.size == 1 else _SumOfGradients.apply(tensor, self.group)

    def sum_no_grad(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, detached."""
        return tensor.detach() if self.size == 1 else _reduced(tensor.detach(), self.group)

    def weighted_mean_no_grad(self, tensor: Tensor, weight: Tensor) -> Tensor:
        """The mean over the processes, each with a scalar weight of at least 0, detached."""
        if self.size == 1:
            return tensor.detach()
        return self.sum_no_grad(tensor * weight) / self.sum_no_grad(weight).clamp(min=1)

    def max_no_grad(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over the processes, detached."""
        return tensor.detach() if self.size == 1 else _reduced(tensor.detach(), self.group, dist.ReduceOp.MAX)

    def any(self, mask: Tensor) -> Tensor:
        """Elementwise, whether ``mask`` is true on any process; bool."""
        return mask if self.size == 1 else self.max_no_grad(mask.to(torch.int32)) > 0

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all processes, of one shape, concatenated along ``dim``; detached."""
        if self.size == 1:
            return tensor.detach()
        source = tensor.detach().contiguous()
        parts = [torch.empty_like(source) for _ in range(self.size)]
        dist.all_gather(parts, source, group=self.group)
        return torch.cat(parts, dim)

    def sum_in_place(self, tensor: Tensor) -> None:
        """Replace the content of ``tensor`` by the sum over the processes."""
        if self.size == 1:
            return
        flat = tensor.T if tensor.dim() == 2 and not tensor.is_contiguous() else tensor
        if flat.is_contiguous():
            dist.all_reduce(flat, group=self.group)
        else:
            tensor.copy_(_reduced(tensor, self.group))

    def shard_bounds(self, n: int) -> tuple[int, int]:
        """The range [first, last) of ``n`` items that this process has."""
        return self.rank * n // self.size, (self.rank + 1) * n // self.size


@dataclass(frozen=True, repr=False)
class Ranks:
    """The position of this process in the mesh of a run.

    data: the processes with the same shard of the dictionary, each with its own shard of the batch
    features: the processes with the same shard of the batch, each with its own shard of the dictionary
    world: all processes, data-major
    mesh: torch's `DeviceMesh` with the dimensions `data` and `features`; None for a single process
    """

    data: Axis = field(default_factory=Axis)
    features: Axis = field(default_factory=Axis)
    world: Axis = field(default_factory=Axis)
    mesh: Any = None

    def __repr__(self) -> str:
        return "SINGLE_PROCESS" if self.world.size == 1 else f"Ranks({self.data!r}, {self.features!r})"

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.world.rank == 0


SINGLE_PROCESS = Ranks()


def _reduced(tensor: Tensor, group: Any, how: Any = dist.ReduceOp.SUM) -> Tensor:
    out = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, how, group=group)
    return out


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        return _reduced(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduced(grad, ctx.group), None
