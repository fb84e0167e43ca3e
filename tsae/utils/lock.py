"""Lock files: one process at a time, and the system releases the lock of a killed process.

The lock is the system's (`flock`) on an open file, whose content only says who holds it. On a file system without
`flock` another file, the record, is the lock: it is created exclusively, and counts for nothing once its process has
ended. Whether that is so is known of processes of this machine only; another's record has to be removed by hand.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)
_ATTEMPTS, _PAUSE = 4, 0.05  # `holder` in another process holds a lock for a moment


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as far as it is known.

    pid, host, since: of the process, its machine, and the local time at which it took the lock; 0 and "" if unknown
    started: when the process started, in the system's ticks, which tells it from a later one with its number
    """

    pid: int = 0
    host: str = ""
    since: str = ""
    started: int = 0

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        where = "" if self.host == socket.gethostname() else f" on {self.host}"
        return f"another process ({self.pid}{where}, since {self.since})"

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended."""
        if self.host != socket.gethostname() or not self.pid:
            return False
        with suppress(PermissionError):
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return True
        return 0 not in (self.started, _started(self.pid)) and self.started != _started(self.pid)


class HeldError(Exception):
    """Another process holds the lock.

    holder: that process
    record: the file to remove by hand if it is gone; None where the system releases the lock
    """

    def __init__(self, holder: Holder, record: Path | None = None) -> None:
        self.holder, self.record = holder, record
        by_hand = "" if record is None else f"; if that process is gone, remove {record}"
        super().__init__(f"{holder}{by_hand}")


class Lock:
    """A lock file; `acquire` and `release`, or a `with` block.

    Args:
        path: the file, in an existing directory.
        keep: leave the file, empty, when it is released.
    """

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.path, self._keep = path, keep
        self._descriptor: int | None = None
        self._flocked = False

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            HeldError: another process holds it.
            OSError: the file cannot be created.
        """
        for attempt in range(_ATTEMPTS):
            try:
                while not self._try():  # the file was removed by a process that released it
                    pass
            except HeldError:
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(_PAUSE)
            else:
                _held.add(self)
                return

    def release(self) -> None:
        """Give the lock back; does nothing if it is not held."""
        if self._descriptor is None:
            return
        with suppress(OSError):
            if self._keep and self._flocked:
                os.ftruncate(self._descriptor, 0)
            else:  # while it is held, so that the file of no other process is removed
                (self.path if self._flocked else _record(self.path)).unlink()
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)

    def _try(self) -> bool:
        """Take the lock; False if the file has been replaced since it was opened."""
        descriptor = _open(self.path)
        try:
            if not _flock(descriptor, exclusive=True):
                raise HeldError(_read(self.path))
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_FLOCK:
                raise
            self._without_flock()
            return True
        except HeldError:
            os.close(descriptor)
            raise
        if not _is_at(descriptor, self.path):
            os.close(descriptor)
            return False
        self._descriptor, self._flocked = descriptor, True
        with suppress(OSError):  # on a full disk the record is missing, not the lock
            _write(descriptor)
        return True

    def _without_flock(self) -> None:
        """Take the lock by creating the record, or by taking over that of a process that has ended."""
        with suppress(OSError):
            self.path.unlink()
        record = _record(self.path)
        for _ in range(2):
            try:
                descriptor = os.open(record, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileExistsError:
                found = _read(record)
                if not found.has_ended:
                    raise HeldError(found, record) from None
                _remove(record, found)
            else:
                _write(descriptor)
                self._descriptor, self._flocked = descriptor, False
                return
        raise HeldError(_read(record), record)

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def holder(path: Path) -> Holder | None:
    """The process that holds the lock file; None if nobody does. Writes nothing."""
    record = _record(path)
    if record.exists() and not (found := _read(record)).has_ended:
        return found
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if _flock(descriptor, exclusive=False) else _read(path)
    except OSError:  # the file system has no locks, and there is no record
        return None
    finally:
        os.close(descriptor)


def claim_file(path: Path) -> int | None:
    """Open a file, made if it is missing, that no other process has claimed; None if one has.

    The claim ends when the descriptor returned is closed. On a file system without `flock` all claims are granted.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            free = _flock(descriptor, exclusive=True)
        except OSError:
            return descriptor
        if free and _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)
        if not free:
            return None


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked child: close the files, or the lock would outlive the parent that holds it."""
    for lock in list(_held):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _open(path: Path) -> int:
    flags = os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | flags, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # another user's, left by a killed process


def _flock(descriptor: int, *, exclusive: bool) -> bool:
    """Lock an open file until it is closed; False if another process holds it.

    Raises an `OSError` with a number in `_NO_FLOCK` if the file system has no such locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except PermissionError as error:  # what some file systems say instead
        raise OSError(errno.ENOLCK, error.strerror) from None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _record(path: Path) -> Path:
    """The file that stands for the lock where the system has none."""
    return path.with_name(f"{path.name}.holder")


def _remove(record: Path, found: Holder) -> None:
    """Remove the record of a process that has ended, but not one that another process has written since."""
    aside = record.with_name(f"{record.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        os.rename(record, aside)
        if _read(aside) != found:
            os.rename(aside, record)
            raise HeldError(_read(record), record)
        aside.unlink()


def _read(path: Path) -> Holder:
    """The record in a file; an unknown process if it is empty or not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = Holder(**values)
        return found if [type(value) for value in asdict(found).values()] == [int, str, str, int] else Holder()
    except (OSError, ValueError, TypeError):
        return Holder()


def _write(descriptor: int) -> None:
    """Write this process's record."""
    pid, since = os.getpid(), datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(Holder(pid, socket.gethostname(), since, _started(pid)))).encode(), 0)


def _started(pid: int) -> int:
    """When a process of this machine started, in the system's ticks; 0 if that is unknown."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
