"""Runs on a model that was trained without BOS: every command feeds the same sequences, and the files say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import evaluated_run
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import options

import tsae.evaluate
from tsae.config import TrainConfig
from tsae.data.sequences import SequenceStream, TokenBatch
from tsae.export import main as export
from tsae.probe.__main__ import main as probe
from tsae.train import command, main
from tsae.training.assemble import prepare
from tsae.training.job import Job
from tsae.view.__main__ import main as view

pytestmark = pytest.mark.usefixtures("blank_report")

BOS = 2


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("model") / "llama")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False}))
    return folder


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Whether sequences that were packed began with BOS."""
    seen: set[bool] = set()
    real = SequenceStream.next_batch

    def watched(self: SequenceStream, n: int) -> TokenBatch:
        batch = real(self, n)
        seen.update((batch.tokens[:, 0] == BOS).tolist())
        return batch

    monkeypatch.setattr(SequenceStream, "next_batch", watched)
    return seen


@pytest.fixture(scope="module")
def runs(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for asked in ("auto", "no", "yes"):
        argv = options(model, text_file, folder / asked, "--text.prepend-bos", asked, "--cache", str(folder / "cache"))
        assert main(argv if asked == "auto" else argv[:-2]) == 0
    return {asked: folder / asked for asked in ("auto", "no", "yes")} | {"cache": folder / "cache"}


def said(run: Path) -> tuple[str, bool]:
    metadata = json.loads((run / "sae/cfg.json").read_text())["metadata"]
    return json.loads((run / "config.json").read_text())["text"]["prepend_bos"], metadata["prepend_bos"]


def weights(run: Path) -> torch.Tensor:
    return load_file(run / "sae/sae_weights.safetensors")["W_enc"]


def test_a_run_records_what_auto_found(runs: dict[str, Path]) -> None:
    assert said(runs["auto"]) == said(runs["no"]) == ("no", False)
    assert said(runs["yes"]) == ("yes", True)
    assert torch.equal(weights(runs["auto"]), weights(runs["no"]))
    assert not torch.equal(weights(runs["auto"]), weights(runs["yes"]))


COMMANDS = {
    "evaluate": lambda run, out: tsae.evaluate.main([str(run), "--out", str(out)]),
    "view": lambda run, out: view([str(run), "--out", str(out)]),
    "export": lambda run, out: export([str(run), "--to", "saelens", "--out", str(out), "--drop-hysteresis"]),
    "probe": lambda run, out: probe([str(run), "--tokens", "2000"]),
    "resume": lambda run, out: main([f"--resume={run}"]),
}


@pytest.mark.parametrize(("asked", "fed"), [("auto", False), ("yes", True)])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_feeds_what_training_fed(
    name: str, asked: str, fed: bool, runs: dict[str, Path], tmp_path: Path, first: set[bool]
) -> None:
    if name == "probe":
        pytest.importorskip("sklearn")
    run, out = shutil.copytree(runs[asked], tmp_path / "run"), tmp_path / "out"
    assert COMMANDS[name](run, out) == 0
    assert first == {fed}
    if name == "evaluate":
        assert json.loads(out.read_text()) == json.loads((run / "eval.json").read_text())
    if name == "export":
        assert json.loads((out / "cfg.json").read_text())["metadata"]["prepend_bos"] is fed


def test_runs_with_and_without_are_measured_on_the_same_text(
    runs: dict[str, Path], tmp_path: Path, first: set[bool], caplog: pytest.LogCaptureFixture
) -> None:
    """Their text is the same, so no other has to be named; sequences begin with BOS, and that is said."""
    assert tsae.evaluate.main([str(runs["yes"]), str(runs["no"]), "--out", str(tmp_path / "out.json")]) == 0
    assert "no was trained without BOS, and is measured with BOS, as the others were." in caplog.messages
    assert first == {True}


def test_a_cache_is_of_one_kind(
    runs: dict[str, Path], model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = json.loads((runs["cache"] / "manifest.json").read_text())["request"]
    assert key["prepend_bos"] is False
    cached = ["--cache", str(runs["cache"])]
    assert main([*options(model, text_file, tmp_path / "no", "--text.prepend-bos", "no"), *cached]) == 0
    assert main([*options(model, text_file, tmp_path / "yes", "--text.prepend-bos", "yes"), *cached]) == 2
    assert "prepend_bos" in capsys.readouterr().err


def test_other_caches_have_the_keys_of_earlier_versions(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    argv = options(tiny_llama, text_file, tmp_path / "run", "--cache", str(tmp_path / "cache"))
    assert main(argv) == 0
    assert "prepend_bos" not in json.loads((tmp_path / "cache/manifest.json").read_text())["request"]


def test_yes_without_a_token_is_refused(
    tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": None, "eos_token": None}))
    assert main(options(folder, text_file, tmp_path / "run", "--text.prepend-bos", "yes")) == 2
    assert f"text.prepend_bos is yes, but the tokenizer of {folder} has neither BOS nor EOS" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def configured(model: Path, text: Path, run: Path) -> TrainConfig:
    return command(options(model, text, run))[0]


def test_a_run_of_an_earlier_version_resumes_with_bos(model: Path, text_file: Path, tmp_path: Path) -> None:
    """Earlier versions did not look at `add_bos_token`; their configurations have no `prepend_bos`."""
    job = Job({"": configured(model, text_file, tmp_path / "run")}, tmp_path / "run")
    resumed, new = prepare(job, resume=True), prepare(job)
    assert (resumed.lm.prefix_id, new.lm.prefix_id) == (BOS, None)
    assert (resumed.job.shared.text.prepend_bos, new.job.shared.text.prepend_bos) == ("auto", "no")


@pytest.mark.parametrize(("said", "asked"), [(True, "no"), (True, "auto"), (False, "yes"), (False, "no"), (None, "no")])
def test_a_source_whose_sequences_began_otherwise_is_named(
    said: bool | None, asked: str, model: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "sae"
    evaluated_run.write_saelens(source)
    values = json.loads((source / "cfg.json").read_text())
    metadata = {"sae_lens_version": "6.54.0", "hook_name": "blocks.1.hook_resid_post", "prepend_bos": said}
    (source / "cfg.json").write_text(json.dumps(values | {"metadata": metadata}))
    more = ("--text.prepend-bos", asked, "--init-from", str(source), "--sae.activation", "relu")
    config = command(options(model, text_file, tmp_path / "run", *more, "--sae.no-unit-norm-decoder"))[0]
    prepare(Job({"": config}, tmp_path / "run"))
    ways, fed = ("without", "with"), asked == "yes"
    found = [message for message in caplog.messages if "BOS, and is fine-tuned" in message]
    expected = f"{source} was trained {ways[bool(said)]} BOS, and is fine-tuned {ways[fed]} it (text.prepend_bos)."
    assert found == ([] if said in (None, fed) else [expected])
