"""Schedules of the two papers, at their corners."""

from __future__ import annotations

import math

import pytest

from tsae.config import ObjectiveConfig, OptimizerConfig
from tsae.training.schedules import buffer_mixing, learning_rate, noise_std, reconstruction_weight, temporal_ramp

PAPER = ObjectiveConfig()


@pytest.mark.parametrize(("step", "weight"), [(0, 2.0), (999, 2.0), (1000, 2.0), (1500, 1.5), (2000, 1.0), (9999, 1.0)])
def test_reconstruction_is_boosted_twofold_and_falls_to_one(step: int, weight: float) -> None:
    assert reconstruction_weight(step, PAPER) == pytest.approx(weight)  # TSAE equation 4


@pytest.mark.parametrize(("step", "ramp"), [(0, 0.0), (1000, 0.0), (1250, 0.25), (2000, 1.0), (5000, 1.0)])
def test_temporal_term_ramps_in(step: int, ramp: float) -> None:
    assert temporal_ramp(step, PAPER) == pytest.approx(ramp)


def test_without_a_schedule_the_temporal_term_is_on_from_the_start() -> None:
    assert temporal_ramp(0, ObjectiveConfig(hold_steps=0, ramp_steps=0)) == 1.0


def test_buffer_mixing_ends_with_the_warm_up() -> None:
    assert [buffer_mixing(s, PAPER) for s in (0, 1999, 2000)] == [0.25, 0.25, 1.0]


def test_warm_up_then_cosine() -> None:
    cfg = OptimizerConfig(lr=3e-4, warmup_steps=1000, schedule="cosine")
    assert learning_rate(0, 5000, cfg) == pytest.approx(3e-7)
    assert learning_rate(499, 5000, cfg) == pytest.approx(1.5e-4)
    assert learning_rate(1000, 5000, cfg) == pytest.approx(3e-4)
    assert learning_rate(3000, 5000, cfg) == pytest.approx(1.5e-4)
    assert learning_rate(4999, 5000, cfg) < 1e-9
    rates = [learning_rate(s, 5000, cfg) for s in range(1000, 5000)]
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False))


def test_linear_decay_over_the_last_share() -> None:
    cfg = OptimizerConfig(lr=1.0, schedule="linear", decay_share=0.5)
    assert [learning_rate(s, 100, cfg) for s in (0, 50, 75, 99)] == pytest.approx([1.0, 1.0, 0.5, 0.02])
    assert learning_rate(99, 100, OptimizerConfig(lr=1.0)) == 1.0


def test_gradient_noise_variance_decays_and_ends() -> None:
    cfg = OptimizerConfig(noise_eta=0.3, noise_steps=2000)
    assert noise_std(0, cfg) == pytest.approx(math.sqrt(0.3))
    assert noise_std(99, cfg) == pytest.approx(math.sqrt(0.3 / 100**0.55))
    assert noise_std(2000, cfg) == 0.0
    assert noise_std(0, OptimizerConfig()) == 0.0
