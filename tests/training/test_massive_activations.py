"""A model with massive activations: said at the start, told in eval.json, left out of training if asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import Killed, die, options, same, weights

from tsae.train import main
from tsae.training.trainer import Trainer


@pytest.fixture(scope="module")
def massive_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_llama with one token of the vocabulary whose embedding is 2,000 times as large."""
    folder = tmp_path_factory.mktemp("massive") / "model"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(folder)("\n\n", add_special_tokens=False)["input_ids"][:1]
    tensors["model.embed_tokens.weight"][token] *= 2000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / "eval.json").read_text())


@pytest.mark.usefixtures("blank_report")
def test_said_at_the_start_and_told_in_eval_json(
    massive_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(massive_model, text_file, tmp_path / "run")) == 0
    said = capsys.readouterr()
    assert "above 4 times the median" in said.err + said.out
    assert "of the squared norm; --buffer.max-norm-ratio leaves such tokens out." in said.err + said.out
    assert "without massive activations" in said.out
    metrics = evaluation(tmp_path / "run")
    assert 0 < metrics["massive"]["tokens"] < 0.05
    assert metrics["massive"]["norm_share"] > 0.99
    assert metrics["massive"]["explained_variance_without"] < metrics["explained_variance"] - 0.1


@pytest.mark.usefixtures("blank_report")
def test_nothing_is_said_where_there_are_none(
    tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(tiny_llama, text_file, tmp_path / "run", "--evaluation.massive-ratio", "20")) == 0
    said = capsys.readouterr()
    assert "the median," not in said.err + said.out
    metrics = evaluation(tmp_path / "run")
    assert metrics["massive"]["explained_variance_without"] == pytest.approx(metrics["explained_variance"])
    assert metrics["massive"]["norm_ratio"] == 20.0


@pytest.mark.usefixtures("blank_report")
def test_left_out_of_training(
    massive_model: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    largest: list[float] = []
    excluded: list[int] = []
    real = Trainer.train_step

    def step(self: Trainer, batch: Any, **options: Any) -> Any:
        norms = batch.x.float().norm(dim=-1)
        largest.append(float(norms[batch.segments >= 0].max() / norms.median()))
        excluded.append(int((batch.segments < 0).sum()))
        return real(self, batch, **options)

    monkeypatch.setattr(Trainer, "train_step", step)
    argv = options(massive_model, text_file, tmp_path / "run", "--buffer.max-norm-ratio", "10", "--steps", "24")
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "above 10 times the median" in said.err + said.out
    assert "of the squared norm; they are left out of training." in said.err + said.out
    assert max(largest) < 12  # the median of the first sequences is not that of a batch
    assert sum(excluded) > 24
    without = evaluation(tmp_path / "run")
    assert main(options(massive_model, text_file, tmp_path / "with", "--steps", "24")) == 0
    assert max(largest) > 100
    with_them = evaluation(tmp_path / "with")
    assert without["massive"]["explained_variance_without"] > with_them["massive"]["explained_variance_without"] + 0.05


def test_a_resumed_run_leaves_out_the_same(massive_model: Path, text_file: Path, tmp_path: Path, at_step: Any) -> None:
    more = ("--buffer.max-norm-ratio", "10", "--steps", "24", "--evaluation.no-final")
    assert main(options(massive_model, text_file, tmp_path / "whole", *more)) == 0
    at_step(15, die)
    with pytest.raises(Killed):
        main(options(massive_model, text_file, tmp_path / "killed", *more))
    at_step()
    assert main(["--resume", str(tmp_path / "killed")]) == 0
    same(tmp_path / "whole", tmp_path / "killed")
    plain = options(massive_model, text_file, tmp_path / "plain", "--steps", "24", "--evaluation.no-final")
    assert main(plain) == 0
    assert not torch.equal(weights(tmp_path / "plain")["W_enc"], weights(tmp_path / "whole")["W_enc"])


@pytest.mark.parametrize("value", ["0.5", "-1", "nan"])
def test_a_ratio_that_makes_no_sense(
    value: str, massive_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = options(massive_model, text_file, tmp_path / "run", f"--buffer.max-norm-ratio={value}")
    assert main(argv) == 2
    assert "buffer.max_norm_ratio is" in capsys.readouterr().err
