"""A run that was stopped or killed goes on, and ends bitwise as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import Killed, die, options, run_options, same

from tsae.train import main


@pytest.mark.parametrize("stop_at", [1, 4, 6, 13, 23])
def test_resume_is_bitwise_equal_wherever_it_stopped(
    stop_at: int,
    argv_of: Callable[..., list[str]],
    at_step: Callable[..., None],
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    at_step(stop_at, die)
    with pytest.raises(Killed):
        main(argv_of(out))
    at_step()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99')  # a line cut short
    assert main(["--resume", str(out)]) == 0
    same(uninterrupted, out)


@pytest.mark.slow
def test_resume_after_kill_9(uninterrupted: Path, tiny_gemma2: Path, text_file: Path, tmp_path: Path) -> None:
    """A real process, really killed, three times at moments nobody chose."""
    out = tmp_path / "run"
    arguments = run_options(tiny_gemma2, text_file, out)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }

    def start(argv: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tsae.train", *argv],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    process = start(arguments)
    for wanted in (3, 9, 15):  # as soon as the log has come this far
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            path = out / "metrics.jsonl"
            if path.exists() and any(f'"step": {n},' in path.read_text() for n in range(wanted, 25)):
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = start(["--resume", str(out)])
    assert process.wait(timeout=200) == 0
    same(uninterrupted, out)


def test_resume_says_what_is_wrong(tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", str(tmp_path)]) == 2
    assert "holds no run to resume" in capsys.readouterr().err
    assert main(["--resume", str(uninterrupted), "--steps", "9"]) == 2
    assert "leave out --steps" in capsys.readouterr().err
    assert main(["tsae-gemma-2-2b", "--resume", str(uninterrupted)]) == 2
    assert "is a run of the preset 'demo', not 'tsae-gemma-2-2b'" in capsys.readouterr().err
    assert main(["demo", "--resume", str(uninterrupted)]) == 0


def test_a_run_with_relative_paths_goes_on_from_another_directory(
    tiny_neox: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tsae.evaluate

    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    shutil.copytree(tiny_neox, tmp_path / "here" / "model")
    shutil.copy(text_file, tmp_path / "here" / "text.txt")
    monkeypatch.chdir(tmp_path / "here")
    out = tmp_path / "run"
    assert main(options(Path("model"), Path("text.txt"), out, "--steps", "2")) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["model"], config["data"]) == (str(tmp_path / "here/model"), str(tmp_path / "here/text.txt"))
    monkeypatch.chdir(tmp_path / "there")
    assert main(["--resume", str(out)]) == 0
    assert tsae.evaluate.main([str(out)]) == 0
    monkeypatch.chdir(tmp_path / "here")
    assert tsae.evaluate.main([str(out), "--data", "text.txt", "--column", "x"]) == 0
    assert json.loads((out / "eval_source.json").read_text())["data"] == config["data"]
