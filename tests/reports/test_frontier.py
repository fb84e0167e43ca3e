"""Bits at equal explained variance: names, interpolation, and comparison against closed forms."""

from __future__ import annotations

from typing import Any

import pytest

from tsae.reports.frontier import CE, SUPPORT, TOTAL, Curve, Frontier, difference_at_equal, run_name


@pytest.mark.parametrize(
    ("name", "method", "size", "seed"),
    [
        ("plain-k36-seed0", "plain", "k36", "0"),
        ("hysteresis-0.4-k36-seed12", "hysteresis-0.4", "k36", "12"),
        ("matryoshka-batchtopk-k24", "matryoshka-batchtopk", "k24", ""),
        ("plain-seed1-k48", "plain", "k48", "1"),
        ("contrastive-3", "contrastive", "3", ""),
        ("schmitt-0.3-seed0", "schmitt", "0.3", "0"),
        ("plain-k36-seed0@0.4", "plain@0.4", "k36", "0"),
        ("plain", "plain", "", ""),
        ("top-kernel", "top-kernel", "", ""),
        ("rate+contrastive-k36", "rate+contrastive", "k36", ""),
        ("3", "3", "", ""),
    ],
)
def test_parts_of_names(name: str, method: str, size: str, seed: str) -> None:
    assert run_name(name) == (method, size, seed)
    assert run_name(run_name(name).configuration) == (method, size, "")


def power(bits: float, c: float = 2.0, gamma: float = 0.5) -> float:
    """The quality where the error is a power of the bits."""
    return 1 - c * bits**-gamma


def test_the_name_of_a_configuration() -> None:
    assert run_name("plain-k36-seed0@0.4").configuration == "plain-k36@0.4"
    assert run_name("contrastive-3").configuration == "contrastive-3"


def test_a_power_law_is_interpolated_exactly_in_both_directions() -> None:
    curve = Curve([(bits, power(bits)) for bits in (400.0, 100.0, 200.0)])
    for bits in (100.0, 130.0, 200.0, 399.0, 400.0):
        assert curve.quality_at(bits) == pytest.approx(power(bits), rel=1e-12)
        assert curve.bits_at(power(bits)) == pytest.approx(bits, rel=1e-9)


@pytest.mark.parametrize("bits", [99.9, 400.1, 0.0, -3.0])
def test_nothing_is_extrapolated(bits: float) -> None:
    curve = Curve([(bits, power(bits)) for bits in (100.0, 400.0)])
    assert curve.quality_at(bits) is None
    if bits > 0:
        assert curve.bits_at(power(bits)) is None
    assert curve.bits_at(1.0) is None


def test_one_point_holds_for_itself_alone() -> None:
    curve = Curve([(200.0, 0.9)])
    assert curve.bits_at(0.9) == pytest.approx(200)
    assert curve.quality_at(200.0) == pytest.approx(0.9)
    assert curve.bits_at(0.901) is None
    assert Curve([]).bits_at(0.9) is None


def test_points_that_another_beats_are_left_out() -> None:
    curve = Curve([(100, 0.8), (150, 0.79), (150, 0.85), (200, 0.85), (200, 0.9), (float("nan"), 0.95), (300, 1.0)])
    assert curve.points == [(100, 0.8), (150, 0.85), (200, 0.9)]


def run(ev: float, support: float, total: float | None = None) -> dict[str, Any]:
    bits = {"support_bits": support, "total_bits": 1.6 * support if total is None else total}
    return {"explained_variance": ev, "ce_loss_score": ev + 0.05, "temporal": bits}


def sweep() -> dict[str, dict[str, Any]]:
    """`plain` at three sizes and seeds, `topk` 10 % dearer, and a method at 80 % of plain's bits."""
    runs = {}
    for seed, shift in enumerate((0.97, 1.0, 1.03)):
        for k in (24, 36, 48):
            bits = 5.0 * k * shift
            runs[f"plain-k{k}-seed{seed}"] = run(power(bits), bits)
            runs[f"topk-k{k}-seed{seed}"] = run(power(bits), 1.1 * bits)
        runs[f"memory-k30-seed{seed}"] = run(power(150.0), 0.8 * 150 * shift)
    return runs


def test_bits_and_quality_over_seeds() -> None:
    frontier = Frontier(sweep().items(), SUPPORT)
    bits = frontier.bits_at("plain", power(160.0))
    # Every seed is on the same curve.
    assert (bits.value, bits.seeds) == (pytest.approx(160), 3)
    assert bits.half_range == pytest.approx(0, abs=1e-9)
    assert Frontier(sweep().items(), TOTAL).bits_at("plain", power(160.0)).value == pytest.approx(256)
    assert frontier.quality_at("topk", 176.0).value == pytest.approx(power(160.0))
    # And the same with another measure of quality: 1 - CE is no power of the bits, but close to one between neighbours.
    by_ce = Frontier(sweep().items(), SUPPORT, CE).bits_at("plain", power(160.0) + 0.05)
    assert by_ce.value == pytest.approx(160, rel=0.01)


def test_outside_of_a_seed_there_is_nothing_and_the_reason_is_said() -> None:
    frontier = Frontier(sweep().items(), SUPPORT)
    inside_two_seeds = frontier.bits_at("plain", power(245.0))
    assert inside_two_seeds.value is None
    assert inside_two_seeds.why == (
        f"plain, seed 0, was measured at {power(24 * 5 * 0.97):.4f} to {power(48 * 5 * 0.97):.4f}, "
        f"which {power(245.0):.4f} lies outside of"
    )
    assert frontier.quality_at("plain", 500.0).why.endswith("which 500.0 bits lies outside of")
    assert frontier.bits_at("other", 0.9).why == "other was not measured"


def test_methods_against_the_best_baseline_at_equal_quality() -> None:
    frontier = Frontier(sweep().items(), SUPPORT)
    found = frontier.relative("memory-k30")
    assert found.baseline == "plain"
    assert found.quality.value == pytest.approx(power(150.0))
    assert found.difference.value == pytest.approx(-0.2)
    assert found.difference.half_range == pytest.approx(0.8 * 0.03)
    assert found.difference.seeds == 3
    assert frontier.relative("memory-k30", ["topk"]).difference.value == pytest.approx(0.8 / 1.1 - 1)
    assert frontier.relative("topk-k36").difference.value == pytest.approx(0.1)
    assert frontier.relative("plain-k36").difference.value == pytest.approx(0)


def test_a_seed_is_compared_with_the_same_seed() -> None:
    """The seeds of both methods are 10 % apart, and each is 20 % below its own; one more has no counterpart."""
    runs = {}
    for seed, shift in enumerate((0.9, 1.0, 1.1)):
        for k in (20, 48):
            runs[f"plain-k{k}-seed{seed}"] = run(power(5.0 * k), 5.0 * k * shift) | {"ce_loss_score": 0.9 + shift / 20}
        runs[f"memory-k30-seed{seed}"] = run(power(150.0), 0.8 * 150 * shift) | {"ce_loss_score": 0.91 + shift / 20}
    found = Frontier(runs.items(), SUPPORT).relative("memory-k30")
    assert (found.difference.value, found.difference.half_range) == (pytest.approx(-0.2), pytest.approx(0, abs=1e-9))
    score = difference_at_equal(runs.items(), "memory-k30", "plain")
    assert (score.value, score.half_range) == (pytest.approx(0.01), pytest.approx(0, abs=1e-9))
    runs["memory-k30-seed7"] = run(power(150.0), 0.8 * 150)
    found = Frontier(runs.items(), SUPPORT).relative("memory-k30")
    assert found.difference.value == pytest.approx(-0.2)  # that of seed 7 against the mean over seeds


def test_a_baseline_that_was_not_measured_there_is_named() -> None:
    runs = sweep() | {"jumprelu-k36-seed0": run(0.3, 100.0)}
    found = Frontier(runs.items(), SUPPORT).relative("memory-k30")
    assert found.baseline == "plain"
    assert found.notes == ["jumprelu, seed 0, was measured at 0.3000 to 0.3000, which 0.8367 lies outside of"]
    far = Frontier([*runs.items(), ("far-k1", run(0.99, 10.0))], SUPPORT).relative("far-k1")
    assert (far.baseline, far.difference.value) == ("", None)
    assert len(far.notes) == 3


def test_no_baseline_is_the_best_where_a_better_one_was_not_measured() -> None:
    """Below the measured sizes of `plain` there are only those of `topk`, which are known to take more bits."""
    runs = sweep() | {f"topk-k{k}-seed0": run(power(5.0 * k), 6.5 * k) for k in (20, 24, 36, 48)}
    runs = {name: metrics for name, metrics in runs.items() if not (name.startswith("topk") and "seed0" not in name)}
    runs["memory-k20-seed0"] = run(power(112.0), 100.0)
    found = Frontier(runs.items(), SUPPORT).relative("memory-k20")
    assert (found.baseline, found.difference.value) == ("", None)
    assert found.difference.why == "plain takes fewer bits than topk at a higher quality, but was not measured there"
    assert Frontier(runs.items(), SUPPORT).relative("memory-k20", ["topk"]).baseline == "topk"


def test_runs_without_bits_are_left_out() -> None:
    old = {"explained_variance": 0.9, "temporal": {"persistence": 0.4}}
    frontier = Frontier([("plain-k36", old), ("plain-k24", run(0.8, 100.0))])
    assert list(frontier.configurations) == ["plain-k24"]


def test_another_metric_at_equal_quality() -> None:
    runs = sweep()
    for name, metrics in runs.items():
        metrics["ce_loss_score"] = metrics["explained_variance"] / 2 + (0.01 if name.startswith("memory") else 0.0)
    found = difference_at_equal(runs.items(), "memory-k30", "plain")
    assert (found.value, found.seeds) == (pytest.approx(0.01), 3)
    assert difference_at_equal(runs.items(), "plain-k36", "plain").value == pytest.approx(0, abs=0.01)
    far = difference_at_equal([*runs.items(), ("far-k1", run(0.99, 10.0))], "far-k1", "plain")
    assert (far.value, far.why) == (None, "plain was not measured at 0.9900 with every seed")
    assert difference_at_equal(runs.items(), "other-k1", "plain").why == "other-k1 was not measured"
