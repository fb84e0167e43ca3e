"""What changes with the step: loss weights, temporal-buffer mixing, learning rate, gradient noise.

Pure functions of (step, configuration). Steps count from 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from tsae.config import ObjectiveConfig, OptimizerConfig


def temporal_ramp(step: int, cfg: ObjectiveConfig) -> float:
    """0 until ``hold_steps``, then linear to 1 over ``ramp_steps`` (TSAE section 4.2)."""
    if step < cfg.hold_steps:
        return 0.0
    if cfg.ramp_steps == 0:
        return 1.0
    return min(1.0, (step - cfg.hold_steps) / cfg.ramp_steps)


def reconstruction_weight(step: int, cfg: ObjectiveConfig) -> float:
    """w(step): ``boost`` until ``hold_steps``, then linear to 1 over ``ramp_steps`` (TSAE equation 4)."""
    return cfg.boost + (1.0 - cfg.boost) * temporal_ramp(step, cfg)


class LossWeights(NamedTuple):
    """The factors of the loss that change with the step; numbers, or scalar tensors on the device.

    reconstruction: w(step); temporal: the ramp times ``cfg.weight``, None before the temporal term starts
    """

    reconstruction: float | Tensor
    temporal: float | Tensor | None


def loss_weights(step: int, cfg: ObjectiveConfig) -> LossWeights:
    """Of ``step``."""
    ramp = temporal_ramp(step, cfg)
    some = ramp > 0 and (cfg.terms or cfg.own_terms)
    return LossWeights(reconstruction_weight(step, cfg), ramp * cfg.weight if some else None)


class StepPlan(NamedTuple):
    """What the host knows of a step before it starts. Numbers, or scalar tensors on the device that it can set.

    loss: the changing factors of the loss; mixing: of the temporal buffer; lr: learning rate
    ramp: `temporal_ramp`, by which thresholds from rates replace a common one
    noise: standard deviation of the gradient noise
    """

    loss: LossWeights
    mixing: float | Tensor
    ramp: float | Tensor
    lr: float | Tensor
    noise: float


def step_plan(step: int, steps: int, objective: ObjectiveConfig, optimizer: OptimizerConfig) -> StepPlan:
    """Of ``step`` of ``steps``."""
    return StepPlan(
        loss_weights(step, objective),
        buffer_mixing(step, objective),
        temporal_ramp(step, objective),
        learning_rate(step, steps, optimizer),
        noise_std(step, optimizer),
    )


def buffer_mixing(step: int, cfg: ObjectiveConfig) -> float:
    """Share of the batch's variance mixed into the temporal buffer: ``buffer_mixing`` during warm-up, then 1."""
    return cfg.buffer_mixing if step < cfg.hold_steps + cfg.ramp_steps else 1.0


def learning_rate(step: int, steps: int, cfg: OptimizerConfig) -> float:
    """Learning rate of ``step`` of ``steps``.

    Linear warm-up from ``lr / warmup_steps``, then `constant`, `cosine` to 0 at ``steps`` (TC-SAE section 5), or
    `linear`: constant, then linear to 0 over the last ``decay_share`` of the run.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "cosine":
        progress = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
        return cfg.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    if cfg.schedule == "linear" and cfg.decay_share > 0:
        return cfg.lr * min(1.0, (steps - step) / (cfg.decay_share * steps))
    return cfg.lr


def noise_std(step: int, cfg: OptimizerConfig) -> float:
    """Standard deviation of the gradient noise relative to the gradient's RMS: variance eta / (1 + step)^0.55
    (Neelakantan et al. 2015, equation 1), 0 from ``noise_steps`` on."""
    if cfg.noise_eta == 0.0 or step >= cfg.noise_steps:
        return 0.0
    return math.sqrt(cfg.noise_eta / (1.0 + step) ** 0.55)
