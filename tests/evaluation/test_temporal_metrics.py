"""Temporal metrics against their definitions, pair by pair in float64, and against signals we can predict."""

import math

import pytest
import torch
from torch import Tensor

from tsae.evaluation.metrics import Persistence, TemporalMetrics, shuffle_within_segments
from tsae.evaluation.metrics.accumulator import pair_mask, row_chunks, segment_runs
from tsae.evaluation.metrics.temporal import CURVE_LAGS, DIFFERENCE_LAGS, lags_at


def pairs_of(segments: Tensor, lag: int) -> list[tuple[int, int, int]]:
    """(row, t, t + lag) with one unbroken segment from t to t + lag."""
    out = []
    for b, row in enumerate(segments.tolist()):
        for t in range(len(row) - lag):
            if row[t] >= 0 and all(row[u] == row[t] for u in range(t, t + lag + 1)):
                out.append((b, t, t + lag))
    return out


def slow_metrics(x: Tensor, h: Tensor, segments: Tensor, lags=CURVE_LAGS, differences=DIFFERENCE_LAGS) -> dict:
    """Every metric of `TemporalMetrics`, one pair and one feature at a time."""
    x, h, k = x.double(), h.double(), h.shape[2]
    counted = [(b, t) for b in range(h.shape[0]) for t in range(h.shape[1]) if segments[b, t] >= 0]
    out = {"relative_difference": {}, "relative_difference_per_feature": {}, "autocorrelation": {}}
    for lag in lags:
        pairs = pairs_of(segments, lag)
        difference, energy, correlations = [0.0] * k, [0.0] * k, []
        for j in range(k):
            values = torch.stack([h[b, t, j] for b, t in counted])
            mean, variance = values.mean(), values.var(correction=0)
            product = 0.0
            for b, t, u in pairs:
                difference[j] += float((h[b, u, j] - h[b, t, j]) ** 2)
                energy[j] += float(h[b, u, j] ** 2 + h[b, t, j] ** 2)
                product += float((h[b, t, j] - mean) * (h[b, u, j] - mean))
            if variance > 0 and pairs:
                correlations.append(product / (len(pairs) * float(variance)))
        if lag in differences:
            alive = [d / e for d, e in zip(difference, energy, strict=True) if e > 0]
            out["relative_difference"][str(lag)] = sum(difference) / sum(energy) if sum(energy) else 0.0
            out["relative_difference_per_feature"][str(lag)] = sum(alive) / len(alive) if alive else 0.0
        out["autocorrelation"][str(lag)] = sum(correlations) / len(correlations) if correlations else 0.0

    pairs = pairs_of(segments, 1)
    table = {"on_on": 0, "on_off": 0, "off_on": 0, "off_off": 0}
    excess = []
    for j in range(k):
        active = sum(int(h[b, t, j] > 0) for b, t in counted)
        starts = stays = 0
        for b, t, u in pairs:
            first, second = bool(h[b, t, j] > 0), bool(h[b, u, j] > 0)
            table[("on" if first else "off") + "_" + ("on" if second else "off")] += 1
            starts += first
            stays += first and second
        if active >= 20 and starts:
            density = active / len(counted)
            excess.append((stays / starts - density) / (1 - density) if density < 1 else 0.0)
    on = table["on_on"] + table["on_off"]
    out["persistence"] = table["on_on"] / on if on else 0.0
    out["persistence_excess"] = sum(excess) / len(excess) if excess else 0.0
    cells = len(pairs) * k
    out["transitions"] = {key: count / cells if cells else 0.0 for key, count in table.items()}

    steepest = []
    for b in range(h.shape[0]):
        mine = [(t, u) for row, t, u in pairs if row == b and bool((x[b, u] != x[b, t]).any())]
        for j in range(k):
            if any(h[b, t, j] > 0 or h[b, u, j] > 0 for t, u in mine):
                steepest.append(
                    max(float((h[b, u, j] - h[b, t, j]).abs() / (x[b, u] - x[b, t]).norm()) for t, u in mine)
                )
    out["smoothness"] = sum(steepest) / len(steepest) if steepest else 0.0
    return out


def fast_metrics(x: Tensor, h: Tensor, segments: Tensor) -> dict:
    metrics = TemporalMetrics()
    metrics.update(x, h, segments)
    return metrics.compute()


def assert_same(actual: dict, expected: dict, tolerance: float = 2e-6) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(actual[key], value, tolerance)
        else:
            assert math.isfinite(actual[key])
            assert actual[key] == pytest.approx(value, abs=tolerance, rel=tolerance), key


def sample(B=3, T=20, k=5, seed=0, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, sparse h with a dead, an always-on and a sometimes negative feature, packed documents, excluded positions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, 4, generator=generator).to(dtype)
    h = (torch.randn(B, T, k, generator=generator) * 3).relu().to(dtype)
    h[..., 0] = 0
    h[..., 1] = 2 + torch.rand(B, T, generator=generator).to(dtype)
    h[..., 2] = torch.nn.functional.gelu(torch.randn(B, T, generator=generator).to(dtype))  # off where negative
    segments = torch.zeros(B, T, dtype=torch.int32)
    segments[:, T // 3 :] = 1
    segments[0, T // 2] = 2  # a document of one token
    segments[1, T // 2 :] = 0  # the first id again, not adjacent: another run
    segments[1, T // 3 : T // 3 + 2] = -1
    segments[2, -4:] = -1
    return x, h, segments


def ar1(rho: float, B: int, T: int, k: int, seed: int = 0) -> Tensor:
    """A stationary AR(1) process of unit variance and lag-L correlation rho^L."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(B, T, k, generator=generator)
    out = torch.empty_like(noise)
    out[:, 0] = noise[:, 0]
    for t in range(1, T):
        out[:, t] = rho * out[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    return out


def one_document(h: Tensor) -> Tensor:
    return torch.zeros(h.shape[:2], dtype=torch.int32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_equals_the_definition(seed, dtype, tolerance):
    x, h, segments = sample(seed=seed, dtype=dtype)
    assert_same(fast_metrics(x, h, segments), slow_metrics(x, h, segments), tolerance)


def test_lags_follow_the_length():
    assert lags_at(128) == lags_at(85) == lags_at(65) == CURVE_LAGS  # 64 is fixed, though above 3/4 of 65
    assert lags_at(170) == CURVE_LAGS
    assert lags_at(171) == (*CURVE_LAGS, 128)
    assert lags_at(1024) == (*CURVE_LAGS, 128, 256, 512)
    assert lags_at(4096)[-1] == 2048
    assert lags_at(64) == CURVE_LAGS[:-1]
    assert lags_at(2) == (1,)


def test_lags_of_longer_sequences_equal_the_definition():
    x, h, _ = sample(T=350, k=3)
    h[:, 1:] += h[:, :-1]
    segments = one_document(h)
    segments[1, 200:] = 1
    metrics = TemporalMetrics(350)
    metrics.update(x, h, segments)
    lags = (*CURVE_LAGS, 128, 256)
    assert_same(metrics.compute(), slow_metrics(x, h, segments, lags, (*DIFFERENCE_LAGS, 256)), 1e-5)


def test_lags_beyond_every_segment_are_left_out_unless_they_are_fixed():
    x, h, _ = sample(T=350, k=3)
    segments = (torch.arange(350) // 60).int().repeat(3, 1)
    metrics = TemporalMetrics(350)
    for _ in range(2):  # also before anything is counted
        found = metrics.compute()
        assert list(found["autocorrelation"]) == [str(lag) for lag in CURVE_LAGS]
        assert list(found["relative_difference"]) == [str(lag) for lag in DIFFERENCE_LAGS]
        assert found["autocorrelation"]["64"] == 0
        metrics.update(x, h, segments)


def test_long_lags_equal_the_definition():
    x, h, _ = sample(T=70, k=3)
    segments = one_document(h)
    assert_same(fast_metrics(x, h, segments), slow_metrics(x, h, segments))


@pytest.mark.parametrize("T", [1, 2])
def test_sequences_shorter_than_every_lag(T):
    x, h, segments = torch.randn(2, T, 4), torch.rand(2, T, 3), torch.zeros(2, T, dtype=torch.int64)
    assert_same(fast_metrics(x, h, segments), slow_metrics(x, h, segments))


def test_merging_equals_one_pass():
    whole, left, right = TemporalMetrics(), TemporalMetrics(), TemporalMetrics()
    for seed in range(4):
        x, h, segments = sample(seed=seed, dtype=torch.float64)
        h = h + 5 * seed * (h > 0)  # batches with different means: different shifts
        whole.update(x, h, segments)
        (left if seed < 1 else right).update(x, h, segments)
    left.merge(right)
    assert_same(left.compute(), whole.compute(), 1e-10)
    empty = TemporalMetrics()
    empty.merge(left)
    assert_same(empty.compute(), whole.compute(), 1e-10)


def test_batches_equal_their_concatenation():
    whole, parts = TemporalMetrics(), TemporalMetrics()
    samples = [sample(seed=seed, dtype=torch.float64) for seed in range(3)]
    for one in samples:
        parts.update(*one)
    whole.update(*(torch.cat(tensors) for tensors in zip(*samples, strict=True)))
    assert_same(parts.compute(), whole.compute(), 1e-10)


def test_every_row_is_counted_once():
    # More elements than one chunk holds.
    h = torch.rand(7, 128, 1500)
    assert sum(len(range(7)[rows]) for rows in row_chunks(h)) == 7
    assert len(list(row_chunks(h))) > 1
    metrics = TemporalMetrics()
    metrics.update(torch.randn(7, 128, 2), h, one_document(h))
    product = ((h[:, 1:] - h[:, :-1]).double() ** 2).sum()
    energy = (h[:, 1:].double() ** 2 + h[:, :-1].double() ** 2).sum()
    assert metrics.compute()["relative_difference"]["1"] == pytest.approx(float(product / energy), rel=1e-6)


@pytest.mark.parametrize("garbage", [1e6, float("nan"), float("inf")])
def test_excluded_positions_have_no_influence(garbage):
    x, h, segments = sample()
    expected = fast_metrics(x, h, segments)
    x, h = x.clone(), h.clone()
    h[segments < 0] = garbage
    x[segments < 0] = garbage
    assert_same(fast_metrics(x, h, segments), expected, 0)


def test_no_pair_crosses_a_document_border():
    # Two documents, each constant: only a pair across the border could see a difference.
    h = torch.ones(2, 12, 3)
    h[:, 5:] = 9.0
    segments = torch.zeros(2, 12, dtype=torch.int32)
    segments[:, 5:] = 1
    metrics = fast_metrics(torch.randn(2, 12, 4), h, segments)
    assert metrics["relative_difference"] == {"1": 0.0, "4": 0.0, "16": 0.0, "64": 0.0}
    assert metrics["smoothness"] == 0.0
    torch.testing.assert_close(pair_mask(segments, 4).sum(1), torch.tensor([1 + 3, 1 + 3]), check_dtype=False)


def test_equal_ids_of_separate_runs_are_separate_segments():
    segments = torch.tensor([[0, 0, 1, 0, 0, -1, 0]])
    assert segment_runs(segments).tolist() == [[0, 0, 1, 2, 2, 3, 4]]
    assert pair_mask(segments, 3).tolist() == [[False] * 4]
    assert pair_mask(segments, 1).tolist() == [[True, False, False, True, False, False]]


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_autocorrelation_of_an_autoregressive_signal(rho):
    # Far from zero: the mean must not leak into the correlation.
    h = ar1(rho, B=64, T=128, k=8) + 500
    curve = fast_metrics(torch.randn(64, 128, 2), h, one_document(h))["autocorrelation"]
    for lag, value in curve.items():
        assert value == pytest.approx(rho ** int(lag), abs=0.02)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_differences_and_persistence_of_an_autoregressive_signal(rho):
    """About 0, a relative difference is 1 - rho^lag; a Gaussian signal keeps its sign by the arcsine law."""
    h = ar1(rho, B=96, T=128, k=8)
    metrics = fast_metrics(torch.randn(96, 128, 2), h, one_document(h))
    for name in ("relative_difference", "relative_difference_per_feature"):
        for lag, value in metrics[name].items():
            assert value == pytest.approx(1 - rho ** int(lag), abs=0.02), name
    stays = 0.5 + math.asin(rho) / math.pi  # P(h_u > 0 given h_t > 0), on half of the time
    assert metrics["persistence"] == pytest.approx(stays, abs=0.01)
    assert metrics["persistence_excess"] == pytest.approx((stays - 0.5) / 0.5, abs=0.02)
    rates = {"on_on": stays / 2, "off_off": stays / 2, "on_off": (1 - stays) / 2, "off_on": (1 - stays) / 2}
    assert metrics["transitions"] == pytest.approx(rates, abs=0.01)


def test_smoothness_of_a_ramp_and_a_step():
    """The input moves by 2 a token. One feature climbs by 0.5 a token, one steps by 3, one is on at the last token
    alone; one is off, and one moves without ever being above 0."""
    t = torch.arange(1.0, 33.0)
    x = torch.zeros(2, 32, 3)
    x[..., 1] = 2 * t
    h = torch.zeros(2, 32, 5)
    h[..., 0] = 0.5 * t
    h[:, 20:, 1] = 3.0
    h[:, 31, 2] = 4.0
    h[..., 4] = -0.1 * t
    assert fast_metrics(x, h, one_document(h))["smoothness"] == pytest.approx((0.5 / 2 + 3 / 2 + 4 / 2) / 3)


def test_constant_and_alternating_signals():
    t = torch.arange(128)
    h = torch.zeros(4, 128, 2)
    h[..., 0] = 3.0
    metrics = fast_metrics(torch.randn(4, 128, 2), h, one_document(h))
    assert metrics["relative_difference"]["1"] == 0
    assert metrics["autocorrelation"]["1"] == 0  # no feature varies
    assert metrics["persistence"] == 1
    assert metrics["persistence_excess"] == 0  # always on: nothing beyond chance
    h[..., 0] = 1.0 - 2.0 * (t % 2)
    metrics = fast_metrics(torch.randn(4, 128, 2), h, one_document(h))
    assert metrics["relative_difference"]["1"] == pytest.approx(2)
    assert metrics["relative_difference"]["4"] == 0
    assert metrics["autocorrelation"]["1"] == pytest.approx(-1)
    assert metrics["autocorrelation"]["2"] == pytest.approx(1)


def test_constant_features_have_neither_autocorrelation_nor_excess():
    # Values that float32 sums cannot represent, and values that alternate between two float32 neighbours, as results of
    # matrix products do: rounding is not variance.
    h = (torch.rand(50, generator=torch.Generator().manual_seed(0)) * 6000 + 1).repeat(3, 127, 1)
    h[:, ::2, 40:] = h[:, ::2, 40:].nextafter(torch.tensor(torch.inf))
    metrics = TemporalMetrics()
    for part in (h[:1], h[1:]):
        metrics.update(torch.randn(*part.shape[:2], 2), part, one_document(part))
    result = metrics.compute()
    assert set(result["autocorrelation"].values()) == {0.0}
    for name in ("relative_difference", "relative_difference_per_feature"):
        assert max(result[name].values()) < 1e-12
    assert result["persistence"] == 1
    assert result["persistence_excess"] == 0


def test_square_wave():
    # On for 8 tokens, off for 8: of 64 activations in a row the last of each run is not followed by one.
    h = ((torch.arange(128) // 8) % 2 == 0).float().expand(2, 128)[..., None]
    metrics = fast_metrics(torch.randn(2, 128, 2), h, one_document(h))
    assert metrics["persistence"] == pytest.approx(7 / 8)
    assert metrics["persistence_excess"] == pytest.approx((7 / 8 - 1 / 2) / (1 / 2))
    assert metrics["transitions"]["on_on"] == pytest.approx(56 / 127)
    assert metrics["transitions"]["on_off"] == pytest.approx(8 / 127)
    assert sum(metrics["transitions"].values()) == pytest.approx(1)
    # A triangle over lags: 1 at 0, 0 a quarter of the period on, -1 half of it on.
    curve = metrics["autocorrelation"]
    assert [curve[lag] for lag in ("8", "16", "32", "64")] == pytest.approx([-1, 1, 1, 1])
    assert curve["1"] == pytest.approx(1 - 2 * 15 / 127)  # 15 of 127 pairs disagree
    assert curve["4"] == pytest.approx(1 - 2 * 60 / 124)
    # One difference over the ones in pairs: the first token is in one pair, and the last is off.
    assert metrics["relative_difference"] == pytest.approx({"1": 15 / 127, "4": 60 / 124, "16": 0, "64": 0})


def test_shrinking_features_is_not_consistency():
    x, h, segments = sample(dtype=torch.float64)
    full, shrunk = fast_metrics(x, h, segments), fast_metrics(x, h * 1e-3, segments)
    assert shrunk.pop("smoothness") == pytest.approx(full.pop("smoothness") * 1e-3)  # has units
    assert_same(shrunk, full, 1e-9)


def test_dead_features_change_only_what_counts_every_feature():
    x, h, segments = sample(dtype=torch.float64)  # in float32 a wider matrix is summed in another order
    wider = torch.cat([h, torch.zeros(*h.shape[:2], 11)], dim=2)
    before, after = fast_metrics(x, h, segments), fast_metrics(x, wider, segments)
    before.pop("transitions")
    assert after.pop("transitions")["off_off"] > 0.5
    assert_same(after, before, 1e-12)


@pytest.mark.parametrize("case", ["dead", "all excluded", "no batch"])
def test_degenerate_sets_are_finite(case):
    metrics = TemporalMetrics()
    h = torch.zeros(2, 8, 3)
    segments = one_document(h) - (1 if case == "all excluded" else 0)
    if case != "no batch":
        metrics.update(torch.ones(2, 8, 4), h, segments)
    result = metrics.compute()
    assert result.pop("transitions")["on_on"] == 0
    for value in result.values():
        assert all(v == 0 for v in (value.values() if isinstance(value, dict) else [value]))


def test_repeated_input_does_not_divide_by_zero():
    # A latched feature may switch where the input is constant, which leaves the slope undefined.
    h = torch.tensor([[[0.0], [1.0], [3.0]]])
    x = torch.tensor([[[0.0], [0.0], [4.0]]])
    assert fast_metrics(x, h, one_document(h))["smoothness"] == pytest.approx(0.5)


def test_shuffling_keeps_each_document_and_moves_nothing_else():
    _, _, segments = sample()
    x = torch.arange(3 * 20, dtype=torch.float32).view(3, 20, 1)
    shuffled = shuffle_within_segments(x, segments, torch.Generator().manual_seed(0))
    runs = segment_runs(segments)
    for b in range(3):
        for run in runs[b].unique():
            here = runs[b] == run
            assert sorted(shuffled[b, here, 0].tolist()) == x[b, here, 0].tolist()
    assert torch.equal(shuffled[segments < 0], x[segments < 0])
    assert not torch.equal(shuffled, x)
    again = shuffle_within_segments(x, segments, torch.Generator().manual_seed(0))
    assert torch.equal(shuffled, again)


def test_shuffling_kills_the_excess_of_order_and_not_that_of_documents():
    latent = ar1(0.95, B=48, T=128, k=16)
    segments = one_document(latent)
    generator = torch.Generator().manual_seed(1)

    def excess(h: Tensor) -> float:
        persistence = Persistence()
        persistence.update_features(h, segments)
        return persistence.excess()

    fast = ar1(0.5, B=48, T=128, k=16).relu()
    assert excess(fast) > 0.25
    assert excess(shuffle_within_segments(fast, segments, generator)) < 0.05
    # A feature of complete documents keeps its excess, which does not depend on the order of tokens.
    topic = (torch.randn(48, 1, 16, generator=generator) > 0).float().expand(48, 128, 16)
    assert excess(shuffle_within_segments(topic, segments, generator)) == pytest.approx(1)
    independent = torch.randn(48, 128, 16, generator=generator).relu()
    assert abs(excess(independent)) < 0.02
    assert excess(torch.ones(48, 128, 16)) == 0


def test_rare_features_do_not_enter_the_excess():
    h = torch.zeros(1, 128, 2)
    h[0, :19, 0] = 1
    segments = one_document(h)
    assert fast_metrics(torch.randn(1, 128, 2), h, segments)["persistence_excess"] == 0
    h[0, 19, 0] = 1
    assert fast_metrics(torch.randn(1, 128, 2), h, segments)["persistence_excess"] > 0.9


def test_merge_wants_the_same_kind():
    with pytest.raises(TypeError, match="other"):
        Persistence().merge(TemporalMetrics().lags)


def test_per_feature_persistence_and_dwell():
    on = [[1, 1, 1, 0, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]
    h = torch.tensor(on, dtype=torch.float32)[..., None] * torch.tensor([2.0, 0.0])
    segments = torch.tensor([[0] * 10, [0, 1] + [1] * 8], dtype=torch.int32)  # the second row's run is cut in two
    persistence = Persistence()
    persistence.update_features(h, segments)
    features = persistence.per_feature()
    assert features.active.tolist() == [7, 0]
    assert features.density.tolist() == [7 / 20, 0]
    # Five of the seven activations have a next token in their segment.
    assert features.stays[0] == pytest.approx(2 / 5)
    assert features.excess[0] == pytest.approx((2 / 5 - 7 / 20) / (1 - 7 / 20))
    assert features.dwell[0] == pytest.approx(7 / 5)  # runs of 3, 1, 1, 1 and 1
    assert features.stays[1].isnan()
    assert features.excess[1].isnan()
    assert features.dwell[1].isnan()
    with pytest.raises(ValueError, match="update"):
        Persistence().per_feature()
