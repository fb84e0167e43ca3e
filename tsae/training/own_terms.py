"""Temporal terms that are the user's own functions: `tsae.train(temporal={"name": function})`.

A configuration records a function by its name alone, as `python:name` in `objective.temporal`; whoever continues the
run passes the function again. It runs in one process, on all features of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tsae.config import OWN_TERM, ObjectiveConfig, TrainConfig
from tsae.errors import UserError
from tsae.utils.torchrun import world_size

if TYPE_CHECKING:
    from tsae.training.objectives import LossInputs

OwnTerm = Callable[["LossInputs", int, ObjectiveConfig], Tensor]
"""Of the tensors of a step, the number of the step, from 0, and the configuration: a scalar to minimise. It is then
multiplied by `objective.weight` and its ramp, as every temporal term is. The statistics among the tensors have
neighbouring tokens, offsets (1, 1), as their first band."""

_terms: ContextVar[Mapping[str, OwnTerm]] = ContextVar("own_terms")


@contextmanager
def own_terms(functions: Mapping[str, OwnTerm]) -> Iterator[None]:
    """Within the block these functions are what `python:NAME` in `objective.temporal` means."""
    token = _terms.set(dict(functions))
    try:
        yield
    finally:
        _terms.reset(token)


def named(temporal: Any) -> dict[str, OwnTerm]:
    """The functions of the option ``temporal`` by name: a function, or a dictionary of them.

    Raises:
        UserError: it is something else, or a name has other characters than a name in Python.
    """
    functions = {getattr(temporal, "__name__", ""): temporal} if callable(temporal) else temporal
    if not isinstance(functions, Mapping) or not functions or not all(map(callable, functions.values())):
        raise UserError(f"temporal is {temporal!r}; give a function, or a dictionary of functions by name.")
    for name in functions:
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(
                f"A temporal function is called {name!r}; give it a name: temporal={{'my_term': function}}."
            )
    return dict(functions)


def joined(temporal: str | None, names: Iterable[str]) -> str:
    """The value of `objective.temporal` with these functions added; None: with these alone."""
    parts = [] if temporal in (None, "none") else temporal.split("+")
    return "+".join(dict.fromkeys([*parts, *(f"{OWN_TERM}{name}" for name in names)]))


def check_own_terms(cfg: TrainConfig) -> None:
    """Raise `UserError` unless the functions that a configuration names were passed, and this is one process."""
    known = _terms.get({})
    for name in cfg.objective.own_terms:
        if name not in known:
            raise UserError(
                f"objective.temporal has the Python function {name!r}, which no file holds; train or resume from "
                f"Python and pass it again: tsae.train(..., temporal={{{name!r}: {name}}})."
            )
        if cfg.cuda_graph:
            raise UserError(
                f"cuda_graph cannot capture the Python function {name!r} in objective.temporal; leave it out."
            )
        if world_size() > 1:
            raise UserError(
                f"objective.temporal has the Python function {name!r}, and there are {world_size()} processes; such a "
                "function runs in one process."
            )


def own_term(name: str, inputs: LossInputs, step: int, cfg: ObjectiveConfig) -> Tensor:
    """The value of a function.

    Raises:
        UserError: it is no scalar tensor.
    """
    value = _terms.get()[name](inputs, step, cfg)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        shown = f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
        raise UserError(f"The temporal function {name!r} returned {shown}; it must return a scalar of a float dtype.")
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))
