"""The notebooks of examples/, and what a notebook shows while it trains and after an interruption, in real kernels."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest
from doc_pages import ROOT
from evaluated_run import write_saelens

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SMALL = {
    "steps": 12,
    "batch": 4,
    "device": "cpu",
    "sae": {"d_sae": 48, "k": 6},
    "buffer": {"sequences": 24, "harvest_batch": 8, "reuse": 1, "estimate_sequences": 16},
    "evaluation": {"sequences": 8, "ce_sequences": 4},
    "text": {"evaluation_share": 0.2},
    "optimizer": {"warmup_steps": 0},
}


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def client(notebook: Any, folder: Path, **options: Any) -> Any:
    where = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, timeout=280, kernel_name="python3", resources=where, **options)


def of_cells(*sources: str) -> Any:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def shown(cell: Any, kind: str) -> list[str]:
    """What a cell put out: its streams' text, or its data of a type."""
    if kind in ("stdout", "stderr"):
        return [out["text"] for out in cell.outputs if out.get("name") == kind]
    return [out["data"][kind] for out in cell.outputs if kind in out.get("data", {})]


def test_there_are_three_and_they_hold_no_output() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["measure_any_sae", "own_temporal_objective", "train_and_look"]
    for path in NOTEBOOKS:
        notebook = read(path)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(not cell.outputs and cell.execution_count is None for cell in code)
        assert [cell.metadata.get("tags") for cell in code if cell.metadata] == [["parameters"]]
        for target in re.findall(r"\]\(([^)#:]+)\)", "".join(c.source for c in notebook.cells)):
            assert (path.parent / target).is_file(), f"{path.name}: {target}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """With a tiny model in the place of the parameters."""
    sae = write_saelens(tmp_path / "sae")
    values = {
        "model": str(tiny_llama),
        "layer": 1,
        "data": str(text_file),
        "options": SMALL,
        "sae": str(sae),
        "tokens": 512,
    }
    notebook = read(path)
    (position,) = [n for n, cell in enumerate(notebook.cells) if cell.metadata.get("tags") == ["parameters"]]
    given = "\n".join(
        f"{name} = {value!r}" for name, value in values.items() if f"{name} =" in notebook.cells[position].source
    )
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(given))
    client(notebook, tmp_path).execute()
    pages = [html for cell in notebook.cells if cell.cell_type == "code" for html in shown(cell, "text/html")]
    assert any("<table>" in html for html in pages)
    if path.stem == "train_and_look":
        assert [png for cell in notebook.cells if cell.cell_type == "code" for png in shown(cell, "image/png")]
        (numbers,) = [text for c in notebook.cells if "steered =" in c.source for text in shown(c, "text/plain")]
        before, while_steered = map(float, re.findall(r"-?\d+\.\d+", numbers)[:2])
        assert while_steered > before


@pytest.mark.slow
def test_bars_are_outputs_of_the_cell_and_few(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """The buffer is refilled several times. Warnings and sentences are shown; so are errors, each as one sentence."""
    options = SMALL | {"model": str(tiny_llama), "layer": 1, "data": str(text_file)}
    notebook = of_cells(
        "import tsae",
        f"run = tsae.train('demo', out='run', **{options!r})",
        "tsae.train(stepz=1)",
        "import logging; logging.getLogger('tsae.lm').warning('look here')",
        "run.features('the river ran').strongest(2)",
        "run.evaluate(tokens=256)",
    )
    client(notebook, tmp_path, allow_errors=True).execute()
    _, train, unknown, warning, features, table = notebook.cells
    bars = shown(train, "text/plain")
    names = [bar.split(":")[0] for bar in bars]
    assert sorted(set(names)) == sorted(names)
    assert {"Tokenizing", "Harvest", "Training", "evaluating features", "evaluating predictions"} == set(names)
    (training,) = [bar for bar in bars if bar.startswith("Training")]
    assert training.startswith("Training: 6,144/6,144 tokens, ")
    assert all("<progress value=" in html for html in shown(train, "text/html"))
    assert "12 steps of 4 x 128 tokens" in "".join(shown(train, "stderr")).replace("\n", "")
    (error,) = unknown.outputs
    assert error["traceback"] == ["UserError: There is no option 'stepz'; the nearest is 'steps'."]
    assert shown(warning, "stderr") == ["look here\n"]
    assert "in a row" in shown(features, "text/plain")[0]
    assert "explained variance" in shown(table, "text/plain")[-1]
    assert "<table>" in shown(table, "text/html")[-1]


@pytest.mark.slow
def test_an_interrupted_cell_saves_and_says_how_to_go_on(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    options = SMALL | {"model": str(tiny_llama), "layer": 1, "data": str(text_file), "steps": 1_000_000}
    options |= {"checkpoint": {"every": 0}, "log_every": 1}
    notebook = of_cells(
        f"import tsae\ntsae.train('demo', out='run', **{options!r})",
        "import json\nprint(sorted(p.name for p in __import__('pathlib').Path('run/checkpoint').glob('step-*')))",
    )
    running = client(notebook, tmp_path, allow_errors=True, force_raise_errors=False)

    async def interrupt() -> None:
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        await asyncio.ensure_future(running.km.interrupt_kernel())

    async def execute() -> None:
        await asyncio.gather(running.async_execute(), interrupt())

    asyncio.run(execute())
    errors = [out for out in notebook.cells[0].outputs if out["output_type"] == "error"]
    (sentence,) = errors[0]["traceback"]
    found = re.fullmatch(
        r"Interrupted after step (\d+), which is saved; continue with tsae\.train\(resume='run'\)",
        sentence,
    )
    assert found, sentence
    assert shown(notebook.cells[1], "stdout") == [f"['step-{int(found[1]):08d}']\n"]
