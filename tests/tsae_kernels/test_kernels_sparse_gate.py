"""Lists with the features that are nearly on: the operator against its definition, the encoder against the dense."""

import kernels_oracle as oracle
import pytest
import torch
from sparse_cases import BACKENDS, DEVICE, TYPES, features, random
from test_kernels_sparse_features import BANDS, Problem, assert_close, dense_of
from torch.library import opcheck

from tsae_kernels import activate_with_stats
from tsae_kernels.backends import sparse_eager as eager
from tsae_kernels.backends.sparse_eager import pack_active
from tsae_kernels.backends.triton import sparse_launch as triton
from tsae_kernels.sparse_features import SparseFeatures, decode_sparse_features, encode_gated
from tsae_kernels.sparse_weights import DeferredGradients, weight_gradients

WIDTH = 0.6
ops = torch.ops.tsae_kernels


def module(backend):
    return triton if backend == "triton" else eager


def arguments(B, T, k, dtype=torch.float32, segmented=True):
    """active, pre, bias, threshold, release, segments of a Schmitt trigger."""
    pre, bias = features(B, T, k, dtype=dtype), 0.1 * random(k)
    threshold = 0.5 + random(k, seed=2).abs()
    release = threshold * torch.linspace(0.2, 1.0, k, device=DEVICE)
    segments = oracle.random_segments(B, T, torch.Generator().manual_seed(T), longest=9).to(DEVICE)
    segments = segments if segmented else None
    h, _ = oracle.activate_with_stats(pre, bias, "relu", threshold, release, ((1, 1),), segments, backend=None)
    return pack_active(h), pre, bias, threshold, release, segments


def definition(active, pre, bias, threshold, release, segments):
    """For every token the listed features as (feature, value, level), and the number of active ones."""
    (B, T, k), on = pre.shape, eager.unpack_active(active, pre.shape[1]).tolist()
    z = pre.float() + (0.0 if bias is None else bias)
    listed, active = [], []
    for b in range(B):
        ids = [0] * T if segments is None else segments[b].tolist()
        for t in range(T):
            token = []
            for j in range(k):
                before = t > 0 and ids[t] == ids[t - 1] and on[b][t - 1][j]
                level = (release if before else threshold)[j]
                near = ids[t] >= 0 and bool((z[b, t, j] - level).abs() < WIDTH / 2 * level)
                if on[b][t][j] or near:
                    exact = pre[b, t, j].to(torch.promote_types(pre.dtype, torch.float32))
                    value = exact if bias is None else exact + bias[j]
                    token.append((j, float(value.to(pre.dtype)) * on[b][t][j], float(level) * near))
            listed.append(token)
            active.append(sum(on[b][t]))
    return listed, active


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("B", "T", "k"), [(2, 33, 40), (1, 5, 1), (1, 32, 7)])
def test_the_lists_are_the_definition(B, T, k, dtype, backend, monkeypatch):
    monkeypatch.setattr(triton, "_WIDE", 30)
    case = arguments(B, T, k, dtype)
    for given in (case, (*case[:2], None, *case[3:5], None)):
        values, indices, counts, levels, active = module(backend).compress_gated(*given, WIDTH, k)
        listed, numbers = definition(*given)
        assert (values.dtype, levels.dtype) == (dtype, torch.float32)
        assert {indices.dtype, counts.dtype, active.dtype} == {torch.int32}
        assert counts.tolist() == [len(token) for token in listed]
        assert active.tolist() == numbers
        found = zip(values.tolist(), indices.tolist(), levels.tolist(), strict=True)
        for n, (token, row) in enumerate(zip(listed, found, strict=True)):
            padded = token + [(k, 0.0, 0.0)] * (k - len(token))
            assert [(j, v, level) for v, j, level in zip(*row, strict=True)] == padded, n
    if k == 40:
        misses = (levels > 0) & (values == 0)
        assert misses.sum() > 10
        assert ((levels > 0) & (values > 0)).sum() > 10
        assert ((levels == 0) & (values > 0)).sum() > 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_before_the_first_position_of_a_word_counts(backend):
    """On at position 31, just below the release at 32, which is far below the threshold."""
    pre = torch.full((1, 34, 3), 2.0, device=DEVICE)
    pre[:, 32] = 0.45
    pre[:, [0, 33]] = 0.0
    threshold, release = torch.ones(3, device=DEVICE), torch.full((3,), 0.5, device=DEVICE)
    active = pack_active(torch.where(pre > 1, pre, 0.0))
    for ids, found in (([0] * 34, 3), ([0] * 32 + [1] * 2, 0)):
        segments = torch.tensor([ids], device=DEVICE)
        _, _, counts, levels, _ = module(backend).compress_gated(
            active, pre, None, threshold, release, segments, WIDTH, 3
        )
        assert counts[31:].tolist() == [3, found, 0]
        assert levels[32].tolist() == [0.5] * found + [0.0] * (3 - found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_window_needs_may_have_any_strides(backend):
    active, pre, bias, threshold, release, segments = arguments(2, 40, 20)
    wanted = module(backend).compress_gated(active, pre, bias, threshold[:1].expand(20), release, segments, WIDTH, 20)
    pre = pre.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    threshold = torch.stack([threshold[:1].expand(20)] * 2, 1)[:, 0]
    segments = segments.long().t().contiguous().t()
    got = module(backend).compress_gated(active, pre, bias, threshold, release, segments, WIDTH, 20)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_list_keeps_the_first_entries_and_counts_all(backend):
    case = arguments(1, 40, 30)
    whole, short = (module(backend).compress_gated(*case, WIDTH, capacity) for capacity in (30, 4))
    assert short[2].max() > 4
    for i in (2, 4):
        assert torch.equal(short[i], whole[i])
    for i in (0, 1, 3):
        assert torch.equal(short[i], whole[i][:, :4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequences(backend):
    case = [each[:0] if i in (0, 1, 5) else each for i, each in enumerate(arguments(1, 8, 5))]
    shapes = [tuple(each.shape) for each in module(backend).compress_gated(*case, WIDTH, 3)]
    assert shapes == [(0, 3), (0, 3), (0,), (0, 3), (0,)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    case = arguments(1, 4, 5)
    opcheck(ops.sparse_compress_gated, (*case, WIDTH, 3, backend))
    opcheck(ops.sparse_compress_gated, (*case[:2], None, *case[3:5], None, WIDTH, 3, backend))


class GatedProblem(Problem):
    """The loss of `Problem`, where features that are nearly on have a gradient through the reconstruction."""

    threshold, release = 0.6, 0.2

    def dense(self, ends=()):
        pre = self.x @ self.W_enc.T
        bias, levels = self.b_enc, (self.threshold, self.release)
        h, stats = activate_with_stats(pre, bias, "relu", *levels, BANDS, self.segments, backend="eager")
        miss = self.misses(h.detach(), (pre + bias).detach())
        z = pre + bias
        flat = (h + miss * (z - z.detach())).flatten(0, 1)  # of misses the gradient alone
        prefixes = [flat[:, :end] @ self.W_dec[:end] for end in ends or (flat.shape[1],)]
        return h, stats, miss, self.loss(h.abs().sum(dtype=torch.float64), stats, *prefixes)

    def misses(self, h, z):
        before = torch.zeros_like(h, dtype=torch.bool)
        before[:, 1:] = h[:, :-1] > 0
        if self.segments is not None:
            before[:, 1:] &= (self.segments[:, 1:] == self.segments[:, :-1])[..., None]
        level = torch.where(before, self.release, self.threshold)
        near = ((z - level).abs() < WIDTH / 2 * level) & (h == 0)
        return near if self.segments is None else near & (self.segments >= 0)[..., None]

    def sparse(self, backend, ends=(), deferred=None):
        levels = self.threshold, self.release
        found, stats = encode_gated(
            self.x, self.W_enc.T, self.b_enc, *levels, BANDS, self.segments,
            width=WIDTH, capacity=self.W_enc.shape[0], backend=backend, deferred=deferred,
        )  # fmt: skip
        options = {"ends": ends or None, "backend": backend, "deferred": deferred}
        xhat = decode_sparse_features(SparseFeatures(*found[:3]), self.W_dec, **options)
        l1 = found.values.abs().sum(dtype=torch.float64)
        return found, stats, self.loss(l1, stats, *(xhat if ends else [xhat]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("ends", [(), (3, 5)])
def test_loss_and_every_gradient_are_those_of_the_dense_step(backend, segmented, ends):
    problem = GatedProblem(1, 40, 3, 5, segmented=segmented)
    h, stats, miss, loss = problem.dense(ends)
    wanted = torch.autograd.grad(loss, problem.leaves)
    found, sparse_stats, sparse_loss = problem.sparse(backend, ends)
    got = torch.autograd.grad(sparse_loss, problem.leaves)
    assert torch.equal(dense_of(SparseFeatures(*found[:3]), 5), h.flatten(0, 1))
    assert miss.sum() > 2
    assert torch.equal(found.counts, (miss | (h > 0)).sum(2).flatten())
    assert_close(stats, sparse_stats)
    assert_close([sparse_loss, *got], [loss, *wanted])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_feature_that_is_only_nearly_on_has_gradients_and_counts_as_fired(backend):
    problem = GatedProblem(1, 24, 4, 6)
    with torch.no_grad():
        problem.b_enc[2] = 0.5 * problem.threshold - (problem.x @ problem.W_enc[2]).max()
        problem.b_enc[2] += 0.3 * problem.threshold  # its largest pre-activation is 0.8 of the threshold
    h, _, miss, loss = problem.dense()
    assert not h[..., 2].any()
    assert miss[..., 2].any()
    wanted = torch.autograd.grad(loss, problem.leaves[1:])
    deferred = DeferredGradients()
    problem.sparse(backend, deferred=deferred)[2].backward()
    grads = weight_gradients(deferred, problem.W_dec)
    assert grads.fired[2]
    assert grads.encoder[2].any()
    assert not grads.decoder[2].any()
    for got, each in zip((grads.encoder, grads.bias, grads.decoder), wanted, strict=True):
        assert_close([got[grads.fired]], [each[grads.fired]])


def test_invalid_arguments_are_named():
    x, weight = torch.randn(2, 3, 4), torch.randn(4, 5)
    for width in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="width must be positive"):
            encode_gated(x, weight, None, 0.5, 0.2, width=width, capacity=2)
    for threshold in (None, torch.ones(2, 3, 1)):
        with pytest.raises(
            ValueError, match=r"threshold and release must be numbers or tensors of shape \[\] or \[k\]"
        ):
            encode_gated(x, weight, None, threshold, 0.2, width=0.5, capacity=2)
