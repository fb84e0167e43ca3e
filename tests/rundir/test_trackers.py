"""TensorBoard, Weights & Biases through a stand-in, and the real one offline if it is installed."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Killed, die, lines, options

from tsae.rundir import trackers
from tsae.train import main

Argv = Callable[..., list[str]]  # the fixture `argv`


@pytest.fixture
def argv(tiny_gemma2: Path, text_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`argv(name, ...)`: the command line of a short run into `tmp_path/run` with `--log name ...`."""
    return lambda *log: options(tiny_gemma2, text_file, tmp_path / "run", "--log", *log)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for the package that records what it is sent; `runs` are in the order they started."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    module.runs = []
    module.key = True

    def login() -> bool:
        if not module.key:
            raise module.errors.Error("No API key configured. Use `wandb login` to log in.")
        return True

    class Run:
        def __init__(self, **asked: Any) -> None:
            self.asked, self.logged, self.summary, self.finished = asked, [], {}, False

        def log(self, values: dict[str, Any], step: int) -> None:
            assert not self.finished
            self.logged.append((step, values))

        def finish(self) -> None:
            self.finished = True

    def init(**asked: Any) -> Run:
        module.runs.append(Run(**asked))
        return module.runs[-1]

    module.login, module.init = login, init
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return module


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of an event directory."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_what_the_log_says(argv: Argv, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    assert main(argv("tensorboard")) == 0
    shown, written = scalars(out / "tensorboard"), lines(out / "metrics.jsonl")
    for name in written[0].keys() - {"step"}:
        assert [step for step, _ in shown[f"train/{name}"]] == [line["step"] for line in written]
        assert [value for _, value in shown[f"train/{name}"]] == pytest.approx([line[name] for line in written])
    evaluation = json.loads((out / "eval.json").read_text())
    assert shown["evaluation/explained_variance"] == [(12, pytest.approx(evaluation["explained_variance"]))]
    lag = evaluation["temporal"]["autocorrelation"]["4"]
    assert shown["evaluation/temporal/autocorrelation/4"] == [(12, pytest.approx(lag))]


def test_a_resumed_run_goes_on_in_the_same_logs(
    argv: Argv, tmp_path: Path, at_step: Callable[..., None], wandb: types.ModuleType
) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    at_step(7, die)  # three steps past the last checkpoint
    with pytest.raises(Killed):
        main(argv("tensorboard", "wandb", "--log-every", "1", "--evaluation.no-final"))
    first = [value for _, value in scalars(out / "tensorboard")["train/loss"]]
    assert len(first) == 7
    at_step()
    assert main(["--resume", str(out)]) == 0
    loss = scalars(out / "tensorboard")["train/loss"]
    assert [step for step, _ in loss] == list(range(1, 13))  # each once
    assert [value for _, value in loss] == pytest.approx([line["loss"] for line in lines(out / "metrics.jsonl")])
    before, after = wandb.runs
    assert before.asked["id"] == after.asked["id"]
    assert after.asked["resume"] == "allow"
    assert [step for step, _ in before.logged] == list(range(1, 8))
    assert [step for step, _ in after.logged] == list(range(5, 13))
    assert before.finished
    assert after.finished


def test_wandb_gets_the_configuration_the_steps_and_the_evaluation(
    argv: Argv, tmp_path: Path, wandb: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    out = tmp_path / "run"
    assert main(argv("wandb")) == 0
    training, evaluation = wandb.runs
    assert training.asked["id"] == evaluation.asked["id"]
    assert training.asked["project"] == "mine"
    assert training.asked["config"] == json.loads((out / "config.json").read_text())
    assert training.asked["dir"] == str(out)
    written = lines(out / "metrics.jsonl")
    assert [step for step, _ in training.logged] == [line["step"] for line in written]
    for (_, values), line in zip(training.logged, written, strict=True):
        assert values == {f"train/{name}": value for name, value in line.items() if name != "step"}
    measured = json.loads((out / "eval.json").read_text())
    assert evaluation.summary["evaluation/explained_variance"] == measured["explained_variance"]
    assert evaluation.summary["evaluation/temporal/persistence"] == measured["temporal"]["persistence"]
    assert evaluation.finished
    # A run that replaces it is another one.
    assert main(argv("wandb", "--overwrite", "--evaluation.no-final")) == 0
    assert wandb.runs[-1].asked["id"] != training.asked["id"]


def test_the_runs_of_a_sweep_are_open_side_by_side(
    tiny_gemma2: Path, text_file: Path, tmp_path: Path, wandb: types.ModuleType
) -> None:
    base = {"preset": "demo", "model": str(tiny_gemma2), "data": str(text_file), "layer": 1, "steps": 2, "batch": 4}
    base |= {"device": "cpu", "log": ["wandb"], "sae.d_sae": 48, "sae.k": 6, "text.column": None, "log_every": 1}
    base |= {"buffer.sequences": 24, "buffer.harvest_batch": 8, "buffer.estimate_sequences": 8}
    base |= {"evaluation.final": False}
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(json.dumps({"base": base, "runs": {"one": {}, "two": {"seed": 1}}}))
    out = tmp_path / "out"
    assert main(["--sweep", str(sweep), "--out", str(out)]) == 0
    one, two = wandb.runs
    assert one.asked["id"] != two.asked["id"]
    assert one.asked["group"] == two.asked["group"] == "out"
    assert one.asked["name"] == "out/one"
    assert one.asked["reinit"] == "create_new"
    assert [step for step, _ in one.logged] == [step for step, _ in two.logged] == [1, 2]


def test_the_real_wandb_offline(argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    assert main(argv("wandb")) == 0
    name = json.loads((out / "wandb.json").read_text())["id"]
    kept = list((out / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert kept
    assert any(b"explained_variance" in path.read_bytes() for path in kept)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_sentence_before_anything_else(
    name: str, argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda wanted: None if wanted == name else object())
    monkeypatch.setattr("tsae.training.assemble.load_language_model", lambda *args, **kwargs: pytest.fail("it began"))
    assert main(argv(name)) == 2
    said = capsys.readouterr().err
    assert said == f"error: --log {name} needs the package {name}, which is not installed; run pip install {name}.\n"
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_login_is_one_sentence_before_anything_else(
    argv: Argv, tmp_path: Path, wandb: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.key = False
    assert main(argv("wandb")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --log wandb: No API key configured.")
    assert "WANDB_MODE=offline" in said
    assert not (tmp_path / "run").exists()


def test_another_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--log", "mlflow", "--out", str(tmp_path / "run")]) == 2
    assert "mlflow" in capsys.readouterr().err
