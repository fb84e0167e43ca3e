"""The scale experiment: grid, plan within a budget, cells that are done, resumed or fail; gains and their fit."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import Killed, die

import tsae
from experiments import scale, scale_figure
from experiments.scale import Cell, Planned, grid, predict, within
from tsae.errors import UserError
from tsae.training.trainer import Trainer


def test_the_grid_has_three_seeds_where_cells_are_small() -> None:
    cells = grid(["plain", "default-0.2"])
    assert len(set(cells)) == len(cells)
    assert len({cell.name for cell in cells}) == len(cells)
    seeds = {(cell.d_sae, cell.tokens): 0 for cell in cells}
    for cell in cells:
        seeds[cell.d_sae, cell.tokens] = max(seeds[cell.d_sae, cell.tokens], cell.seed + 1)
    assert set(seeds) == {(d, tokens) for d in scale.WIDTHS for tokens in scale.TOKENS}
    assert seeds[2_560, 1_000_000] == seeds[2_560, 4_000_000] == seeds[10_240, 1_000_000] == 3
    assert seeds[40_960, 10_000_000] == seeds[10_240, 10_000_000] == 1
    sizes = {(method, k) for method in ("default-0.2", "plain") for k in scale.KS[method]}
    assert {(cell.method, cell.k) for cell in cells} == sizes


def test_the_most_expensive_cells_are_dropped_first() -> None:
    planned = [Planned(Cell("plain", d, 10**6, 28, 0), float(d)) for d in (300, 100, 400, 200)]
    kept, dropped = within(planned, 650.0)
    assert [each.seconds for each in kept] == [100, 200, 300]
    assert [each.seconds for each in dropped] == [400]
    assert within(planned, 50.0)[0] == []
    assert within(planned, float("inf"))[1] == []


def test_times_are_corrected_by_the_cells_that_are_done() -> None:
    done, left = Cell("plain", 2560, 1000, 28, 0), Cell("default", 2560, 3000, 28, 0)
    per_token = {"plain 2560": 0.1, "default 2560": 0.2}
    assert predict([left], per_token, {})[0].seconds == pytest.approx(scale.OVERHEAD + 600)
    row = {"seconds": 207.0, "training_seconds": 200.0}  # twice as slow as timed, and 7 s beside
    assert predict([left], per_token, {done: row})[0].seconds == pytest.approx(7 + 2 * 600)
    resumed: dict[str, Any] = {"metrics": {}}  # of unknown time
    assert predict([left], per_token, {done: resumed})[0].seconds == pytest.approx(scale.OVERHEAD + 600)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of two methods, two widths and one number of tokens, with made-up times."""
    monkeypatch.setattr(scale, "WIDTHS", (48, 96))
    monkeypatch.setattr(scale, "TOKENS", (4096,))
    monkeypatch.setattr(scale, "KS", {"plain": (6,), "batchtopk": (6,)})
    monkeypatch.setattr(scale, "SEVERAL_SEEDS", 0)
    monkeypatch.setattr(scale, "METHODS", {name: scale.METHODS[name] for name in ("plain", "batchtopk")})
    monkeypatch.setattr(scale, "seconds_per_token", lambda method, d_sae: d_sae / 48 / 4096)


def arguments(tmp_path: Path, **more: Any) -> Namespace:
    base = {"runs": tmp_path / "runs", "data": "text", "cache": tmp_path / "cache", "results": tmp_path / "scale.jsonl"}
    cells = {"methods": list(scale.METHODS), "k": [], "seeds": scale.SEEDS, "widths": [], "tokens": []}
    return Namespace(**base | cells | {"hours": 1.0, "plan": False, "harvest": False} | more)


@pytest.mark.parametrize("method", scale.METHODS)
def test_a_step_of_every_method_is_timed(method: str) -> None:
    assert 0 < scale.seconds_per_token(method, 64, 16) < 1


def test_a_part_of_the_grid() -> None:
    cells = grid(["plain", "rate"], [30, 38], 1)
    assert {cell.method for cell in cells} == {"plain", "rate"}
    assert {(cell.k, cell.seed) for cell in cells} == {(30, 0), (38, 0)}
    assert len(cells) == 9 * 2 * 2
    few = grid(["plain"], widths=[2_560], tokens=[10_000_000, 1_000_000], seeds=1)
    assert [(cell.d_sae, cell.tokens, cell.k) for cell in few] == [
        (2_560, tokens, k) for tokens in (1_000_000, 10_000_000) for k in scale.KS["plain"]
    ]


def write_cache(folder: Path, sequences: int) -> None:
    folder.mkdir(exist_ok=True)
    shards = [{"sequences": sequences - 8}, {"sequences": 8}]
    (folder / "manifest.json").write_text(json.dumps({"shards": shards, "request": {"length": 128}}))


@pytest.mark.usefixtures("small")
def test_the_plan_says_what_is_done_dropped_and_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.plan(arguments(tmp_path), 3600) == []
    assert "4 cells wait for the cache" in capsys.readouterr().out
    assert len(scale.plan(arguments(tmp_path, plan=True), 3600)) == 4
    write_cache(tmp_path / "cache", 32)
    assert scale.tokens_in_cache(tmp_path / "cache") == 4096
    kept = scale.plan(arguments(tmp_path), 2 * scale.OVERHEAD + 3)
    assert [each.cell.d_sae for each in kept] == [48, 48]
    said = capsys.readouterr().out
    assert "Dropped, the most expensive first: 2 cells" in said
    assert "0 cells are done; the cache has 4,096 tokens." in said
    assert set(json.loads((tmp_path / "runs" / "timings.json").read_text())) == {
        f"{method} {d}" for method in ("plain", "batchtopk") for d in (48, 96)
    }


@pytest.mark.usefixtures("small")
def test_cells_that_are_done_or_failed_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path / "cache", 32)
    measured: list[str] = []

    def measure(cell: Cell, *_: Any) -> dict[str, Any]:
        measured.append(cell.name)
        if len(measured) == 2:
            raise UserError("step 3: the loss is nan")
        if len(measured) == 4:
            raise Killed
        return {"cell": asdict(cell), "metrics": {}}

    monkeypatch.setattr(scale, "measure", measure)
    with pytest.raises(Killed):
        scale.run(arguments(tmp_path))
    scale.run(arguments(tmp_path))
    assert len(measured) == 5
    assert measured[3] == measured[4]
    lines = [json.loads(line) for line in (tmp_path / "scale.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert [line.get("error") for line in lines] == [None, "step 3: the loss is nan", None, None]
    assert len(scale_figure.read(tmp_path / "scale.jsonl")) == 3


@pytest.mark.usefixtures("small", "blank_report")
def test_a_cell_is_harvested_trained_killed_and_resumed(
    tiny_gemma2: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny: dict[str, Any] = {"model": str(tiny_gemma2), "layer": 1, "device": "cpu", "log_every": 1}
    tiny["buffer"] = {**scale.STREAM["buffer"], "sequences": 16, "estimate_sequences": 8}
    tiny["evaluation"] = {"sequences": 8, "ce_sequences": 4}
    tiny["text"] = {"shuffle_buffer": scale.SHUFFLE, "evaluation_share": 0.2}
    monkeypatch.setattr(scale, "STREAM", {**scale.STREAM, **tiny})
    cell, cache = grid()[0], tmp_path / "cache"
    tsae.train("demo", harvest_only=True, **scale.options(cell, str(text_file), str(cache)))
    assert scale.tokens_in_cache(cache) == 4096
    before = {path: path.read_bytes() for path in cache.iterdir()}

    def measured(folder: str) -> dict[str, Any]:
        return scale.measure(cell, tmp_path / folder, str(text_file), str(cache))

    whole = measured("whole")
    assert whole["seconds"] > whole["training_seconds"] > 0
    assert set(whole["metrics"]) == {"explained_variance", "ce_loss_score", "frac_alive", "l0", "temporal"}
    assert not (tmp_path / "whole" / cell.name / "checkpoint").exists()
    real = Trainer.train_step

    def dying(self: Trainer, *args: Any, **more: Any) -> Any:
        if self.step == 2:
            die()
        return real(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", dying)
        with pytest.raises(Killed):
            measured("again")
    again = measured("again")
    assert again["metrics"] == whole["metrics"]
    assert "seconds" not in again
    assert {path: path.read_bytes() for path in cache.iterdir()} == before


def row(method: str, k: int, bits: float, ev: float, *, d_sae: int = 2560, tokens: int = 10**6, seed: int = 0) -> Any:
    metrics = {"explained_variance": ev, "temporal": {"total_bits": bits, "support_bits": bits / 2}}
    return {"cell": asdict(Cell(method, d_sae, tokens, k, seed)), "metrics": metrics}


def test_gains_are_against_the_best_baseline_at_equal_quality() -> None:
    rows = [row("plain", 28, 100, 0.80), row("plain", 44, 200, 0.90)]
    rows += [row("batchtopk", 28, 110, 0.80), row("batchtopk", 44, 220, 0.90)]
    rows += [row("rate", 28, 90, 0.80), row("rate", 44, 180, 0.90), row("default", 28, 90, 0.95)]
    first, second, outside = scale_figure.gains(rows)
    assert (first.bits, second.bits) == pytest.approx((-0.1, -0.1))
    assert first.quality is None  # no baseline has so few bits
    assert second.quality is not None
    assert second.quality > 0
    assert outside.bits is None
    assert "| 2,560 | 1 M | rate | 2 | -10.0% ± 0.0% |" in scale_figure.table([first, second])
    assert "outside of what was measured" in scale_figure.table([outside])


def made_up(slope: float, noise: float, seed: int = 1) -> list[scale_figure.Gain]:
    rng = np.random.default_rng(seed)
    return [
        scale_figure.Gain(
            "rate", d, tokens, k, repeat, -0.1 + slope * np.log10(tokens / 1e6) + noise * rng.normal(), None
        )
        for d in scale.WIDTHS
        for tokens in scale.TOKENS
        for k in (28, 44)
        for repeat in range(2)
    ]


def test_the_fit_finds_the_slope_and_its_interval_the_truth(tmp_path: Path) -> None:
    found, covered = made_up(0.03, 0.01), 0
    for seed in range(20):
        fitted = scale_figure.fit(made_up(0.03, 0.01, seed), lambda gain: gain.bits)
        assert fitted is not None
        value, low, high = fitted.slope(1)
        assert value == pytest.approx(0.03, abs=0.02)
        covered += low < 0.03 < high
        covered += fitted.slope(2)[1] < 0 < fitted.slope(2)[2]
        value, low, high = fitted.at(10**8, 40_960)
        covered += low < -0.1 + 0.03 * 2 < high
        assert high - low > 2 * 0.01
    assert covered >= 50  # of 60, 90 % in expectation
    exact = scale_figure.fit(made_up(0.03, 0.0), lambda gain: gain.bits)
    assert exact is not None
    assert exact.at(10**8, 2560) == pytest.approx((-0.04, -0.04, -0.04))
    assert scale_figure.fit(found, lambda gain: gain.quality) is None
    assert "| rate | +3." in scale_figure.extrapolation(made_up(0.03, 0.0))
    scale_figure.figure(found, tmp_path / "scale.png", "total")
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_one_width_and_one_number_of_tokens_have_no_slope() -> None:
    found = [gain for gain in made_up(0.03, 0.01) if (gain.d_sae, gain.tokens) == (2560, 10**6)]
    fitted = scale_figure.fit(found, lambda gain: gain.bits)
    assert fitted is not None
    assert fitted.slope(1) == fitted.slope(2) == (0, 0, 0)
    assert fitted.coefficients[0] == pytest.approx(-0.1, abs=0.01)
