"""A run that was stopped or killed resumes, and ends bitwise equal to an uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Killed, die, lines, options, run_options, same

import tsae.training.run
from tsae.train import main
from tsae.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("blank_report")


@pytest.mark.parametrize("stop_at", [1, 4, 6, 13, 23])
def test_resume_is_bitwise_equal_wherever_it_stopped(
    stop_at: int, argv_of: Callable[..., list[str]], at_step: Callable[..., None], uninterrupted: Path, tmp_path: Path
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


@pytest.mark.parametrize("cached", [False, True])
def test_harvesting_ahead_changes_no_bit_and_resumes(
    cached: bool,
    argv_of: Callable[..., list[str]],
    at_step: Callable[..., None],
    uninterrupted: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    arguments = argv_of(out, "--buffer.ahead", 24, *(["--cache", tmp_path / "cache"] if cached else []))
    at_step(13, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(arguments) == 143
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    at_step()
    assert main(["--resume", str(out)]) == 0
    same(uninterrupted, out)
    assert "Waited for activations" in capfd.readouterr().err


def test_interrupted_before_there_is_anything_to_resume(
    argv_of: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """While the model is loaded, or converted: no directory has been made."""
    monkeypatch.setattr(tsae.training.run, "prepare", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    out = tmp_path / "run"
    assert main(argv_of(out)) == 130
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == "interrupted before anything began; start again"
    assert not out.exists()


def test_interrupted_while_a_run_that_is_resumed_loads_its_model(
    argv_of: Callable[..., list[str]],
    at_step: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    at_step(13, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(argv_of(out)) == 143
    monkeypatch.setattr(tsae.training.run, "prepare", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    assert main(["--resume", str(out)]) == 130
    assert "--resume" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["läufe 日本", "a[b]", "[red] :smile:", "$\\alpha$ 100%"])
def test_any_name_and_a_schedule(
    name: str,
    argv_of: Callable[..., list[str]],
    at_step: Callable[..., None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Killed in the decay of the learning rate, after a warm-up."""
    scheduled = ("--optimizer.schedule", "cosine", "--optimizer.warmup-steps", 6, "--steps", 14)
    assert main(argv_of(tmp_path / "whole", *scheduled)) == 0
    out = tmp_path / name / name
    at_step(9, die)
    with pytest.raises(Killed):
        main([str(out) if word == "OUT" else word for word in argv_of("OUT", *scheduled)])
    at_step()
    assert main(["--resume", str(out)]) == 0
    same(tmp_path / "whole", out)
    assert capfd.readouterr().err.splitlines()[-1] == f"Written: {out}"


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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.fixture(scope="module")
def stopped_at_13(tiny_gemma2: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 13; tests work on a copy."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    real = Trainer.train_step

    def train_step(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.step == 13:
            die()
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(Killed):
            main(run_options(tiny_gemma2, text_file, out))
    return out


@pytest.mark.parametrize("file", ["step-00000012/state.pt", "step-00000012/manifest.json", "buffer-0003.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    file: str, uninterrupted: Path, stopped_at_13: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(stopped_at_13, tmp_path / "run")
    flip(out / "checkpoint" / file)
    capsys.readouterr()
    assert main(["--resume", str(out)]) == 0
    said = capsys.readouterr().err
    assert f"The checkpoint {out / 'checkpoint' / 'step-00000012'} is damaged: " in said
    assert f"Resuming {out} after step 8." in said
    same(uninterrupted, out)
    assert not list((out / "checkpoint").glob("damaged-*"))


def test_a_configuration_that_changed_since_is_refused_with_the_difference(
    uninterrupted: Path, stopped_at_13: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(stopped_at_13, tmp_path / "run")
    good = json.loads((out / "config.json").read_text())
    changed = good | {"steps": 26, "sae": good["sae"] | {"k": 3}, "device": "auto"}
    (out / "config.json").write_text(json.dumps(changed))
    assert main(["--resume", str(out)]) == 2
    said = capsys.readouterr().err
    assert "is not what the run was trained with: steps is 26 there and was 24, sae.k is 3 there and was 1; put" in said
    (out / "config.json").write_text(json.dumps(good))
    assert main(["--resume", str(out)]) == 0
    same(uninterrupted, out)


def test_measurements_that_lost_their_end_do_not_get_another(stopped_at_13: Path, tmp_path: Path) -> None:
    """As after a system crash: a file shorter than the checkpoint says must not be padded with NULs."""
    out = shutil.copytree(stopped_at_13, tmp_path / "run")
    content = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(content[: len(content) // 2])
    assert main(["--resume", str(out)]) == 0
    assert b"\0" not in (out / "metrics.jsonl").read_bytes()
    steps = [line["step"] for line in lines(out / "metrics.jsonl")]
    assert steps[0] == 1
    assert steps[-1] == 24
    assert steps == sorted(steps)


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
