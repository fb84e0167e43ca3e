"""Every command rejects an autoencoder of the wrong width before any text goes through the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated_run import write_run, write_saelens

import tsae
from tsae.data.sequences import TokenBatch
from tsae.evaluation.evaluator import evaluate

SAID = "takes activations of width 20, but the blocks of {} put out 32"


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("command", ["evaluate", "compare", "export", "view", "probe"])
def test_every_command_says_it_before_any_text_is_read(
    command: str, tmp_path: Path, tiny_gemma3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tsae import evaluate, export
    from tsae.probe import __main__ as probe
    from tsae.view import __main__ as view

    if command == "probe":
        pytest.importorskip("sklearn")
    run = write_run(tmp_path / "run", tiny_gemma3, d_in=20, activation="schmitt")
    before = sorted(run.rglob("*"))
    out = ["--to", "saelens", "--drop-hysteresis", "--out", str(tmp_path / "out")]
    main: Any
    main, more = {
        "evaluate": (evaluate.main, []),
        "compare": (evaluate.main, [str(write_saelens(tmp_path / "fits"))]),
        "export": (export.main, out),
        "view": (view.main, []),
        "probe": (probe.main, []),
    }[command]
    assert main([str(run), *more]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert SAID.format(tiny_gemma3) in said
    assert "run " in said
    assert sorted(run.rglob("*")) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_forward")
def test_and_so_does_the_function(tmp_path: Path, tiny_gemma3: Path) -> None:
    from tsae.lm.loading import load_language_model

    lm = load_language_model(str(tiny_gemma3), device="cpu", dtype="float32")
    sae = tsae.load(write_saelens(tmp_path / "wrong", d_in=20))
    batch = TokenBatch(torch.arange(18).view(2, 9), torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(tsae.UserError, match=f"^The autoencoder {SAID.format(tiny_gemma3)}"):
        evaluate(sae, lm, [batch], layer=1)
