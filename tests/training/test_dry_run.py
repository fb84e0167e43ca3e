"""`--dry-run` writes nothing, and its estimates of memory and disk match the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from allocated import allocated
from safetensors import safe_open
from tiny_runs import run_options

from tsae.config import SAEConfig, TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.presets import at_length
from tsae.sae.kinds import KINDS
from tsae.sae.normalization import InputNormalizer
from tsae.train import command, main
from tsae.training import checkpoint
from tsae.training.dry_run import dry_run
from tsae.training.job import Job
from tsae.training.memory import BUFFER, MODEL, SAE, STEP, sae_bytes, step_bytes
from tsae.training.trainer import Trainer


def without_header(file: Path) -> int:
    """Bytes of a safetensors file's tensors."""
    return file.stat().st_size - 8 - int.from_bytes(file.open("rb").read(8), "little")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("activation", "length"),
    [
        *((kind, 128) for kind in (*KINDS, "rate with gate")),
        ("relu", 1024),
        ("schmitt", 512),
        ("topk", 16),
        ("relu", 4),
    ],
)
def test_memory_of_an_autoencoder_and_of_a_step(activation: str, length: int, autocast: bool) -> None:
    """As many tokens need as much memory at any length."""
    activation, *gate = activation.split()
    sae = SAEConfig(d_in=64, d_sae=1024, k=16, activation=activation, gate_gradient=0.2 * bool(gate))  # type: ignore[arg-type]
    cfg = at_length(TrainConfig(batch=8, sae=sae), length)
    trainer = Trainer(cfg, InputNormalizer.identity(64), torch.device("cpu"), autocast=autocast)
    shape = cfg.batch, length
    batch = ActivationBatch(torch.randn(*shape, 64), torch.zeros(shape, dtype=torch.int32))
    trainer.train_step(batch)
    state = [*trainer.sae.state_dict().values(), *(p.grad for p in trainer.sae.parameters())]
    state += [v for values in trainer.optimizer.state.values() for v in values.values() if v.dim()]
    assert sum(tensor.nbytes for tensor in state) == sae_bytes(sae)
    peak = allocated(lambda: trainer.train_step(batch))
    assert 0.8 * step_bytes(cfg, autocast=autocast) < peak < 1.05 * step_bytes(cfg, autocast=autocast)


def test_a_dry_run_writes_nothing_and_is_right(
    tiny_gemma2: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    argv = [*run_options(tiny_gemma2, text_file, out), "--cache", str(cache), "--lm-dtype", "float32"]
    watched = (tmp_path, tiny_gemma2, text_file.parent)
    before = [sorted(folder.rglob("*")) for folder in watched]
    assert main([*argv, "--dry-run"]) == 0
    assert [sorted(folder.rglob("*")) for folder in watched] == before
    assert "nothing was written" in capsys.readouterr().out

    estimate = dry_run(Job({"": command(argv)[0]}, out))
    assert not out.exists()
    assert not cache.exists()
    assert set(estimate.seconds) == {"harvest", "training"}
    assert all(seconds > 0 for seconds in estimate.seconds.values())
    assert estimate.seconds["training"] == 24 * estimate.measured["training"][0]

    assert main(argv) == 0
    announced = capsys.readouterr().err
    assert "Memory, estimated, in MiB: language model" in announced
    newest = checkpoint.latest(out / "checkpoint")
    assert newest is not None
    _, contents = checkpoint.load(newest)
    assert estimate.memory[BUFFER] == sum(tensor.nbytes for tensor in contents.values())
    with safe_open(tiny_gemma2 / "model.safetensors", framework="pt") as file:
        weights = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert weights <= estimate.memory[MODEL] < 1.01 * weights  # and a few buffers
    sae = SAEConfig(**json.loads((out / "config.json").read_text())["sae"])
    assert (estimate.memory[SAE], estimate.memory[STEP] > 0) == (sae_bytes(sae), True)
    files = sum(path.stat().st_size for path in (out / "checkpoint").rglob("*") if path.is_file())
    assert files < estimate.disk["checkpoints"] < 2 * files  # one more exists while it is written
    shards = sum(without_header(path) for path in cache.glob("shard-*"))
    assert estimate.disk["cache, to be added"] == pytest.approx(shards, rel=0.02)

    again = dry_run(Job({"": command([*argv, "--overwrite"])[0]}, out))
    assert again.disk["cache, to be added"] == 0
    assert again.seconds["harvest"] == 0
    assert again.seconds["reading the cache"] > 0


def test_a_sweep_has_a_dry_run_too(
    tiny_gemma2: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"model": str(tiny_gemma2), "data": str(text_file), "layer": 1, "steps": 4, "batch": 4, "device": "cpu"}
    values |= {"buffer": {"sequences": 8, "harvest_batch": 4}, "sae": {"d_sae": 48, "k": 4}}
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps({"base": values, "grid": {"seed": [0, 1]}}))
    before = sorted(tmp_path.rglob("*"))
    assert main(["--sweep", str(file), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert "nothing was written" in capsys.readouterr().out
    assert main(["--resume", str(tmp_path), "--dry-run"]) == 2
