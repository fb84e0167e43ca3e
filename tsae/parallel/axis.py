"""The processes of a run as a mesh, and the sums over them.

The rule that all code here follows: a scalar of the loss is summed over the processes where it is made, so that every
process holds the value of the whole batch and the whole dictionary, and its gradient goes to that process's share
alone. Gradients of weights are then sums over the shares of the batch, never means.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Axis:
    """The processes along one dimension of the mesh. Of one process, every method gives back what it is given.

    Args:
        group: torch's process group; None is this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def __repr__(self) -> str:
        return f"Axis({self.rank} of {self.size})"

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, on each of them; the gradient reaches this one's ``tensor`` as it comes.

        For what is the same on all processes from here on.
        """
        return tensor if self.size == 1 else _Sum.apply(tensor, self.group)

    def spread(self, tensor: Tensor) -> Tensor:
        """``tensor`` as it is, which all processes have; its gradient is the sum of theirs.

        For what each process puts to another use from here on.
        """
        return tensor if self.size == 1 else _Spread.apply(tensor, self.group)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, without gradient."""
        return tensor if self.size == 1 else _reduced(tensor.detach(), self.group)

    def largest(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over the processes, without gradient."""
        return tensor if self.size == 1 else _reduced(tensor.detach(), self.group, dist.ReduceOp.MAX)

    def any(self, mask: Tensor) -> Tensor:
        """Elementwise, whether it is so on any process; bool."""
        return mask if self.size == 1 else self.largest(mask.to(torch.int32)) > 0

    def gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """All processes' tensors, of one shape, one after another along ``dim``; without gradient."""
        if self.size == 1:
            return tensor
        source = tensor.detach().contiguous()
        parts = [torch.empty_like(source) for _ in range(self.size)]
        dist.all_gather(parts, source, group=self.group)
        return torch.cat(parts, dim)

    def add_up(self, tensor: Tensor) -> None:
        """Put the sum over the processes in the place of ``tensor``."""
        if self.size == 1:
            return
        flat = tensor.T if tensor.dim() == 2 and not tensor.is_contiguous() else tensor
        if flat.is_contiguous():
            dist.all_reduce(flat, group=self.group)
        else:
            tensor.copy_(_reduced(tensor, self.group))

    def span(self, n: int) -> tuple[int, int]:
        """This process's share of ``n`` things in a row: the first, and the one after the last."""
        return self.rank * n // self.size, (self.rank + 1) * n // self.size


@dataclass(frozen=True, repr=False)
class Ranks:
    """Where this process stands in the mesh of a run.

    data: the processes with the same part of the dictionary, each with its own share of the batch
    features: the processes with the same share of the batch, each with its own part of the dictionary
    world: all of them, data-major
    mesh: torch's `DeviceMesh` with the dimensions `data` and `features`; None alone
    """

    data: Axis = field(default_factory=Axis)
    features: Axis = field(default_factory=Axis)
    world: Axis = field(default_factory=Axis)
    mesh: Any = None

    def __repr__(self) -> str:
        return "SINGLE_PROCESS" if self.world.size == 1 else f"Ranks({self.data!r}, {self.features!r})"

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
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


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduced(grad, ctx.group), None
