"""The sparse encoder and decoder against the dense ones, in every backend of the lists."""

import kernels_oracle as oracle
import pytest
import torch

from tsae_kernels import MULTISCALE, activate_with_stats
from tsae_kernels.backends.sparse_eager import pack_active, unpack_active
from tsae_kernels.sparse_features import SparseFeatures, decode_sparse_features, encode_sparse
from tsae_kernels.sparse_weights import DeferredGradients, weight_gradients

BACKENDS = oracle.parameters(("eager", "triton"))
BANDS = ((1, 2), (4, 9), (11, 11))


def topk_threshold(pre, bias, n):
    """[B, T, 1]: exceeded by n features of every token."""
    return (pre.detach() + bias.detach()).sort(-1, descending=True).values[..., n : n + 1]


class Problem:
    """Weights, activations and a loss on every output of the encoder and the decoder."""

    def __init__(self, B, T, d, k, dtype=torch.float64, segmented=False, device="cpu", sparse=0.0):
        generator = torch.Generator().manual_seed(B + T + d + k)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x = normal(B, T, d).to(device, dtype)
        self.W_enc = (normal(k, d) * d**-0.5).to(device, dtype)
        self.b_enc = (normal(k) * 0.1 - sparse).to(device, dtype)
        self.W_dec = (normal(k, d) * d**-0.5).to(device, dtype)
        self.segments = oracle.random_segments(B, T, generator, longest=12).to(device) if segmented else None
        self.generator = generator
        self.leaves = [tensor.requires_grad_() for tensor in (self.x, self.W_enc, self.b_enc, self.W_dec)]

    def loss(self, l1, stats, *xhat):
        """A scalar whose gradient differs for every output."""
        generator = torch.Generator().manual_seed(0)
        total = l1.double() * 0.3
        for output in (*stats, *xhat):
            weight = torch.rand(output.shape, generator=generator, dtype=torch.float64).to(output.device)
            total = total + (weight * output.double() * 0.1).sum()
        return total + sum((each.reshape(-1).double() ** 2).sum() for each in xhat)

    def dense(self, threshold=None, release=None, bands=BANDS, ends=()):
        pre = self.x @ self.W_enc.T
        arguments = self.b_enc, "relu", threshold, release, bands, self.segments
        h, stats = activate_with_stats(pre, *arguments, backend="eager")
        flat = h.reshape(-1, h.shape[2])
        prefixes = [flat[:, :end] @ self.W_dec[:end] for end in ends or (flat.shape[1],)]
        return h, stats, self.loss(h.abs().sum(dtype=torch.float64), stats, *prefixes)

    def sparse(self, backend, threshold=None, release=None, bands=BANDS, ends=(), capacity=None, deferred=None):
        if threshold is not None and deferred is not None:
            assert not isinstance(threshold, torch.Tensor) or not threshold.requires_grad
        features, stats = encode_sparse(
            self.x, self.W_enc.T, self.b_enc, threshold, release, bands, self.segments,
            capacity=capacity or self.W_enc.shape[0], backend=backend, deferred=deferred,
        )  # fmt: skip
        options = {"ends": ends or None, "backend": backend, "deferred": deferred}
        xhat = decode_sparse_features(features, self.W_dec, **options)
        return (
            features,
            stats,
            self.loss(features.values.abs().sum(dtype=torch.float64), stats, *(xhat if ends else [xhat])),
        )


def dense_of(features: SparseFeatures, k):
    """h [N, k] of lists, read entry by entry."""
    h = torch.zeros(len(features.counts), k, dtype=features.values.dtype)
    for n, (values, indices, count) in enumerate(zip(*(each.detach().cpu() for each in features), strict=True)):
        for value, j in list(zip(values, indices, strict=True))[:count]:
            h[n, j] = value
    return h


def assert_close(got, wanted, rtol=1e-10):
    for a, b in zip(got, wanted, strict=True):
        scale = b.double().abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale)


THRESHOLDS = {
    "relu": lambda p: (None, None),
    "batchtopk": lambda p: (torch.tensor(0.4), None),
    "topk": lambda p: (topk_threshold(p.x @ p.W_enc.T, p.b_enc, 3), None),
    "schmitt": lambda p: (0.6, 0.2),
    "schmitt per feature": lambda p: ((t := torch.rand(p.W_enc.shape[0], generator=p.generator) + 0.3), t * 0.4),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("activation", THRESHOLDS)
def test_loss_and_every_gradient_are_those_of_the_dense_step(backend, activation, segmented):
    interpreted = backend == "triton" and oracle.INTERPRETED
    problem = Problem(*((1, 17, 3, 5) if interpreted else (2, 37, 5, 11)), segmented=segmented)
    levels = THRESHOLDS[activation](problem)
    h, stats, loss = problem.dense(*levels)
    wanted = torch.autograd.grad(loss, problem.leaves)
    features, sparse_stats, sparse_loss = problem.sparse(backend, *levels)
    got = torch.autograd.grad(sparse_loss, problem.leaves)
    assert torch.equal(dense_of(features, h.shape[2]), h.flatten(0, 1))
    assert not features.overflow
    assert_close(stats, sparse_stats)
    assert_close([sparse_loss, *got], [loss, *wanted])


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_ascend_and_end_with_zeros(backend):
    problem = Problem(3, 33, 4, 9, sparse=0.5)
    features, _, _ = problem.sparse(backend, capacity=12)
    values, indices, counts = (each.detach() for each in features)
    places = torch.arange(12)
    used = places < counts[:, None]
    assert counts.min() == 0 < counts.max()
    assert (indices[~used] == 9).all()
    assert (values[~used] == 0).all()
    assert (indices[:, 1:] > indices[:, :-1])[used[:, 1:]].all()
    assert indices.dtype == counts.dtype == torch.int32


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_list_keeps_the_first_features_and_is_reported(backend):
    problem = Problem(1, 40, 4, 50)
    whole, _, _ = problem.sparse(backend)
    short, _, _ = problem.sparse(backend, capacity=5)
    assert short.overflow
    assert not whole.overflow
    assert torch.equal(short.counts, whole.counts)
    assert torch.equal(short.values, whole.values[:, :5])
    assert torch.equal(short.indices, whole.indices[:, :5])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pieces", [1, 2])
def test_deferred_gradients_are_those_of_autograd(backend, pieces):
    problem = Problem(2, 21, 5, 30, segmented=True, sparse=0.8)
    ends = (4, 4, 20, 30)
    whole = torch.autograd.grad(problem.dense(0.6, 0.2, ends=ends)[2], problem.leaves)
    deferred = DeferredGradients()
    if pieces == 1:
        problem.sparse(backend, 0.6, 0.2, ends=ends, deferred=deferred)[2].backward()
    else:
        encoded, expected = problem.x.detach(), torch.zeros(())
        for b in range(2):
            problem.x = encoded[b : b + 1]
            segments, problem.segments = problem.segments, problem.segments[b : b + 1]
            problem.sparse(backend, 0.6, 0.2, ends=ends, deferred=deferred)[2].backward()
            expected = expected + problem.dense(0.6, 0.2, ends=ends)[2]
            problem.segments = segments
        whole = [None, *torch.autograd.grad(expected, problem.leaves[1:])]
    got = weight_gradients(deferred, problem.W_dec)
    assert_measured(got, problem.W_dec)
    assert all(leaf.grad is None for leaf in problem.leaves[1:])
    fired = got.fired
    assert 0 < fired.sum() < 30
    assert_close([got.encoder[fired], got.bias, got.decoder[fired]], [whole[1][fired], whole[2], whole[3][fired]])
    assert not whole[1][~fired].any()
    assert not whole[3][~fired].any()


def assert_measured(grads, W_dec):
    """The vectors beside the rows are what the rows say."""
    fired = grads.fired[:, None]
    encoder, decoder, weight = (torch.where(fired, rows, 0) for rows in (grads.encoder, grads.decoder, W_dec.detach()))
    products = (encoder, encoder), (decoder, decoder), (decoder, weight), (weight, weight)
    assert_close(grads[4:], [(a * b).sum(1) for a, b in products])


def test_rows_of_dead_features_are_added():
    problem = Problem(1, 30, 5, 20, sparse=1.0)
    deferred = DeferredGradients()
    problem.sparse("eager", deferred=deferred)[2].backward()
    grads = weight_gradients(deferred, problem.W_dec)
    before = [torch.where(grads.fired[:, None], rows, 0) for rows in (grads.encoder, grads.decoder)]
    bias = grads.bias.clone()
    for rows in (grads.encoder, grads.decoder):
        rows[~grads.fired] = torch.nan  # they may hold anything
    features = torch.stack([(~grads.fired).nonzero()[0, 0], grads.fired.nonzero()[0, 0]])
    more = torch.randn(2, 2, 5, dtype=torch.float64)
    after = grads.add_rows(features, more[0], more[1], torch.ones(2), problem.W_dec)
    assert_measured(after, problem.W_dec)
    assert torch.equal(
        after.fired.nonzero()[:, 0], torch.cat([grads.fired.nonzero()[:, 0], features[:1]]).sort().values
    )
    for rows, old, new in zip((after.encoder, after.decoder), before, more, strict=True):
        expected = old.index_add(0, features, new)
        assert torch.equal(torch.where(after.fired[:, None], rows, 0), expected)
    assert torch.equal(after.bias, bias.index_add(0, features, torch.ones(2, dtype=bias.dtype)))


def test_weight_gradients_needs_a_backward_pass():
    with pytest.raises(RuntimeError, match="recorded 0 of the decoder and 0 of the encoder"):
        weight_gradients(DeferredGradients())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (2, 64)])
def test_empty_batches_and_tokens_without_features(backend, shape):
    problem = Problem(*shape, 3, 7, sparse=100.0)
    features, _, loss = problem.sparse(backend, capacity=4)
    assert not features.overflow
    assert features.values.shape == (shape[0] * shape[1], 4)
    assert not features.counts.any()
    grads = torch.autograd.grad(loss, problem.leaves)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("T", [1, 31, 32, 33, 70])
def test_packing_is_inverted_and_counts_nan(T):
    h = torch.randn(2, T, 3).relu()
    h[0, T - 1, 1] = torch.nan
    active = pack_active(h)
    assert active.shape == (2, -(-T // 32), 3)
    assert torch.equal(unpack_active(active, T), h != 0)
    last = active[:, -1] >> (T - 1) % 32
    assert torch.equal(last & 1, (h[:, -1] != 0).int())
    if T % 32:
        assert not (last >> 1).any()


def test_pre_can_be_given_and_gets_no_gradient():
    problem = Problem(1, 9, 4, 6)
    pre = problem.x @ problem.W_enc.T
    given, _ = encode_sparse(problem.x, problem.W_enc.T, problem.b_enc, capacity=6, pre=pre)
    own, _ = encode_sparse(problem.x, problem.W_enc.T, problem.b_enc, capacity=6)
    assert torch.equal(given.values, own.values)
    grads = [torch.autograd.grad(each.values.sum(), problem.W_enc, retain_graph=True)[0] for each in (given, own)]
    assert torch.equal(*grads)
    assert torch.autograd.grad(given.values.sum(), pre, allow_unused=True) == (None,)


def test_invalid_arguments_are_named():
    x, weight = torch.randn(2, 3, 4), torch.randn(4, 5)
    for capacity in (0, True, 2.0):
        with pytest.raises(ValueError, match="capacity must be an int of at least 1"):
            encode_sparse(x, weight, capacity=capacity)
    with pytest.raises(ValueError, match=r"weight must be a tensor of shape \[d, k\] with d = 4"):
        encode_sparse(x, weight.T, capacity=2)
    with pytest.raises(ValueError, match=r"pre must be x @ weight of shape \[2, 3, 5\]"):
        encode_sparse(x, weight, capacity=2, pre=torch.zeros(2, 3, 4))
    features, _ = encode_sparse(x, weight, capacity=2)
    for ends in ((), (3,), (4, 3, 5), (-1, 5)):
        with pytest.raises(ValueError, match="ends must ascend to the number of features, 5"):
            decode_sparse_features(features, weight.T, ends=ends)
    with pytest.raises(ValueError, match="weight must be a tensor of shape"):
        decode_sparse_features(features, weight[0])


def test_default_bands_are_those_of_the_dense_functions():
    problem = Problem(1, 20, 4, 6)
    _, stats = encode_sparse(problem.x, problem.W_enc.T, problem.b_enc, capacity=6)
    _, wanted = activate_with_stats(problem.x @ problem.W_enc.T, problem.b_enc, bands=MULTISCALE, backend="eager")
    assert_close(stats, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_have_the_bits_of_the_dense_features(backend, dtype):
    problem = Problem(1, 20, 4, 40, dtype=dtype, sparse=0.5)
    with torch.no_grad():
        pre = problem.x @ problem.W_enc.T
        h, stats = oracle.activate_with_stats(pre, problem.b_enc, "relu", 0.3, 0.1, BANDS, backend=backend)
        arguments = problem.x, problem.W_enc.T, problem.b_enc, 0.3, 0.1, BANDS
        features, sparse_stats = encode_sparse(*arguments, capacity=40, pre=pre, backend=backend)
    assert features.values.dtype == dtype
    assert torch.equal(dense_of(features, 40), h.flatten(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(stats, sparse_stats, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_feature_active_on_every_token(backend):
    problem = Problem(1, 6, 3, 5)
    with torch.no_grad():
        problem.b_enc += 100
    loss, wanted = (dense := problem.dense()[2]), torch.autograd.grad(dense, problem.leaves)
    features, _, sparse_loss = problem.sparse(backend)
    assert (features.counts == 5).all()
    assert_close([sparse_loss, *torch.autograd.grad(sparse_loss, problem.leaves)], [loss, *wanted])


def test_under_autocast_products_are_bfloat16_and_gradients_float32():
    problem = Problem(2, 16, 24, 64, dtype=torch.float32, sparse=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        features, stats, loss = problem.sparse("eager", 0.3, 0.1)
        *_, dense_loss = problem.dense(0.3, 0.1)
    assert features.values.dtype == torch.bfloat16
    assert stats.square.dtype == torch.float32
    grads = torch.autograd.grad(loss, problem.leaves)
    wanted = torch.autograd.grad(dense_loss, problem.leaves)
    for got, dense in zip(grads, wanted, strict=True):
        assert got.dtype == torch.float32
        assert (got - dense).norm() < 2e-2 * dense.norm()
