"""The kernels compared with a copy, with each other and with alternatives in PyTorch, and their speed requirements.

On a CPU with [16, 128, 2304] float32 features, on a GPU with [2048, 128, 2304] bfloat16 features, or fewer sequences if
its memory does not suffice, which the table and the measurement then say.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.conftest import device_name
from benchmarks.measure import Variant, compare
from benchmarks.results import Measurement, Row
from benchmarks.workload import BOTH, Function, Workload, backends
from tsae_kernels import MULTISCALE

pytestmark = pytest.mark.timeout(1200)  # torch.compile of the loop over 127 offsets

Find = Callable[[str], Measurement]
Record = Callable[[Measurement], None]

WIDTH = 2304
LENGTHS = (128, 512, 2048)
RELU, SCHMITT, LENGTH_CASE = f"relu, {BOTH}", f"schmitt, {BOTH}", "time per element"
PACKED = f"packed segments, {BOTH}"
COMPILED = ", compiled"

# Alternatives to compile: "all"; "most", without the loop over 127 offsets, which takes minutes to compile; "none"
COMPILE = os.environ.get("TSAE_BENCH_COMPILED") or "all"
if COMPILE not in ("all", "most", "none"):
    raise ValueError(f"TSAE_BENCH_COMPILED must be all, most or none, got {COMPILE!r}")

# The alternatives of every case, eager and compiled. The loop is compiled once only, which takes longer than the rest.
EVERY = ("eager loop", "prefix sums", "banded Laplacian", "banded Laplacian, three products in all")
BEST = EVERY[1:]
STRONG = (EVERY[1], EVERY[3])  # the fastest compiled and the fastest eager on the CPUs seen
CASES: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("statistics", "forward"): (EVERY, BEST),
    ("statistics", "backward"): ((), ()),
    ("relu", "forward"): ((), STRONG),
    ("relu", "backward"): ((), ()),
    ("relu", BOTH): (EVERY, EVERY),
    ("threshold", BOTH): ((), STRONG),
}
SMOKE_BANDS = ((1, 2), (3, 4))


def intended(device: torch.device, smoke: bool) -> int:
    """Sequences of length 128."""
    return 2048 if device.type == "cuda" and not smoke else 16


def sequences(device: torch.device, smoke: bool) -> int:
    """The intended number; on a GPU without room for float32 intermediates, halved until there is, with a warning."""
    batch = intended(device, smoke)
    if device.type == "cpu":
        return batch
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    while batch > 16 and 40 * batch * 128 * WIDTH * 2 > free:
        batch //= 2
    if batch < intended(device, smoke):
        warnings.warn(
            f"{batch} sequences instead of {intended(device, smoke)}: only {free / 2**30:.0f} GiB are free",
            RuntimeWarning,
            stacklevel=2,
        )
    return batch


@pytest.fixture(scope="module")
def make_workload(smoke: bool, device: torch.device) -> Callable[[int], Workload]:
    """Inputs for a sequence length with a constant number of elements; only the latest are kept."""
    kept: dict[int, Workload] = {}

    def make(length: int) -> Workload:
        if length not in kept:
            kept.clear()
            kept[length] = new_workload(length, smoke, device)
        return kept[length]

    return make


def new_workload(length: int, smoke: bool, device: torch.device, packed: bool = False) -> Workload:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rotation = 4 if device.type == "cpu" else 2  # a GPU's inputs exceed its caches anyway
    batch = sequences(device, smoke) * LENGTHS[0] // length
    shape = (batch, length // 8, 32) if smoke else (batch, length, WIDTH)
    return Workload(shape, dtype, device, rotation, SMOKE_BANDS if smoke else MULTISCALE, packed)


def run(
    benchmark: Any,
    record: Record,
    case: str,
    workload: Workload,
    own: str,
    variants: list[Variant],
    smoke: bool,
    rounds: int = 21,
) -> None:
    """Measure and record; pytest-benchmark times the variant named `own`."""
    mine = next(v for v in variants if v.name == own)
    others = [v for v in variants if v.name != own]
    device = workload.device
    timings = compare(benchmark, mine, others, device, rounds=2 if smoke else rounds)
    dtype = str(workload.dtype).removeprefix("torch.")
    measurement = Measurement(case, own, device_name(device), list(workload.shape), dtype, workload.bytes)
    if workload.shape[0] < intended(device, smoke):
        measurement.notes["sequences intended"] = intended(device, smoke)
    measurement.add([*others, mine], timings)
    record(measurement)


def to_compile(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the alternatives that `TSAE_BENCH_COMPILED` allows to compile."""
    allowed = {"all": EVERY, "most": BEST, "none": ()}[COMPILE]
    return tuple(name for name in names if name in allowed)


def with_compile(function: Function, smoke: bool) -> Function:
    """`torch.compile` in one graph for fixed shapes; in smoke mode without code generation, which takes a minute."""
    return torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager" if smoke else "inductor")


@pytest.mark.parametrize(("kind", "passes"), CASES, ids=lambda value: value.replace(" ", ""))
def test_case(
    benchmark: Any,
    record: Record,
    make_workload: Callable[[int], Workload],
    device: torch.device,
    smoke: bool,
    kind: str,
    passes: str,
) -> None:
    torch._dynamo.reset()
    w = make_workload(LENGTHS[0])
    names = backends(device)
    eager, compiled = CASES[kind, passes]
    variants = [w.copy()]
    variants += [w.variant(n, "alternative", w.alternative(n, kind), kind, passes) for n in eager]
    for n in to_compile(compiled):
        function = with_compile(w.alternative(n, kind), smoke)
        variants.append(w.variant(n + COMPILED, "alternative", function, kind, passes))
    variants += [w.variant(n, "backend", w.backend(n, kind), kind, passes) for n in names]
    run(benchmark, record, f"{kind}, {passes}", w, names[-1], variants, smoke)


def test_schmitt_trigger(
    benchmark: Any, record: Record, make_workload: Callable[[int], Workload], device: torch.device, smoke: bool
) -> None:
    """The trigger in PyTorch with the fastest differences, and the default backend with and without the trigger."""
    torch._dynamo.reset()
    w = make_workload(LENGTHS[0])
    names = backends(device)
    variants = [w.copy()]
    for states in ("loop over T", "two cumulative maxima"):
        for compiled in (False, True) if COMPILE != "none" else (False,):
            function = w.alternative(STRONG[0] if compiled else STRONG[1], "schmitt", states)
            if compiled:
                function = with_compile(function, smoke)
            name = states + COMPILED * compiled
            variants.append(w.variant(name, "alternative", function, "schmitt", BOTH))
    for kind in ("relu", "threshold"):
        variants.append(w.variant(f"{names[-1]}, {kind} only", "backend", w.backend(names[-1], kind), kind, BOTH))
    variants += [w.variant(n, "backend", w.backend(n, "schmitt"), "schmitt", BOTH) for n in names]
    run(benchmark, record, SCHMITT, w, names[-1], variants, smoke)


def test_time_per_element(benchmark: Any, record: Record, device: torch.device, smoke: bool) -> None:
    """The same number of elements in sequences of increasing length; pytest-benchmark times the shortest."""
    names = backends(device)
    workloads = [new_workload(length, smoke, device) for length in LENGTHS]
    variants = [workloads[0].copy()]
    for length, w in zip(LENGTHS, workloads, strict=True):
        for name in EVERY[1:2] + EVERY[3:]:
            variants.append(
                w.variant(f"{name}, T = {length}", "alternative", w.alternative(name, "relu"), "relu", BOTH)
            )
        for name in names:
            variants.append(w.variant(f"{name}, T = {length}", "backend", w.backend(name, "relu"), "relu", BOTH))
    own = f"{names[-1]}, T = {LENGTHS[0]}"
    run(benchmark, record, LENGTH_CASE, workloads[0], own, variants, smoke, rounds=41)  # to resolve a few percent


def test_packed_segments(
    benchmark: Any, record: Record, make_workload: Callable[[int], Workload], device: torch.device, smoke: bool
) -> None:
    """Sequences of several documents, and the default backend on whole sequences."""
    whole, packed = make_workload(LENGTHS[0]), new_workload(LENGTHS[0], smoke, device, packed=True)
    names = backends(device)
    variants = [whole.copy()]
    for name in names[-1:]:
        variants.append(whole.variant(f"{name}, whole sequences", "backend", whole.backend(name, "relu"), "relu", BOTH))
    variants += [packed.variant(n, "backend", packed.backend(n, "relu"), "relu", BOTH) for n in names]
    run(benchmark, record, PACKED, packed, names[-1], variants, smoke)


# The speed requirements ("bars"), one test each, so that a failure reports its figure.


def only_on(device: torch.device, type_: str) -> None:
    if device.type != type_:
        pytest.skip(f"a requirement for {type_}, and the benchmarks run on {device.type}")


def slower(m: Measurement, variant: str) -> float:
    """A variant's time relative to the default backend's."""
    return m.seconds(variant) / m.seconds(m.own)


def best_alternative(m: Measurement, *, compiled_only: bool = False) -> Row:
    """The fastest, refused ones included: in bfloat16 none of them is as accurate as the gate wants."""
    rows = [row for row in m.of_kind("alternative") if not compiled_only or row.variant.endswith(COMPILED)]
    if not rows:
        pytest.skip("no alternative was compiled (TSAE_BENCH_COMPILED)")
    return min(rows, key=lambda row: row.seconds)


@pytest.mark.parametrize(("type_", "least"), [("cpu", 120), ("cuda", 50)])
def test_bar_faster_than_the_eager_loop(measured: Find, device: torch.device, type_: str, least: int) -> None:
    only_on(device, type_)
    factor = slower(measured(RELU), "eager loop")
    assert factor >= least, f"{factor:.1f} times faster than the eager loop, not {least}"


@pytest.mark.parametrize(("type_", "least"), [("cpu", 4), ("cuda", 3)])
def test_bar_faster_than_the_best_of_torch(measured: Find, device: torch.device, type_: str, least: int) -> None:
    """On a GPU, than the best compiled alternative."""
    only_on(device, type_)
    m = measured(RELU)
    best = best_alternative(m, compiled_only=type_ == "cuda")
    factor = slower(m, best.variant)
    assert factor >= least, f"{factor:.2f} times faster than {best.variant}, not {least}"


def test_bar_at_most_8_copies(measured: Find, device: torch.device) -> None:
    only_on(device, "cpu")
    m = measured(RELU)
    copies = m.copies(m.row(m.own))
    assert copies is not None
    assert copies <= 8, f"{copies:.2f} times as long as h.clone(), not 8"


def test_bar_schmitt_trigger_at_most_15_percent(measured: Find) -> None:
    m = measured(SCHMITT)
    ratio = m.seconds(m.own) / m.seconds(f"{m.own}, relu only")
    assert ratio <= 1.15, f"with the Schmitt trigger {ratio:.3f} times as long as without, not 1.15"


@pytest.mark.parametrize("length", LENGTHS[1:])
def test_bar_time_per_element_flat(measured: Find, length: int) -> None:
    """The time per element is at most 10 % higher than at T = 128."""
    m = measured(LENGTH_CASE)
    ratio = slower(m, f"{m.own.split(',')[0]}, T = {length}")
    assert ratio <= 1.10, f"an element takes {ratio:.3f} times as long at T = {length} as at T = 128, not 1.10"


@pytest.mark.parametrize("case", [RELU, SCHMITT])
def test_bar_nothing_of_the_size_of_h(measured: Find, case: str) -> None:
    """Peak memory beyond h and its gradient is less than a quarter of h; the statistics themselves are 4 % of h."""
    m = measured(case)
    peak = m.row(m.own).peak_bytes
    if peak is None:
        pytest.skip("this system does not report peak memory")
    beyond = peak / m.tensor_bytes - 2
    assert beyond < 0.25, f"{beyond:.2f} times the size of h beyond h and grad_pre"


@pytest.mark.parametrize("case", ["statistics, forward", "relu, forward", "relu, backward"])
def test_bar_85_percent_of_copy_bandwidth(measured: Find, device: torch.device, case: str) -> None:
    only_on(device, "cuda")
    m = measured(case)
    share = m.bandwidth_share(m.row(m.own))
    assert share is not None
    assert share >= 0.85, f"{case}: {share:.1%} of the copy's bandwidth, not 85 %"


def test_bar_the_default_is_the_fastest_backend(measured: Find, device: torch.device) -> None:
    only_on(device, "cuda")
    m = measured(RELU)
    rows = m.of_kind("backend")
    assert {"cuda", "triton"} <= {row.variant for row in rows}, "cuda and triton must both be available"
    fastest = min(rows, key=lambda row: row.seconds)
    assert fastest.variant == m.own, f"{fastest.variant} is faster than {m.own}, the default"
