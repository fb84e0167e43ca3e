"""Contrast and slowness against the definitions, pair by pair in float64, and their gradients."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tsae.config import TEMPORAL, ObjectiveConfig
from tsae.training.objectives import FeatureBatch, LossInputs, bands_for, objective, temporal_term
from tsae.training.temporal_objectives import (
    MaskedPairs,
    Pairs,
    contrastive_loss,
    count_pairs,
    draw_pairs,
    draw_pairs_by_hash,
    find_window_edges,
    slow_loss,
    window_loss,
)
from tsae_kernels import temporal_stats, window_consistency

B, T, K = 3, 12, 6
SEGMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [-1] + [0] * 4 + [1] + [-1] + [0] * 5])


def features(seed: int = 0) -> Tensor:
    h = torch.randn(B, T, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return h.relu()


def joined(segments: Tensor, b: int, t: int, u: int) -> bool:
    window = segments[b, t : u + 1]
    return bool(window[0] >= 0) and bool((window == window[0]).all())


def all_pairs(segments: Tensor, offset: int) -> set[tuple[int, int]]:
    return {
        (b * T + t, b * T + u)
        for b in range(B)
        for t in range(T)
        for u in range(t + 1, min(t + offset, T - 1) + 1)
        if joined(segments, b, t, u)
    }


def test_pairs_are_drawn_inside_segments_and_reach_every_pair() -> None:
    adjacent, near = all_pairs(SEGMENTS, 1), all_pairs(SEGMENTS, 3)
    generator = torch.Generator().manual_seed(0)
    pairs = draw_pairs(SEGMENTS, 1, 0, generator)
    assert {(int(a), int(b)) for a, b in zip(*pairs, strict=True)} == adjacent
    assert int(count_pairs(SEGMENTS, 1)) == len(adjacent)
    assert int(count_pairs(SEGMENTS, 3)) == len(near)
    seen: set[tuple[int, int]] = set()
    for _ in range(200):
        pairs = draw_pairs(SEGMENTS, 3, 8, generator)
        assert len(pairs.anchors) == len(set(pairs.anchors.tolist())) == 8
        seen |= {(int(a), int(b)) for a, b in zip(*pairs, strict=True)}
    assert seen == near
    assert len(draw_pairs(torch.full((2, 5), -1), 1, 8, generator).anchors) == 0


@pytest.mark.parametrize(("group", "other"), [(None, False), (4, False), (None, True)])
def test_contrastive_loss_is_symmetric_infonce(group: int | None, other: bool) -> None:
    h, tau = features(), 0.3
    pairs = draw_pairs(SEGMENTS, 2, 14, torch.Generator().manual_seed(1))
    rows = h.flatten(0, 1)[:, :group].tolist()

    def cosine(a: int, b: int) -> float:
        u, v = rows[a], rows[b]
        norm = math.sqrt(sum(x * x for x in u) * sum(x * x for x in v))
        return sum(x * y for x, y in zip(u, v, strict=True)) / norm if norm else 0.0

    p = list(zip(pairs.anchors.tolist(), pairs.partners.tolist(), strict=True))
    expected = 0.0
    for i, (a, b) in enumerate(p):
        others = [j for j, (c, _) in enumerate(p) if j == i or not other or c // T != a // T]
        expected -= cosine(a, b) / tau - math.log(sum(math.exp(cosine(a, p[j][1]) / tau) for j in others))
        expected -= cosine(a, b) / tau - math.log(sum(math.exp(cosine(p[j][0], b) / tau) for j in others))
    loss = contrastive_loss(h, pairs, tau, group=group, other_sequences=other)
    assert float(loss) == pytest.approx(expected / (2 * len(p)), rel=1e-9)


def test_contrastive_loss_is_low_where_neighbours_agree_and_knows_no_scale() -> None:
    level = torch.nn.functional.one_hot(torch.arange(4), 4).double()  # a feature of its own for every sequence
    h = level[:, None].expand(4, T, 4).contiguous()
    pairs = draw_pairs(torch.zeros(4, T, dtype=torch.int32), 1, 0, torch.Generator())
    smooth = contrastive_loss(h, pairs, other_sequences=True)
    assert float(smooth) < 1e-2
    assert float(contrastive_loss(h * 1e-3, pairs, other_sequences=True)) == pytest.approx(float(smooth))
    assert float(contrastive_loss(h, pairs)) > 2.0  # the same text is among the negatives
    noise = contrastive_loss(h[torch.randperm(4)][:, torch.randperm(T)].roll(1, 2) * torch.rand(4, T, 4), pairs)
    assert float(noise) > float(smooth)


def test_tokens_without_features_give_no_nan_and_no_gradient() -> None:
    h = features()
    h[0, 3] = 0.0
    h.requires_grad_()
    pairs = Pairs(torch.tensor([2, 3, 20]), torch.tensor([3, 4, 21]))
    contrastive_loss(h, pairs).backward()
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()
    assert not h.grad[0, 3].any()
    assert h.grad[0, 2].any()
    nothing = contrastive_loss(h, Pairs(*(torch.zeros(0, dtype=torch.int64),) * 2))
    assert float(nothing.detach()) == 0.0


def test_contrastive_loss_of_bfloat16_features_is_float32_and_near() -> None:
    h, pairs = features(), draw_pairs(SEGMENTS, 1, 0, torch.Generator())
    loss = contrastive_loss(h.bfloat16(), pairs)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(contrastive_loss(h.bfloat16().double(), pairs)), rel=0.01)


@pytest.mark.parametrize("offset", [1, 3])
def test_slow_loss_is_differences_over_variance(offset: int) -> None:
    h = features()
    h[..., 4] = 2.0  # does not vary
    h[..., 5] = 0.0  # dead
    kept = SEGMENTS >= 0
    pairs = sorted(all_pairs(SEGMENTS, offset))
    flat = h.flatten(0, 1)
    ratios = []
    for j in range(4):
        difference = sum(float((flat[b, j] - flat[a, j]) ** 2) for a, b in pairs) / len(pairs)
        ratios.append(difference / 2 / float(h[kept][:, j].var(correction=0)))
    stats = temporal_stats(h, ((1, offset),), SEGMENTS)
    loss = slow_loss(stats, kept.sum(), count_pairs(SEGMENTS, offset))
    assert float(loss) == pytest.approx(sum(ratios) / 4, rel=1e-9)
    constant = slow_loss(temporal_stats(torch.ones(2, 9, 3), ((1, 1),)), 18, 16)
    assert float(constant) == 0.0


def test_slow_loss_is_one_minus_the_autocorrelation_of_a_known_signal() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(40, 500, 3, generator=generator, dtype=torch.float64)
    for j, rho in enumerate((0.0, 0.5, 0.9)):
        for t in range(1, 500):
            h[:, t, j] = rho * h[:, t - 1, j] + math.sqrt(1 - rho**2) * h[:, t, j]
    for scale in (1.0, 1e-3):
        stats = temporal_stats(scale * h + 7.0 * scale, ((1, 1),))
        assert float(slow_loss(stats, 20_000, 40 * 499)) == pytest.approx(1 - (0.0 + 0.5 + 0.9) / 3, abs=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"temporal": "contrastive", "offset": 2},
        {"temporal": "contrastive", "negatives": "other-sequences", "group": 4},
        {"temporal": "slow", "offset": 2},
        {"temporal": "slow", "group": 3},
        {"temporal": "multiscale", "group": 3},
        {"temporal": "window", "group": 3},
    ],
)
def test_gradcheck_of_every_term_with_weight_and_group(options: dict[str, object]) -> None:
    cfg = ObjectiveConfig(boost=1.0, hold_steps=0, ramp_steps=0, l1=0.0, **options)  # type: ignore[arg-type]
    pairs = draw_pairs(SEGMENTS, cfg.offset, 9, torch.Generator().manual_seed(0))
    variance = torch.rand(K, dtype=torch.float64) + 0.1

    def term(h: Tensor) -> Tensor:
        stats = temporal_stats(h, bands_for(cfg), SEGMENTS)
        return temporal_term(FeatureBatch(h=h, stats=stats, segments=SEGMENTS, variance=variance, pairs=pairs), cfg)

    h = (features() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(term, (h,), atol=1e-7)
    (gradient,) = torch.autograd.grad(term(h), h)
    assert gradient[..., : cfg.group or K].any()
    assert not gradient[..., cfg.group or K :].any()
    assert float(term(h).detach()) == pytest.approx(
        float(term(torch.cat([h[..., : cfg.group or K], h[..., cfg.group or K :] * 5], -1)).detach())
    )
    cfg.weight = 2.5
    x = torch.zeros(B, T, 4)
    stats = temporal_stats(h, bands_for(cfg), SEGMENTS)
    inputs = LossInputs(x=x, xhat=x, h=h, stats=stats, segments=SEGMENTS, variance=variance, pairs=pairs)
    terms = objective(inputs, 0, cfg)
    assert float(terms.total.detach()) == pytest.approx(2.5 * float(terms.temporal))
    assert float(terms.temporal) == pytest.approx(float(term(h).detach()), rel=1e-6)


def test_without_segments_a_row_is_one() -> None:
    h, cfg = features(), ObjectiveConfig(temporal="slow")
    stats = temporal_stats(h, bands_for(cfg))
    zeros = torch.zeros(B, T, dtype=torch.int32)
    one = FeatureBatch(h=h, stats=stats)
    torch.testing.assert_close(temporal_term(one, cfg), temporal_term(replace(one, segments=zeros), cfg))


@pytest.mark.parametrize("window", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("segments", [SEGMENTS, torch.zeros(B, T, dtype=torch.int32), SEGMENTS.clamp(max=-1)])
def test_the_window_from_statistics_is_the_kernels_window(segments: Tensor, group: int | None, window: int) -> None:
    h = features().requires_grad_()
    edges = find_window_edges(segments, window)
    got = window_loss(h, temporal_stats(h, ((1, 1),), segments), edges, group=group)
    expected = window_consistency(h[..., :group], window, segments)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, h)[0], torch.autograd.grad(expected, h)[0])
    rows = set(edges.firsts.tolist()) | set((edges.firsts + 1).tolist())
    assert all(bool(segments.flatten()[row] >= 0) for row in rows)  # excluded positions may hold anything


OWN = {"weights": (0.3, 0.2), "window_weight": 0.7, "contrastive_weight": 0.4, "slow_weight": 1.3}


@pytest.mark.parametrize("options", [{}, {"group": 4}])
@pytest.mark.parametrize(("bands", "offset"), [(((1, 3), (4, 7)), 1), (((2, 2), (5, 7)), 5), (((1, 2), (3, 4)), 4)])
@pytest.mark.parametrize("names", [*itertools.combinations(TEMPORAL, 2), TEMPORAL], ids="+".join)
def test_a_combination_is_the_sum_of_its_terms_and_so_is_its_gradient(
    names: tuple[str, ...], bands: tuple[tuple[int, int], ...], offset: int, options: dict[str, int]
) -> None:
    pairs = draw_pairs(SEGMENTS, offset, 14, torch.Generator().manual_seed(1))
    variance = torch.rand(K, dtype=torch.float64) + 0.1

    def value_and_gradient(temporal: str) -> tuple[Tensor, Tensor]:
        cfg = ObjectiveConfig(temporal=temporal, bands=bands, offset=offset, **options, **OWN)  # type: ignore[arg-type]
        cfg.check()
        h = features().requires_grad_()
        stats = temporal_stats(h, bands_for(cfg), SEGMENTS)
        batch = FeatureBatch(h=h, stats=stats, segments=SEGMENTS, variance=variance, pairs=pairs)
        term = temporal_term(batch, cfg)
        return term.detach(), torch.autograd.grad(term, h)[0]

    parts = [value_and_gradient(name) for name in names]
    assert all(value > 0 for value, _ in parts)
    value, gradient = value_and_gradient("+".join(names))
    torch.testing.assert_close(value, sum(part for part, _ in parts))
    torch.testing.assert_close(gradient, sum(part for _, part in parts))
    again, _ = value_and_gradient("+".join(reversed(names)))
    assert torch.equal(value, again)


@pytest.mark.parametrize("name", TEMPORAL)
def test_each_term_has_a_weight_of_its_own(name: str) -> None:
    pairs = draw_pairs(SEGMENTS, 1, 0, torch.Generator())
    terms = []
    for factor in (1.0, 2.5):
        own = {"weights": (factor * 0.1,) * 3} if name == "multiscale" else {f"{name}_weight": factor * 0.1}
        cfg = ObjectiveConfig(temporal=name, **own)  # type: ignore[arg-type]
        stats = temporal_stats(features(), bands_for(cfg), SEGMENTS)
        batch = FeatureBatch(h=features(), stats=stats, segments=SEGMENTS, variance=torch.ones(K), pairs=pairs)
        terms.append(temporal_term(batch, cfg))
    torch.testing.assert_close(terms[1], 2.5 * terms[0])


@pytest.mark.parametrize(
    ("temporal", "bands", "offset", "expected"),
    [
        ("none", ((1, 3),), 2, ((1, 1),)),
        ("contrastive+window", ((1, 3),), 2, ((1, 1),)),
        ("multiscale", ((2, 3), (4, 9)), 5, ((2, 3), (4, 9))),
        ("multiscale+window", ((1, 3), (4, 9)), 5, ((1, 1), (2, 3), (4, 9))),
        ("multiscale+window", ((2, 3),), 5, ((1, 1), (2, 3))),
        ("contrastive+slow", ((2, 3),), 5, ((1, 5),)),
        ("multiscale+slow", ((1, 3), (4, 9)), 3, ((1, 3), (4, 9))),
        ("multiscale+slow", ((1, 3), (4, 9)), 9, ((1, 3), (4, 9))),
        ("multiscale+slow", ((1, 3), (4, 9)), 1, ((1, 1), (2, 3), (4, 9))),
        ("multiscale+slow", ((2, 3), (6, 9)), 7, ((1, 1), (2, 3), (4, 5), (6, 7), (8, 9))),
        ("multiscale+slow", ((5, 9),), 2, ((1, 2), (5, 9))),
    ],
)
def test_bands_are_the_pieces_that_the_terms_cut_each_other_into(
    temporal: str, bands: tuple[tuple[int, int], ...], offset: int, expected: tuple[tuple[int, int], ...]
) -> None:
    assert bands_for(ObjectiveConfig(temporal=temporal, bands=bands, offset=offset)) == expected


@pytest.mark.parametrize("window", [2, 3, 5])
def test_only_pairs_at_a_segment_s_ends_are_edges(window: int) -> None:
    """Whatever the number of windows is: its reciprocal in float32 once made every pair one."""
    for end in range(30, 60):
        segments = torch.zeros(8, 128, dtype=torch.int32)
        segments[0, end:] = 1
        segments[1, :9] = -1
        edges = find_window_edges(segments, window)
        assert len(edges.firsts) == 9 * 2 * (window - 2)


def test_pairs_drawn_by_hash_lie_in_segments_and_are_uniform() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, -1, -1, 2], [3, 3, 3, 3, 3, 3, 3, 3]])
    wanted = draw_pairs(segments, 3, 0, torch.Generator().manual_seed(0)).anchors.tolist()
    flat = segments.flatten()
    lags: dict[int, int] = {}
    seen: dict[int, int] = {}
    for step in range(300):
        anchors, partners, valid = draw_pairs_by_hash(segments, 3, 4, 7, torch.tensor(step))
        assert valid.all()
        assert len(set(anchors.tolist())) == 4
        assert torch.equal(anchors, anchors.sort().values)
        assert (flat[anchors] == flat[partners]).all()
        assert (anchors // 8 == partners // 8).all()
        for anchor, lag in zip(anchors.tolist(), (partners - anchors).tolist(), strict=True):
            seen[anchor] = seen.get(anchor, 0) + 1
            if anchor == 8:  # it has all three
                lags[lag] = lags.get(lag, 0) + 1
    assert sorted(seen) == wanted
    assert all(80 < count < 165 for count in seen.values()), seen  # 120 +- 8.5 of 1,200 draws among 10
    assert sorted(lags) == [1, 2, 3]
    assert min(lags.values()) > 20


def test_pairs_drawn_by_hash_are_a_function_of_seed_and_step_and_say_what_is_no_pair() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, -1, -1, 2]])
    one = draw_pairs_by_hash(segments, 2, 2, 7, torch.tensor(3))
    assert all(
        torch.equal(a, b) for a, b in zip(one, draw_pairs_by_hash(segments, 2, 2, 7, torch.tensor(3)), strict=True)
    )
    many = [
        tuple(draw_pairs_by_hash(segments, 2, 2, seed, torch.tensor(step))[0].tolist())
        for seed in range(4)
        for step in range(4)
    ]
    assert len(set(many)) > 2
    for count in (0, 6):
        anchors, partners, valid = draw_pairs_by_hash(segments, 1, count, 7, torch.tensor(0))
        assert anchors[valid].tolist() == [0, 1, 3]
        assert torch.equal(anchors[~valid], partners[~valid])
    h = torch.rand(1, 8, 5)
    few = draw_pairs(segments, 1, 0, torch.Generator())
    torch.testing.assert_close(contrastive_loss(h, MaskedPairs(anchors, partners, valid)), contrastive_loss(h, few))
    none = MaskedPairs(anchors, partners, torch.zeros_like(valid))
    h.requires_grad_()
    contrastive_loss(h, none).backward()
    assert torch.equal(h.grad, torch.zeros_like(h))
