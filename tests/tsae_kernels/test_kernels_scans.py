"""The cheapest on/off path and the leaky recurrence: every backend against brute force and closed forms."""

import itertools
import math

import kernels_oracle as oracle
import pytest
import torch
from kernels_oracle import BACKENDS, FAST_BACKENDS, leaky_recurrence, viterbi_path
from torch.library import opcheck

import tsae_kernels

ops = torch.ops.tsae_kernels
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def random_costs(k, generator, scale=2.0):
    """Transition costs [2, 2, k] and start costs [2, k]; some cheaper to stay in, some to leave, some negative."""
    return scale * torch.randn(2, 2, k, generator=generator), scale * torch.randn(2, k, generator=generator)


def documents(ids):
    """The segments of a row as lists of positions. ids: the row's list."""
    parts = []
    for t, id_ in enumerate(ids):
        if id_ < 0:
            continue
        if parts and parts[-1][-1] == t - 1 and ids[t - 1] == id_:
            parts[-1].append(t)
        else:
            parts.append([t])
    return parts


def path_cost(on, z, transition, start, segments=None):
    """[k]: the cost of a path [B, T, k] over all sequences; infinite where it is on at z <= 0."""
    B, T, k = z.shape
    z, transition, start, j = z.double(), transition.double(), start.double(), torch.arange(k)
    cost = torch.where(on, torch.where(z > 0, -(z**2), math.inf), 0)
    total = torch.zeros(k, dtype=torch.float64)
    for b, ids in enumerate(oracle.rows_of(segments, B)):
        for part in documents([0] * T if ids is None else ids):
            states = on[b, part].long()
            total += cost[b, part].sum(0) + start[states[0], j]
            for before, after in itertools.pairwise(states):
                total += transition[before, after, j]
    return total


def cheapest(z, transition, start):
    """Over all 2^T paths of one segment z [T, k]: the one that is off where two cheapest last differ."""
    T, k = z.shape
    best, found = torch.full((k,), math.inf, dtype=torch.float64), torch.zeros(T, k, dtype=torch.bool)
    for states in itertools.product((False, True), repeat=T):  # the last position's state changes last
        on = torch.tensor(states[::-1])[:, None].expand(T, k)
        cost = path_cost(on[None], z[None], transition, start)
        better = cost < best
        best, found = torch.where(better, cost, best), torch.where(better, on, found)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 2, 3, 6, 8])
def test_the_path_is_the_cheapest_of_all(backend, T):
    generator = torch.Generator().manual_seed(T)
    k = 5 if backend == "triton" else 37
    z = torch.randn(1, T, k, generator=generator) + 0.5
    transition, start = random_costs(k, generator, scale=1.0)
    assert torch.equal(viterbi_path(z, transition, start, backend=backend)[0], cheapest(z[0], transition, start))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_costs_are_off(backend):
    """Small whole numbers, whose sums are exact: many paths cost the same."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-1, 3, (1, 6, 40), generator=generator).float()
    transition = torch.randint(-2, 4, (2, 2, 40), generator=generator).float()
    start = torch.randint(0, 3, (2, 40), generator=generator).float()
    wanted = cheapest(z[0], transition, start)
    assert torch.equal(viterbi_path(z, transition, start, backend=backend)[0], wanted)
    from_off = cheapest(z.flip(1)[0], transition.transpose(0, 1), start)
    assert not torch.equal(from_off.flip(0), wanted)  # the order of ties is seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segmented", [False, True])
def test_without_memory_it_is_a_threshold(backend, dtype, segmented):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 20, 9, generator=generator).to(dtype)
    segments = oracle.random_segments(2, 20, generator, longest=7) if segmented else None
    off, on = 0.3 * torch.randn(9, generator=generator), torch.rand(9, generator=generator)
    transition, start = torch.stack([off, on]).expand(2, 2, 9), torch.stack([off, on])
    # The difference is rounded to the precision that costs have.
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = (z > 0) & (z.to(compute) ** 2 > on.to(compute) - off.to(compute))
    if segmented:
        wanted &= (segments >= 0)[..., None]
    assert torch.equal(viterbi_path(z, transition, start, segments, backend=backend), wanted)


def greedy_trigger(z, transition, start):
    """On where that is cheaper given the previous state alone (causal): the Schmitt trigger. z: [B, T, k]."""
    on = torch.zeros(z.shape, dtype=torch.bool)
    price = start[1] - start[0]
    for t in range(z.shape[1]):
        on[:, t] = (z[:, t] > 0) & (z[:, t] ** 2 > price)
        price = torch.where(on[:, t], transition[1, 1] - transition[1, 0], transition[0, 1] - transition[0, 0])
    return on


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_never_costs_more_than_the_greedy_trigger(backend):
    generator = torch.Generator().manual_seed(2)
    k, T = (9, 30) if backend == "triton" else (65, 200)
    z = 1.5 * torch.randn(2, T, k, generator=generator)
    # lambda times bits, with p(on | off) = p01 and p(on | on) = p11
    p01, p11 = 0.1 * torch.rand(k, generator=generator) + 1e-3, torch.rand(k, generator=generator).clamp(0.05, 0.95)
    transition = -torch.stack([torch.stack([1 - p01, p01]), torch.stack([1 - p11, p11])]).log2()
    start = transition[0].clone()
    found, greedy = viterbi_path(z, transition, start, backend=backend), greedy_trigger(z, transition, start)
    ours, theirs = (path_cost(on, z, transition, start) for on in (found, greedy))
    assert (ours <= theirs + 1e-4).all()
    assert (ours < theirs - 1e-2).any()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "k"), [(1, 1, 1), (3, 1, 5), (2, 17, 33), (2, 40, 98), (3, 130, 7), (1, 600, 66)])
@pytest.mark.parametrize("segmented", [False, True])
def test_paths_as_in_the_reference(backend, dtype, B, T, k, segmented):
    """The same states, also with costs of both signs and at every place of the kernels' words."""
    oracle.too_slow(backend, T > 100 or (dtype == torch.float16 and T > 20))
    generator = torch.Generator().manual_seed(T + k)
    z = (1.5 * torch.randn(B, T, k, generator=generator)).to(dtype)
    segments = oracle.random_segments(B, T, generator) if segmented else None
    costs = random_costs(k, generator)
    found, wanted = (viterbi_path(z, *costs, segments, backend=name) for name in (backend, "reference"))
    assert found.dtype == torch.bool
    assert found.is_contiguous()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_segment_has_its_own_path(backend):
    """Also segments of one position, an id that recurs, and excluded positions of any value."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[0] * 5 + [1] + [0] * 6 + [-1] * 3 + [0] * 4 + [2], [-1] * 4 + [5] * 12 + [-2] * 4])
    z = torch.randn(2, 20, 11, generator=generator) + 0.5
    costs = random_costs(11, generator, scale=1.0)
    z[ids < 0] = math.inf
    found = viterbi_path(z, *costs, ids, backend=backend)
    assert not found[ids < 0].any()
    for b in range(2):
        for part in documents(ids[b].tolist()):
            alone = viterbi_path(z[b : b + 1, part], *costs, backend=backend)
            assert torch.equal(found[b, part], alone[0])
    z[ids < 0] = math.nan
    assert torch.equal(viterbi_path(z, *costs, ids, backend=backend), found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_paths_do_not_change_with_the_unit_or_a_constant(backend):
    """Costs go with z^2, and what every path pays decides nothing."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(1, 30, 7, generator=generator).double()
    transition, start = (cost.double() for cost in random_costs(7, generator, scale=1.0))
    found = viterbi_path(z, transition, start, backend=backend)
    assert found.any()
    assert torch.equal(viterbi_path(4 * z, 16 * transition, 16 * start, backend=backend), found)
    assert torch.equal(viterbi_path(z, transition + 0.75, start - 2, backend=backend), found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decisions_stay_exact_beside_a_huge_value(backend, dtype):
    """The costs of later positions are not lost in the rounding of z^2 = 1e12, nor in an infinite one."""
    z = torch.tensor([[1.0, 0.5, 1.0, 1.0, 0.5, 0.5]])
    transition, start = torch.tensor([[0.0, 2.0], [0.25, 0.125]]), torch.tensor([0.0, 1.0])
    paths = []
    for huge in (16.0, 1e6, 1e18, math.inf):
        x = z.clone()
        x[0, 2] = huge
        costs = transition[..., None], start[:, None]
        paths.append(viterbi_path(x[..., None].to(dtype), *costs, backend=backend)[0, :, 0])
    assert paths[0].tolist() == [True, True, True, True, True, True]
    assert all(torch.equal(path, paths[0]) for path in paths)
    sticky = torch.tensor([[0.0, 2.0], [0.25, 0.75]])
    x[0, 3:] = torch.tensor([0.5, 0.5, 0.5])  # staying on costs 0.5 and gains 0.25
    path = viterbi_path(x[..., None].to(dtype), sticky[..., None], start[:, None], backend=backend)[0, :, 0]
    assert path[2]
    assert not path[3:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_negative_values_are_off(backend):
    z = torch.full((1, 6, 4), 3.0)
    z[0, 2, 0], z[0, 3, 1], z[0, 2, 2] = math.nan, -math.inf, 0.0
    costs = torch.zeros(2, 2, 4), torch.zeros(2, 4)
    found = viterbi_path(z, *costs, backend=backend)
    assert torch.equal(found, z > 0)
    cheap = torch.tensor([5.0, -5.0])[:, None].expand(2, 4)  # not even where on is paid for
    assert torch.equal(viterbi_path(z, cheap.expand(2, 2, 4), cheap, backend=backend), z > 0)


def strided(shape, dtype, generator):
    """Views of one tensor's values: with strides, transposed, unaligned, and constant along k."""
    base = torch.randn(shape, generator=generator).to(dtype)
    B, T, _ = shape
    every = torch.stack([base, base], 3)[..., 0]
    transposed = base.transpose(1, 2).contiguous().transpose(1, 2)
    batch = base.transpose(0, 1).contiguous().transpose(0, 1)
    unaligned = torch.cat([base[..., :1], base], 2)[..., 1:]
    constant = torch.randn(B, T, 1, generator=generator).to(dtype).expand(shape)
    return every, transposed, batch, unaligned, constant


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_give_the_same_bits(backend, dtype):
    oracle.too_slow(backend, dtype == torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    costs, decay = random_costs(66, generator), torch.rand(66, generator=generator)
    for x in strided((2, 10, 66), dtype, generator):
        assert not x.is_contiguous()
        paths = [viterbi_path(each, *costs, backend=backend) for each in (x, x.contiguous())]
        assert torch.equal(*paths)
        states = [leaky_recurrence(each, decay, backend=backend) for each in (x, x.contiguous())]
        assert torch.equal(*states)
        features = x.contiguous(), states[1]
        grads = [
            ops.leaky_recurrence_backward(*oracle.carried((each, decay, *features, None, backend), backend))
            for each in (x, x.contiguous())
        ]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    z = torch.zeros(0, 5, 3)
    found = viterbi_path(z, torch.zeros(2, 2, 3), torch.zeros(2, 3), backend=backend)
    assert found.shape == z.shape
    assert found.dtype == torch.bool
    decay = torch.full((3,), 0.5, requires_grad=True)
    h = leaky_recurrence(z, decay, torch.zeros(0, 5, dtype=torch.int64), backend=backend)
    assert h.shape == z.shape
    assert torch.equal(torch.autograd.grad(h.sum(), decay)[0], torch.zeros(3))


def recurrence_by_hand(a, decay, segments=None):
    """In plain PyTorch, differentiable by autograd. a: [B, T, k] float64."""
    B, T, k = a.shape
    rows = []
    for b, ids in enumerate(oracle.rows_of(segments, B)):
        state, row = torch.zeros(k, dtype=a.dtype), []
        for t in range(T):
            if ids is not None and ids[t] < 0:
                row.append(torch.zeros(k, dtype=a.dtype))
                continue
            if not (t > 0 and oracle.same_segment(ids, t - 1, t)):
                state = torch.zeros(k, dtype=a.dtype)
            state = decay * state + (1 - decay) * a[b, t]
            row.append(state)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "k"), [(1, 1, 1), (3, 1, 5), (2, 17, 33), (2, 150, 66)])
@pytest.mark.parametrize("segmented", [False, True])
def test_the_recurrence_and_its_gradients(backend, dtype, B, T, k, segmented):
    oracle.too_slow(backend, T > 100 or (dtype == torch.float16 and T > 1))
    generator = torch.Generator().manual_seed(T + k)
    a = torch.randn(B, T, k, generator=generator).to(dtype)
    decay = torch.rand(k, generator=generator, dtype=torch.float64)
    decay[0] = 0.999
    if k > 1:
        decay[1] = 0
    decay = decay if dtype == torch.float64 else decay.float()
    segments = oracle.random_segments(B, T, generator) if segmented else None
    grad_h = torch.randn(B, T, k, generator=generator).to(dtype)

    exact = a.double().requires_grad_(), decay.double().requires_grad_()
    h = recurrence_by_hand(*exact, segments)
    wanted = [h, *torch.autograd.grad(h, exact, grad_h.double())]
    a, decay = a.requires_grad_(), decay.requires_grad_()
    h = leaky_recurrence(a, decay, segments, backend=backend)
    found = [h, *torch.autograd.grad(h, (a, decay), grad_h)]
    assert h.dtype == dtype
    assert found[2].dtype == decay.dtype
    for ours, right in zip(found, wanted, strict=True):
        scale = right.abs().max().item()
        torch.testing.assert_close(ours.double(), right, rtol=RTOL[dtype], atol=RTOL[dtype] * scale)
    if segmented:
        assert (found[0][segments < 0] == 0).all()
        assert (found[1][segments < 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segmented", [False, True])
def test_gradcheck_of_the_recurrence(backend, segmented):
    generator = torch.Generator().manual_seed(6)
    a = torch.randn(2, 9, 3, dtype=torch.float64, generator=generator).requires_grad_()
    decay = torch.tensor([0.0, 0.4, 0.95], dtype=torch.float64).requires_grad_()
    segments = torch.tensor([[0, 0, 0, 1, 1, -1, 2, 2, 2], [-1, 3, 3, 3, 3, 3, 4, 5, -1]]) if segmented else None

    def function(a, decay):
        # Without the check of decay's range, which the step below 0 would fail.
        inputs = oracle.carried((a, decay, segments, backend), backend)
        return ops.leaky_recurrence(*inputs).cpu()

    assert torch.autograd.gradcheck(function, (a, decay), fast_mode=backend == "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_segment_and_feature(backend, value):
    """Forward until the segment ends, back until it begins; padding may hold anything."""
    ids = torch.tensor([[0, 0, 0, 0, -1, -1, 1, 1]])
    generator = torch.Generator().manual_seed(7)
    clean = torch.randn(1, 8, 3, generator=generator)
    broken, decay = clean.clone(), torch.tensor([0.5, 0.9, 0.0])
    broken[0, 2, 1] = broken[0, 4, 0] = broken[0, 5, 2] = value
    h, wanted = (leaky_recurrence(a, decay, ids, backend=backend) for a in (broken, clean))
    touched = torch.zeros(1, 8, 3, dtype=torch.bool)
    touched[0, 2:4, 1] = True
    assert torch.equal(~h.isfinite(), touched)
    assert torch.equal(h[~touched], wanted[~touched])
    arguments = oracle.carried((broken, decay, clean, wanted, ids, backend), backend)
    grad_a, grad_decay = (x.cpu() for x in ops.leaky_recurrence_backward(*arguments))
    touched[0, :, 1] = torch.tensor([True] * 3 + [False] * 5)
    assert torch.equal(~grad_a.isfinite(), touched)
    assert grad_decay.isfinite().tolist() == [True, False, True]
    arguments = oracle.carried((clean, decay, broken, h, ids, backend), backend)
    assert ops.leaky_recurrence_backward(*arguments)[1].isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_forms_of_the_recurrence(backend):
    decay = torch.tensor([0.0, 0.5, 0.75])
    t = torch.arange(1, 21)[:, None]
    torch.testing.assert_close(
        leaky_recurrence(torch.ones(1, 20, 3), decay, backend=backend)[0], 1 - decay**t, rtol=1e-6, atol=0
    )
    impulse = torch.zeros(1, 20, 3)
    impulse[0, 0] = 1
    wanted = (1 - decay) * decay ** (t - 1)
    torch.testing.assert_close(leaky_recurrence(impulse, decay, backend=backend)[0], wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_keeps_float32_over_a_long_walk(backend):
    """In bfloat16 a state would not move: 0.001 of a step is less than half of its spacing."""
    oracle.too_slow(backend, True)
    decay = torch.tensor([0.999])
    h = leaky_recurrence(torch.ones(1, 3000, 1).bfloat16(), decay, backend=backend)
    wanted = 1 - decay.double() ** torch.arange(1, 3001)[:, None]
    torch.testing.assert_close(h[0].double(), wanted, rtol=2**-8, atol=0)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("segmented", [False, True])
def test_every_output_of_the_scans_is_written(backend, segmented):
    """With deterministic algorithms PyTorch fills new tensors with NaN. Also, two runs give the same bits."""
    generator = torch.Generator().manual_seed(8)
    a, segments = torch.randn(2, 21, 70, generator=generator), None
    if segmented:
        segments = oracle.random_segments(2, 21, generator, longest=9)
        segments[0] = -1
    costs, decay = random_costs(70, generator), torch.rand(70, generator=generator)

    def everything():
        h = leaky_recurrence(a, decay, segments, backend=backend)
        inputs = [oracle.carried((a, decay, *more, segments, backend), backend) for more in ((a, h), (None, None))]
        grads = [x.cpu() for each in inputs for x in ops.leaky_recurrence_backward(*each)]
        return [viterbi_path(a, *costs, segments, backend=backend), h, *grads]

    clean = everything()
    torch.use_deterministic_algorithms(True)
    try:
        poisoned = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(clean, poisoned, strict=True))
    assert torch.equal(clean[4], clean[2])  # grad_a needs neither a nor h
    assert (clean[5] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_scans(backend, dtype):
    oracle.too_slow(backend, dtype == torch.bfloat16)
    a, segments = torch.randn(2, 6, 3).to(dtype), torch.tensor([[0, 0, 1, 1, -1, 2]] * 2)
    costs, decay = (torch.rand(2, 2, 3), torch.rand(2, 3)), torch.rand(3)
    a, costs, decay, segments = oracle.carried((a, costs, decay, segments), backend)
    for ids in (None, segments):
        opcheck(ops.viterbi_path, (a, *costs, ids, backend))
        opcheck(ops.leaky_recurrence, (a.clone().requires_grad_(), decay.clone().requires_grad_(), ids, backend))
        opcheck(ops.leaky_recurrence_backward, (a, decay, a, a, ids, backend))
        opcheck(ops.leaky_recurrence_backward, (a, decay, None, None, ids, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_scans_are_in_one_graph(backend, dynamic):
    """torch.compile with fullgraph=True; named unlike "compiles_without", which the emulation leaves out."""
    oracle.too_slow(backend, dynamic)
    torch.compiler.reset()
    segments = torch.tensor([[0, 0, 1, 1, -1, 2]] * 2)

    def function(a, decay, transition, start):
        h = tsae_kernels.leaky_recurrence(a, decay, segments.to(a.device), backend=backend)
        on = tsae_kernels.viterbi_path(h, transition, start, backend=backend)
        return (h * on).square().sum() + h.sum()

    inputs = torch.randn(2, 6, 3), torch.rand(3), torch.rand(2, 2, 3) / 9, torch.rand(2, 3) / 9
    a, decay, *costs = oracle.carried(inputs, backend)
    leaves = a.requires_grad_(), decay.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected, got = function(*leaves, *costs), compiled(*leaves, *costs)
    torch.testing.assert_close(got, expected)
    for x, y in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_of_the_recurrence_is_an_error(backend):
    a = torch.randn(1, 4, 2, requires_grad=True)
    h = leaky_recurrence(a, torch.full((2,), 0.5), backend=backend)
    (grad,) = torch.autograd.grad(h.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_path_has_no_gradient_and_a_fixed_decay_none(backend):
    a, decay = torch.randn(1, 4, 2, requires_grad=True), torch.full((2,), 0.5)
    costs = torch.zeros(2, 2, 2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    assert not viterbi_path(a, *costs, backend=backend).requires_grad
    (grad,) = torch.autograd.grad(leaky_recurrence(a, decay, backend=backend).sum(), a)
    wanted = 0.5 * torch.tensor([1.875, 1.75, 1.5, 1.0])[:, None].expand(1, 4, 2)
    torch.testing.assert_close(grad, wanted)


Z = torch.randn(2, 6, 3)
COSTS = {"transition_cost": torch.zeros(2, 2, 3), "start_cost": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"z": [1.0]}, TypeError, ["z must be", "list"]),
        ({"z": torch.ones(2, 6, 3).long()}, TypeError, ["z must be float64", "int64"]),
        ({"z": torch.ones(6, 3)}, ValueError, ["z must be", "[6, 3]"]),
        ({"z": torch.ones(2, 0, 3)}, ValueError, ["z must be", "[2, 0, 3]"]),
        ({"transition_cost": torch.zeros(2, 3)}, ValueError, ["transition_cost must have shape [2, 2, 3]", "[2, 3]"]),
        ({"transition_cost": 1.0}, TypeError, ["transition_cost must be a tensor", "1.0"]),
        ({"transition_cost": torch.full((2, 2, 3), math.inf)}, ValueError, ["transition_cost must be finite", "inf"]),
        ({"start_cost": torch.zeros(3)}, ValueError, ["start_cost must have shape [2, 3]", "[3]"]),
        ({"start_cost": torch.zeros(2, 3).long()}, TypeError, ["start_cost must be a floating-point", "int64"]),
        ({"start_cost": torch.full((2, 3), math.nan)}, ValueError, ["start_cost must be finite", "nan"]),
        ({"segments": torch.zeros(2, 5).long()}, ValueError, ["segments must have shape [2, 6]"]),
        ({"segments": torch.zeros(2, 6)}, TypeError, ["segments must be", "float32"]),
        ({"backend": "fast"}, ValueError, ["backend must be one of", "'fast'"]),
    ],
)
def test_bad_arguments_of_the_path(arguments, error, words):
    with pytest.raises(error) as raised:
        tsae_kernels.viterbi_path(**{"z": Z, **COSTS, **arguments})
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"a": torch.ones(6, 3)}, ValueError, ["a must be", "[6, 3]"]),
        ({"decay": 0.5}, TypeError, ["decay must be a tensor of shape [3]", "0.5"]),
        ({"decay": torch.zeros(4)}, ValueError, ["decay must have shape [3]", "[4]"]),
        ({"decay": torch.tensor([0.0, 1.0, 0.5])}, ValueError, ["decay must be in [0, 1)", "1.0"]),
        ({"decay": torch.tensor([0.0, -0.5, 0.5])}, ValueError, ["decay must be in [0, 1)", "-0.5"]),
        ({"decay": torch.tensor([0.0, math.nan, 0.5])}, ValueError, ["decay must be in [0, 1)", "nan"]),
        ({"segments": torch.zeros(6).long()}, ValueError, ["segments must have shape [2, 6]"]),
        ({"backend": 3}, TypeError, ["backend must be", "3"]),
    ],
)
def test_bad_arguments_of_the_recurrence(arguments, error, words):
    with pytest.raises(error) as raised:
        tsae_kernels.leaky_recurrence(**{"a": Z, "decay": torch.full((3,), 0.5), **arguments})
    assert all(word in str(raised.value) for word in words)


def test_the_variable_selects_the_backend_of_the_scans(monkeypatch):
    monkeypatch.setenv("TSAE_BACKEND", "slow")
    with pytest.raises(ValueError, match="TSAE_BACKEND must be one of"):
        tsae_kernels.leaky_recurrence(Z, torch.full((3,), 0.5))
    with pytest.raises(ValueError, match="TSAE_BACKEND must be one of"):
        tsae_kernels.viterbi_path(Z, **COSTS)
