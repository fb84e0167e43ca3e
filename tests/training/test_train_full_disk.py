"""A full disk at any point of a run: one sentence, complete files are kept, and the run resumes from them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from full_disk import filling
from matplotlib.figure import Figure
from tiny_runs import lines, options, run_options, same

from tsae.evaluate import EvaluationResult
from tsae.train import main
from tsae.training.trainer import Trainer
from tsae.utils.cli import report_errors


def before_call(owner: type, name: str, act: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `act` with the object before each call of its method."""
    real = getattr(owner, name)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        act(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    (sentence,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "Traceback" not in said
    assert "(File too large)" in sentence
    return sentence


@pytest.mark.usefixtures("blank_report")
def test_in_a_checkpoint(
    uninterrupted: Path,
    tiny_gemma2: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    with filling() as fill, monkeypatch.context() as patch:
        before_call(Trainer, "train_step", lambda self: fill(20_000) if self.step == 6 else None, patch)
        assert main(run_options(tiny_gemma2, text_file, out)) == 2
    good = out / "checkpoint" / "step-00000004"
    assert f"the last good one is {good}; make room, and continue with" in one_sentence(capsys)
    assert sorted(path.name for path in (out / "checkpoint").iterdir()) == ["buffer-0001.safetensors", good.name]
    assert main(["--resume", str(out)]) == 0
    same(uninterrupted, out)


@pytest.mark.usefixtures("blank_report")
def test_in_the_measurements(
    tiny_gemma2: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = [*run_options(tiny_gemma2, text_file, out), "--log-every", "1"]
    with filling() as fill:
        fill(8_000)
        assert main([*command, "--checkpoint.every", "0"]) == 2
    assert f"{out / 'metrics.jsonl'} cannot be written" in one_sentence(capsys)
    assert main(["--resume", str(out)]) == 0
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == list(range(1, 25))


@pytest.mark.parametrize(
    ("owner", "method", "file", "kept"),
    [
        (Trainer, "finished", "sae/sae_weights.safetensors", []),
        (EvaluationResult, "check_finite", "eval.json", ["sae/sae_weights.safetensors", "sae/cfg.json"]),
        (Figure, "savefig", "report.png", ["sae/sae_weights.safetensors", "eval.json"]),
    ],
)
def test_in_what_is_written_last(
    owner: type,
    method: str,
    file: str,
    kept: list[str],
    tiny_neox: Path,
    text_file: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    capsys.readouterr()
    with filling() as fill, monkeypatch.context() as patch:
        before_call(owner, method, lambda self: fill(700), patch)
        assert main(options(tiny_neox, text_file, out)) == 2
    assert f"{out / file} cannot be written" in one_sentence(capsys)
    for name in kept:
        assert (out / name).read_bytes() == (finished / name).read_bytes() or name.endswith(".json")
    assert not (out / file).exists()
    assert not list(out.rglob("*.tmp"))
    assert main(["--resume", str(out)]) == 0
    same(finished, out)
    assert (out / "eval.json").read_bytes() == (finished / "eval.json").read_bytes()


def test_what_no_part_expected_is_a_sentence_too(capsys: pytest.CaptureFixture[str]) -> None:
    with report_errors() as status:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/config.json")
    assert status.code == 2
    assert capsys.readouterr().err == (
        "error: No space left on device (/run/config.json); what was complete is kept: start or resume again.\n"
    )
    with pytest.raises(FileNotFoundError), report_errors():
        raise FileNotFoundError(errno.ENOENT, "a bug", "x")
