"""Where runs are written, and what happens to a run that is already there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Killed, options, run_options

from tsae.rundir import directory as directories
from tsae.train import command, main
from tsae.utils.config_json import to_dict

pytestmark = pytest.mark.usefixtures("blank_report")


def test_a_directory_with_a_run_is_not_touched(
    uninterrupted: Path, tiny_gemma2: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    assert main(run_options(tiny_gemma2, text_file, uninterrupted)) == 2
    message = capsys.readouterr().err
    assert "--resume" in message
    assert "--overwrite" in message
    assert before == {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    assert main(run_options(tiny_gemma2, text_file, other)) == 2
    assert main([*run_options(tiny_gemma2, text_file, other), "--overwrite"]) == 2
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]


def test_overwrite_replaces_a_run(tiny_neox: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    short = options(tiny_neox, text_file, out, "--steps", "2", "--evaluation.no-final")
    assert main(short) == 0
    assert main([*short, "--overwrite", "--steps", "3"]) == 0
    assert json.loads((out / "config.json").read_text())["steps"] == 3
    assert [p.name for p in (out / "checkpoint").glob("step-*")] == ["step-00000003"]


def test_overwrite_killed_at_any_moment_can_be_started_again(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, _ = command([])
    for changes in range(100):
        out = tmp_path / f"run-{changes}"
        shutil.copytree(uninterrupted, out)
        left = [changes]

        def until_killed(real: Any, left: list[int] = left) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir", "replace", "mkdir", "open"):
                patch.setattr(os, name, until_killed(getattr(os, name)))
            try:
                directories.start_run(out, cfg)
                break
            except Killed:
                pass
        assert directories.new_directory("demo", out, overwrite=True) == out
    assert changes > 10
    assert json.loads((out / "config.json").read_text()) == to_dict(cfg)
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_a_first_start_killed_at_once_can_be_started_again(tmp_path: Path) -> None:
    (tmp_path / ".config.json.tmp").write_text("{")
    assert directories.new_directory("demo", tmp_path, overwrite=False) == tmp_path


def test_default_directory_and_latest(
    tiny_neox: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = options(tiny_neox, text_file, Path("unused"), "--steps", "2", "--evaluation.no-final")
    where = arguments.index("--out")
    assert main(arguments[:where] + arguments[where + 2 :]) == 0
    latest = tmp_path / "runs" / "latest"
    assert latest.is_symlink()
    assert (latest / "config.json").exists()
    assert latest.resolve().parent == tmp_path / "runs" / "demo"


def test_runs_of_the_same_second_go_to_different_directories() -> None:
    assert len({directories.new_directory("demo", None, overwrite=False) for _ in range(20)}) == 20
