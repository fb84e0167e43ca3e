"""A stand-in for CUDA graphs on a CPU: records the operators of a step and repeats them on the same memory.

As with a graph on a GPU, numbers of the host and tensors that the step looked up are those of the capture; a capture
changes nothing; results lie where they lay. A step that keeps its state in new tensors, or takes a number of the host
that changes, therefore goes wrong here as it would there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OF_NO_INPUT = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class RecordedGraph(TorchDispatchMode):
    """What `torch.cuda.CUDAGraph` does for a trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.made: set[int] = set()  # memory that the capture allocated
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # tensors that existed, and their content

    def pool(self) -> None:
        """Memory is not pooled."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in self._changed(func, args, kwargs):
            assert isinstance(value, Tensor), argument
            if value.data_ptr() not in self.made and value.data_ptr() not in self.before:
                self.before[value.data_ptr()] = (value.detach(), value.detach().clone())
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.made |= {each.data_ptr() for each in results if each.untyped_storage().data_ptr() not in inputs}
        self.calls.append((func, args, kwargs, results))
        return out

    @staticmethod
    def _changed(func: Any, args: tuple, kwargs: dict) -> Iterator[tuple[str, Any]]:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from ((argument.name, leaf) for leaf in tree_leaves(value))

    def restore(self) -> None:
        """End of the capture: nothing has happened."""
        for tensor, content in self.before.values():
            tensor.copy_(content)

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat every operator."""
        for func, args, kwargs, results in self.calls:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            if func.overloadpacket.__name__ in _OF_NO_INPUT:
                continue
            for old, new in zip(results, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new.detach())


class _Stream:
    def wait_stream(self, other: Any) -> None:
        pass


@contextlib.contextmanager
def _capture(graph: RecordedGraph, pool: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    with graph:
        yield
    graph.restore()


def record_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put `RecordedGraph` in the place of CUDA's graphs, and streams that do nothing."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", _capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
