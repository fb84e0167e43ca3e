"""Complete runs with tokenizers that do not fit their model, or have no BOS."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import options, write_text
from transformers import AutoTokenizer

from tsae.evaluation.held_out import evaluation_batches
from tsae.lm.loading import load_language_model
from tsae.rundir.directory import read_config
from tsae.train import main


def train(model: Path, folder: Path, change: Callable[[Any], None]) -> tuple[int, Path]:
    """Exit status and directory of a run whose tokenizer is changed, with little evaluation text."""
    shutil.copytree(model, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    change(tokenizer)
    tokenizer.save_pretrained(folder / "model")
    text, run = write_text(folder / "river.txt"), folder / "run"
    text.write_text(text.read_text()[:14_000])
    return main(options(folder / "model", text, run, "--evaluation.sequences", "500")), run


def test_padding_token_without_a_row_in_the_embedding(tiny_llama: Path, tmp_path: Path) -> None:
    """Only the evaluation pads: the last row of the held-out text."""
    status, run = train(tiny_llama, tmp_path, lambda t: t.add_special_tokens({"pad_token": "[PAD]"}))
    cfg = read_config(run)
    batches = evaluation_batches(cfg, load_language_model(cfg.model), 500)
    assert any((batch.segments[:, cfg.length - 1] == -1).any() for batch in batches)
    assert status == 0
    assert (run / "eval.json").exists()
    assert main([f"--resume={run}"]) == 0


@pytest.mark.parametrize(("lost", "prepended"), [(["bos_token"], True), (["bos_token", "eos_token"], False)])
def test_without_bos(tiny_llama: Path, tmp_path: Path, lost: list[str], prepended: bool) -> None:
    status, run = train(tiny_llama, tmp_path, lambda t: [setattr(t, name, None) for name in lost])
    assert status == 0
    assert (run / "eval.json").exists()
    assert json.loads((run / "sae/cfg.json").read_text())["metadata"]["prepend_bos"] is prepended


def test_token_of_text_without_a_row_is_refused_before_training(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, run = train(tiny_llama, tmp_path, lambda t: t.add_tokens(["river"]))
    assert status == 2
    assert not run.exists()
    assert "the token 'river' with id 400, but the model's embedding has only 400 rows" in capsys.readouterr().err
