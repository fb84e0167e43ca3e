"""Checkpoints: whole or not at all, bounded in number, never executing code."""

from __future__ import annotations

import pickle
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
