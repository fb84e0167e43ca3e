"""Every activation with and without Matryoshka groups under every objective, through the trainer, for three steps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from tsae.config import ObjectiveConfig, OptimizerConfig, SAEConfig, TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.sae.normalization import InputNormalizer
from tsae.training.trainer import Trainer

B, T, D, K = 6, 24, 8, 40
ACTIVATIONS = ("relu", "gelu", "topk", "batchtopk", "jumprelu", "schmitt", "jumprelu_schmitt", "rate", "persistent")
GROUPS = ((), (10, 25, K))
OBJECTIVES = ("none", "multiscale", "window", "contrastive", "slow", "contrastive+window", "slow+multiscale")


def make(sae: dict[str, Any], objective: dict[str, Any], lr: float = 0.02) -> Trainer:
    cfg = TrainConfig(
        steps=100,
        batch=B,
        sae=SAEConfig(d_in=D, d_sae=K, k=4, **sae),
        objective=ObjectiveConfig(**{"l1": 0.0, "boost": 1.0, "hold_steps": 0, "ramp_steps": 0} | objective),
        optimizer=OptimizerConfig(lr=lr, clip_norm=0.0),
    )
    cfg.check()
    return Trainer(cfg, InputNormalizer(torch.zeros(D), 1.0), torch.device("cpu"), autocast=False)


def batch(step: int, b: int = B) -> ActivationBatch:
    x = torch.randn(b, T, D, generator=torch.Generator().manual_seed(step))
    for t in range(1, T):
        x[:, t] = 0.7 * x[:, t - 1] + 0.7 * x[:, t]
    segments = torch.zeros(b, T, dtype=torch.int32)
    segments[0, 9:] = 1
    segments[1, 5] = -1
    return ActivationBatch(x, segments)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_three_steps(activation: str, groups: tuple[int, ...], objective: str) -> None:
    options = {"temporal": objective, "weight": 3.0, "group": 20, "offset": 2, "pairs": 30, "adaptive": False}
    trainer = make({"activation": activation, "groups": groups, "encoder_scale": 0.1}, options)
    before = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
    logs = [trainer.train_step(batch(0), log=True) for _ in range(3)]
    assert all(math.isfinite(value) for log in logs for value in log.values())
    assert len({log["loss"] for log in logs}) == 3
    assert logs[-1]["reconstruction"] < logs[0]["reconstruction"]
    assert (logs[0]["temporal"] > 0) == (objective != "none")
    if not groups:
        assert logs[0]["loss"] == pytest.approx(logs[0]["reconstruction"] + 3.0 * logs[0]["temporal"])
    else:  # short prefixes reconstruct less
        assert logs[0]["loss"] > logs[0]["reconstruction"] + 3.0 * logs[0]["temporal"]
    for name, parameter in trainer.sae.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} has not moved"
    raw = batch(1)
    sae = trainer.finished()
    assert torch.isfinite(sae(raw.x, raw.segments)).all()


@pytest.mark.parametrize("ratio", [1.0, 0.4])
@pytest.mark.parametrize("hysteresis", ["causal", "two-sided"])
def test_exact_steering_trains_at_the_wanted_l0_and_holds_it_on_other_text(hysteresis: str, ratio: float) -> None:
    options = {"activation": "schmitt", "steering": "exact", "hysteresis": hysteresis, "release_ratio": ratio}
    trainer = make(options, {"temporal": "none"})
    log = [trainer.train_step(batch(step, 24), log=True) for step in range(60)]
    assert all(entry["l0"] == pytest.approx(4.0, rel=0.01) for entry in log)  # a stretch switches as a whole
    assert log[-1]["reconstruction"] < 0.9 * log[0]["reconstruction"]
    assert not trainer.controller.started
    assert log[-1]["threshold"] == pytest.approx(float(trainer.sae.threshold[0]))
    again = make(options, {"temporal": "none"})
    again.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for step in (60, 61):
        assert again.train_step(batch(step, 24), log=True) == trainer.train_step(batch(step, 24), log=True)
    sae, held_out = trainer.finished(), batch(1000, 24)
    active = (sae.encode(held_out.x, held_out.segments) > 0).sum(-1).float().mean()
    assert float(active) == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("activation", ["jumprelu", "jumprelu_schmitt"])
def test_learned_thresholds_hold_the_wanted_l0_and_differ_between_features(activation: str) -> None:
    trainer = make({"activation": activation, "release_ratio": 0.5}, {"temporal": "none"})
    log = [trainer.train_step(batch(step, 24), log=True) for step in range(60)]
    assert sum(entry["l0"] for entry in log[-20:]) / 20 == pytest.approx(4.0, rel=0.1)
    theta = trainer.sae.threshold
    assert float(theta.std() / theta.mean()) > 0.03
    sae, held_out = trainer.finished(), batch(1000, 24)
    frozen = float(trainer.controller.frozen / trainer.controller.theta)  # without the last steps' noise
    assert abs(frozen - 1.0) > 1e-3
    assert trainer.sae.log_threshold is not None
    torch.testing.assert_close(sae.threshold, trainer.sae.log_threshold.detach().exp() * frozen)
    active = (sae.encode(held_out.x, held_out.segments) > 0).sum(-1).float().mean()
    assert float(active) == pytest.approx(4.0, rel=0.15)
    if activation == "jumprelu_schmitt":
        ratio = sae.release / sae.threshold
        assert float(ratio.std()) > 0.01
        assert bool((ratio > 0).all() & (ratio < 1).all())


def test_the_l0_penalty_is_in_the_loss_and_lowers_l0() -> None:
    ends = []
    for weight in (0.02, 2.0):
        trainer = make({"activation": "jumprelu"}, {"temporal": "none", "l0": weight})
        logs = [trainer.train_step(batch(step), log=True) for step in range(40)]
        assert logs[0]["loss"] == pytest.approx(logs[0]["reconstruction"] + weight * logs[0]["l0"])
        ends.append(logs[-1]["l0"])
    assert ends[1] < 0.7 * ends[0]


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "jumprelu_schmitt"])
def test_auxk_revives_features_that_are_below_zero_on_every_token(activation: str) -> None:
    silent: dict[float, int] = {}
    for weight in (0.0, 1.0):
        objective = {"temporal": "none", "aux_weight": weight, "dead_after_tokens": B * T, "aux_k": 10}
        trainer = make({"activation": activation, "apply_b_dec_to_input": False}, objective)
        with torch.no_grad():
            trainer.sae.b_enc[:20] = -5.0
        for step in range(120):
            trainer.train_step(batch(step))
        silent[weight] = int((trainer.dead.silent[:20] > 20 * B * T).sum())
    assert silent[0.0] >= 16
    assert silent[1.0] <= 10


def test_the_contrastive_pairs_depend_on_seed_and_step_alone() -> None:
    first = make({"activation": "topk"}, {"temporal": "contrastive", "offset": 3, "pairs": 10})
    again = make({"activation": "topk"}, {"temporal": "contrastive", "offset": 3, "pairs": 10})
    segments = batch(0).segments
    drawn, same = first._pairs(segments), again._pairs(segments)
    assert drawn is not None
    assert same is not None
    assert torch.equal(drawn.anchors, same.anchors)
    assert torch.equal(drawn.partners, same.partners)
    again.step = 1
    other = again._pairs(segments)
    assert other is not None
    assert not torch.equal(drawn.anchors, other.anchors)
