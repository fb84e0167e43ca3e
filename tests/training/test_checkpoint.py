"""Checkpoints are complete or absent, limited in number, and never execute code."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from full_disk import files_of_at_most
from hypothesis import given, settings
from hypothesis import strategies as st

from tsae.errors import UserError
from tsae.training import checkpoint
from tsae.utils.atomic import checksum, checksum_of, write_json


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


@pytest.mark.parametrize("limit", [100, 2000, 10_000])  # bytes: within the buffer's file, the state's, and after both
def test_a_full_disk_is_a_sentence_and_leaves_the_last_good_one(tmp_path: Path, limit: int) -> None:
    save(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    state = {"trainer": {"w": torch.full((5000,), 2.0)}}
    buffer = {"x": torch.full((200,), 2.0)}
    with files_of_at_most(limit), pytest.raises(UserError) as caught:
        checkpoint.save(tmp_path, 2, state, buffer, 2, 2)
    assert str(caught.value) == (
        f"{tmp_path / 'step-00000002'} cannot be written (File too large); what was complete is kept: the last good "
        f"one is {tmp_path / 'step-00000001'}; make room, and continue with python -m tsae.train --resume "
        f"{tmp_path.parent}."
    )
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before.items() <= left.items()
    assert {path.name for path in left.keys() - before.keys()} <= {"buffer-0002.safetensors"}
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"
    checkpoint.save(tmp_path, 2, state, buffer, 2, 1)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found.state["step"] == 2
    assert len(list(tmp_path.iterdir())) == 2


KILLED = """
import os, resource, shutil, signal, sys
from pathlib import Path
import torch
from tsae.training import checkpoint

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


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


FILES = ("step-00000002/state.pt", "step-00000002/manifest.json", "buffer-0002.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_of_a_damaged_checkpoint_the_one_before_it_is_taken(name: str, damage: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, step)
    path = tmp_path / name
    if damage == "flip":
        flip(path, -20)
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -5 if damage == "truncate" else 0])
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert (found.state["step"], found.buffer["x"].tolist()) == (1, [1.0, 1.0])
    if name.endswith("state.pt") and damage == "remove":
        assert not found.damaged  # it is no checkpoint
    else:
        (sentence,) = found.damaged
        assert sentence.startswith(f"The checkpoint {tmp_path / 'step-00000002'} ")
        assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"
    # It does not count among those kept, nor in place of the one that is made instead of it.
    save(tmp_path, 2, 2, keep=1)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert (found.state["step"], found.buffer["x"].tolist(), found.damaged) == (2, [2.0, 2.0], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["buffer-0002.safetensors", "step-00000002"]


def test_a_damaged_old_checkpoint_does_not_stop_the_next(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, step)
    for path in (tmp_path / "step-00000001").iterdir():
        path.write_bytes(b"x")
    save(tmp_path, 3, 3)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found.state["step"] == 3


def test_where_all_are_damaged_they_are_named_and_left(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step) / "state.pt", 300, 5)
    before = sorted(tmp_path.rglob("*"))
    words = r"step-00000002 is damaged: .*state.pt is not as it was written. No other can be read; remove"
    with pytest.raises(UserError, match=words):
        checkpoint.load_latest(tmp_path)
    assert before == sorted(tmp_path.rglob("*"))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_flipped_bit_and_no_cut_goes_unnoticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder), 1)
        file = data.draw(st.sampled_from(sorted(p for p in Path(folder).rglob("*") if p.is_file())), label="file")
        size = file.stat().st_size
        if data.draw(st.booleans(), label="cut"):
            file.write_bytes(file.read_bytes()[: data.draw(st.integers(0, size - 1), label="to")])
        else:
            flip(file, data.draw(st.integers(0, size - 1), label="byte"), data.draw(st.integers(0, 7), label="bit"))
        with suppress(UserError):
            state, contents = checkpoint.load(path)
            assert file.name == "manifest.json"  # its layout
            assert torch.equal(state["trainer"]["w"], torch.ones(3))
            assert torch.equal(contents["x"], torch.ones(2))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('pwned').touch()",))


def sign(path: Path) -> None:
    """Checksums that are right."""
    files = {"state.pt": checksum(path / "state.pt")}
    values = {"format": checkpoint.FORMAT, "files": files}
    write_json(path / "manifest.json", values | {"checksum": checksum_of(values)})


def test_a_malicious_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    with (path / "state.pt").open("wb") as file:
        pickle.dump(Bomb(), file)
    sign(path)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path)
    torch.save({"bomb": Bomb()}, path / "state.pt")
    sign(path)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path)
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    saved = checkpoint.save(tmp_path, 3, {}, {}, 0, keep=1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="step-00000003 is of another version of tsae; train again"):
        checkpoint.load(saved)
