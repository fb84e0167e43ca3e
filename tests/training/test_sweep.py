"""Sweeps on tiny models: the same weights as alone, one harvest, resuming, divergence, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import sample_text
from tiny_runs import Killed

import tsae.training.trainer
from tsae.config import TrainConfig
from tsae.data.harvest import Harvester
from tsae.errors import UserError
from tsae.train import main
from tsae.training.sweep_file import read_sweep
from tsae.training.trainer import Trainer
from tsae.utils.config_json import to_dict

pytestmark = pytest.mark.usefixtures("blank_report")

RUNS = {
    "plain": {"seed": 3, "sae.release_ratio": 1.0, "objective": {"temporal": "none"}},
    "wide": {"sae": {"d_sae": 96, "k": 1, "activation": "batchtopk"}, "log_every": 5, "optimizer.noise_eta": 0.1},
    "window": {"normalize": False, "sae.activation": "gelu", "objective": {"temporal": "window", "l1": 1e-3}},
}


@pytest.fixture(scope="module")
def base(tiny_neox: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text(sample_text(12_000))
    return {
        "preset": "demo",
        "model": str(tiny_neox),
        "data": str(text),
        "layer": 1,
        "steps": 12,
        "batch": 4,
        "log_every": 3,
        "device": "cpu",
        "sae": {"d_sae": 48, "k": 6},
        "objective.dead_after_tokens": 600,
        "objective.hold_steps": 2,
        "objective.ramp_steps": 2,
        "buffer": {"sequences": 24, "harvest_batch": 8, "reuse": 1, "estimate_sequences": 16},
        "checkpoint.every": 4,
        "evaluation": {"sequences": 8, "ce_sequences": 4},
        "text.evaluation_share": 0.2,
    }


def write(path: Path, **parts: Any) -> Path:
    path.write_text(yaml.safe_dump(parts, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def swept(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    asked: list[int] = []
    real = Harvester.batches

    def counting(self: Harvester, tokens: Any, *args: Any) -> Any:
        asked.append(tokens.segments.shape[0])
        return real(self, tokens, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Harvester, "batches", counting)
        file = write(folder / "three.yaml", base=base, runs=RUNS)
        assert main(["--sweep", str(file), "--out", str(folder / "out")]) == 0
    assert sum(asked) == 12 * 4  # one harvest for all
    return folder / "out"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "sae" / "sae_weights.safetensors")


def log(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def same(a: Path, b: Path) -> None:
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name
    assert log(a) == log(b)
    assert json.loads((a / "eval.json").read_text()) == json.loads((b / "eval.json").read_text())


def test_a_sweep_has_run_directories_and_a_table(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in swept.iterdir()} == {"checkpoint", "sweep.json", *RUNS}
    for name in RUNS:
        files = {path.name for path in (swept / name).iterdir()}
        assert files == {"config.json", "metrics.jsonl", "sae", "eval.json", "report.png"}
    state = torch.load(swept / "checkpoint" / "step-00000012" / "state.pt", weights_only=True)
    normalizers = {name: trainer["normalizer"] for name, trainer in state["trainers"].items()}
    assert torch.equal(normalizers["window"]["mean"], torch.zeros(32))
    assert normalizers["window"]["scale"] == 1.0
    assert normalizers["plain"]["scale"] == normalizers["wide"]["scale"] != 1.0
    assert [line["step"] for line in log(swept / "wide")] == [1, 5, 10, 12]
    rows = json.loads((swept / "sweep.json").read_text())["runs"]
    assert list(rows) == list(RUNS)
    for name, row in rows.items():
        assert row["config"] == json.loads((swept / name / "config.json").read_text())
        assert (row["steps"], row["error"]) == (12, None)
        assert row["metrics"] == json.loads((swept / name / "eval.json").read_text())
    assert {row["config"]["data_seed"] for row in rows.values()} == {0}
    assert (rows["plain"]["config"]["seed"], rows["window"]["config"]["objective"]["l1"]) == (3, 1e-3)
    before = (swept / "sweep.json").read_bytes()
    assert main(["--resume", str(swept)]) == 0  # there is nothing left to do but to evaluate
    assert (swept / "sweep.json").read_bytes() == before
    table = capsys.readouterr().out
    for word in (
        *RUNS,
        "shuffled",
        f"{rows['wide']['metrics']['l0']:.1f}",
        f"{rows['plain']['metrics']['explained_variance']:.3f}",
    ):
        assert word in table


@pytest.mark.parametrize("name", RUNS)
def test_a_run_alone_gives_bitwise_the_same(name: str, swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "alone"
    assert main(["--config", str(swept / name / "config.json"), "--out", str(out)]) == 0
    same(swept / name, out)


def test_the_data_seed_decides_the_batches_and_the_seed_the_weights(base: dict[str, Any], tmp_path: Path) -> None:
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def spy(self: Trainer, batch: Any, **options: Any) -> dict[str, float]:
        seen.setdefault((self.cfg.seed, self.cfg.stream_seed), batch.x)
        raise UserError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", spy)
        for data_seed in (0, 1):
            file = write(tmp_path / "s.yaml", base=base | {"data_seed": data_seed}, grid={"seed": [0, 1]})
            for name, cfg in read_sweep(file).items():
                (tmp_path / "c.json").write_text(json.dumps(to_dict(cfg)))
                assert main(["--config", str(tmp_path / "c.json"), "--out", str(tmp_path / f"{name}{data_seed}")]) == 2
    assert torch.equal(seen[0, 0], seen[1, 0])
    assert torch.equal(seen[0, 1], seen[1, 1])
    assert not torch.equal(seen[0, 0], seen[0, 1])


def diverging(patch: pytest.MonkeyPatch, run: str, at: int) -> None:
    real = tsae.training.trainer.objective

    def broken(inputs: Any, step: int, cfg: Any) -> Any:
        terms = real(inputs, step, cfg)
        if cfg.temporal != run or step < at - 1:
            return terms
        return terms._replace(reconstruction=torch.tensor(float("inf")))

    patch.setattr(tsae.training.trainer, "objective", broken)


@pytest.mark.parametrize("stop_at", [6, 9])
def test_a_diverged_run_stops_alone_and_resuming_is_bitwise_equal(
    stop_at: int, swept: Path, base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run diverges at step 7, all are killed before step `stop_at` + 1 and resumed."""
    out = tmp_path / "out"
    real = Trainer.train_step

    def killed(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.step == stop_at and self.cfg.sae.activation == "batchtopk":
            raise Killed
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        diverging(patch, "window", 7)
        arguments = ["--sweep", str(write(tmp_path / "s.yaml", base=base, runs=RUNS)), "--out", str(out)]
        patch.setattr(Trainer, "train_step", killed)
        with pytest.raises(Killed):
            main(arguments)
        patch.setattr(Trainer, "train_step", real)
        assert main(["--resume", str(out)]) == 0
    for name in ("plain", "wide"):
        same(swept / name, out / name)
    message = json.loads((out / "window" / "diverged.json").read_text())
    assert message["steps"] == 6
    assert "Training stopped at step 7: the reconstruction term of the loss is inf" in message["message"]
    row = json.loads((out / "sweep.json").read_text())["runs"]["window"]
    assert (row["steps"], row["metrics"], row["error"]) == (6, None, message["message"])
    assert log(out / "window") == [line for line in log(swept / "window") if line["step"] < 7]
    written = {"config.json", "metrics.jsonl", "diverged.json", "report.png"}
    assert {path.name for path in (out / "window").iterdir()} == written
    assert "window: Training stopped at step 7" in " ".join(capsys.readouterr().out.split())


def test_when_all_diverge_the_status_says_so(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        diverging(patch, "window", 2)
        file = write(tmp_path / "s.yaml", base=base, runs={"window": RUNS["window"]})
        assert main(["--sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "error: No run of" in capsys.readouterr().err
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_overwrite_replaces_runs_and_keeps_what_is_not_theirs(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    short = base | {"steps": 2, "evaluation.final": False}
    file = write(tmp_path / "s.yaml", base=short, runs={"a": None, "b": None})
    assert main(["--sweep", str(file), "--out", str(out)]) == 0
    (out / "b" / "notes.txt").write_text("precious")
    write(file, base=short, runs={"c": None})
    assert main(["--sweep", str(file), "--out", str(out)]) == 2
    assert "already has a sweep; continue it with --resume" in capsys.readouterr().err
    assert main(["--sweep", str(file), "--out", str(out), "--overwrite"]) == 0
    assert {path.name for path in out.iterdir()} == {"checkpoint", "sweep.json", "b", "c"}
    assert [path.name for path in (out / "b").iterdir()] == ["notes.txt"]
    assert main(["--resume", str(out / "c")]) == 2
    assert f"is part of a sweep; resume the sweep, --resume {out}" in capsys.readouterr().err


def test_default_directory(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sizes.yaml", base=base | {"steps": 1, "evaluation.final": False}, grid={"sae.k": [4, 5]})
    assert main(["--sweep", "sizes.yaml"]) == 0
    latest = (tmp_path / "runs" / "latest").resolve()
    assert latest.parent == tmp_path / "runs" / "sweep-sizes"
    assert (latest / "k5" / "sae").is_dir()


def test_grid_names_and_nested_and_dotted_options(tmp_path: Path) -> None:
    text = """
    base: {seed: 5, optimizer: {lr: 1e-3}, sae.k: 20}
    runs:
      a: {}
      b: {preset: tsae-gemma-2-2b, data: python-docs, sae: {d_sae: 99}, layer: 9, model: gemma-3-270m}
    grid: {sae.release_ratio: [0.3, 1], objective.temporal: [none, window]}
    """
    file = tmp_path / "s.yaml"
    file.write_text(text.replace("      b:", "      # b:"))
    cfgs = read_sweep(file)
    assert list(cfgs) == [f"a-release_ratio{r}-temporal{t}" for r in ("0.3", "1") for t in ("none", "window")]
    cfg = cfgs["a-release_ratio1-temporalwindow"]
    assert (cfg.sae.release_ratio, cfg.objective.temporal, cfg.sae.k, cfg.optimizer.lr) == (1.0, "window", 20, 1e-3)
    assert (cfg.seed, cfg.data_seed, cfg.preset) == (5, 5, "demo")
    file.write_text(text)
    with pytest.raises(UserError, match=r"Run 'b-.*' has text\.column = 'text' and run 'a-"):
        read_sweep(file)  # of another preset, with other text options


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runs: {a: {}, b: {steps: 7}}", "Run 'b' has steps = 7 and run 'a' 800"),
        ("runs: {a: {}, b: {data_seed: 7}}", "Run 'b' has data_seed = 7 and run 'a' 0"),
        ("runs: {a: {}, b: {buffer.reuse: 7}}", "Run 'b' has buffer.reuse = 7"),
        ("runs: {a: {sae.kk: 7}}", "unknown field 'sae.kk'"),
        ("runs: {a: {model.kk: 7}}", "There is no option 'model.kk'"),
        ("runs: {a: {sae.k: many}}", "Run 'a' of"),
        ("runs: {a: {sae.k: 0}}", "sae.k is 0"),
        ("runs: {a: {objective.temporal: slow+fast}}", "objective.temporal is 'slow+fast'; it must be none, or any of"),
        ("runs: {a: {optimizer.lr: .nan}}", "optimizer.lr is nan"),
        ("runs: {a: {}, a: {seed: 1}}", "'a' is given twice"),
        ("runs: {../a: {}}", "named '../a'"),
        ("runs: {checkpoint: {}}", "named 'checkpoint'"),
        ("runs: [a]", "it must be a mapping"),
        ("runs: {a: 3}", "it must be a mapping of options"),
        ("base: {seed: 1}", "neither runs nor a grid"),
        ("grid: {seed: 1}", "it must be a list"),
        ("base: {preset: nosuch}\nruns: {a: }", "There is no preset 'nosuch'"),
        ("run: {a: {}}", "a mapping with base, and runs or grid or both"),
        ("runs: {a: [}", "cannot be read as YAML"),
        ("base: {model: /no/such/model}\nruns: {a: }", "/no/such/model"),
        ("base: {sae.d_in: 7, model: MODEL, data: DATA, layer: 1}\nruns: {a: }", "Run 'a': sae.d_in is 7"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    text: str, words: str, base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(text.replace("MODEL", base["model"]).replace("DATA", base["data"]))
    assert main(["--sweep", str(file), "--out", str(out)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not out.exists()


def test_options_beside_a_sweep_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--sweep", str(tmp_path / "s.yaml"), "--steps", "9"]) == 2
    assert "leave out --steps" in capsys.readouterr().err
    assert main(["--sweep", str(tmp_path / "s.yaml")]) == 2
    assert "There is no file" in capsys.readouterr().err


def test_a_data_seed_is_checked() -> None:
    with pytest.raises(UserError, match="data_seed is -1"):
        TrainConfig(data_seed=-1).check()
