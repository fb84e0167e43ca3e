"""The main job end to end on tiny models of the real classes: results, resuming after kill -9, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tsae import checkpoint, directories
from tsae.config import to_dict
from tsae.data.harvest import Harvester
from tsae.errors import UserError
from tsae.sae.model import SparseAutoencoder
from tsae.train import command, main
from tsae.trainer import Trainer

WORDS = [
    "the",
    "river",
    "ran",
    "under",
    "a",
    "stone",
    "bridge",
    "and",
    "children",
    "threw",
    "leaves",
    "from",
    "it",
    "to",
    "see",
    "whose",
    "would",
    "come",
    "out",
    "first",
    "on",
    "the",
    "other",
    "side",
    "where",
    "an",
    "old",
    "man",
    "sat",
    "reading",
    "his",
    "paper",
    "in",
    "the",
    "sun",
    "as",
    "he",
    "had",
    "done",
    "every",
    "day",
    "for",
    "years",
]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(1500):
        picks = torch.randint(len(WORDS), (40,), generator=generator).tolist()
        lines.append(" ".join(WORDS[i] for i in picks) + ".\n\n")
    path = tmp_path_factory.mktemp("text") / "river.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def options(model: Path, text: Path, out: Path, *more: str, preset: str = "demo") -> list[str]:
    base = f"""{preset} --model {model} --data {text} --out {out} --layer 1 --steps 12 --batch 4 --log-every 3
        --device cpu --sae.d-sae 48 --sae.k 6 --buffer.sequences 24 --buffer.harvest-batch 8 --buffer.reuse 1
        --buffer.estimate-sequences 16 --checkpoint.every 4 --evaluation.sequences 8 --evaluation.ce-sequences 4
        --text.column None --text.evaluation-share 0.2"""
    return base.split() + list(more)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def leaves(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    return [value]


@pytest.mark.parametrize(
    ("model", "preset"),
    [("tiny_gemma2", "tsae-gemma-2-2b"), ("tiny_neox", "tcsae-pythia-70m"), ("tiny_gemma3", "demo")],
)
def test_every_preset_runs_end_to_end(
    model: str, preset: str, text_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "run"
    more = ["--optimizer.warmup-steps", "1", "--optimizer.lr", "1e-3"]
    assert main(options(request.getfixturevalue(model), text_file, out, *more, preset=preset)) == 0
    names = {p.name for p in out.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoint", "sae", "eval.json", "report.png"}
    logged = lines(out / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 3, 6, 9, 12]
    wanted = {
        "loss",
        "reconstruction",
        "sparsity",
        "temporal",
        "auxiliary",
        "explained_variance",
        "l0",
        "dead",
        "lr",
    }
    wanted |= {
        "lag1_correlation",
        "lag1_correlation_p10",
        "lag1_correlation_p50",
        "lag1_correlation_p90",
        "tokens",
    }
    assert all(wanted <= set(line) for line in logged)
    assert logged[-1]["reconstruction"] < logged[0]["reconstruction"]
    assert logged[-1]["tokens"] <= 12 * 4 * 128
    values = json.loads((out / "eval.json").read_text())
    assert all(isinstance(leaf, (int, float)) and abs(leaf) < 1e30 for leaf in leaves(values))
    config = json.loads((out / "config.json").read_text())
    assert (config["preset"], config["steps"], config["sae"]["d_sae"]) == (preset, 12, 48)
    assert config["text"]["threshold"] == 0.2  # the split that holds from now on, whatever becomes of the text
    sae = SparseAutoencoder.load(out / "sae")
    assert sae.W_enc.shape == (sae.cfg.d_in, 48)
    if preset == "tcsae-pythia-70m":
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
        assert (sae.cfg.activation, logged[0]["temporal"] > 0) == ("gelu", True)


def run_options(model: Path, text: Path, out: Path) -> list[str]:
    """Everything with state on: noise, temporal loss, dead features, a buffer that refills."""
    more = "--steps 24 --optimizer.noise-eta 0.1 --optimizer.clip-norm 2 --objective.hold-steps 4"
    more += " --objective.ramp-steps 4 --objective.dead-after-tokens 600 --evaluation.no-final"
    more += " --sae.d-sae 96 --sae.k 1"  # few enough active that some die
    return options(model, text, out, *more.split())


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "sae" / "sae_weights.safetensors")


@pytest.fixture(scope="session")
def uninterrupted(tiny_gemma2: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(run_options(tiny_gemma2, text_file, out)) == 0
    later = lines(out / "metrics.jsonl")[2:]
    for name in ("dead", "auxiliary", "temporal"):  # else a resumed run could lose their state unnoticed
        assert all(line[name] > 0 for line in later)
    return out


def same(a: Path, b: Path) -> None:
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name
    timing = "tokens_per_second"
    first, second = ([{k: v for k, v in x.items() if k != timing} for x in lines(p / "metrics.jsonl")] for p in (a, b))
    assert first == second


@pytest.mark.parametrize("stop_at", [1, 4, 6, 13, 23])
def test_resume_is_bitwise_equal_wherever_it_stopped(
    stop_at: int,
    uninterrupted: Path,
    tiny_gemma2: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    real = Trainer.train_step

    class Killed(BaseException):
        pass

    def killed(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.step == stop_at:
            raise Killed
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(Killed):
        main(run_options(tiny_gemma2, text_file, out))
    monkeypatch.setattr(Trainer, "train_step", real)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99')  # a line cut short
    assert main(["--resume", str(out)]) == 0
    same(uninterrupted, out)


@pytest.mark.slow
def test_resume_after_kill_9(uninterrupted: Path, tiny_gemma2: Path, text_file: Path, tmp_path: Path) -> None:
    """A real process, really killed, three times at moments nobody chose."""
    out = tmp_path / "run"
    arguments = run_options(tiny_gemma2, text_file, out)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }

    def start(argv: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tsae.train", *argv],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    process = start(arguments)
    for wanted in (3, 9, 15):  # as soon as the log has come this far
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            path = out / "metrics.jsonl"
            if path.exists() and any(f'"step": {n},' in path.read_text() for n in range(wanted, 25)):
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = start(["--resume", str(out)])
    assert process.wait(timeout=200) == 0
    same(uninterrupted, out)


@pytest.mark.parametrize("term", ["reconstruction", "temporal"])
def test_a_loss_that_is_not_finite_stops_with_step_term_and_checkpoint(
    term: str,
    tiny_neox: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tsae.trainer

    real = tsae.trainer.objective

    def broken(x: Any, xhat: Any, h: Any, stats: Any, step: int, cfg: Any, **kw: Any) -> Any:
        terms = real(x, xhat, h, stats, step, cfg, **kw)
        if step < 6:
            return terms
        bad = torch.tensor(float("nan"))
        return terms._replace(**{term: bad, "total": terms.total * bad})

    monkeypatch.setattr(tsae.trainer, "objective", broken)
    out = tmp_path / "run"
    assert main(options(tiny_neox, text_file, out)) == 2
    message = capsys.readouterr().err
    assert f"step 7: the {term} term of the loss is nan" in message
    assert str(out / "checkpoint" / "step-00000004") in message
    assert not (out / "sae").exists()
    state = torch.load(out / "checkpoint" / "step-00000004" / "state.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in state["trainers"][""]["sae"].values())


class BrokenGradient(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * float("nan")


@pytest.mark.parametrize("broken_at", [7, 12])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    broken_at: int,
    tiny_neox: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tsae.trainer

    real = tsae.trainer.objective

    def broken(x: Any, xhat: Any, h: Any, stats: Any, step: int, cfg: Any, **kw: Any) -> Any:
        terms = real(x, xhat, h, stats, step, cfg, **kw)
        return terms._replace(total=BrokenGradient.apply(terms.total)) if step == broken_at - 1 else terms

    monkeypatch.setattr(tsae.trainer, "objective", broken)
    out = tmp_path / "run"
    assert main(options(tiny_neox, text_file, out, "--optimizer.clip-norm", "0")) == 2
    assert f"step {broken_at}: the norm of the gradient is nan" in capsys.readouterr().err
    newest = checkpoint.latest(out / "checkpoint")
    assert newest is not None
    assert newest.name == f"step-{(broken_at - 1) // 4 * 4:08d}"
    assert not (out / "sae").exists()


@pytest.mark.parametrize("tensor", ["sae.W_enc", "optimizer.state.0.exp_avg", "temporal_buffer"])
def test_a_checkpoint_of_numbers_that_are_not_finite_is_never_written(
    tensor: str,
    tiny_neox: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a GPU, where a step without a log looks at nothing."""
    real = Trainer.train_step

    def spoiling(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        values = real(self, *args, **kwargs)
        if self.step == 8:
            found: Any = self.state_dict()
            for part in tensor.split("."):
                found = found[int(part) if part.isdigit() else part]
            found[(0,) * found.dim()] = float("inf")
        return values

    monkeypatch.setattr(Trainer, "train_step", spoiling)
    out = tmp_path / "run"
    assert main(options(tiny_neox, text_file, out)) == 2
    message = capsys.readouterr().err
    assert f"step 8: {tensor} is not finite" in message
    assert f"the last good checkpoint is {out / 'checkpoint' / 'step-00000004'}" in message
    newest = checkpoint.latest(out / "checkpoint")
    assert newest is not None
    assert newest.name == "step-00000004"


def test_the_start_up_line_states_the_buffers_bound(
    tiny_neox: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "--steps 3 --batch 32 --buffer.sequences 64 --buffer.dtype float32 --evaluation.no-final"
    more += " --lm-dtype float32 --autocast none"
    assert main(options(tiny_neox, text_file, tmp_path / "run", *more.split())) == 0
    start = " ".join(capsys.readouterr().err.split())
    # 64 sequences x 128 tokens x width 32 x 4 bytes = 1 MiB
    assert "Activation buffer: at most 64 sequences, 1 MiB (float32)" in start
    assert "layer 1 (float32) on cpu, 48 schmitt features, 3 steps of 32 x 128 tokens." in start
    assert start.index("Activation buffer") < start.index("Harvest") < start.index("Training")


def test_mean_and_scale_come_from_positions_that_count(tiny_neox: Path, tmp_path: Path) -> None:
    text = tmp_path / "special.txt"
    text.write_text("".join(f"the river ran {'<eos>' * (i % 4)} under a bridge {i}.\n\n" for i in range(3000)))
    out = tmp_path / "run"
    assert main(options(tiny_neox, text, out, "--steps", "4", "--evaluation.no-final")) == 0
    held = load_file(out / "checkpoint" / "buffer-0001.safetensors")  # all that was harvested
    kept = held["segments"] >= 0
    assert int((~kept).sum()) > 0
    x = held["x"][kept].double()
    state = torch.load(out / "checkpoint" / "step-00000004" / "state.pt", weights_only=True)
    normalizer = state["trainers"][""]["normalizer"]
    torch.testing.assert_close(normalizer["mean"].double(), x.mean(0), rtol=1e-5, atol=1e-6)
    assert normalizer["scale"] == pytest.approx(float(x.var(0, correction=0).mean().sqrt()), rel=1e-5)


def test_both_evaluations_read_only_text_that_training_does_not(
    tiny_neox: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches the metrics, decoded: every segment is in the evaluation part, none is in the training part."""
    import tsae.evaluate
    import tsae.run
    from tsae.data.text import TextConfig, open_text

    seen: list[list[str]] = []
    real = tsae.evaluate.evaluate_all

    def spy(saes: Any, lm: Any, batches: list[Any], **options: Any) -> Any:
        segments: list[str] = []
        for batch in batches:
            for row, ids in zip(batch.tokens[:, 1:], batch.segments, strict=True):
                segments += [lm.tokenizer.decode(row[ids == i]) for i in ids.unique() if i >= 0]
        seen.append(segments)
        return real(saes, lm, batches, **options)

    monkeypatch.setattr(tsae.run, "evaluate_all", spy)
    monkeypatch.setattr(tsae.evaluate, "evaluate_all", spy)
    out = tmp_path / "run"
    assert main(options(tiny_neox, text_file, out, "--steps", "2")) == 0
    assert tsae.evaluate.main([str(out)]) == 0

    def part(name: Any) -> str:
        config = TextConfig(evaluation_share=0.2)
        return "\0".join(d.text for d in open_text(str(text_file), part=name, seed=0, config=config))

    held_out, trained_on = part("evaluation"), part("train")
    assert len(seen) == 2
    for segments in seen:
        assert len(segments) >= 8
        assert all(text in held_out for text in segments)
        assert not any(text in trained_on for text in segments if len(text) > 100)
    assert seen[0] == seen[1]


def test_a_directory_with_a_run_is_not_touched(
    uninterrupted: Path,
    tiny_gemma2: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    assert main(run_options(tiny_gemma2, text_file, uninterrupted)) == 2
    message = capsys.readouterr().err
    assert "--resume" in message
    assert "--overwrite" in message
    assert before == {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    assert main(run_options(tiny_gemma2, text_file, other)) == 2
    assert main([*run_options(tiny_gemma2, text_file, other), "--overwrite"]) == 2
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]


def test_overwrite_replaces_a_run(tiny_neox: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    short = options(tiny_neox, text_file, out, "--steps", "2", "--evaluation.no-final")
    assert main(short) == 0
    assert main([*short, "--overwrite", "--steps", "3"]) == 0
    assert json.loads((out / "config.json").read_text())["steps"] == 3
    assert [p.name for p in (out / "checkpoint").glob("step-*")] == ["step-00000003"]


def test_overwrite_killed_at_any_moment_can_be_started_again(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    cfg, _ = command([])
    for changes in range(100):
        out = tmp_path / f"run-{changes}"
        shutil.copytree(uninterrupted, out)
        left = [changes]

        def until_killed(real: Any, left: list[int] = left) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir", "replace", "mkdir", "open"):
                patch.setattr(os, name, until_killed(getattr(os, name)))
            try:
                directories.start_run(out, cfg)
                break
            except Killed:
                pass
        assert directories.new_directory("demo", out, overwrite=True) == out
    assert changes > 10
    assert json.loads((out / "config.json").read_text()) == to_dict(cfg)
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_a_first_start_killed_at_once_can_be_started_again(tmp_path: Path) -> None:
    (tmp_path / ".config.json.tmp").write_text("{")
    assert directories.new_directory("demo", tmp_path, overwrite=False) == tmp_path


@pytest.fixture
def short_text(text_file: Path, tmp_path: Path) -> Path:
    """Fills a row of 128 tokens, but not the harvest's first batch."""
    path = tmp_path / "short.txt"
    path.write_text("".join(text_file.read_text().splitlines(keepends=True)[:8]))
    return path


def test_bad_input_that_shows_late_leaves_the_old_run(
    tiny_neox: Path,
    text_file: Path,
    short_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    short = options(tiny_neox, text_file, out, "--steps", "2", "--evaluation.no-final")
    assert main(short) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main([*short, "--overwrite", "--data", str(short_text)]) == 2
    message = capsys.readouterr().err
    assert "the text is too short" in message
    assert "Activation buffer" not in message  # found before the run announces itself

    def fail(*args: object, **kwargs: object) -> None:
        raise UserError("no")

    for owner, name in ((Harvester, "batches"), (Trainer, "__init__")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            assert main([*short, "--overwrite"]) == 2
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--layer", "99"], "99"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--data", "/no/such/text.txt"], "/no/such/text.txt"),
        (["--data", "nobody/no-such-data"], "nobody/no-such-data"),
        (["--model", "nobody/no-such-model"], "nobody/no-such-model"),
        (["--sae.k", "49"], "sae.k is 49"),
        (["--sae.d-in", "7"], "sae.d_in is 7"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "'meta' cannot be used"),
        (["--objective.l1", "nan"], "objective.l1 is nan"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    more: list[str],
    words: str,
    tiny_gemma2: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    assert main(options(tiny_gemma2, text_file, out, *more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_found_first(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/nowhere/run")):
        assert main(options(Path("/no/such/model"), text_file, out)) == 2
        assert f"error: A run cannot be written to {out}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_empty_and_short_text_and_missing_columns(
    tiny_gemma2: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("the river ran. " * 5 + "\n\n" + "under a bridge. " * 3)
    (tmp_path / "rows.jsonl").write_text('{"body": "the river ran"}\n{"body": "under"}\n')
    for name, more in (("empty.txt", []), ("short.txt", []), ("rows.jsonl", ["--text.column", "text"])):
        out = tmp_path / "run"
        assert main(options(tiny_gemma2, text_file, out, "--data", str(tmp_path / name), *more)) == 2
        message = capsys.readouterr().err
        assert message.count("error: ") == 1
        assert "Traceback" not in message
        assert not out.exists()
    assert "body" in message


def test_resume_says_what_is_wrong(tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", str(tmp_path)]) == 2
    assert "holds no run to resume" in capsys.readouterr().err
    assert main(["--resume", str(uninterrupted), "--steps", "9"]) == 2
    assert "leave out --steps" in capsys.readouterr().err
    assert main(["tsae-gemma-2-2b", "--resume", str(uninterrupted)]) == 2
    assert "is a run of the preset 'demo', not 'tsae-gemma-2-2b'" in capsys.readouterr().err
    assert main(["demo", "--resume", str(uninterrupted)]) == 0


def test_default_directory_and_latest(
    tiny_neox: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = options(tiny_neox, text_file, Path("unused"), "--steps", "2", "--evaluation.no-final")
    where = arguments.index("--out")
    assert main(arguments[:where] + arguments[where + 2 :]) == 0
    latest = tmp_path / "runs" / "latest"
    assert latest.is_symlink()
    assert (latest / "config.json").exists()
    assert latest.resolve().parent == tmp_path / "runs" / "demo"


def test_runs_of_the_same_second_go_to_different_directories() -> None:
    assert len({directories.new_directory("demo", None, overwrite=False) for _ in range(20)}) == 20


def test_a_run_with_relative_paths_goes_on_from_another_directory(
    tiny_neox: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tsae.evaluate

    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    shutil.copytree(tiny_neox, tmp_path / "here" / "model")
    shutil.copy(text_file, tmp_path / "here" / "text.txt")
    monkeypatch.chdir(tmp_path / "here")
    out = tmp_path / "run"
    assert main(options(Path("model"), Path("text.txt"), out, "--steps", "2")) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["model"], config["data"]) == (str(tmp_path / "here/model"), str(tmp_path / "here/text.txt"))
    monkeypatch.chdir(tmp_path / "there")
    assert main(["--resume", str(out)]) == 0
    assert tsae.evaluate.main([str(out)]) == 0
    monkeypatch.chdir(tmp_path / "here")
    assert tsae.evaluate.main([str(out), "--data", "text.txt", "--column", "x"]) == 0
    assert json.loads((out / "eval_source.json").read_text())["data"] == config["data"]


def test_excluded_positions_change_nothing(tiny_gemma2: Path, text_file: Path) -> None:
    """Poison at positions of negative segment id reaches neither the weights nor a logged figure."""
    from dataclasses import replace

    from tsae.data.harvest import Harvest
    from tsae.sae.normalization import InputNormalizer

    for activation in ("schmitt", "batchtopk", "topk", "relu", "jumprelu", "jumprelu_schmitt"):
        more = "--sae.d-sae 32 --sae.k 4 --objective.l1 0.1 --objective.hold-steps 0 --objective.dead-after-tokens 1"
        cfg, _ = command(["demo", *more.split(), "--sae.activation", activation])
        cfg = replace(cfg, sae=replace(cfg.sae, d_in=8))
        x = torch.randn(4, 20, 8, generator=torch.Generator().manual_seed(0))
        segments = torch.zeros(4, 20, dtype=torch.int32)
        segments[:, 7] = -1
        segments[2, 15:] = -1
        poisoned = x.clone()
        poisoned[segments < 0] = 1e4
        results = []
        for data in (x, poisoned):
            trainer = Trainer(cfg, InputNormalizer(torch.zeros(8), 1.0), torch.device("cpu"), autocast=False)
            logged = [trainer.train_step(Harvest(data, segments), log=True) for _ in range(3)]
            results.append((trainer.sae.state_dict(), logged))
        for name, tensor in results[0][0].items():
            torch.testing.assert_close(tensor, results[1][0][name], rtol=1e-5, atol=1e-6)
        for a, b in zip(results[0][1], results[1][1], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_unknown_errors_are_not_swallowed(
    monkeypatch: pytest.MonkeyPatch, tiny_neox: Path, text_file: Path, tmp_path: Path
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(options(tiny_neox, text_file, tmp_path / "run"))


def test_user_errors_are_value_errors() -> None:
    assert issubclass(UserError, ValueError)
