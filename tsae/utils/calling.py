"""How the user talks to the package: with commands, or from Python. Messages name options accordingly."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from tsae.errors import UserError
from tsae.utils.interrupts import at_once

_python: ContextVar[bool] = ContextVar("python", default=False)


def resume_call(directory: Path) -> str:
    """What continues the run in a directory: a command, or a call."""
    return f"tsae.train(resume={str(directory)!r})" if _python.get() else f"python -m tsae.train --resume {directory}"


def option(name: str, value: Path | None = None) -> str:
    """An option, without a value a switch, as the user writes it."""
    if _python.get():
        return f"{name}={True if value is None else str(value)!r}"
    return f"--{name}" if value is None else f"--{name} {value}"


@contextmanager
def from_python() -> Iterator[None]:
    """Within the block messages name options as Python does, and SIGINT and SIGTERM raise `Interrupted`."""
    token = _python.set(True)
    try:
        with at_once():
            yield
    except UserError as error:
        error.args = (in_python(str(error)), *error.args[1:])
        raise
    finally:
        _python.reset(token)


def in_python(message: str) -> str:
    """A message with options as Python has them: ``--sae.d-sae`` is `sae.d_sae`, and ``--evaluation.no-final`` is
    `evaluation.final=False`."""
    message = re.sub(r"python -m (tsae\.\w+)", r"\1", message)
    return re.sub(r"(?<![^\s(])--([a-z][a-z0-9-]*(?:\.[a-z][a-z0-9-]*)*)", _keyword, message)


def _keyword(found: re.Match[str]) -> str:
    *sections, name = found[1].split(".")
    off = name.startswith("no-")
    words = ".".join([*sections, name.removeprefix("no-")]).replace("-", "_")
    return f"`{words}=False`" if off else f"`{words}`"


def make_callable(module: ModuleType, function: Callable[[], Callable[..., Any]]) -> None:
    """Make a module callable: `tsae.train` is both a submodule and a function, in whatever order things are imported.

    function: returns what a call of the module calls; called when that is first needed
    """

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return function()(*args, **options)

        @property
        def __doc__(self) -> str | None:  # type: ignore[override]
            """The function's, for `help` and a notebook's question mark."""
            return function().__doc__

        @property
        def __signature__(self) -> Any:
            import inspect

            return inspect.signature(function())

    module.__class__ = CallableModule
