"""One process owns a run directory: training, and every command that reads a run's files together or adds to them.

The owner holds the lock `layout.LOCK` in the directory. A sweep's directory stands for its runs: nobody else may own
one of them while the sweep is owned, nor the sweep while one of its runs is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from tsae.errors import UserError
from tsae.rundir import layout
from tsae.utils.lock import HeldError, Lock, holder

_OWN = (*layout.OUTPUTS, layout.CONFIG, layout.SWEEP, layout.LOCK)
_CONFIGURATIONS = ("cfg.json", "config.json")  # of every library's autoencoders, and of models
_WEIGHTS = (".safetensors", ".pt", ".npz", ".bin", ".gguf")

_owned: ContextVar[frozenset[Path]] = ContextVar("owned", default=frozenset())  # by the commands around this call

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _owned.set(frozenset()))


@contextmanager
def owning(directory: Path, advice: str = "name another directory") -> Iterator[None]:
    """Own a run's or a sweep's directory within the block; a directory that is missing is made, and removed if it stays
    empty. Within an outer block for the same directory this does nothing.

    advice: what to do instead of waiting

    Raises:
        UserError: another process owns it, or it cannot be written to.
    """
    with ExitStack() as stack:
        try:
            _make(directory, stack)
            _own(directory, advice, stack)
        except OSError as error:
            raise UserError(
                f"A run cannot be written to {directory} ({error.strerror or error}); name another directory."
            ) from None
        yield


@contextmanager
def owning_runs(*directories: Path, advice: str = "end it first") -> Iterator[None]:
    """Own, within the block, those of ``directories`` that are runs or sweeps.

    One that cannot be written to, such as a run on a read-only disk, is used without a lock if nobody owns it.

    Raises:
        UserError: another process owns one of them.
    """
    with ExitStack() as stack:
        for directory in dict.fromkeys(path.resolve() for path in directories):
            if is_run(directory):
                try:
                    _own(directory, advice, stack)
                except OSError:
                    _check_free(directory, directory, advice)
        yield


def check_output(path: Path, *, own: str | None = None) -> None:
    """Raise `UserError` unless ``path`` is where the file of a result may be: in a directory that exists, and in the
    place of no other file of a run, an autoencoder or a model.

    own: the name in `layout` of the file that the command writes into a run by default
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory; name a file.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"There is no directory {path.parent} for {path.name}; create it, or name another file.")
    run = _run_with(path)
    if run is not None and (path.name != own or run != path.absolute().parent.resolve()):
        raise UserError(f"{path} is a file of the run in {run}; name another file.")
    if path.exists() and (path.name in _CONFIGURATIONS or path.suffix in _WEIGHTS):
        raise UserError(f"{path} is part of an autoencoder or a model; name another file.")


def check_output_directory(directory: Path, *runs: Path) -> None:
    """Raise `UserError` if ``directory`` is, or is in, the place of a file or folder of a run.

    runs: directories that are about to be runs
    """
    run = _run_with(directory, *runs)
    if run is not None:
        raise UserError(f"{directory} is in the place of a file of the run in {run}; name another directory.")


def _run_with(path: Path, *runs: Path) -> Path | None:
    """The run, also of ``runs``, that ``path``, which need not exist, is a file of, at any depth; None if none is."""
    whole, new = path.absolute().parent.resolve() / path.name, [run.resolve() for run in runs]
    for directory in whole.parents:
        first = Path(whole.relative_to(directory).parts[0])
        if any(first.match(pattern) for pattern in _OWN) and (directory in new or is_run(directory)):
            return directory
    return None


def is_run(directory: Path) -> bool:
    """Whether a directory is that of a run or a sweep, or is about to be."""
    return any((directory / name).is_file() for name in (layout.CONFIG, layout.SWEEP, layout.LOCK))


def _make(directory: Path, stack: ExitStack) -> None:
    """Make the directory; when ``stack`` is left, what was made is removed if it is empty."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):  # the stack calls in reverse: `directory` first
        stack.callback(_remove_if_empty, path)


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


def _own(directory: Path, advice: str, stack: ExitStack) -> None:
    whole = directory.resolve()
    if whole in _owned.get():
        return
    try:
        stack.enter_context(Lock(directory / layout.LOCK))
    except HeldError as error:
        raise _refusal(directory, str(error), advice) from None
    if (whole.parent / layout.SWEEP).is_file():
        _check_free(whole.parent, directory, advice)
    if (whole / layout.SWEEP).is_file():
        for lock in whole.glob(f"*/{layout.LOCK}*"):
            _check_free(lock.parent, lock.parent, advice)
    token = _owned.set(_owned.get() | {whole})
    stack.callback(_owned.reset, token)


def _check_free(directory: Path, asked: Path, advice: str) -> None:
    """Raise `UserError`, about the directory ``asked``, if another process owns ``directory``."""
    found = None if directory.resolve() in _owned.get() else holder(directory / layout.LOCK)
    if found is not None:
        raise _refusal(asked, str(found), advice)


def _refusal(directory: Path, who: str, advice: str) -> UserError:
    return UserError(f"The run {directory} is in use by {who}; wait until that has ended, or {advice}.")
