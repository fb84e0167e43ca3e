"""The sum of gradients over the shards of the batch, while the backward pass runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from tsae.parallel.axis import Axis
from tsae.parallel.sharding import local


class GradientSum:
    """Sums each parameter's gradient over the processes of an axis, from the moment that the backward pass has it.

    PyTorch calls a hook when a gradient is complete; it starts an asynchronous all-reduce. The decoder's gradient is
    thus reduced while the encoder's is computed. Collectives start in the order of the backward pass, which is the same
    on all processes. With one process nothing happens.

    Args:
        parameters: leaves, or DTensors, whose local shards are summed.
        axis: the shards of the batch.
    """

    def __init__(self, parameters: Iterable[Tensor], axis: Axis) -> None:
        self.axis = axis
        self._last = False
        self._pending: list[tuple[dist.Work, Tensor, Tensor]] = []  # work, what it sums, where the sum goes
        for parameter in parameters if axis.size > 1 else ():
            parameter.register_post_accumulate_grad_hook(self._start)

    @contextmanager
    def last_backward(self, last: bool = True) -> Iterator[None]:
        """Around a backward pass; gradients are complete after the ``last`` one of a step."""
        self._last = last
        try:
            yield
        finally:
            self._last = False

    @torch.no_grad()
    def _start(self, parameter: Tensor) -> None:
        if not self._last or parameter.grad is None:
            return
        grad = local(parameter.grad)
        summed = grad.T if grad.dim() == 2 and not grad.is_contiguous() else grad
        if not summed.is_contiguous():
            summed = summed.contiguous()
        work = dist.all_reduce(summed, group=self.axis.group, async_op=True)
        self._pending.append((work, summed, grad))

    @torch.no_grad()
    def wait(self) -> None:
        """Complete the sums. On a GPU later kernels wait, and the host does not."""
        for work, summed, grad in self._pending:
            work.wait()
            if summed.data_ptr() != grad.data_ptr():
                grad.copy_(summed if summed.shape == grad.shape else summed.T)
        self._pending.clear()
