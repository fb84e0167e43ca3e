"""Transition counts of every backend against counting pair by pair."""

import kernels_oracle as oracle
import pytest
import torch
from kernels_oracle import activate_with_stats, encode_with_stats, temporal_stats
from torch.library import opcheck

import tsae_kernels
from tsae_kernels import CountedStats, TemporalStats, count_pairs, temporal_loss_from_stats
from tsae_kernels.sparse_features import encode_sparse

BANDS = ((1, 3), (4, 15))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {
    "relu": {},
    "identity": {"activation": "identity"},
    "gelu": {"activation": "gelu"},
    "per position": {"threshold": 0.4},  # [B, T, 1] in `options`
    "schmitt": {"threshold": 0.9, "release": 0.1},
}


def by_pairs(h, segments=None):
    """[B, 3, k]: every pair (t, t + 1) of one segment, one by one."""
    B, T, k = h.shape
    counts = torch.zeros(B, 3, k, dtype=torch.int32)
    for b, ids in enumerate(oracle.rows_of(segments, B)):
        on = [[value != value or value > 0 for value in row] for row in h[b].tolist()]
        for t in range(T - 1):
            if not oracle.same_segment(ids, t, t + 1):
                continue
            for j in range(k):
                kind = {(True, True): 0, (True, False): 1, (False, True): 2}.get((on[t][j], on[t + 1][j]))
                if kind is not None:
                    counts[b, kind, j] += 1
    return counts


def options_of(case, pre):
    options = dict(OPTIONS[case])
    if case == "per position":
        options["threshold"] = torch.linspace(-1, 1, pre.shape[0] * pre.shape[1]).view(*pre.shape[:2], 1)
    return options


def assert_counts(pre, backend, segments=None, bands=BANDS, **options):
    h, stats = activate_with_stats(pre, segments=segments, bands=bands, transitions=True, backend=backend, **options)
    assert isinstance(stats, CountedStats)
    assert stats.transitions.dtype == torch.int32
    assert stats.transitions.is_contiguous()
    assert torch.equal(stats.transitions, by_pairs(h, segments))
    alone = temporal_stats(h, bands, segments, transitions=True, backend=backend)
    plain = activate_with_stats(pre, segments=segments, bands=bands, backend=backend, **options)
    for got, other in zip(stats, alone, strict=True):
        assert torch.equal(got, other)
    for got, other in zip((h, *stats), (plain[0], *plain[1]), strict=False):
        assert torch.equal(got, other)
    return h, stats


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation_and_dtype(backend, case, segmented, dtype):
    oracle.too_slow(backend, not segmented or dtype in (torch.float64, torch.float16))
    oracle.compiles_too_much(backend, dtype in (torch.float64, torch.float16) or case in ("gelu", "per position"))
    generator = torch.Generator().manual_seed(2)
    pre = torch.randn(2, 23, 5, generator=generator).to(dtype)
    segments = oracle.random_segments(2, 23, generator, longest=9) if segmented else None
    assert_counts(pre, backend, segments, oracle.few(backend, BANDS), **options_of(case, pre))


@pytest.mark.parametrize("backend", oracle.SAMPLED_BACKENDS)
@pytest.mark.parametrize("T", [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 128, 129, 300])
@pytest.mark.parametrize("k", [1, 34, 97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_and_widths(backend, T, k, dtype):
    oracle.compiles_too_much(backend, T == 128 and dtype == torch.float32)
    generator = torch.Generator().manual_seed(T * k)
    pre = torch.randn(2, T, k, generator=generator).to(dtype)
    for segments in (None, oracle.random_segments(2, T, generator, longest=50)):
        assert_counts(pre, backend, segments, tsae_kernels.MULTISCALE, threshold=0.6, release=0.1)


@pytest.mark.parametrize("backend", oracle.FAST_BACKENDS)
@pytest.mark.parametrize("bands", [(), ((1, 1),), ((2, 7), (9, 40)), tsae_kernels.MULTISCALE])
def test_the_bands_do_not_matter(backend, bands):
    oracle.compiles_too_much(backend, bands != tsae_kernels.MULTISCALE)
    pre = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    assert_counts(pre, backend, bands=bands, threshold=0.5, release=0.2)


@pytest.mark.parametrize("backend", oracle.SAMPLED_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_of_many_features(backend, dtype):
    """Blocks of rows and tiles of features are processed in turn: each must find its own state again."""
    oracle.compiles_too_much(backend, dtype in (torch.float64, torch.float16))
    generator = torch.Generator().manual_seed(3)
    pre = torch.randn(1, 700, 450, generator=generator).to(dtype)
    ids = (torch.rand(1, 700, generator=generator) < 0.01).long().cumsum(1)
    ids[0, 100:170] = -1
    for segments in (None, ids):
        results = [
            activate_with_stats(pre, threshold=0.6, release=0.1, segments=segments, transitions=True, backend=name)
            for name in (backend, "reference")
        ]
        assert torch.equal(results[0][1].transitions, results[1][1].transitions)


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_nan_counts_as_on_and_minus_zero_as_off(backend):
    column = torch.tensor([float("nan"), -0.0, float("inf"), float("nan"), float("-inf"), 0.0, 1e-30, -1.0])
    h = column.view(1, 8, 1).expand(1, 8, 2)
    stats = temporal_stats(h, oracle.few(backend, ((1, 3),)), transitions=True, backend=backend)
    assert stats.transitions.tolist() == [[[1, 1], [3, 3], [2, 2]]]
    pre = torch.tensor([1.0, float("nan"), 0.0, 1.0]).view(1, 4, 1).expand(1, 4, 2)
    for threshold, release in ((None, None), (0.5, 0.1)):
        _, stats = activate_with_stats(
            pre, None, "relu", threshold, release, oracle.few(backend, ((1, 3),)), transitions=True, backend=backend
        )
        assert stats.transitions.tolist() == [[[1, 1], [1, 1], [1, 1]]]


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_the_rounded_feature_is_counted(backend):
    """1e-9 is on in float32 and 0 in float16."""
    pre, bias = torch.zeros(1, 6, 2, dtype=torch.float16), torch.full((2,), 1e-9)
    h, stats = activate_with_stats(pre, bias, bands=oracle.few(backend, BANDS), transitions=True, backend=backend)
    assert (h == 0).all()
    assert (stats.transitions == 0).all()


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_padding_may_hold_anything(backend):
    h = torch.randn(2, 9, 4)
    segments = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, 1], [0, 0, 0, 0, 0, 0, -1, -1, -1]])
    bands = oracle.few(backend, BANDS)
    clean = temporal_stats(h, bands, segments, transitions=True, backend=backend)
    h[segments < 0] = torch.tensor([float("inf"), float("nan"), 1e30, -1.0])
    padded = temporal_stats(h, bands, segments, transitions=True, backend=backend)
    assert torch.equal(clean.transitions, padded.transitions)
    assert torch.equal(clean.transitions, by_pairs(h, segments))


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_nothing_to_count(backend):
    bands = oracle.few(backend, BANDS)
    for segments in (torch.full((2, 6), -1), torch.arange(6).repeat(2, 1)):  # excluded; one position each
        stats = temporal_stats(torch.ones(2, 6, 2), bands, segments, transitions=True, backend=backend)
        assert (stats.transitions == 0).all()
    for segments in (None, torch.zeros(0, 7, dtype=torch.int64)):
        _, stats = activate_with_stats(
            torch.zeros(0, 7, 3), bands=bands, segments=segments, transitions=True, backend=backend
        )
        assert [tuple(s.shape) for s in stats] == [(0, len(bands), 3), (0, 3), (0, 3), (0, 3, 3)]
        assert stats.transitions.dtype == torch.int32


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_strides_do_not_matter(backend):
    base = torch.randn(3, 5, 20)
    bands = oracle.few(backend, ((1, 2),))
    for h in (
        base.transpose(1, 2),
        base[:, :, ::2].transpose(0, 1),
        base[:1].expand(4, 5, 20),
        base[..., :1].expand(3, 5, 8),
    ):
        assert_counts(h, backend, bands=bands, activation="identity")


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize("segmented", [False, True])
def test_pairs_are_every_position_but_one_end(backend, segmented):
    """on_on + off_on: the active positions that are not the first of a segment; on_on + on_off: not the last."""
    oracle.too_slow(backend, not segmented)
    generator = torch.Generator().manual_seed(5)
    pre = torch.randn(3, 50, 6, generator=generator)
    segments = oracle.random_segments(3, 50, generator, longest=12) if segmented else torch.zeros(3, 50).long()
    bands = oracle.few(backend, BANDS)
    h, stats = assert_counts(pre, backend, segments, bands, threshold=0.4, release=0.1)
    on_on, on_off, off_on = stats.transitions.unbind(1)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    ends = begins.roll(-1, 1)
    ends[:, -1] = True
    active = (h > 0) & (segments >= 0)[..., None]
    assert torch.equal(on_on + off_on, (active & ~begins[..., None]).sum(1).int())
    assert torch.equal(on_on + on_off, (active & ~ends[..., None]).sum(1).int())
    off_off = count_pairs(segments)[:, None] - stats.transitions.sum(1)
    assert (off_off >= 0).all()
    assert torch.equal(count_pairs(segments), (~begins & (segments >= 0)).sum(1))
    inside = (segments >= 0)[..., None] & (h == 0)
    off_pairs = (inside[:, 1:] & inside[:, :-1] & ~begins[:, 1:, None]).sum(1)
    assert torch.equal(off_off, off_pairs)


def test_without_the_keyword_there_are_three_fields():
    pre = torch.randn(2, 6, 3)
    for backend in oracle.HERE:
        for stats in (
            activate_with_stats(pre, backend=backend)[1],
            temporal_stats(pre, backend=backend),
            encode_with_stats(pre, torch.randn(3, 4), backend=backend)[1],
        ):
            assert type(stats) is TemporalStats
            assert stats._fields == ("differences", "total", "square")
    assert CountedStats._fields == (*TemporalStats._fields, "transitions")


def test_the_statistics_within_counted_ones():
    _, stats = activate_with_stats(torch.randn(2, 6, 3), transitions=True)
    assert type(stats.temporal) is TemporalStats
    assert all(a is b for a, b in zip(stats.temporal, stats, strict=False))


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
def test_gradients_are_those_without_counts(backend, activation):
    oracle.too_slow(backend, activation != "relu")
    bands = oracle.few(backend, BANDS)
    segments = torch.tensor([[0] * 8 + [1] * 5, [-1] * 3 + [0] * 10])
    results = []
    for transitions in (False, True):
        torch.manual_seed(0)
        x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 13, 4), (4, 6), (6,)))
        options = {"bands": bands, "segments": segments, "transitions": transitions, "backend": backend}
        h, stats = encode_with_stats(x, weight, bias, activation, **options)
        again = temporal_stats(h, bands, segments, transitions=transitions, backend=backend)
        assert not transitions or not (stats.transitions.requires_grad or again.transitions.requires_grad)
        loss = temporal_loss_from_stats(stats, 13, (0.1, 0.2, 0.3)[: len(bands)], torch.ones(6))
        loss = loss + h.sum() + stats.square.sum() + (again.differences * 0.1).sum() + again.total.sum()
        results.append(torch.autograd.grad(loss, [x, weight, bias]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


ops = torch.ops.tsae_kernels


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_opcheck(backend):
    bands = [offset for band in oracle.few(backend, ((1, 3),)) for offset in band]
    segments = torch.tensor([[0, 0, 1, 1, -1, 2]] * 2)
    given = torch.randn(2, 6, 3), torch.randn(3), torch.tensor(0.5), torch.tensor(0.2), segments
    pre, bias, threshold, release, segments = oracle.carried(given, backend)
    rest = bands, segments, backend
    opcheck(ops.temporal_stats_counted, (pre.clone().requires_grad_(), *rest))
    opcheck(ops.activate_with_mask_counted, (pre, bias, threshold, release, *rest))
    leaves = pre.clone().requires_grad_(), bias.clone().requires_grad_()
    opcheck(ops.activate_with_stats_counted, (*leaves, "relu", threshold, release, *rest))


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_compiles_without_graph_breaks(backend):
    torch.compiler.reset()
    bands = oracle.few(backend, BANDS)

    def function(x, weight):
        h, stats = encode_with_stats(x, weight, None, "relu", 0.5, 0.2, bands, transitions=True, backend=backend)
        again = temporal_stats(h, bands, transitions=True, backend=backend)
        rates = stats.transitions[:, 0] / (stats.transitions[:, 0] + stats.transitions[:, 1]).clamp_min(1)
        return stats.temporal.differences.sum() + again.square.sum() + rates.sum(), again.transitions

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = torch.randn(2, 20, 3, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    (expected, counts), (got, compiled_counts) = function(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected)
    assert torch.equal(counts, compiled_counts)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_the_mask_operator_counts_the_same(backend):
    bands = [offset for band in oracle.few(backend, BANDS) for offset in band]
    generator = torch.Generator().manual_seed(4)
    given = (
        torch.randn(2, 45, 6, generator=generator),
        torch.randn(6, generator=generator),
        torch.full((6,), 0.6),
        torch.full((6,), 0.1),
        oracle.random_segments(2, 45, generator),
    )
    pre, bias, threshold, release, segments = oracle.carried(given, backend)
    active, *stats = ops.activate_with_mask_counted(pre, bias, threshold, release, bands, segments, backend)
    plain = ops.activate_with_mask(pre, bias, threshold, release, bands, segments, backend)
    assert all(torch.equal(a, b) for a, b in zip((active, *stats), plain, strict=False))
    h, *wanted = ops.activate_with_stats_counted(pre, bias, "relu", threshold, release, bands, segments, backend)
    assert torch.equal(stats[3], wanted[3])
    assert torch.equal(stats[3].cpu(), by_pairs(h.cpu(), given[4]))


@pytest.mark.parametrize("backend", oracle.parameters(("eager", "triton")))
@pytest.mark.parametrize("capacity", [8, 2])
def test_sparse_lists_of_active_features(backend, capacity):
    """The counts come from all active features, also of tokens whose list is full."""
    bands = oracle.few(backend, BANDS)
    segments = torch.tensor([[0] * 8 + [1] * 5, [-1] * 3 + [0] * 10])
    results = []
    for transitions in (False, True):
        generator = torch.Generator().manual_seed(0)
        shapes = (2, 13, 4), (8, 4), (8,)
        x, weight, bias = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
        given = oracle.carried((x, weight.T, bias, segments), backend)
        features, stats = encode_sparse(
            *given[:3], 0.5, 0.1, bands, given[3], capacity=capacity, transitions=transitions, backend=backend
        )
        loss = features.values.sum() + stats.differences.sum() + stats.total.sum() + stats.square.sum()
        results.append((loss, *torch.autograd.grad(loss, [x, weight, bias])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert isinstance(stats, CountedStats)
    assert not stats.transitions.requires_grad
    h, _ = activate_with_stats(x @ weight.T, bias, "relu", 0.5, 0.1, bands, segments, backend="eager")
    assert torch.equal(stats.transitions.cpu(), by_pairs(h, segments))
    assert bool(features.overflow) == (capacity == 2)


def test_rows_walked_in_several_chunks():
    h = torch.randn(7, 12, 2**15)  # two rows to a chunk
    segments = torch.tensor([[0] * 5 + [-1] + [1] * 6] * 6 + [[2] * 12])
    got, wanted = (
        temporal_stats(h, ((1, 3),), segments, transitions=True, backend=name).transitions
        for name in ("eager", "reference")
    )
    assert torch.equal(got, wanted)
