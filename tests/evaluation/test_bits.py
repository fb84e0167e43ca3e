"""Bits per token: closed forms, invariances, and a real code of the same length."""

import math

import arithmetic_coder
import pytest
import torch
from torch import Tensor

from tsae.evaluation.metrics import CodeLength, Persistence, shuffle_within_segments
from tsae.evaluation.metrics.bits import _WIDTHS, _costs


def entropy(q: float | Tensor) -> Tensor:
    """H(q) in bits."""
    q = torch.as_tensor(q, dtype=torch.float64)
    return -(torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q)) / math.log(2)


def chains(p01: Tensor, p11: Tensor, B: int, T: int, seed: int = 0) -> Tensor:
    """Stationary two-state Markov chains, [B, T, len(p01)], as 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(B, T, len(p01), generator=generator)
    on = torch.zeros_like(draws)
    on[:, 0] = (draws[:, 0] < p01 / (1 + p01 - p11)).float()
    for t in range(1, T):
        on[:, t] = (draws[:, t] < torch.where(on[:, t - 1] > 0, p11, p01)).float()
    return on


def whole(h: Tensor) -> Tensor:
    """One document per row."""
    return torch.zeros(h.shape[:2], dtype=torch.int32)


def measured(h: Tensor, segments: Tensor | None = None, half: Tensor | None = None) -> CodeLength:
    """The code of a set whose first rows are one half and the others the other."""
    segments = whole(h) if segments is None else segments
    if half is None:
        half = (torch.arange(len(h)) >= len(h) / 2).int()[:, None].expand(segments.shape)
    code = CodeLength()
    code.update(h, segments, half)
    return code


def compute(h: Tensor, step: float = 1.0, norms: Tensor | None = None, **kwargs: Tensor) -> dict[str, float]:
    return measured(h, **kwargs).compute(step, torch.ones(h.shape[2]) if norms is None else norms)


def lively(B: int = 40, T: int = 128, k: int = 24, seed: int = 0) -> Tensor:
    """Features with rates of a real autoencoder's and exponential amplitudes of different scales."""
    generator = torch.Generator().manual_seed(seed)
    p01, p11 = torch.rand(k, generator=generator) * 0.05 + 0.001, torch.rand(k, generator=generator) * 0.9
    scale = torch.exp2(torch.rand(k, generator=generator) * 5 + 1)
    amplitude = torch.empty(B, T, k).exponential_(generator=generator) * scale + scale
    return chains(p01, p11, B, T, seed) * amplitude


def slow_support(h: Tensor, segments: Tensor, half: Tensor) -> tuple[float, float]:
    """The definition: counts and charges one position and feature at a time."""
    B, T, k = h.shape
    events: dict[str, list] = {"all": [], "start": [], "off": [], "on": []}
    for b in range(B):
        for t in range(T):
            if segments[b, t] < 0:
                continue
            follows = t > 0 and segments[b, t - 1] == segments[b, t] and half[b, t - 1] == half[b, t]
            for j in range(k):
                event = (int(half[b, t]), j, bool(h[b, t, j] > 0))
                events["all"].append(event)
                kind = "start" if not follows else "on" if h[b, t - 1, j] > 0 else "off"
                events[kind].append(event)

    def charge(charged: list, counted: list) -> float:
        bits = 0.0
        for side in (0, 1):
            others = [e for e in counted if e[0] != side]
            pooled = (sum(e[2] for e in others) + 0.5) / (len(others) + 1)
            for j in range(k):
                own = [e for e in others if e[1] == j]
                p = (sum(e[2] for e in own) + pooled) / (len(own) + 1)
                bits -= sum(math.log2(p if e[2] else 1 - p) for e in charged if e[:2] == (side, j))
        return bits

    tokens = len(events["all"]) / k
    memory = charge(events["start"], events["all"]) + charge(events["off"], events["off"])
    memory += charge(events["on"], events["on"])
    return memory / tokens, charge(events["all"], events["all"]) / tokens


@pytest.mark.parametrize("seed", range(2))
def test_support_equals_the_definition(seed):
    h = lively(B=4, T=24, k=5, seed=seed) - 0.5
    h[..., 3] = 0
    h[..., 4] = 1
    segments = whole(h)
    segments[:, 8:] = 1
    segments[0, 12] = 2
    segments[1, 12:] = 0
    segments[2, -4:] = -1
    half = (torch.arange(4 * 24) >= 40).int().view(4, 24)  # the border lies within a document
    found = measured(h, segments, half).support()
    assert found == pytest.approx(slow_support(h, segments, half), rel=1e-9)


@pytest.mark.parametrize("T", [2, 32, 128, 1000])
def test_markov_chains_cost_their_entropy_rate(T):
    p01, p11 = torch.tensor([0.01, 0.05, 0.2, 0.5]), torch.tensor([0.9, 0.4, 0.2, 0.98])
    metrics = compute(chains(p01, p11, B=240_000 // T, T=T))
    density = p01 / (1 + p01 - p11)
    rate = (density * entropy(p11) + (1 - density) * entropy(p01)).sum()
    memoryless = entropy(density).sum()
    assert metrics["support_bits_memoryless"] == pytest.approx(float(memoryless), rel=0.02)
    assert metrics["support_bits"] == pytest.approx(float(rate + (memoryless - rate) / T), rel=0.02)  # with the starts


def test_nothing_is_fitted_where_it_is_judged():
    """Halves of different rates are charged each other's: entropy and divergence."""
    draws = torch.rand(400, 128, 1)
    p = torch.where(torch.arange(400) < 200, 0.1, 0.4)[:, None, None]
    metrics = compute((draws < p).float())
    cross = [-a * math.log2(b) - (1 - a) * math.log2(1 - b) for a, b in ((0.1, 0.4), (0.4, 0.1))]
    for name in ("support_bits", "support_bits_memoryless"):
        assert metrics[name] == pytest.approx(sum(cross) / 2, rel=0.01)


def test_a_feature_unseen_in_one_half_costs_finitely():
    h = torch.zeros(20, 128, 10)
    h[..., 1:] = lively(B=20, k=9)
    h[15, 7, 0] = 300.0  # in the second half alone
    rare, never = compute(h), compute(torch.cat([h[..., 1:], torch.zeros(20, 128, 1)], dim=2))
    for name in ("support_bits", "amplitude_bits"):
        extra = (rare[name] - never[name]) * 20 * 128
        assert 4 < extra < 30, name  # bits for the event


def test_what_needs_no_code_costs_nothing():
    """Dead features, and constant ones that are always on: below 3 bits each for the complete text."""
    h = lively()
    always = torch.tensor([0.3, 5.0, 70.0, 2e4]).expand(40, 128, 4)
    plain, more = compute(h), compute(torch.cat([h, always, torch.zeros(40, 128, 4)], dim=2))
    for name in ("support_bits", "amplitude_bits"):
        assert more[name] == pytest.approx(plain[name], abs=3 * 8 / (40 * 128)), name
    alone = compute(always)
    assert 0 <= alone["total_bits"] < 3 * 4 / (40 * 128)


def test_dead_features_cost_nothing_in_any_number():
    h = lively()
    plain, wide = compute(h), compute(torch.cat([h, torch.zeros(40, 128, 3000)], dim=2))
    assert wide["support_bits"] == pytest.approx(plain["support_bits"], rel=0.005)
    assert wide["amplitude_bits"] == plain["amplitude_bits"]


def test_relabelled_features_cost_the_same():
    h, norms = lively(), torch.rand(24) + 0.5
    order = torch.randperm(24)
    assert compute(h[..., order], norms=norms[order]) == pytest.approx(compute(h, norms=norms), rel=1e-9)


def test_rescaled_features_cost_the_same():
    """h c with a decoder row / c is the same code; and so are other units of the activations."""
    h, norms = lively(), torch.rand(24) + 0.5
    expected = compute(h, norms=norms)
    c = torch.exp2(torch.randint(-8, 9, (24,)).float())  # exact in float32
    assert compute(h * c, norms=norms / c) == pytest.approx(expected, rel=1e-9)
    c = torch.rand(24) * 100
    assert compute(h * c, norms=norms / c) == pytest.approx(expected, rel=1e-3)  # values that round the other way
    assert compute(h, step=32.0, norms=norms * 32) == pytest.approx(expected, rel=1e-9)


def test_duplicated_features_cost_twice():
    """Two copies at half the amplitude: twice the support; a half is coded as the whole with twice the step."""
    h = lively()
    twice = compute(torch.cat([h / 2, h / 2], dim=2))
    once = compute(h, step=2.0)
    for name in ("support_bits", "support_bits_memoryless"):
        assert twice[name] == pytest.approx(2 * once[name], rel=1e-6)  # the pooled rates' prior
    assert twice["amplitude_bits"] == pytest.approx(2 * once["amplitude_bits"], rel=0.02)
    assert twice["total_bits"] > 1.5 * compute(h)["total_bits"]


@pytest.mark.parametrize("step", [0.5, 2.0])
@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_gaussian_amplitudes_cost_their_entropy_given_the_past(rho, step):
    """log2(sigma sqrt(2 pi e) / step) bits a value, less 0.5 log2(1 / (1 - rho^2)) for the value before."""
    noise, sigma = torch.randn(200, 128, 4), torch.tensor([8.0, 8.0, 30.0, 100.0])
    z = noise.clone()
    for t in range(1, 128):
        z[:, t] = rho * z[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    found = measured(1000 + sigma * z).amplitude(step, torch.ones(4))
    first = (sigma * math.sqrt(2 * math.pi * math.e) / step).log2()
    saved = -0.5 * math.log2(1 - rho**2) * 127 / 128
    # Classes half an octave apart share a histogram, and the intervals are learned.
    assert found == pytest.approx(float((first - saved).sum()), rel=0.02)


def test_exponential_amplitudes_of_blinking_features_cost_their_entropy():
    """log2(e mu / step) bits a value: the histograms know no family of distributions."""
    on = chains(torch.full((6,), 0.2), torch.full((6,), 0.2), B=300, T=128)
    mu = torch.tensor([8.0, 8.0, 16.0, 16.0, 64.0, 64.0])
    h = on * (torch.empty_like(on).exponential_() * mu + 50)
    expected = (0.2 * (math.e * mu).log2()).sum()
    assert measured(h).amplitude(1.0, torch.ones(6)) == pytest.approx(float(expected), rel=0.02)


def test_values_that_last_cost_only_where_they_start():
    on = chains(torch.full((6,), 0.02), torch.full((6,), 0.95), B=200, T=128)
    level = torch.randint(1, 65, on.shape).float() * 10
    h = on * level
    for t in range(1, 128):  # the level of a run is that of its start
        h[:, t] = torch.where((on[:, t] > 0) & (on[:, t - 1] > 0), h[:, t - 1], h[:, t])
    starts = int((on[:, 0] > 0).sum() + ((on[:, 1:] > 0) & (on[:, :-1] == 0)).sum())
    per_start = measured(h).amplitude(10.0, torch.ones(6)) * 200 * 128 / starts
    assert per_start == pytest.approx(6, rel=0.05)  # of 64 levels
    blinking = measured(on * level).amplitude(10.0, torch.ones(6)) * 200 * 128 / int(on.sum())
    assert blinking == pytest.approx(6, rel=0.05)  # without a use for the past, directly


def test_the_costs_are_those_of_a_code():
    counts = torch.zeros(85, 2, len(_WIDTHS), dtype=torch.float64)
    counts[30, 0, :40] = torch.randint(0, 50, (40,)).double()
    counts[40, 1, 100] = 1000
    costs = _costs(counts)
    assert bool((costs[:, 0] > 0).all() & costs[:, 1, 1:].isfinite().all())
    assert bool((costs[:, 1, 0][counts[:, 1, 0] == 0].isinf()).all())  # 0 has one sign
    torch.testing.assert_close(
        (2**-costs * _WIDTHS).sum((1, 2)), torch.ones(85, dtype=torch.float64), atol=1e-2, rtol=0
    )
    assert bool(((2**-costs * _WIDTHS).sum((1, 2)) <= 1 + 1e-12).all())


def test_a_real_arithmetic_coder_needs_as_many_bits():
    h = lively(B=24, k=48)
    h[..., 0], h[..., 1] = 1, 0
    segments = whole(h)
    segments[:, 50:] = 1
    code, total = measured(h, segments), 0
    for half in (0, 1):
        density, after_off, after_on = (rate.tolist() for rate in code.rates(1 - half))
        on = (h[12 * half : 12 * half + 12] > 0).tolist()

        def probability(before: list[bool] | None, j: int, rates=(density, after_off, after_on)) -> float:
            return rates[0][j] if before is None else rates[2][j] if before[j] else rates[1][j]

        def events(on=on, probability=probability):
            for row in on:
                for t, now in enumerate(row):
                    before = None if t in (0, 50) else row[t - 1]
                    for j, bit in enumerate(now):
                        yield bit, probability(before, j)

        written = arithmetic_coder.encode(events())
        total += 8 * len(written)
        decode = arithmetic_coder.decoder(written)
        for row in on:
            before = None
            for t, now in enumerate(row):
                before = None if t in (0, 50) else before
                before = [decode(probability(before, j)) for j in range(48)]
                assert before == now
    support, memoryless = code.support()
    assert total / (24 * 128) == pytest.approx(support, rel=0.02)
    assert support < 0.8 * memoryless


def test_features_that_last_are_cheaper_in_order_than_shuffled():
    h = lively()
    mixed = shuffle_within_segments(h, whole(h), torch.Generator().manual_seed(0))
    order, shuffled = compute(h), compute(mixed)
    assert order["support_bits"] < 0.85 * shuffled["support_bits"]
    assert shuffled["support_bits"] == pytest.approx(shuffled["support_bits_memoryless"], rel=0.03)
    assert order["support_bits_memoryless"] == pytest.approx(shuffled["support_bits_memoryless"], rel=1e-9)


def test_counts_agree_with_persistence():
    h, persistence = lively(), Persistence()
    persistence.update_features(h, whole(h))
    half = torch.zeros(h.shape[:2], dtype=torch.int32)
    rates, features = measured(h, half=half).rates(0), persistence.per_feature()
    # Apart from the prior of one observation.
    assert bool(((rates.density - features.density).abs() < 1 / (40 * 128)).all())
    assert bool(((rates.on_after_on - features.stays).abs() < 1.2 / features.active).all())


def test_batches_and_merged_halves_equal_one_pass():
    h = lively(B=12, T=70)
    segments = whole(h)
    segments[:, 33:] = 1
    segments[3, 10:20] = -1
    half = (torch.arange(12) >= 6).int()[:, None].expand(12, 70)
    expected = measured(h, segments, half).compute(1.0, torch.ones(24))
    left, right = CodeLength(), CodeLength()
    for code, rows in ((left, slice(0, 5)), (right, slice(5, 9)), (right, slice(9, 12))):
        code.update(h[rows], segments[rows], half[rows])
    empty = CodeLength()
    empty.merge(right)
    empty.merge(left)
    assert empty.compute(1.0, torch.ones(24)) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(TypeError, match="other"):
        empty.merge(Persistence())


@pytest.mark.parametrize("garbage", [1e6, math.nan, math.inf])
def test_excluded_positions_have_no_influence(garbage):
    h = lively(B=4, T=30)
    segments = whole(h)
    segments[:, 12:] = 1
    segments[:, 11:13] = -1
    expected = compute(h, segments=segments)
    h[segments < 0] = garbage
    assert compute(h, segments=segments) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_dtype(dtype):
    h = lively().to(torch.bfloat16)
    assert compute(h.to(dtype)) == pytest.approx(compute(h.float()), rel=1e-9)


@pytest.mark.parametrize("case", ["no batch", "all excluded", "dead", "one token", "one row", "no error", "T = 1"])
def test_degenerate_sets_are_finite(case):
    code, step = CodeLength(), 0.0 if case == "no error" else 1.0
    h = torch.zeros(1, 1, 3) if case == "one token" else torch.rand(6, 1 if case == "T = 1" else 9, 3)
    h = h * 0 if case == "dead" else h[:1] if case == "one row" else h
    if case != "no batch":
        code.update(h, whole(h) - (1 if case == "all excluded" else 0), 0)
    metrics = code.compute(step, torch.ones(3))
    assert all(math.isfinite(value) and value >= 0 for value in metrics.values())
    if case in ("no batch", "all excluded"):
        assert set(metrics.values()) == {0.0}


def test_values_that_are_not_finite_are_reported():
    h = lively(B=4)
    h[1, 3, 2] = math.inf
    assert math.isnan(compute(h)["amplitude_bits"])
    assert math.isnan(compute(lively(B=4), step=math.nan)["total_bits"])
    h[1, 3, 2] = 3e38  # as large as float32 allows
    assert math.isfinite(compute(h, step=1e-30)["amplitude_bits"])
