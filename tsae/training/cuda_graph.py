"""A training step as a CUDA graph: captured once and replayed, so that the host launches one thing a step.

What changes from step to step lies in tensors that the graph reads: the batch, the factors of the loss, the learning
rate. What changes the kernels themselves, such as the start of the temporal term, the first dead features or a larger
capacity of the lists, has a graph of its own, captured after `WARM_UP` ordinary steps. **It has not run on a GPU.**
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from tsae.data.harvest import ActivationBatch
from tsae.training.optimization import set_learning_rate
from tsae.training.schedules import LossWeights, StepPlan

WARM_UP = 3  # ordinary steps before a capture, in which libraries allocate what they keep


class PlanOnDevice:
    """The numbers of a `StepPlan` as scalar tensors that a graph reads.

    Args:
        plan: of the first step; whether its temporal term has started stays.
        device: where the tensors are.
    """

    def __init__(self, plan: StepPlan, device: torch.device) -> None:
        self.values = [torch.zeros((), device=device) for _ in range(5)]
        reconstruction, temporal, mixing, ramp, lr = self.values
        loss = LossWeights(reconstruction, None if plan.loss.temporal is None else temporal)
        self.plan = StepPlan(loss, mixing, ramp, lr, 0.0)

    def set(self, plan: StepPlan) -> None:
        """Set the tensors to the numbers of ``plan``, without waiting for the device."""
        numbers = (*plan.loss, plan.mixing, plan.ramp, plan.lr)
        for value, number in zip(self.values, numbers, strict=True):
            if number is not None:
                value.fill_(number)


class _Captured:
    """One graph, its inputs and its result."""

    def __init__(self, batch: ActivationBatch, plan: StepPlan) -> None:
        self.x, self.segments = torch.empty_like(batch.x), torch.empty_like(batch.segments)
        self.plan = PlanOnDevice(plan, batch.x.device)
        self.warmed = 0
        self.graph: Any = None
        self.result: Any = None

    def fill(self, batch: ActivationBatch, plan: StepPlan, optimizer: torch.optim.Optimizer) -> None:
        self.x.copy_(batch.x, non_blocking=True)
        self.segments.copy_(batch.segments, non_blocking=True)
        self.plan.set(plan)
        set_learning_rate(optimizer, float(plan.lr))

    def step(self, make_step: Callable[..., Any]) -> Any:
        tokens: Tensor = (self.segments >= 0).sum()
        return make_step(ActivationBatch(self.x, self.segments), self.plan.plan, tokens, check=False)


class GraphedSteps:
    """Makes steps by graphs.

    Args:
        make_step: ``make_step(batch, plan, tokens, check=False)``, which waits for nothing and changes all state in
            place.
        device: a GPU.
    """

    def __init__(self, make_step: Callable[..., Any], device: torch.device) -> None:
        self.make_step, self.device = make_step, device
        self.captured: dict[Hashable, _Captured] = {}
        self.side = torch.cuda.Stream(device)
        self.pool: Any = None

    def __call__(self, batch: Any, plan: StepPlan, optimizer: torch.optim.Optimizer, kind: Hashable) -> Any:
        """One step.

        batch: on the device
        kind: what else decides which kernels run
        out: of ``make_step``; after a replay in tensors that the next step overwrites
        """
        key = (tuple(batch.x.shape), batch.x.dtype, batch.segments.dtype, plan.loss.temporal is None, kind)
        if key not in self.captured:
            self.captured[key] = _Captured(batch, plan)
        each = self.captured[key]
        each.fill(batch, plan, optimizer)
        if each.graph is None and each.warmed < WARM_UP:
            each.warmed += 1
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.side):
                result = each.step(self.make_step)
            torch.cuda.current_stream(self.device).wait_stream(self.side)
            return result
        if each.graph is None:
            optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            # The thread that prefetches activations may allocate in the meantime.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                each.result = each.step(self.make_step)
            self.pool, each.graph = graph.pool(), graph
        each.graph.replay()
        return each.result
