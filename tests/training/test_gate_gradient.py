"""The pseudo-gradient of being on: against its definition, entry by entry, and in training."""

from __future__ import annotations

import pytest
import torch
from test_families import batch, make

from tsae.sae.straight_through import NEAR_MISS, GateLevels, gate_gradient
from tsae_kernels import activate_with_stats

B, T, K = 4, 12, 7
WIDTH, STRENGTH, PRICE = 0.6, 0.3, 0.05


@pytest.fixture
def case() -> tuple[torch.Tensor, GateLevels, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pre = 2 * torch.randn(B, T, K, generator=generator)
    bias = 0.3 * torch.randn(K, generator=generator)
    threshold = 0.8 + torch.rand(K, generator=generator)
    release = threshold * torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.5])
    segments = torch.zeros(B, T, dtype=torch.int32)
    segments[0, 5:] = 1
    segments[1, 3] = -1
    return pre, GateLevels(bias, threshold, release), segments


def features(pre: torch.Tensor, levels: GateLevels, segments: torch.Tensor) -> torch.Tensor:
    return activate_with_stats(pre, *levels[:1], "relu", *levels[1:], ((1, 1),), segments)[0]


@pytest.mark.parametrize("dense", [False, True], ids=["listed", "dense"])
def test_it_is_the_definition(
    case: tuple[torch.Tensor, GateLevels, torch.Tensor], dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed, as on a CPU, and dense, as where the host must not wait for the number of entries."""
    monkeypatch.setattr("tsae.sae.straight_through.runs_behind", lambda _: dense)
    pre, levels, segments = case
    bias, threshold, release = levels
    assert bias is not None
    pre.requires_grad_()
    bias.requires_grad_()
    h = features(pre, levels, segments)
    grad = torch.randn(h.shape, generator=torch.Generator().manual_seed(1))
    plain = torch.autograd.grad(h, (pre, bias), grad, retain_graph=True)
    marked = gate_gradient(h, pre, levels, segments, WIDTH, STRENGTH, PRICE)
    found = torch.autograd.grad(marked, (pre, bias), grad)
    expected, misses = torch.zeros_like(pre), 0
    for b in range(B):
        for t in range(T):
            for j in range(K):
                joined = t > 0 and segments[b, t] == segments[b, t - 1]
                on_before = joined and h[b, t - 1, j] > 0
                level = float((release if on_before else threshold)[j])
                z = float(pre.detach()[b, t, j] + bias.detach()[j])
                near = segments[b, t] >= 0 and abs(z - level) < WIDTH / 2 * level
                if near:
                    jump = 0.0 if h[b, t, j] > 0 else 2 * PRICE * level
                    expected[b, t, j] = STRENGTH / WIDTH * (grad[b, t, j] + jump)
                miss = near and h[b, t, j] == 0
                misses += miss
                assert marked[b, t, j] == (NEAR_MISS if miss else h[b, t, j])
    assert misses > 3
    torch.testing.assert_close(found[0], plain[0] + expected)
    torch.testing.assert_close(found[1], plain[1] + expected.sum((0, 1)))


def test_marks_do_not_change_the_reconstruction(case: tuple[torch.Tensor, GateLevels, torch.Tensor]) -> None:
    pre, levels, segments = case
    h = features(pre, levels, segments)
    marked = gate_gradient(h, pre, levels, segments, WIDTH, STRENGTH, PRICE)
    W = torch.randn(K, 5)
    torch.testing.assert_close(h @ W, marked @ W, rtol=0, atol=1e-28)


def test_a_feature_that_would_lower_the_error_is_pushed_on_and_one_that_does_not_pay_is_pushed_off() -> None:
    levels = GateLevels(None, torch.ones(2), torch.ones(2))
    pre = torch.tensor([[[0.9, 1.1]]], requires_grad=True)  # just off, just on
    segments = torch.zeros(1, 1, dtype=torch.int32)
    h = features(pre, levels, segments)
    x = torch.tensor([1.5, 0.2])  # with decoder rows that are the axes: the first is worth being on, the second is not
    marked = gate_gradient(h, pre, levels, segments, WIDTH, STRENGTH, 1.0)
    ((marked[0, 0] - x).square().sum()).backward()
    assert pre.grad is not None
    assert float(pre.grad[0, 0, 0]) < 0 < float(pre.grad[0, 0, 1])


def test_its_sign_is_that_of_what_being_on_changes_in_error_and_price() -> None:
    """Of the squared error and the price l^2, computed with the feature on and off; on either side of the level."""
    for target in (0.3, 0.8, 0.98, 1.02, 1.2, 1.7):  # l is 1, so that being on pays above 1
        change = (1.0 - target) ** 2 + 1.0 - target**2
        for value in (0.99, 1.01):
            pre = torch.tensor([[[value]]], requires_grad=True)
            segments, levels = torch.zeros(1, 1, dtype=torch.int32), GateLevels(None, torch.ones(1), torch.ones(1))
            h = features(pre, levels, segments)
            marked = gate_gradient(h.detach(), pre, levels, segments, WIDTH, STRENGTH, 1.0)
            (marked - target).square().sum().backward()
            assert pre.grad is not None
            assert float(pre.grad) == pytest.approx(STRENGTH / WIDTH * change, abs=0.02)


@pytest.mark.parametrize("activation", ["schmitt", "rate"])
def test_training_with_it_reaches_a_lower_error(activation: str) -> None:
    ends = []
    for strength in (0.0, 0.5):
        options = {"activation": activation, "release_ratio": 0.5, "encoder_scale": 0.3, "gate_gradient": strength}
        trainer = make(options, {"temporal": "none", "hold_steps": 20, "ramp_steps": 20})
        log = [trainer.train_step(batch(step, 24), log=True) for step in range(100)]
        ends.append(sum(entry["reconstruction"] for entry in log[-20:]))
        assert sum(entry["l0"] for entry in log[-20:]) / 20 == pytest.approx(4.0, rel=0.15)
    assert ends[1] < ends[0]


def test_pieces_of_a_batch_have_the_gradient_of_the_batch() -> None:
    options = {"activation": "schmitt", "release_ratio": 0.5, "gate_gradient": 0.5}
    whole, cut = make(options, {"temporal": "none"}), make(options, {"temporal": "none"})
    cut.cfg.chunk = 2
    for trainer in (whole, cut):
        trainer.controller.start(torch.tensor(0.8))
        trainer.train_step(batch(0))
    for name, parameter in whole.sae.parameter_dict().items():
        torch.testing.assert_close(cut.sae.parameter_dict()[name].grad, parameter.grad, msg=name)
