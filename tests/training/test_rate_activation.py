"""The activation `rate` in training: per-feature thresholds from its own transition counts, steered to L0 or bits."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from test_families import batch, make

from tsae.errors import UserError
from tsae.evaluation.metrics.bits import CodeLength
from tsae.sae.hysteresis import mask_path
from tsae.sae.model import SparseAutoencoder
from tsae.sae.normalization import InputNormalizer
from tsae.sae.rates import MEMORY, decision_rates, path_costs, switch_costs
from tsae.sae.release import with_hysteresis
from tsae.training.init_from import warm_start
from tsae.training.trainer import Trainer

RATE: dict[str, Any] = {"activation": "rate", "release_ratio": 0.5, "encoder_scale": 0.3, "amplitude_bits": 8.0}
NONE = {"temporal": "none", "hold_steps": 20, "ramp_steps": 20}


def trained(steps: int = 80, lr: float = 0.02, **sae: Any) -> Trainer:
    trainer = make(RATE | sae, NONE, lr)
    for step in range(steps):
        trainer.train_step(batch(step, 24))
    return trainer


def held_out(sae: SparseAutoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    x, segments = batch(1000, 48)
    return sae.encode(x, segments), segments


def test_thresholds_are_common_before_the_blend_and_those_of_the_rates_after() -> None:
    trainer = make(RATE, NONE)
    for step in range(80):
        trainer.train_step(batch(step, 24))
        spread = float(trainer.sae.threshold.std())
        assert (spread < 1e-6) == (step <= 20)
    sae, rates = trainer.sae, trainer.steering.rates
    assert rates is not None
    price = RATE["amplitude_bits"]
    costs = switch_costs(decision_rates(sae.rates, price, RATE["release_ratio"]), price)
    torch.testing.assert_close(sae.threshold.square(), sae.bit_price * costs.from_off)
    torch.testing.assert_close(sae.release.square(), sae.bit_price * costs.from_on)
    assert float((sae.release / sae.threshold).std()) > 0.01


def test_counts_are_those_of_the_features() -> None:
    trainer = make(RATE, NONE)
    x, segments = batch(0)
    with torch.no_grad():
        trainer.steering.prepare(trainer.sae.pre_activation(x), segments, 0, 0.0)
    trainer.sae.eval()
    on = trainer.sae.encode(x, segments) > 0
    trainer.sae.train()
    trainer.train_step(batch(0))
    pair = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0))[..., None]
    first, second = on[:, :-1] & pair, on[:, 1:] & pair
    expected = [(first & second).sum((0, 1)), (first & ~second).sum((0, 1)), (second & ~first).sum((0, 1))]
    rates = trainer.steering.rates
    assert rates is not None
    assert torch.equal(rates.counts, torch.stack(expected).float())
    assert float(rates.pairs) == float(pair.sum())


def test_it_holds_the_wanted_l0_on_other_text() -> None:
    sae = trained().finished()
    h, segments = held_out(sae)
    assert float((h > 0).sum(-1)[segments >= 0].float().mean()) == pytest.approx(4.0, rel=0.15)


def test_it_holds_the_wanted_bits_on_other_text() -> None:
    sae = trained(150, lr=0.005, support_bits=12.0).finished()
    code = CodeLength()
    h, segments = held_out(sae)
    code.update(h[:24], segments[:24], 0)
    code.update(h[24:], segments[24:], 1)
    assert code.support()[0] == pytest.approx(12.0, rel=0.2)


@pytest.mark.parametrize("steps", [10, 30, 50], ids=["common thresholds", "blend", "thresholds of the rates"])
def test_resumed_training_continues_bit_for_bit(steps: int) -> None:
    trainer = trained(steps)
    again = make(RATE, NONE)
    again.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for step in (steps, steps + 1):
        assert again.train_step(batch(step, 24), log=True) == trainer.train_step(batch(step, 24), log=True)
    assert all(torch.equal(a, b) for a, b in zip(again.sae.buffers(), trainer.sae.buffers(), strict=True))


def test_pieces_of_a_batch_give_the_counts_of_the_batch() -> None:
    whole, cut = make(RATE, NONE), make(RATE, NONE)
    cut.cfg = dataclasses.replace(cut.cfg, chunk=2)
    for trainer in (whole, cut):
        trainer.controller.start(torch.tensor(0.8))
        trainer.train_step(batch(0))
    assert whole.steering.rates is not None
    assert cut.steering.rates is not None
    assert torch.equal(whole.steering.rates.counts, cut.steering.rates.counts)


def test_saved_and_folded_it_computes_the_same(tmp_path: Any) -> None:
    trainer = trained(50)
    trainer.normalizer = InputNormalizer(torch.full((8,), 2.0), 3.0)
    sae = trainer.finished()
    sae.save(tmp_path)
    loaded = SparseAutoencoder.load(tmp_path)
    for kind in ("causal", "two-sided", "path"):
        one, other = with_hysteresis(sae, kind), with_hysteresis(loaded, kind)
        x, segments = batch(7)
        assert torch.equal(one.encode(3 * x + 2, segments), other.encode(3 * x + 2, segments))
        raw = with_hysteresis(trainer.sae.eval(), kind).encode(x, segments)
        torch.testing.assert_close(one.encode(3 * x + 2, segments) / 3, raw, atol=1e-4, rtol=1e-3)
        trainer.sae.train()


def cost(sae: SparseAutoencoder, h: torch.Tensor, segments: torch.Tensor) -> float:
    """The objective of `path`: less the squares of what is on, plus the price of the support."""
    transition, start = (sae.bit_price * bits for bits in path_costs(sae.rates, sae.cfg.amplitude_bits))
    total, on = -float(h.detach().double().square().sum()), (h > 0).long()
    features = torch.arange(h.shape[2])
    for b, t in (segments >= 0).nonzero().tolist():
        joined = t > 0 and segments[b, t] == segments[b, t - 1]
        costs = transition[on[b, t - 1], on[b, t], features] if joined else start[on[b, t], features]
        total += float(costs.sum())
    return total


def test_the_path_costs_less_than_the_causal_trigger() -> None:
    sae = trained().finished()
    x, segments = batch(5)
    causal, path = (
        cost(sae, with_hysteresis(sae, kind).encode(x, segments) * (segments >= 0)[..., None], segments)
        for kind in ("causal", "path")
    )
    assert path < causal


def test_the_path_is_that_of_the_features_own_rates() -> None:
    sae = trained().finished()
    (x, segments), price = batch(5), sae.cfg.amplitude_bits
    kept = (segments >= 0)[..., None]
    decisive = decision_rates(sae.rates, price, sae.cfg.release_ratio)
    transition, start = (sae.bit_price * bits for bits in path_costs(decisive, price))
    pre = mask_path(sae.pre_activation(x), sae.b_enc, transition, start, segments)
    other = (pre + sae.b_enc).relu() * kept
    assert cost(sae, with_hysteresis(sae, "path").encode(x, segments) * kept, segments) < cost(sae, other, segments)


@pytest.mark.parametrize("kind", ["causal", "two-sided", "path"])
def test_nan_stays_visible(kind: str) -> None:
    sae = with_hysteresis(trained(30).finished(), kind)
    x, segments = batch(5)
    x[2, 3] = torch.nan
    h = sae.encode(x, segments)
    assert h[2, 3].isnan().all()
    assert not h[3:].isnan().any()


def warm(source: SparseAutoencoder) -> Trainer:
    cfg = make(RATE, NONE).cfg
    start = warm_start(cfg, source, InputNormalizer(torch.full((8,), 0.3), 2.0))
    trainer = Trainer(cfg, start.normalizer, torch.device("cpu"), autocast=False)
    trainer.start_from(start)
    return trainer


def test_a_warm_start_from_its_own_kind_is_the_source_at_step_0() -> None:
    source = trained(50).finished()
    trainer = warm(source)
    x, segments = batch(9)
    y = trainer.normalizer(x)
    with torch.no_grad():
        trainer.steering.prepare(trainer.sae.pre_activation(y), segments, 0)
        h, _ = trainer.sae.activate(trainer.sae.pre_activation(y), segments=segments)
    torch.testing.assert_close(2.0 * h, source.encode(x, segments), atol=2e-3, rtol=1e-3)


def test_a_warm_start_takes_the_release_ratio_of_the_run() -> None:
    source = trained(50).finished()
    cfg = make(RATE, NONE).cfg
    cfg = dataclasses.replace(cfg, sae=dataclasses.replace(cfg.sae, release_ratio=0.2))
    start = warm_start(cfg, source, InputNormalizer(torch.zeros(8), 1.0))
    trainer = Trainer(cfg, start.normalizer, torch.device("cpu"), autocast=False)
    trainer.start_from(start)
    x, segments = batch(9)
    with torch.no_grad():
        trainer.steering.prepare(trainer.sae.pre_activation(x), segments, 0)
    costs = switch_costs(decision_rates(source.rates, source.cfg.amplitude_bits, 0.2), source.cfg.amplitude_bits)
    torch.testing.assert_close(trainer.sae.threshold, source.threshold, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(trainer.sae.release.square(), source.bit_price * costs.from_on, rtol=1e-3, atol=1e-4)


def test_thresholds_of_other_rates_are_said_and_start_in_common(caplog: pytest.LogCaptureFixture) -> None:
    source = trained(50).finished()
    source.threshold *= torch.linspace(0.8, 1.2, len(source.threshold))
    trainer = warm(source)
    trainer.train_step(batch(9))
    assert "do not follow from its rates" in caplog.text
    assert float(trainer.sae.threshold.std()) < 1e-6


def test_a_resumed_warm_start_keeps_the_thresholds_of_the_rates() -> None:
    trainer = warm(trained(50).finished())
    trainer.train_step(batch(9))
    again = make(RATE, NONE)
    again.load_state_dict(copy.deepcopy(trainer.state_dict()))
    trainer.train_step(batch(10))
    again.train_step(batch(10))
    assert float(again.sae.threshold.std()) > 1e-3  # in step 1, when those of a run from scratch are all the same
    assert all(torch.equal(a, b) for a, b in zip(again.sae.buffers(), trainer.sae.buffers(), strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steering": "exact"}, "sae.steering is 'exact'"),
        ({"activation": "schmitt", "hysteresis": "path"}, "sae.hysteresis is 'path'"),
        ({"activation": "schmitt", "support_bits": 9.0}, "sae.support_bits is 9.0"),
        ({"layer_norm": "post"}, "sae.layer_norm is 'post'"),
        ({"amplitude_bits": -1.0}, "sae.amplitude_bits"),
    ],
)
def test_what_it_cannot_be_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as info:
        make(RATE | change, NONE)
    assert "\n" not in str(info.value)


def test_an_always_on_feature_keeps_a_threshold() -> None:
    costs = switch_costs(torch.tensor([[0.999], [0.9999]]), 0.0)
    assert float(costs.from_off) > 0
    assert math.isfinite(float(costs.from_off))
    assert MEMORY > 0
