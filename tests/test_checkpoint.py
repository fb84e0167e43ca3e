"""Checkpoints: whole or not at all, bounded in number, never executing code."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tsae import checkpoint
from tsae.errors import UserError


def save(directory: Path, step: int, refills: int = 1, keep: int = 2) -> Path:
    return checkpoint.save(
        directory,
        step,
        {"trainer": {"w": torch.full((3,), float(step))}},
        {"x": torch.full((2,), float(refills))},
        refills,
        keep,
    )


def test_round_trip_and_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
    save(tmp_path, 5)
    save(tmp_path, 10)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    state, contents = checkpoint.load(newest)
    assert state["step"] == 10
    assert torch.equal(state["trainer"]["w"], torch.full((3,), 10.0))
    assert torch.equal(contents["x"], torch.ones(2))


def test_only_the_newest_are_kept_with_their_buffers(tmp_path: Path) -> None:
    for step, refills in ((1, 1), (2, 1), (3, 2), (4, 3), (5, 3)):
        save(tmp_path, step, refills)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["buffer-0003.safetensors", "step-00000004", "step-00000005"]
    save(tmp_path, 6, 4)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["buffer-0003.safetensors", "buffer-0004.safetensors", "step-00000005", "step-00000006"]


def test_what_a_kill_leaves_behind_is_no_checkpoint_and_is_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002").mkdir()
    (tmp_path / ".tmp-step-00000002" / "state.pt").write_bytes(b"half")
    (tmp_path / "step-00000003").mkdir()  # renamed, but its contents never reached the disk
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000001"
    save(tmp_path, 4)
    assert not (tmp_path / ".tmp-step-00000002").exists()


def test_a_failing_write_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000001"


KILLED = """
import os, resource, shutil, signal, sys
from pathlib import Path
import torch
from tsae import checkpoint

def save(directory, step, refills):
    state = {"trainer": {"w": torch.full((5000,), float(step))}}
    checkpoint.save(directory, step, state, {"x": torch.full((1000,), float(refills))}, refills, 1)

def after_lines(n):  # kill before the n-th line of Python that `save` and what it calls for files execute
    def trace(frame, event, argument):
        nonlocal n
        if os.path.basename(frame.f_code.co_filename) not in ("checkpoint.py", "shutil.py"):
            return None
        if event == "line":
            n -= 1
            if n == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)

def after_bytes(n):  # kill in the middle of the write that brings a file beyond n bytes
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))

def attempt(kill, n):
    directory = Path(sys.argv[1]) / f"{kill.__name__}-{n}"
    save(directory, 1, 1)
    child = os.fork()
    if child == 0:
        kill(n)
        save(directory, 2, 2)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    state, contents = checkpoint.load(checkpoint.latest(directory))
    step = state["step"]
    assert torch.equal(state["trainer"]["w"], torch.full((5000,), float(step)))
    assert torch.equal(contents["x"], torch.full((1000,), float(step)))
    save(directory, 3, 3)
    assert checkpoint.latest(directory).name == "step-00000003"
    shutil.rmtree(directory)
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0
    print(kill.__name__, n, step, killed)
    return killed

for limit in (2000, 10000):  # within the buffer, within the state
    assert attempt(after_bytes, limit)
n = 1
while attempt(after_lines, n):
    n += 1
"""


def test_a_kill_at_any_line_of_a_save_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """Forked processes that really die: of SIGKILL between two lines, and of SIGXFSZ within a write."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
    attempts = [line.split() for line in done.stdout.splitlines()]
    assert [a[2:] for a in attempts[:2]] == [["1", "True"]] * 2
    steps = [a[2] for a in attempts[2:]]
    assert steps == sorted(steps)  # the new one counts from one moment on
    assert steps.count("1") > 10
    assert steps.count("2") > 5
    assert attempts[-1][3] == "False"


def test_damage_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    whole = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"step-00000001 cannot be read .* remove that directory"):
        checkpoint.load(path)
    (path / "state.pt").write_bytes(whole)
    (tmp_path / "buffer-0001.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('pwned').touch()",))


def test_a_malicious_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    with (path / "state.pt").open("wb") as file:
        pickle.dump(Bomb(), file)
    with pytest.raises(UserError):
        checkpoint.load(path)
    torch.save({"bomb": Bomb()}, path / "state.pt")
    with pytest.raises(UserError):
        checkpoint.load(path)
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    saved = checkpoint.save(tmp_path, 3, {}, {}, 0, keep=1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="step-00000003 is of another version of tsae; train again"):
        checkpoint.load(saved)
