"""Training, estimating and evaluating on models that are unlike Llama: trained on as they are, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import save_family
from tiny_runs import options, weights

from tsae import evaluate
from tsae.train import main


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a command line that is refused."""
    assert main(argv) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.usefixtures("blank_report")
@pytest.mark.parametrize("family", ["opt_projected", "electra", "gemma3n"])
def test_trained_estimated_and_evaluated(
    family: str, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = save_family(tmp_path / "model", family), tmp_path / "run"
    argv = options(model, text_file, run)
    assert main([*argv, "--dry-run"]) == 0
    assert main(argv) == 0
    assert weights(run)["W_enc"].shape == (32, 48)
    assert json.loads((run / "config.json").read_text())["sae"]["d_in"] == 32
    before = json.loads((run / "eval.json").read_text())
    assert evaluate.main([str(run)]) == 0
    after = json.loads((run / "eval.json").read_text())
    assert after["explained_variance"] == pytest.approx(before["explained_variance"], rel=1e-4)
    assert evaluate.main([str(run / "sae"), "--model", str(model), "--layer", "1", "--data", str(text_file)]) == 0


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"n_positions": 64}),
        ("llama", {"max_position_embeddings": 64}),
        ("opt", {"max_position_embeddings": 64}),
        ("gptj", {"n_positions": 64}),
        ("mpt", {"max_seq_len": 64}),
    ],
)
def test_a_context_shorter_than_a_sequence(
    family: str, changes: dict[str, Any], tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = save_family(tmp_path / "model", family, **changes), tmp_path / "run"
    for more in ([], ["--dry-run"]):
        assert "takes at most 64 tokens at once, but 129 are fed" in refusal(
            [*options(model, text_file, run), *more], capsys
        )
    assert not run.exists()


def test_evaluation_says_that_a_context_is_too_short(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_family(tmp_path / "model", "gpt2", n_positions=128)
    assert evaluate.main([str(finished / "sae"), "--model", str(model), "--layer", "1"]) == 2
    assert "at most 128 tokens at once, but 129 are fed (1 + 128" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_report")
@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_no_limit_is_no_obstacle(family: str, tmp_path: Path, text_file: Path) -> None:
    assert main(options(save_family(tmp_path / "model", family), text_file, tmp_path / "run")) == 0
