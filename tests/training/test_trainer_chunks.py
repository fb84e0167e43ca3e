"""A step whose batch is worked on in pieces: the same step, in less memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from allocated import allocated

from tsae.config import ObjectiveConfig, OptimizerConfig, SAEConfig, TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.errors import UserError
from tsae.sae.normalization import InputNormalizer
from tsae.training.memory import step_bytes
from tsae.training.trainer import Trainer

B, T, D = 6, 128, 16


def config(activation: str, d_sae: int = 64, **objective: Any) -> TrainConfig:
    sae = SAEConfig(d_in=D, d_sae=d_sae, k=4, activation=activation, release_ratio=0.4)  # type: ignore[arg-type]
    values = {"aux_weight": 0.0, "hold_steps": 0, "ramp_steps": 0, "adaptive": False, "dead_after_tokens": 1500}
    optimizer = OptimizerConfig(lr=0.01, clip_norm=1.0)
    return TrainConfig(batch=B, steps=9, sae=sae, objective=ObjectiveConfig(**values | objective), optimizer=optimizer)


def batches(number: int, seed: int = 0) -> list[ActivationBatch]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(number):
        x = torch.randn(B, T, D, generator=generator)
        segments = torch.zeros(B, T, dtype=torch.int32)
        segments[:, T // 2 :] = 1
        segments[-1, 100:] = -1  # pieces of different weight
        out.append(ActivationBatch(x + x.roll(1, 1), segments))
    return out


def trained(cfg: TrainConfig, steps: int = 6) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = Trainer(cfg, InputNormalizer.identity(D), torch.device("cpu"), autocast=False)
    trainer.controller.start(torch.tensor(1.0))  # else a steered threshold starts from the first piece's
    return trainer, [trainer.train_step(batch, log=True) for batch in batches(steps)]


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize(
    ("activation", "objective"),
    [
        ("topk", {"temporal": "none"}),
        ("schmitt", {"temporal": "none", "l1": 0.1}),
        ("relu", {"temporal": "none", "l1": 0.1}),
        ("jumprelu", {"temporal": "none", "l0": 0.01}),
        ("jumprelu_schmitt", {"temporal": "none"}),
    ],
)
def test_the_same_steps_in_pieces(chunk: int, activation: str, objective: dict[str, Any]) -> None:
    cfg = config(activation, **objective)
    whole, expected = trained(cfg)
    pieces, logged = trained(replace(cfg, chunk=chunk))
    for name, tensor in whole.sae.state_dict().items():
        torch.testing.assert_close(pieces.sae.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert torch.equal(pieces.dead.silent, whole.dead.silent)
    for got, want in zip(logged, expected, strict=True):
        for name in ("loss", "reconstruction", "sparsity", "explained_variance", "l0", "gradient_norm", "dead"):
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name


def test_a_piece_of_the_whole_batch_is_the_batch_bit_for_bit() -> None:
    cfg = config("schmitt", temporal="contrastive+window+slow+multiscale", adaptive=True, aux_weight=0.1)
    whole, expected = trained(cfg)
    pieces, logged = trained(replace(cfg, chunk=B + 1))
    assert logged == expected
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(pieces.sae.state_dict()[name], tensor)


@pytest.mark.parametrize("temporal", ["multiscale", "contrastive+window+slow"])
def test_every_objective_trains_in_pieces(temporal: str) -> None:
    _, logged = trained(config("batchtopk", temporal=temporal, adaptive=True, aux_weight=0.1), steps=9)
    _, pieces = trained(
        replace(config("batchtopk", temporal=temporal, adaptive=True, aux_weight=0.1), chunk=2), steps=9
    )
    assert pieces[-1]["reconstruction"] == pytest.approx(logged[-1]["reconstruction"], rel=0.05)
    assert pieces[-1]["temporal"] > 0


@pytest.mark.parametrize("activation", ["schmitt", "topk", "batchtopk"])
def test_memory_is_that_of_a_piece(activation: str) -> None:
    cfg = config(activation, d_sae=4096, temporal="none")
    for chunk in (0, 1):
        cfg = replace(cfg, chunk=chunk)
        trainer, _ = trained(cfg, steps=1)
        batch = batches(1)[0]
        peak = allocated(lambda t=trainer, x=batch: t.train_step(x))
        assert 0.7 * step_bytes(cfg, autocast=False) < peak < 1.15 * step_bytes(cfg, autocast=False)


def test_a_negative_piece_is_refused() -> None:
    with pytest.raises(UserError, match="chunk is -1"):
        replace(config("topk"), chunk=-1).check()
