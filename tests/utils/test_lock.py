"""Locks: one process at a time, released by the system, with and without `flock`."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from read_only import read_only

from tsae.utils import lock as module
from tsae.utils.lock import HeldError, Lock, holder

HOLD = """
import sys, time
from pathlib import Path
from tsae.utils import lock
if sys.argv[2] == "records":
    lock.fcntl = None
lock.Lock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["flock", "records"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with `flock`, and one without."""
    if request.param == "records":
        monkeypatch.setattr(module, "fcntl", None)
    return request.param


@pytest.fixture
def other(system: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `tmp_path / "lock"`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock"), system]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_refused_and_told_who_holds_it(other: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(HeldError, match=rf"another process \({other.pid}, since 20\d\d-"):
        Lock(tmp_path / "lock").acquire()
    found = holder(tmp_path / "lock")
    assert found is not None
    assert found.pid == other.pid


def test_the_lock_of_a_killed_process_is_free(other: subprocess.Popen[str], tmp_path: Path) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert list(tmp_path.iterdir())  # its file is still there
    assert holder(tmp_path / "lock") is None
    with Lock(tmp_path / "lock"):
        pass
    assert not list(tmp_path.iterdir())


def test_within_a_process_too(system: str, tmp_path: Path) -> None:
    with Lock(tmp_path / "lock"), pytest.raises(HeldError):
        Lock(tmp_path / "lock").acquire()
    with Lock(tmp_path / "lock"):
        assert holder(tmp_path / "lock") is not None
    assert holder(tmp_path / "lock") is None


def test_looking_at_a_lock_writes_nothing(system: str, tmp_path: Path) -> None:
    assert holder(tmp_path / "lock") is None
    assert not list(tmp_path.iterdir())


def test_of_many_at_once_one_holds_it(system: str, tmp_path: Path) -> None:
    """Although every release removes the file that others may just have opened."""
    inside, most, taken = [], [], []

    def take() -> None:
        for _ in range(40):
            try:
                with Lock(tmp_path / "lock"):
                    inside.append(1)
                    most.append(len(inside))
                    taken.append(1)
                    time.sleep(0.001)
                    inside.pop()
            except HeldError:
                pass

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) > 8
    assert max(most) == 1


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    child = os.fork()
    if child == 0:
        lock.release()  # is not its own
        time.sleep(60)
        os._exit(0)
    try:
        assert holder(tmp_path / "lock") is not None
        lock.release()
        with Lock(tmp_path / "lock"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_of_another_program_counts(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"), pytest.raises(HeldError, match=r"^another process$"):
        Lock(tmp_path / "lock").acquire()


@pytest.mark.parametrize("record", ["", "7", "[]", '{"pid": 1}', '{"pid": "x"}', "\x00\xff"])
def test_a_file_that_is_no_record_does_not_matter(record: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(record)
    assert holder(tmp_path / "lock") is None
    with Lock(tmp_path / "lock"):
        pass


def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    with read_only(tmp_path), pytest.raises(PermissionError):
        Lock(tmp_path / "lock").acquire()


class TestWithoutFlock:
    """What is known of a process from its record alone."""

    @pytest.fixture(autouse=True)
    def records(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "fcntl", None)

    def record(self, folder: Path, **changes: object) -> None:
        with Lock(folder / "lock"):
            values = json.loads((folder / "lock.holder").read_text())
        (folder / "lock.holder").write_text(json.dumps(values | changes))

    def test_a_process_of_another_machine_may_live(self, tmp_path: Path) -> None:
        self.record(tmp_path, host="node7", pid=2**22 + 1)
        with pytest.raises(HeldError, match=r"on node7, since .*if that process is gone, remove .*lock\.holder$"):
            Lock(tmp_path / "lock").acquire()

    def test_one_of_this_machine_that_has_ended_does_not(self, tmp_path: Path) -> None:
        self.record(tmp_path, pid=2**22 + 1)
        with Lock(tmp_path / "lock"):
            pass

    def test_nor_one_whose_number_another_has_now(self, tmp_path: Path) -> None:
        self.record(tmp_path, started=1)
        with Lock(tmp_path / "lock"):
            pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EACCES])
def test_a_file_system_without_flock_is_noticed(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with Lock(tmp_path / "lock"):
        assert [path.name for path in tmp_path.iterdir()] == ["lock.holder"]
        with pytest.raises(HeldError, match=str(os.getpid())):
            Lock(tmp_path / "lock").acquire()
    assert not list(tmp_path.iterdir())
