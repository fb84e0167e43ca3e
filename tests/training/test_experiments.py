"""The experiments' files can be read, and their summary says what the runs say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.summary import against_plain, by_configuration, figure, read_sweeps, table, write_json
from tsae.training.sweep_file import read_sweep

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_is_a_sweep(file: Path) -> None:
    for cfg in read_sweep(file).values():
        cfg.check()


def metrics(ev: float, excess: float) -> dict[str, Any]:
    return {
        "explained_variance": ev,
        "ce_loss_score": 0.98,
        "l0": 38.0,
        "frac_alive": 0.9,
        "temporal": {
            "persistence_excess": excess,
            "persistence_excess_shuffled": 0.02,
            "relative_difference": {"1": 0.7},
            "relative_difference_per_feature": {"1": 0.9},
            "smoothness": 0.08,
        },
    }


@pytest.fixture
def found(tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, Any] = {
        "plain-seed0": {"metrics": metrics(0.90, 0.08)},
        "plain-seed1": {"metrics": metrics(0.94, 0.10)},
        "schmitt-0.3-seed0": {"metrics": metrics(0.91, 0.30)},
        "lost": {"metrics": None, "error": "step 3: the temporal term of the loss is nan"},
    }
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    return by_configuration(read_sweeps([tmp_path]))


def test_means_over_seeds_and_what_stands_against_plain(
    found: dict[str, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(found) == ["plain", "schmitt-0.3"]
    assert "| plain | 2 | 0.9200 ± 0.0200 |" in table(found)
    row = against_plain(found).splitlines()[-1]
    assert row.startswith("| schmitt-0.3 | -0.0100 | +0.0000 | +0.0% | 100.0% | 3.33 x | 4.00 x |")


def test_other_release_ratios_stand_beside_their_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {f"{name}-seed{seed}": {"metrics": metrics(0.9, 0.1)} for name in ("plain", "schmitt") for seed in range(2)}
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    for name, ratio, excess, source in (
        ("plain-seed0", 0.4, 0.2, {}),
        ("plain-seed1", 0.4, 0.3, {}),
        ("plain-seed1", 0.2, 0.9, {"data": "other.txt", "column": None, "part": "all"}),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        values = metrics(0.8, excess) | {"release": {"ratio": ratio}, "source": source}
        (tmp_path / name / f"eval-release-{ratio}.json").write_text(json.dumps(values))
    found = by_configuration(read_sweeps([tmp_path]))
    assert list(found) == ["plain", "plain@0.4", "schmitt"]
    assert [run["temporal"]["persistence_excess"] for run in found["plain@0.4"]] == [0.2, 0.3]
    assert "on other text, other.txt; left out" in capsys.readouterr().out
    assert "| plain@0.4 | -0.1000 |" in against_plain(found)


def test_the_figure_is_drawn(found: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    figure(found | {"schmitt-0.4+other-words": found["plain"]}, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_the_compact_file_gives_the_same_tables(found: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    sweeps = read_sweeps([tmp_path])
    write_json(sweeps, tmp_path / "kept.json")
    kept = by_configuration(read_sweeps([tmp_path / "kept.json"]))
    assert (table(kept), against_plain(kept)) == (table(found), against_plain(found))


@pytest.mark.parametrize(
    ("file", "sweep", "make"),
    [("frontier-2026-11-26", "frontier", against_plain), ("sweeps-2026-11-25", "default", table)],
)
def test_tables_in_the_docs_are_those_of_the_kept_results(file: str, sweep: str, make: Any) -> None:
    runs = read_sweeps([ROOT / "docs" / "results" / f"{file}.json"])[sweep]
    if sweep == "default":  # the page has the rows of several seeds
        runs = {name: run for name, run in runs.items() if "-seed" in name}
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert make(by_configuration({sweep: runs})) in page
