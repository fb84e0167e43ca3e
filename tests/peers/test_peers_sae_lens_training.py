"""`tsae.integrations.sae_lens` in the real SAELens: registry, trainer and loader."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_cases import D_IN, D_SAE, K, activations, same_to, trained

import tsae
from tsae.training.temporal_objectives import contrastive_loss, draw_pairs
from tsae_kernels import temporal_loss, window_consistency

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed; make peers")
integration = pytest.importorskip("tsae.integrations.sae_lens")

ROOT = Path(__file__).parents[2]
B, T = 6, 32


def slow_signals(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches in which directions switch slowly, plus directions that change at every token."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, D_IN, generator=generator), dim=1)
    segments = torch.zeros(B, T, dtype=torch.int32)
    segments[:, T // 2 :] = 1
    out = []
    for _ in range(steps):
        level = torch.randn(B, 2, 24, generator=generator).sub(1.0).relu().repeat_interleave(T // 2, dim=1)
        flicker = torch.randn(B, T, 24, generator=generator).sub(1.5).relu()
        out.append((4.0 * (level + flicker) @ directions, segments))
    return out


def train(kind: str, steps: int = 150, **options: Any) -> Any:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    sae_class, config_class = get_sae_training_class(kind)
    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, k=K, **options))
    batches = integration.SequenceBatches(itertools.cycle(slow_signals(20)))
    if hasattr(sae, "follow"):
        sae.follow(batches)
    cfg = SAETrainerConfig(total_training_samples=steps * B * T, train_batch_size_samples=B * T, lr=3e-3, lr_end=3e-4)
    return SAETrainer(cfg, sae, batches).fit()


def test_batches_are_flattened_sequences() -> None:
    (x, segments), *_ = slow_signals(1)
    normalizer = tsae.sae.normalization.InputNormalizer(torch.full((D_IN,), 2.0), 4.0)
    batches = integration.SequenceBatches([(x.bfloat16(), segments)], normalizer)
    assert batches.segments is None
    rows = next(batches)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.reshape(B, T, D_IN), (x.bfloat16().float() - 2.0) / 4.0)
    assert batches.segments is segments
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("temporal", ["contrastive", "multiscale", "window", "slow"])
def test_the_loss_is_our_objective_on_sequences(temporal: str) -> None:
    from sae_lens.saes.sae import TrainStepInput

    options = {"temperature": 0.2, "pairs": 20, "min_variance": 0.0}
    cfg = integration.TemporalTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=K, temporal=temporal, temporal_options=options
    )
    sae = integration.TemporalTopKTrainingSAE(cfg)
    batches = integration.SequenceBatches(slow_signals(1))
    x = next(batches)
    step = TrainStepInput(x, {"temporal": 3.0}, None, 7, False)
    sae.follow(batches)
    out = sae.training_forward_pass(step)
    h, segments = out.feature_acts.reshape(B, T, D_SAE), batches.segments
    expected = {
        "contrastive": lambda: contrastive_loss(h, draw_pairs(segments, 1, 20, torch.Generator().manual_seed(7)), 0.2),
        "multiscale": lambda: temporal_loss(h, segments=segments, min_variance=0.0),
        "window": lambda: 0.01 * window_consistency(h, 3, segments),
    }
    if temporal in expected:
        torch.testing.assert_close(out.losses["temporal_loss"], 3.0 * expected[temporal](), rtol=1e-4, atol=1e-7)
    out.loss.backward()
    losses = {name: float(value.detach()) for name, value in out.losses.items()}
    assert losses["temporal_loss"] > 0
    assert float(out.loss.detach()) == pytest.approx(sum(losses.values()), rel=1e-5)
    assert torch.isfinite(sae.W_enc.grad).all()


@pytest.mark.parametrize("kind", ["temporal_topk", "temporal_batchtopk"])
def test_saelens_trains_saves_and_loads_temporal_saes(kind: str, tmp_path: Path) -> None:
    sae = train(kind, temporal_coefficient=1.0, temporal_warm_up_steps=10)
    sae.save_inference_model(tmp_path / "inference")
    sae.save_model(tmp_path / "training")
    inference = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    assert inference.cfg.architecture() == ("topk" if kind == "temporal_topk" else "jumprelu")
    again = sae_lens.TrainingSAE.load_from_disk(tmp_path / "training")
    assert type(again) is type(sae)
    assert again.cfg.temporal == "contrastive"
    ours, (x, segments) = tsae.load(tmp_path / "inference"), slow_signals(1)[0]
    with torch.no_grad():
        same_to(ours.encode(x), inference.encode(x))
        assert float((x - ours(x)).square().sum() / (x - x.mean((0, 1))).square().sum()) < 0.3
    assert segments.shape == x.shape[:2]


def test_the_objective_makes_features_more_consistent() -> None:
    """A contrastive term on adjacent tokens, against SAELens's TopK on the same batches."""
    from tsae.evaluation.metrics import TemporalMetrics

    scores = {}
    for kind, options in (("topk", {}), ("temporal_topk", {"temporal_coefficient": 1.0})):
        sae = train(kind, **options)
        metrics = TemporalMetrics()
        with torch.no_grad():
            for x, segments in slow_signals(4):
                metrics.update(x, sae.encode(x), segments)
        scores[kind] = metrics.compute()["relative_difference"]["1"]
    assert scores["temporal_topk"] < 0.8 * scores["topk"]


def test_shuffled_tokens_are_refused() -> None:
    from sae_lens.saes.sae import TrainStepInput

    sae = integration.TemporalTopKTrainingSAE(integration.TemporalTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    x = torch.randn(50, D_IN)
    with pytest.raises(tsae.UserError, match="needs whole sequences"):
        sae.training_forward_pass(TrainStepInput(x, {"temporal": 1.0}, None, 0, False))
    batches = integration.SequenceBatches(slow_signals(1))
    next(batches)
    sae.follow(batches)
    with pytest.raises(tsae.UserError, match="needs whole sequences"):  # not the latest batch
        sae.training_forward_pass(TrainStepInput(x, {"temporal": 1.0}, None, 0, False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal_options": {"temprature": 1.0}}, "has no such field"),
        ({"temporal_options": {"temperature": 0.0}}, "must be positive"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tsae.UserError, match=message):
        train("temporal_topk", steps=1, **options)


@pytest.mark.parametrize("activation", ["schmitt", "jumprelu_schmitt"])
def test_saelens_loads_hysteresis_after_registration(activation: str, tmp_path: Path) -> None:
    ours, x = trained(activation), activations()
    ours.save(tmp_path, model_name="m", hook_name="blocks.1.hook_resid_post")
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert isinstance(theirs, integration.SchmittSAE)
    segments = torch.ones(x.shape[:2], dtype=torch.int32)
    segments[:, 0] = 0  # BOS, to SAELens
    with torch.no_grad():
        h = ours.encode(x, segments)
        same_to(theirs.encode(x), h)
        same_to(theirs(x), ours.decode(h))
        assert int((h > 0).sum()) > int((ours.encode(x.flatten(0, 1)[:, None]) > 0).sum())  # some are held on
        same_to(theirs.encode(x[0]), h[0])
    theirs.save_model(tmp_path / "again")
    assert torch.equal(sae_lens.SAE.load_from_disk(tmp_path / "again").release, theirs.release)


def test_the_example_runs(tiny_gemma3: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = f"--model {tiny_gemma3} --layer 1 --data {text_file} --out {tmp_path}"
    options += " --d-sae 64 --k 4 --steps 4 --batch 4"
    script = str(ROOT / "examples" / "train_with_sae_lens.py")
    monkeypatch.setattr(sys, "argv", [script, *options.split()])
    runpy.run_path(script, run_name="__main__")
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["architecture"] == "topk"
    ours, theirs = tsae.load(tmp_path / "sae"), sae_lens.SAE.load_from_disk(tmp_path / "sae")
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same_to(theirs.encode(x), ours.encode(x))
