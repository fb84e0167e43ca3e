"""The experiments' files can be read, and their summary says what the runs say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.summary import (
    against,
    at_equal_quality,
    at_one_quality,
    by_configuration,
    figure,
    named,
    of_seed,
    persistence_figure,
    read_sweeps,
    table,
    write_json,
)
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


def test_means_over_seeds_and_what_stands_against(
    found: dict[str, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(found) == ["plain", "schmitt-0.3"]
    assert "| plain | 2 | 0.9200 ± 0.0200 |" in table(found)
    row = against(found).splitlines()[-1]
    assert row.startswith("| schmitt-0.3 | -0.0100 | +0.0000 | +0.0% | 100.0% | 3.33 x | 4.00 x |")
    head, _, row = against(found, "schmitt-0.3").splitlines()
    assert head.startswith("| against schmitt-0.3 | EV |")
    assert row.startswith("| plain | +0.0100 | +0.0000 | +0.0% | 100.0% | 0.30 x | 0.25 x |")


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
    assert "| plain@0.4 | -0.1000 |" in against(found)


def test_the_figure_is_drawn(found: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    persistence_figure(found | {"schmitt-0.4+other-words": found["plain"]}, tmp_path / "persistence.png")
    assert (tmp_path / "persistence.png").stat().st_size > 10_000


def with_bits(ev: float, support: float) -> dict[str, Any]:
    found = metrics(ev, 0.1)
    found["massive"] = {"explained_variance_without": ev - 0.01}
    found["temporal"] |= {"support_bits": support, "total_bits": 1.6 * support}
    return found


@pytest.fixture
def sweep_with_bits(tmp_path: Path) -> Path:
    """The error is 1 over the root of the bits; `memory` needs 20 % fewer."""
    runs = {}
    for seed in range(2):
        for k in (24, 36):
            runs[f"plain-k{k}-seed{seed}"] = with_bits(1 - (5 * k) ** -0.5, 5 * k)
            runs[f"topk-k{k}-seed{seed}"] = with_bits(1 - (5 * k) ** -0.5, 5.5 * k)
        runs[f"memory-k30-seed{seed}"] = with_bits(1 - 144**-0.5, 115.2 + 6 * seed)
    runs["jumprelu-k36"] = with_bits(0.5, 100)
    runs["old-k36"] = metrics(0.9, 0.1)
    (tmp_path / "bits").mkdir()
    kept = {name: {"metrics": run} for name, run in runs.items()}
    (tmp_path / "bits" / "sweep.json").write_text(json.dumps({"runs": kept}))
    return tmp_path / "bits"


def test_bits_at_equal_explained_variance(sweep_with_bits: Path) -> None:
    runs = named(read_sweeps([sweep_with_bits]))
    lines = at_equal_quality(runs).splitlines()
    assert lines[0] == (
        "| at equal EV | EV | support bits | relative | best baseline | total bits | relative | best baseline |"
        " CE score, difference |"
    )
    row = next(line for line in lines if line.startswith("| memory-k30"))
    # 118.2 of 144 bits, and half the range over seeds.
    assert row == (
        "| memory-k30 | 0.9167 ± 0.0000 | 118.2 ± 3.0 | -17.9% ± 2.1% | plain | 189.1 ± 4.8 | -17.9% ± 2.1% | plain |"
        " +0.0000 ± 0.0000 |"
    )
    assert "| plain-k36 | 0.9255 ± 0.0000 | 180.0 ± 0.0 | +0.0% ± 0.0% | plain |" in "\n".join(lines)
    assert "* memory-k30: jumprelu was measured at 0.5000 to 0.5000, which 0.9167 lies outside of" in lines
    assert "| jumprelu-k36 | 0.5000 | 100.0 | +0.0% | jumprelu |" in "\n".join(lines)
    assert "old-k36" not in "\n".join(lines)
    at = at_one_quality(runs, 1 - 144**-0.5).splitlines()
    assert "| topk | 158.4 ± 0.0 | 253.4 ± 0.0 |" in at
    assert "| jumprelu | – | – |" in at
    assert at_equal_quality([("old-k36", metrics(0.9, 0.1))]) == ""
    of_one = of_seed(read_sweeps([sweep_with_bits]), "1")
    assert list(of_one["bits"]) == [
        "plain-k24-seed1",
        "topk-k24-seed1",
        "plain-k36-seed1",
        "topk-k36-seed1",
        "memory-k30-seed1",
    ]


def test_bits_stand_behind_explained_variance_in_the_table(sweep_with_bits: Path) -> None:
    rows = table(by_configuration(read_sweeps([sweep_with_bits]))).splitlines()
    assert rows[0].startswith("| run | seeds | EV | EV without massive | support bits | total bits | CE score |")
    assert rows[2].startswith("| plain-k24 | 2 | 0.9087 ± 0.0000 | 0.8987 ± 0.0000 | 120.0 ± 0.0 | 192.0 ± 0.0 |")
    assert "| old-k36 | 1 | 0.9000 | – | – | – |" in rows[-1]


def test_the_compact_file_keeps_the_bits_and_the_figure_is_drawn(sweep_with_bits: Path, tmp_path: Path) -> None:
    sweeps = read_sweeps([sweep_with_bits])
    write_json(sweeps, tmp_path / "kept.json")
    kept = read_sweeps([tmp_path / "kept.json"])
    assert at_equal_quality(named(kept)) == at_equal_quality(named(sweeps))
    assert table(by_configuration(kept)) == table(by_configuration(sweeps))
    figure(named(kept), tmp_path / "bits.png")
    assert (tmp_path / "bits.png").stat().st_size > 10_000
    figure(named(kept), tmp_path / "best.png", lowest=0.9)  # without jumprelu
    assert (tmp_path / "best.png").read_bytes() != (tmp_path / "bits.png").read_bytes()


def test_the_compact_file_gives_the_same_tables(found: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    sweeps = read_sweeps([tmp_path])
    write_json(sweeps, tmp_path / "kept.json")
    kept = by_configuration(read_sweeps([tmp_path / "kept.json"]))
    assert (table(kept), against(kept)) == (table(found), against(found))


@pytest.mark.parametrize(
    ("file", "sweep", "make"),
    [("frontier-2026-11-26", "frontier", against), ("sweeps-2026-11-25", "default", table)],
)
def test_tables_in_the_docs_are_those_of_the_kept_results(file: str, sweep: str, make: Any) -> None:
    runs = read_sweeps([ROOT / "docs" / "results" / f"{file}.json"])[sweep]
    if sweep == "default":  # the page has the rows of several seeds
        runs = {name: run for name, run in runs.items() if "-seed" in name}
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert make(by_configuration({sweep: runs})) in page
