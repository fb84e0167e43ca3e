"""The report from complete, partial and broken run directories."""

import json
import math
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import save_file

from tsae.errors import UserError
from tsae.reports.figure import draw, write_report
from tsae.reports.records import Records, read_history
from tsae.reports.table import print_comparison, print_table

EVALUATION = {
    "explained_variance": 0.915,
    "l0": 32.4,
    "frac_alive": 0.957,
    "ce_loss_score": 0.977,
    "ce_loss_score_mean_ablation": 0.911,
    "temporal": {
        "relative_difference": {"1": 0.676, "4": 0.81, "16": 0.86, "64": 0.88},
        "relative_difference_per_feature": {"1": 0.88, "4": 0.95, "16": 0.97, "64": 0.985},
        "autocorrelation": {"1": 0.31, "2": 0.2, "4": 0.13, "8": 0.09, "16": 0.06, "32": 0.04, "64": 0.02},
        "persistence": 0.467,
        "persistence_excess": 0.313,
        "persistence_excess_shuffled": 0.095,
        "transitions": {"on_on": 0.006, "on_off": 0.0066, "off_on": 0.0066, "off_off": 0.9808},
        "smoothness": 0.12,
        "support_bits": 187.6,
        "support_bits_memoryless": 215.2,
        "support_bits_shuffled": 209.4,
        "amplitude_bits": 126.3,
        "amplitude_bits_shuffled": 127.0,
        "total_bits": 313.9,
    },
}
CONFIG = {
    "model": "gemma-3-270m",
    "layer": 9,
    "sae": {"d_sae": 64, "activation": "schmitt", "k": 32, "release_ratio": 0.3},
    "objective": {"temporal": "multiscale", "l1": 0.0, "dead_after_tokens": 1_000_000},
}


def record(step: int) -> dict[str, float]:
    return {
        "step": step,
        "tokens": 2048 * step,
        "loss": 1 / step,
        "reconstruction": 0.9 / step,
        "sparsity": 0.1,
        "temporal": 0.0 if step < 20 else 1e-3,
        "auxiliary": 0.01,
        "explained_variance": 1 - 1 / step,
        "l0": 32 + 50 / step,
        "dead": step // 10,
        "lag1_correlation": 0.3,
    }


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "sae").mkdir()
    lines = [json.dumps(record(step)) for step in range(1, 201)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "eval.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    sparsity = np.linspace(-4, -0.5, 64, dtype=np.float32)
    sparsity[:5] = -10
    save_file({"sparsity": sparsity}, tmp_path / "sae" / "sparsity.safetensors")
    return tmp_path


def page(run_dir) -> Figure:
    """The figure of a complete run directory."""
    density = np.geomspace(1e-4, 0.5, 64)
    history = read_history(run_dir / "metrics.jsonl")
    return draw(Records("run", history, EVALUATION, config=CONFIG, density=density))


def axes_of(figure: Figure) -> dict[str, object]:
    return {ax.get_title(loc="left") or ax.get_title(): ax for sub in figure.subfigs for ax in sub.axes}


def size(path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_page_is_deterministic_and_leaves_nothing_else(run_dir):
    before = {path.name for path in run_dir.iterdir()}
    path = write_report(run_dir)
    assert size(path) == (1600, 1080)
    first = path.read_bytes()
    write_report(run_dir)
    assert path.read_bytes() == first
    assert {path.name for path in run_dir.iterdir()} == before | {"report.png"}


@pytest.mark.parametrize("missing", ["metrics.jsonl", "eval.json", "config.json", "sae/sparsity.safetensors"])
def test_a_missing_file_costs_its_panels_only(run_dir, missing):
    (run_dir / missing).unlink()
    assert size(write_report(run_dir)) == (1600, 1080)


def test_an_empty_run_still_has_a_page(tmp_path):
    assert size(write_report(tmp_path)) == (1600, 1080)


@pytest.mark.parametrize("name", [r"a $\no$ b", "$", "run\udcff", "日本"])
def test_any_name_of_the_run_its_model_and_its_text(run_dir, name):
    """`$` begins no formula, and a name that is not Unicode is drawn."""
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"model": name, "data": name}))
    assert size(write_report(run_dir.rename(run_dir.with_name(name)))) == (1600, 1080)


def test_any_key_may_be_missing_or_odd(run_dir):
    lines = [
        {"step": 1},
        {"step": 2, "loss": None, "l0": math.nan, "dead": 0, "reconstruction": -1.0},
        {"step": 3, "explained_variance": -2.0, "sparsity": 0.0},
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run_dir / "eval.json").write_text(json.dumps({"explained_variance": -1.76, "temporal": {}}))
    (run_dir / "config.json").write_text("{}")
    write_report(run_dir)


@pytest.mark.parametrize("drop", sorted(record(1).keys() - {"step"}))
def test_each_series_may_be_missing(drop):
    history = {key: (np.arange(1, 50), np.linspace(0.1, 1, 49)) for key in record(1) if key not in ("step", drop)}
    draw(Records("run", history, EVALUATION, config=CONFIG))


def test_panels_have_titles_labels_and_the_data(run_dir):
    panels = axes_of(page(run_dir))
    assert len(panels) == 9
    assert next(iter(panels)) == "Bits per token"  # the yardstick stands first
    for ax in panels.values():
        assert ax.get_xlabel()
    losses = {line.get_label(): line for line in panels["Loss terms"].lines}
    assert {"reconstruction", "sparsity", "temporal", "auxiliary"} <= losses.keys()
    assert panels["Loss terms"].get_yscale() == "log"
    target = panels["Active features (L0)"].get_legend().get_texts()[-1].get_text()
    assert target == "target k = 32"
    lags = panels["Memory over lags"]
    assert list(lags.lines[0].get_xdata()) == [1, 2, 4, 8, 16, 32, 64]
    assert list(lags.lines[0].get_ydata()) == list(EVALUATION["temporal"]["autocorrelation"].values())


def test_quality_and_bits_stand_first_in_the_report():
    def texts(evaluation):
        figure = draw(Records("run", {}, evaluation, config=CONFIG, density=None))
        return [text.get_text() for text in figure.subfigs[0].texts]

    found = texts(EVALUATION)
    places = [
        found.index(name)
        for name in (
            "explained variance",
            "loss recovered (zero ablation)",
            "support bits",
            "total bits",
            "active features (L0)",
        )
    ]
    assert places == sorted(places)
    assert [found[place - 1] for place in places] == ["0.915", "0.977", "187.6", "313.9", "32.4"]
    assert found[places[1] + 1] == "0.911 against mean ablation"
    old = texts({**EVALUATION, "temporal": {"persistence_excess": 0.3}})  # written before bits were measured
    assert old[old.index("total bits") - 1] == "–"


def test_bars_show_support_and_amplitudes(run_dir):
    bits = axes_of(page(run_dir))["Bits per token"]
    assert [bar.get_width() for bar in bits.patches] == pytest.approx([187.6, 215.2, 209.4, 126.3, 0, 127.0])
    written = [text.get_text().strip() for text in bits.texts]
    assert written == ["187.6", "313.9", "215.2", "209.4", "336.4"]
    old = {**EVALUATION, "temporal": {"persistence_excess": 0.3}}
    panels = axes_of(draw(Records("run", {}, old, config=CONFIG, density=None)))
    assert [text.get_text() for text in panels["Bits per token"].texts] == ["not measured"]


def test_the_comparison_begins_with_quality_and_bits(capsys):
    old = {**EVALUATION, "temporal": {"persistence_excess": 0.313}}
    print_comparison({"new": {"metrics": EVALUATION, "error": None}, "old": {"metrics": old, "error": None}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(line for line in lines if line[0] == "run")[1:6] == ["EV", "score", "bits", "bits", "L0"]
    assert next(line for line in lines if line[0] == "new")[1:6] == ["0.915", "0.977", "187.6", "313.9", "32.4"]
    assert next(line for line in lines if line[0] == "old")[1:6] == ["0.915", "0.977", "–", "–", "32.4"]


def test_the_table_begins_with_quality_and_bits(capsys):
    print_table(EVALUATION)
    rows = [line.split("│")[0].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert rows[:4] == [
        "Quality and code length",
        "explained variance",
        "loss recovered (zero ablation)",
        "support bits",
    ]


def test_the_table_leaves_out_what_was_not_measured(capsys):
    print_table({"explained_variance": 0.9, "temporal": {"persistence": 0.4}})
    assert "bits" not in capsys.readouterr().out
    print_table(EVALUATION)
    assert re.search(r"total bits +│ +313\.90 │ per token", capsys.readouterr().out)


def test_a_running_mean_follows_long_series(run_dir):
    lines = axes_of(page(run_dir))["Explained variance"].lines
    raw, smooth = lines[0].get_ydata(), lines[1].get_ydata()
    assert len(raw) == len(smooth) == 200
    assert smooth[100] == pytest.approx(np.mean(raw[98:103]), rel=1e-3)


def test_history_keeps_the_last_line_of_a_step_and_survives_a_cut_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "l0": 5}\n{"step": 1, "l0": 4, "x": "text"}\n{"step": 2, "l0": 6}\n{"step": 3, "l')
    history = read_history(path)
    assert set(history) == {"step", "l0"}
    assert history["l0"][0].tolist() == [1, 2]
    assert history["l0"][1].tolist() == [4, 6]


@pytest.mark.parametrize("broken", ['{"step": 1, "l', '{"l0": 3}', "[1]", '{"step": null}'])
def test_a_broken_line_is_named(tmp_path, broken):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + broken + '\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_evaluation_is_named_and_nothing_is_written(run_dir, content):
    (run_dir / "eval.json").write_text(content)
    with pytest.raises(UserError, match=r"eval\.json"):
        write_report(run_dir)
    assert not (run_dir / "report.png").exists()


def test_no_such_directory(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        write_report(tmp_path / "nothing")
