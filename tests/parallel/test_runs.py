"""The main job in several processes: same results as in one, resuming in another number, failures."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from launch import fork, run_jobs, torchrun
from safetensors.torch import load_file
from tiny_runs import lines, options

from tsae.train import main

Runs = dict[str, Path]
# Tokens with large activations left out, and features that die.
LEFT_OUT = ["--buffer.max-norm-ratio", "1.1", "--objective.dead-after-tokens", "600", "--sae.k", "1"]
LONG = ["--length", "300", "--batch", "3"]


def arguments(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    """A run with all state: a buffer that refills, temporal terms; 12 steps, checkpoints at 4, 8 and 12."""
    extra = "--autocast none --lm-dtype float32 --log-every 1 --objective.hold-steps 2 --objective.ramp-steps 4"
    extra += " --checkpoint.keep 3 --objective multiscale+contrastive --objective.pairs 32 --optimizer.noise-eta 0.01"
    return options(model, text, out, *extra.split(), *more)


@pytest.fixture(scope="module")
def runs(tiny_gemma2: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Run directories by name: one process, which fills a cache; two in both modes; bad input, which leaves none."""
    folder = tmp_path_factory.mktemp("runs")
    found = {name: folder / name for name in ("one", "shares", "parts", "none", "sweep", "sweep-of-one")}
    found |= {name: folder / name for name in ("left-out", "left-out-of-one", "long", "long-of-one")}
    cache = ("--cache", str(folder / "cache"))
    assert main(arguments(tiny_gemma2, text_file, found["one"], *cache)) == 0
    assert main(arguments(tiny_gemma2, text_file, found["left-out-of-one"], *LEFT_OUT)) == 0
    assert main(arguments(tiny_gemma2, text_file, found["long-of-one"], *LONG)) == 0
    sweep = write_sweep(folder / "sweep.json", tiny_gemma2, text_file)
    assert main(["--sweep", str(sweep), "--out", str(found["sweep-of-one"])]) == 0
    jobs = [
        (0, arguments(tiny_gemma2, text_file, found["shares"])),
        (0, arguments(tiny_gemma2, text_file, found["parts"], "--parallel.features", "2", *cache)),
        (0, ["--sweep", str(sweep), "--out", str(found["sweep"])]),
        (0, arguments(tiny_gemma2, text_file, found["left-out"], *LEFT_OUT)),
        (0, arguments(tiny_gemma2, text_file, found["long"], *LONG)),
        (2, arguments(tiny_gemma2, text_file, found["none"], "--layer", "99")),
        (2, arguments(tiny_gemma2, text_file, found["none"], "--cache", str(folder / "other"))),
        (2, arguments(tiny_gemma2, text_file, found["none"], "--sae.d-sae", "49", "--parallel.features", "2")),
        (2, arguments(tiny_gemma2, text_file, found["none"], "--batch", "1")),
        (2, arguments(tiny_gemma2, text_file, found["none"], "--dry-run")),
        (2, arguments(tiny_gemma2, text_file, found["one"])),
    ]
    (folder / "stderr").write_text(fork(2, run_jobs, jobs, folder=folder))
    return found | {"stderr": folder / "stderr"}


def write_sweep(path: Path, model: Path, text: Path) -> Path:
    """Two runs of 4 steps; JSON is YAML, too."""
    base = {"model": str(model), "data": str(text), "layer": 1, "steps": 4, "batch": 4, "log_every": 1, "device": "cpu"}
    base |= {"lm_dtype": "float32", "autocast": "none", "sae": {"d_sae": 48, "k": 6}}
    base |= {"buffer": {"sequences": 16, "harvest_batch": 8, "reuse": 1, "estimate_sequences": 8}}
    base |= {"evaluation": {"sequences": 4, "ce_sequences": 2}, "text": {"column": None, "evaluation_share": 0.2}}
    path.write_text(json.dumps({"base": base, "runs": {"a": {}, "b": {"sae.activation": "topk"}}}))
    return path


def check_same(one: Path, other: Path) -> None:
    first, second = lines(one / "metrics.jsonl"), lines(other / "metrics.jsonl")
    assert [line["step"] for line in second] == list(range(1, 13))
    for a, b in zip(first, second, strict=True):
        for name in ("loss", "reconstruction", "temporal", "l0", "tokens", "lr"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)
    ours, theirs = (load_file(p / "sae" / "sae_weights.safetensors") for p in (one, other))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    ours, theirs = (json.loads((p / "eval.json").read_text()) for p in (one, other))
    assert theirs["explained_variance"] == pytest.approx(ours["explained_variance"], abs=1e-3)


def test_two_processes_make_the_run_of_one(runs: Runs) -> None:
    check_same(runs["one"], runs["shares"])
    check_same(runs["one"], runs["parts"])


def test_two_processes_leave_out_the_tokens_and_count_the_dead_features_of_one(runs: Runs) -> None:
    check_same(runs["left-out-of-one"], runs["left-out"])
    one, two = (lines(runs[name] / "metrics.jsonl") for name in ("left-out-of-one", "left-out"))
    assert [line["dead"] for line in two] == [line["dead"] for line in one]
    assert one[-1]["dead"] > 0
    without = lines(runs["one"] / "metrics.jsonl")
    assert one[-1]["tokens"] < without[-1]["tokens"]  # left out on either process


def test_two_processes_make_the_run_of_one_at_another_length(runs: Runs) -> None:
    check_same(runs["long-of-one"], runs["long"])
    tokens = [line["tokens"] for line in lines(runs["long"] / "metrics.jsonl")]
    assert tokens == [step * 3 * 300 for step in range(1, 13)]


def test_two_processes_make_the_sweep_of_one(runs: Runs) -> None:
    for name in ("a", "b"):
        one, two = (lines(runs[sweep] / name / "metrics.jsonl") for sweep in ("sweep-of-one", "sweep"))
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
        assert (runs["sweep"] / name / "eval.json").exists()
    assert set(json.loads((runs["sweep"] / "sweep.json").read_text())["runs"]) == {"a", "b"}


def test_bad_input_is_said_once_and_leaves_nothing(runs: Runs) -> None:
    said = [line for line in runs["stderr"].read_text().splitlines() if line.startswith("error")]
    assert len(said) == 6
    for line, words in zip(
        said,
        (
            "layer 99 does not exist",
            "several processes only read a cache",
            "it must divide sae.d_sae, which is 49",
            "batch is 1, too few for 2 processes",
            "--dry-run estimates for one process",
            "already has a run",
        ),
        strict=True,
    ):
        assert words in line
    assert not runs["none"].exists()


def test_the_first_process_alone_writes_to_the_terminal(runs: Runs) -> None:
    assert runs["stderr"].read_text().count("Written: ") == 5  # the jobs that succeed


def cut_back(run: Path, copy: Path, step: int) -> Path:
    """A copy of the run without the checkpoints after ``step``."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoint").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return copy


@pytest.mark.parametrize("name", ["shares", "parts"])
def test_a_run_of_two_processes_goes_on_in_one(name: str, runs: Runs, tmp_path: Path) -> None:
    copy = cut_back(runs[name], tmp_path / "copy", 4)
    assert main(["--resume", str(copy)]) == 0
    check_same(runs["one"], copy)


@pytest.mark.slow
def test_runs_go_on_in_four_processes(runs: Runs, tmp_path: Path) -> None:
    jobs = [
        (0, ["--resume", str(cut_back(runs["one"], tmp_path / "one", 8))]),
        (0, ["--resume", str(cut_back(runs["shares"], tmp_path / "shares", 4)), "--parallel.features", "2"]),
        (0, ["--resume", str(cut_back(runs["parts"], tmp_path / "parts", 4))]),
    ]
    fork(4, run_jobs, jobs, folder=tmp_path)
    for name in ("one", "shares", "parts"):
        check_same(runs["one"], tmp_path / name)


def test_a_dictionary_in_parts_needs_several_processes(
    tiny_gemma2: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tiny_gemma2, text_file, tmp_path / "run", "--parallel.features", "2")) == 2
    assert "but there is 1 process; start several with torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("mishap", ["kill", pytest.param("error", marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_job(mishap: str, tiny_gemma2: Path, text_file: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    endless = arguments(tiny_gemma2, text_file, tmp_path / "run", "--steps", "100000")
    result = torchrun(2, "mishap.py", mishap, *endless, timeout=200)
    assert result.returncode != 0
    assert time.monotonic() - start < 150  # mostly the start; the timeout of a collective is longer
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 3
    if mishap == "error":
        assert "process 1 of 2 failed:\nTraceback" in result.stderr
        assert "ArithmeticError: a mishap" in result.stderr
    else:
        assert "process 0 of 2 stopped because another process is gone" in result.stderr


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(
    runs: Runs, tiny_gemma2: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = torchrun(2, "mishap.py", "interrupt", *arguments(tiny_gemma2, text_file, out))
    assert result.returncode != 0
    assert result.stderr.count("interrupted after step 4, which is saved") == 1
    assert main(["--resume", str(out)]) == 0
    check_same(runs["one"], out)
