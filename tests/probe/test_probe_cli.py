"""`python -m tsae.probe` from run directories to probes.json, on a tiny language model."""

import builtins
import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import sample_text

from tsae.config import EvaluationConfig, SAEConfig, TrainConfig
from tsae.data import harvest
from tsae.data.text import TextConfig
from tsae.probe.__main__ import main
from tsae.probe.command import probe_runs
from tsae.probe.results import print_results
from tsae.sae.model import SparseAutoencoder
from tsae.utils.config_json import to_dict


def write_run(folder: Path, model: Path, text: Path, seed: int, **options) -> Path:
    config = TrainConfig(
        model=str(model),
        layer=1,
        data=str(text),
        data_seed=7,
        device="cpu",
        lm_dtype="float32",
        text=TextConfig(evaluation_share=0.5),
        sae=SAEConfig(d_in=32, d_sae=48, k=4, activation="topk"),
        evaluation=EvaluationConfig(sequences=40, ce_sequences=2),
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config) | options))
    SparseAutoencoder(config.sae, generator=torch.Generator().manual_seed(seed)).save(folder / "sae")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_gemma3) -> list[Path]:
    """Two runs on a text with two titles, with about half of the passages held out."""
    folder = tmp_path_factory.mktemp("probed")
    text = folder / "text.txt"
    text.write_text("".join(f" = Title {i} = \n\n{sample_text(6000, seed=i)}\n\n" for i in range(2)))
    return [write_run(folder / name, tiny_gemma3, text, seed) for seed, name in enumerate(("plain", "other"))]


@pytest.fixture(scope="module")
def probed(source) -> tuple[Any, list[int], list[dict]]:
    """The results of probing both, the sequences of every harvest, and what was written."""
    harvests = []
    real = harvest.activations

    def counted(lm, tokens, layer):
        harvests.append(len(tokens))
        return real(lm, tokens, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harvest, "activations", counted)
        results = probe_runs(source)
    written = [json.loads((run / "probes.json").read_text()) for run in source]
    assert sorted(path.name for path in source[0].iterdir()) == ["config.json", "probes.json", "sae"]
    return results, harvests, written


@pytest.fixture
def runs(source, tmp_path) -> list[Path]:
    """Copies without results, for tests that modify them."""
    unprobed = shutil.ignore_patterns("probes.json")
    return [shutil.copytree(run, tmp_path / run.name, ignore=unprobed) for run in source]


def test_what_is_written(probed):
    _, harvests, written = probed
    assert harvests == [16, 16, 8]  # once for both
    for found in written:
        assert found["chance"] == 0.5
        assert found["left_out"] == {}
        assert set(found["problems"]) == {"document", "section", "token_class"}
        assert found["text"]["part"] == "the run's own evaluation part"
        assert found["text"]["tokens"] == 40 * 128
        assert found["text"]["seed"] == 7
        for problem in found["problems"].values():
            assert set(problem["auc"]) == set(problem["stderr"]) == {"1", "5", "20", "dense"}
            assert all(0 <= value <= 1 for value in problem["auc"].values())
            labels = problem["auc_by_label"]
            for key, mean in problem["auc"].items():
                assert sum(areas[key] for areas in labels.values()) / len(labels) == pytest.approx(mean)
            assert problem["train_tokens"] >= 20 * len(labels) <= problem["test_tokens"]
        # The tiny model's activations know their own token.
        assert found["problems"]["token_class"]["auc"]["dense"] > 0.8
        assert found["problems"]["token_class"]["auc"]["20"] > 0.6
    plain, other = (found["problems"] for found in written)
    for name, problem in plain.items():
        assert problem["auc"]["dense"] == other[name]["auc"]["dense"]
        assert problem["auc"]["20"] != other[name]["auc"]["20"]


def test_a_table_of_the_runs_beside_each_other(probed):
    page = StringIO()
    print_results(probed[0], Console(file=page, width=60))  # a file is as wide as necessary
    out = page.getvalue()
    for word in ("plain", "other", "document", "section", "token class", "20 features", "activations, all", "chance"):
        assert word in out
    assert "Left out" not in out
    assert "5,120 tokens" in out
    assert out.count("one label against the rest") == 1
    row = next(line for line in out.splitlines() if "1 feature " in line)
    assert row.count("±") == 2
    for name, k in (("document", 1), ("token_class", 20)):
        for written in probed[2]:
            auc, error = (written["problems"][name][key][str(k)] for key in ("auc", "stderr"))
            assert f"{auc:.3f} ± {error:.3f}" in out

    page = StringIO()
    print_results(probed[0], Console(file=page, force_terminal=True, width=60, color_system=None))
    assert max(map(len, page.getvalue().splitlines())) <= 60
    assert page.getvalue().count("1 feature ") == 6  # one run below the other


def test_alone_a_run_scores_what_it_scores_beside_others(runs, probed, capsys):
    assert main([str(runs[1]), str(runs[1] / ".." / runs[1].name)]) == 0  # one run, named twice
    assert json.loads((runs[1] / "probes.json").read_text()) == probed[2][1]
    assert "token class" in capsys.readouterr().out
    assert not (runs[0] / "probes.json").exists()


def test_a_trained_run_on_other_text(uninterrupted, tmp_path, capsys):
    """Rows of text have no sections: the key is left out, with the reason."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": sample_text(200, seed=seed)}) + "\n" for seed in range(60)))
    written = uninterrupted / "probes.json"
    try:
        assert main([str(uninterrupted), "--data", str(rows), "--column", "text", "--tokens", "2500"]) == 0
        found = json.loads(written.read_text())
    finally:
        written.unlink(missing_ok=True)
    assert set(found["problems"]) == {"document", "token_class"}
    assert "has no sections" in found["left_out"]["section"]
    assert found["text"]["data"] == str(rows)
    assert found["text"]["part"] == "the evaluation side of the run's split"
    assert found["text"]["tokens"] == 2560
    out = capsys.readouterr().out
    assert "Left out: section" in out
    assert "rows.jsonl" in out.replace("\n", "")  # a long path is wrapped


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda run: (run / "sae" / "cfg.json").unlink(), [], "no trained autoencoder"),
        (lambda run: None, ["--tokens", "0"], "--tokens is 0"),
        (lambda run: None, ["--tokens", "30"], "too short"),
        (lambda run: None, ["--data", "/no/such/file.txt"], "no such file"),
        (lambda run: None, ["--device", "quantum"], "quantum"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(runs, capsys, spoil, options, message):
    spoil(runs[1])
    before = sorted(runs[0].parent.rglob("*"))
    assert main([str(run) for run in runs] + options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert "Traceback" not in error
    assert sorted(runs[0].parent.rglob("*")) == before


def test_runs_of_different_layers_or_texts(runs, capsys):
    path = runs[1] / "config.json"
    config = json.loads(path.read_text())
    for key, value in (("layer", 2), ("data", "python-docs"), ("length", 64), ("lm_quantization", "8bit")):
        path.write_text(json.dumps(config | {key: value}))
        assert main([str(run) for run in runs]) == 2
        assert f"plain and other differ in {key}" in capsys.readouterr().err
    assert main([]) == 2
    assert not (runs[0] / "probes.json").exists()


def test_runs_of_different_lengths_at_one(runs):
    path = runs[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"length": 64}))
    assert main([*map(str, runs), "--length", "32"]) == 0
    assert {json.loads((run / "probes.json").read_text())["text"]["length"] for run in runs} == {32}


def test_weights_that_are_not_finite_leave_no_file(runs, capsys):
    sae = SparseAutoencoder.load(runs[1] / "sae")
    with torch.no_grad():
        sae.b_dec[:] = float("nan")
    sae.save(runs[1] / "sae")
    assert main([str(run) for run in runs]) == 2
    assert "not finite" in capsys.readouterr().err
    assert not any((run / "probes.json").exists() for run in runs)


def test_without_scikit_learn(runs, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main([str(runs[0])]) == 2
    assert 'run pip install "tsae[probes]"' in capsys.readouterr().err


def labelled(folder: Path, model: Path) -> Path:
    """A run on rows with a column of words, one of objects, and one of numbers that few rows have."""
    rows = [
        {"text": sample_text(150, seed=i), "kind": ("book", "code")[i % 2], "other": {"a": i}, "year": 1900 + i % 2}
        for i in range(60)
    ]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_run(folder / "run", model, text, 0)


def test_columns_of_the_text_are_labels(tmp_path, tiny_gemma3, capsys):
    run = labelled(tmp_path, tiny_gemma3)
    assert main([str(run), "--labels", "kind", "year"]) == 0
    assert "label kind" in capsys.readouterr().out
    problems = json.loads((run / "probes.json").read_text())["problems"]
    assert set(problems["label_kind"]["auc_by_label"]) == {"book", "code"}
    assert set(problems["label_year"]["auc_by_label"]) == {"1900", "1901"}
    for problem in ("label_kind", "label_year"):
        assert min(problems[problem]["train_tokens"], problems[problem]["test_tokens"]) > 200


@pytest.mark.parametrize(
    ("column", "sentence"), [("topic", "no document of"), ("other", "which is no label: name a column of words")]
)
def test_columns_that_are_no_labels_are_refused(tmp_path, tiny_gemma3, capsys, column, sentence):
    run = labelled(tmp_path, tiny_gemma3)
    assert main([str(run), "--labels", column]) == 2
    assert sentence in capsys.readouterr().err
    assert not (run / "probes.json").exists()
