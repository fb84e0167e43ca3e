"""Training on a GPU: a run, bfloat16, resuming, a sweep, harvesting ahead, a CUDA graph. Skipped without a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import Killed, die, lines, options, same, weights

from tsae.config import SAEConfig
from tsae.sae.model import SparseAutoencoder
from tsae.train import main
from tsae_kernels import MULTISCALE, count_positions, temporal_loss_from_stats

DEVICE = "cuda"
HAVE_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAVE_GPU, reason="torch sees no GPU"),
    pytest.mark.usefixtures("blank_report"),
]

FLOAT32 = ("--lm-dtype", "float32", "--autocast", "none")
TEMPORAL = ("multiscale", "contrastive+window")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Gradients of gathered rows are sums in a fixed order, not in that of atomic additions."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def on(device: str, argv: list[str]) -> list[str]:
    """The command line with another device."""
    place = argv.index("--device") + 1
    return [*argv[:place], device, *argv[place + 1 :]]


def test_a_run_on_a_gpu_has_the_losses_of_one_on_a_cpu(tiny_neox: Path, text_file: Path, tmp_path: Path) -> None:
    for device in (DEVICE, "cpu"):
        assert main(on(device, options(tiny_neox, text_file, tmp_path / device, *FLOAT32))) == 0
    gpu, cpu = (lines(tmp_path / device / "metrics.jsonl") for device in (DEVICE, "cpu"))
    assert [line["step"] for line in gpu] == [line["step"] for line in cpu]
    for name in ("loss", "l0", "gradient_norm"):
        assert gpu[0][name] == pytest.approx(cpu[0][name], rel=1e-3), name
        assert gpu[-1][name] == pytest.approx(cpu[-1][name], rel=0.05), name
    found, expected = (json.loads((tmp_path / device / "eval.json").read_text()) for device in (DEVICE, "cpu"))
    assert found["explained_variance"] == pytest.approx(expected["explained_variance"], abs=0.02)
    assert found["ce_loss_with_sae"] == pytest.approx(expected["ce_loss_with_sae"], rel=1e-2)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / DEVICE).values())


def test_bfloat16_autocast_trains_float32_weights(tiny_neox: Path, text_file: Path, tmp_path: Path) -> None:
    precise = [*FLOAT32, "--steps", "24"]
    rough = ["--lm-dtype", "bfloat16", "--autocast", "bfloat16", "--steps", "24"]
    for name, more in (("float32", precise), ("bfloat16", rough)):
        assert main(on(DEVICE, options(tiny_neox, text_file, tmp_path / name, *more))) == 0
    first, exact = (lines(tmp_path / name / "metrics.jsonl") for name in ("bfloat16", "float32"))
    assert first[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)
    assert first[0]["loss"] != exact[0]["loss"]
    assert first[-1]["loss"] < first[0]["loss"]
    saved = weights(tmp_path / "bfloat16")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("temporal", TEMPORAL)
def test_a_killed_run_resumes_bitwise(
    temporal: str, argv_of: Callable[..., list[str]], at_step: Callable[..., None], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(on(DEVICE, argv_of(whole, "--objective.temporal", temporal))) == 0
    at_step(13, die)
    with pytest.raises(Killed):
        main(on(DEVICE, argv_of(killed, "--objective.temporal", temporal)))
    at_step()
    assert main(["--resume", str(killed)]) == 0
    same(whole, killed)


@pytest.mark.usefixtures("deterministic")
def test_harvesting_ahead_changes_no_bit(argv_of: Callable[..., list[str]], tmp_path: Path) -> None:
    """The language model then runs in a thread, beside the training steps."""
    for ahead in ("0", "24"):
        assert main(on(DEVICE, argv_of(tmp_path / ahead, "--buffer.ahead", ahead))) == 0
    same(tmp_path / "0", tmp_path / "24")


@pytest.mark.usefixtures("deterministic")
def test_a_run_of_a_sweep_is_bitwise_the_run_alone(tiny_neox: Path, text_file: Path, tmp_path: Path) -> None:
    runs: dict[str, dict[str, Any]] = {
        "hysteresis": {"objective.temporal": "multiscale"},
        "topk": {"sae.activation": "topk", "objective.temporal": "none"},
    }
    base = {
        "preset": "demo",
        "model": str(tiny_neox),
        "data": str(text_file),
        "layer": 1,
        "steps": 12,
        "batch": 4,
        "device": DEVICE,
        "sae": {"d_sae": 48, "k": 6},
        "buffer": {"sequences": 24, "harvest_batch": 8, "reuse": 1, "estimate_sequences": 16},
        "evaluation": {"final": False},
        "text.evaluation_share": 0.2,
    }
    for name, chosen in (("both", runs), ("alone", {"topk": runs["topk"]})):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"base": base, "runs": chosen}, sort_keys=False))
        assert main(["--sweep", str(file), "--out", str(tmp_path / name)]) == 0
    together, alone = (load_file(tmp_path / n / "topk" / "sae" / "sae_weights.safetensors") for n in ("both", "alone"))
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    assert (tmp_path / "both" / "hysteresis" / "sae" / "sae_weights.safetensors").is_file()


def test_a_cuda_graph_captures_forward_and_backward_of_a_step() -> None:
    """Of an autoencoder with hysteresis and the temporal loss.

    The trainer's own step still waits for the device (indices of dead features, pairs drawn on the CPU); once it does
    not, this test should capture `Trainer.train_step`.
    """
    torch.manual_seed(0)
    d_in, d_sae = 32, 130
    sae = SparseAutoencoder(SAEConfig(d_in=d_in, d_sae=d_sae, k=8, activation="schmitt")).to(DEVICE).train()
    with torch.no_grad():
        sae.threshold.fill_(0.5)
        sae.release.fill_(0.2)
    x = torch.randn(4, 128, d_in, device=DEVICE)  # [B, T, d]
    segments = (torch.arange(128, device=DEVICE) // 50).expand(4, -1).contiguous()
    parameters = [parameter for parameter in sae.parameters() if parameter.requires_grad]

    def step() -> list[torch.Tensor]:
        h, stats, _ = sae.activate_counted(sae.pre_activation(x), MULTISCALE, segments)
        *_, xhat = sae.decode_prefixes(h)
        temporal = temporal_loss_from_stats(stats, count_positions(segments))
        loss = (x - xhat).square().sum(-1).mean() + temporal
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        step()
    torch.cuda.current_stream().wait_stream(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    for found, expected in zip(replayed, step(), strict=True):
        torch.testing.assert_close(found, expected)
    assert math.isfinite(replayed[0].item())
