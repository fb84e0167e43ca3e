"""The benchmarks' tools: the gate rejects wrong results, timing, and the table and figure of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import alternatives, gate, measure, test_kernels
from benchmarks.conftest import remarks
from benchmarks.measure import Timing, Variant
from benchmarks.report import draw, floor, heading, main
from benchmarks.results import Measurement, read_json, table, write_json
from benchmarks.workload import Workload, backends
from tsae_kernels import MULTISCALE, activate_with_stats

CPU = torch.device("cpu")
BOTH = "forward + backward"
SHAPE = (2, 40, 16)
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def workload() -> Workload:
    return Workload(SHAPE, torch.float32, CPU, rotation=2)


@pytest.mark.parametrize("name", list(alternatives.DIFFERENCES))
@pytest.mark.parametrize("kind", ["statistics", "relu", "threshold"])
def test_alternatives_pass_the_gate(workload: Workload, name: str, kind: str) -> None:
    assert not workload.variant(name, "alternative", workload.alternative(name, kind), kind, BOTH).refused


@pytest.mark.parametrize("states", list(alternatives.STATES))
def test_alternatives_of_the_schmitt_trigger_pass_the_gate(workload: Workload, states: str) -> None:
    function = workload.alternative("prefix sums", "schmitt", states)
    assert not workload.variant(states, "alternative", function, "schmitt", BOTH).refused
    without = workload.alternative("prefix sums", "threshold")
    assert "no trigger: h is off" in workload.variant("no trigger", "alternative", without, "schmitt", BOTH).refused


def test_the_reference_is_put_together_from_blocks() -> None:
    w = Workload((3, 40, 2**13), torch.float32, CPU, rotation=1)  # in blocks of one row and 3276 features
    found = gate.reference(w.pre[0], "relu", w.threshold, w.release, w.grad_h[0], w.grad_differences)
    x = w.pre[0].detach().double().requires_grad_(True)
    h, stats = activate_with_stats(x, None, "relu", w.threshold, w.release, backend="reference")
    ((h * w.grad_h[0]).sum() + (stats.differences * w.grad_differences).sum()).backward()
    assert x.grad is not None
    for name, value in {"h": h, **stats._asdict(), "grad": x.grad}.items():
        torch.testing.assert_close(found[name], value.detach())


@pytest.mark.parametrize("length", [7, 130])
def test_alternatives_for_lengths_around_the_bands(length: int) -> None:
    w = Workload((2, length, 8), torch.float32, CPU, rotation=1)
    for name in alternatives.DIFFERENCES:
        assert not w.variant(name, "alternative", w.alternative(name, "relu"), "relu", BOTH).refused


def test_alternatives_in_bfloat16() -> None:
    w = Workload(SHAPE, torch.bfloat16, CPU, rotation=1)
    for name in alternatives.DIFFERENCES:
        assert not w.variant(name, "alternative", w.alternative(name, "relu"), "relu", BOTH).refused


def test_figures_of_a_refused_alternative_are_kept_and_a_backend_must_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 and at the size of a GPU's benchmark PyTorch's own alternatives are less accurate than ours."""
    monkeypatch.setitem(gate.TOLERANCE, torch.bfloat16, 1e-4)
    w = Workload(SHAPE, torch.bfloat16, CPU, rotation=1)
    function = w.alternative("eager loop", "relu")
    variant = w.variant("loop", "alternative", function, "relu", BOTH)
    assert variant.refused.startswith("loop: ")
    with pytest.raises(gate.WrongResultError):
        w.variant("loop", "backend", function, "relu", BOTH)
    m = Measurement("relu", "own", "a GPU", list(SHAPE), "bfloat16", w.bytes)
    m.add([variant, Variant("own", "backend", lambda i: None)], {n: Timing([0.1], None) for n in ("loop", "own")})
    assert cells(table([m]).splitlines()[2])[1] == "loop (refused)"
    assert remarks(m) == [f"refused in 'relu', timed all the same: {variant.refused}"]
    assert Measurement.from_dict(m.to_dict()).rows[0].refused == variant.refused


def test_a_large_batch_is_checked_from_its_first_to_its_last_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gate.checked_sequences(2048)
    assert (rows[0], rows[-1], len(rows.unique())) == (0, 2047, gate.SEQUENCES)
    assert gate.checked_sequences(5).tolist() == [0, 1, 2, 3, 4]
    assert gate.checked_sequences(1).tolist() == [0]
    monkeypatch.setattr(gate, "SEQUENCES", 3)
    w = Workload((9, 40, 8), torch.float32, CPU, rotation=1)
    right = w.backend("eager", "relu")
    w.variant("right", "backend", right, "relu", BOTH)
    assert w._expected["relu", "backward"]["h"].shape == (3, 40, 8)  # of as many as are checked

    def wrong_at_the_end(pre: Tensor) -> alternatives.Output:
        out = right(pre)
        return out._replace(h=torch.cat([out.h[:-1], 2 * out.h[-1:]]))

    with pytest.raises(gate.WrongResultError, match="h is off"):
        w.variant("wrong", "backend", wrong_at_the_end, "relu", BOTH)
    with pytest.raises(gate.WrongResultError, match="h has 8 sequences, not 9"):
        w.variant("short", "backend", lambda pre: right(pre[:-1]), "relu", "forward")


def test_packed_segments_are_gated_and_their_bytes_count() -> None:
    w = Workload((40, 128, 8), torch.float32, CPU, rotation=1, packed=True)
    assert w.segments is not None
    runs = w.segments[:, -1] - w.segments[:, 0] + 1
    assert (w.segments.diff(dim=1) >= 0).all()
    assert runs.min() == 1
    assert 3 < runs.float().mean() < 4
    one = w.variant("eager", "backend", w.backend("eager", "schmitt"), "schmitt", BOTH)
    assert one.bytes == 5 * w.bytes + w.statistics_bytes + 2 * w.segments.nbytes
    w.segments = None
    without = w.backend("eager", "relu")
    w = Workload((40, 128, 8), torch.float32, CPU, rotation=1, packed=True)
    with pytest.raises(gate.WrongResultError, match="differences is off"):
        w.variant("without segments", "backend", without, "relu", BOTH)


def test_a_batch_that_does_not_fit_shrinks_with_a_warning_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    free = 80 * 2**30
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    assert test_kernels.sequences(gpu, smoke=False) == 2048
    free = 30 * 2**30
    with pytest.warns(RuntimeWarning, match="1024 sequences instead of 2048: only 30 GiB are free"):
        assert test_kernels.sequences(gpu, smoke=False) == 1024
    m = example()
    m.notes["sequences intended"] = 2048
    assert remarks(m) == ["'relu, forward + backward': 2 sequences, not 2048: too little free memory"]


def test_the_cache_is_emptied_by_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written lines would still be in the cache when the timed call starts, and be written during it."""
    monkeypatch.setattr(measure, "SCRATCH_BYTES", 2**20)
    measure._scratch.cache_clear()
    scratch = measure._scratch(CPU)
    version = scratch._version
    with torch.profiler.profile() as profile:
        measure.occupy(CPU)
    measure._scratch.cache_clear()
    assert scratch._version == version
    assert {event.key: event.count for event in profile.key_averages()}["aten::sum"] == measure.READS


def one_offset_too_many(h: Tensor) -> Tensor:
    wrong = ((1, 3), (4, 16), (17, 127))
    return alternatives.eager_loop(h.shape[1], h.device, h.dtype, wrong)(h)


def not_centred(h: Tensor) -> Tensor:
    Ls = alternatives._laplacians(h.shape[1], h.device, h.dtype, MULTISCALE)
    return torch.stack([(h * (L @ h)).sum(1) for L in Ls], 1)


def correct(h: Tensor) -> Tensor:
    return alternatives.eager_loop(h.shape[1], h.device, h.dtype, MULTISCALE)(h)


def with_half_the_gradient(h: Tensor) -> Tensor:
    return 0.5 * correct(h) + 0.5 * correct(h.detach())


def not_a_number(h: Tensor) -> Tensor:
    return correct(h) * float("nan")


@pytest.mark.parametrize(
    ("wrong", "quantity"),
    [
        (one_offset_too_many, "differences"),
        (not_centred, "differences"),
        (with_half_the_gradient, "grad"),
        (not_a_number, "differences"),
    ],
)
def test_the_gate_catches_a_wrong_alternative(workload: Workload, wrong: Any, quantity: str) -> None:
    def function(pre: Tensor) -> alternatives.Output:
        return alternatives.statistics(pre.relu(), wrong)

    with pytest.raises(gate.WrongResultError, match=f"^wrong one: {quantity} is off by"):
        workload.variant("wrong one", "backend", function, "relu", BOTH)


def test_the_gate_catches_a_wrong_shape(workload: Workload) -> None:
    def function(h: Tensor) -> alternatives.Output:
        return alternatives.statistics(h, lambda h: not_a_number(h)[:, :2])

    with pytest.raises(gate.WrongResultError, match=r"differences is \[2, 2, 16\], not \[2, 3, 16\]"):
        workload.variant("short", "backend", function, "statistics", "forward")


def test_backends_are_gated_and_meant_for_the_device(workload: Workload) -> None:
    names = backends(CPU)
    assert "eager" in names
    assert not {"reference", "triton", "cuda"} & set(names)
    for kind in ("statistics", "relu", "threshold", "schmitt"):
        for passes in ("forward", "backward", BOTH):
            workload.variant(names[-1], "backend", workload.backend(names[-1], kind), kind, passes)


def test_bytes_that_a_pass_must_move(workload: Workload) -> None:
    """Statistics read h; the activation reads pre and writes h; the backward pass reads h and its gradient.

    A forward pass also writes the statistics.
    """
    expected = {
        ("statistics", "forward"): 1,
        ("statistics", "backward"): 2,
        ("relu", "forward"): 2,
        ("relu", "backward"): 3,
        ("relu", BOTH): 5,
    }
    for (kind, passes), tensors in expected.items():
        variant = workload.variant("eager", "backend", workload.backend("eager", kind), kind, passes)
        statistics = workload.statistics_bytes if "forward" in passes else 0
        assert variant.bytes == tensors * workload.bytes + statistics
    h, stats = activate_with_stats(workload.pre[0].detach())
    assert h.nbytes == workload.bytes
    assert sum(s.nbytes for s in stats) == workload.statistics_bytes


def test_what_exceeds_the_gpu_runs_in_slices_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    w = Workload((4, 40, 8), torch.float32, CPU, rotation=1)
    correct = w.alternative("eager loop", "relu")
    rows: list[int] = []

    def short_of_memory(pre: Tensor) -> alternatives.Output:
        rows.append(pre.shape[0])
        if pre.shape[0] > 1:
            raise torch.OutOfMemoryError
        return correct(pre)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert not w.variant("loop", "alternative", short_of_memory, "relu", BOTH).refused
    assert rows[:3] == [4, 2, 1]
    assert set(rows[2:]) == {1}


class FakeBenchmark:
    """The part of pytest-benchmark's fixture that `compare` uses."""

    def __init__(self) -> None:
        self.rounds = 0

    def pedantic(self, target: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target()
            self.rounds += 1


def test_variants_take_turns_on_rotating_inputs() -> None:
    calls: list[tuple[str, int]] = []

    def variant(name: str) -> Variant:
        return Variant(name, "backend", lambda i: calls.append((name, i)))

    benchmark = FakeBenchmark()
    others = [variant("a"), variant("b")]
    timings = measure.compare(benchmark, variant("own"), others, CPU, rounds=20, memory=False)
    assert calls[:3] == [("own", 0), ("a", 0), ("b", 0)]  # warm-up calls
    assert [i for _, i in calls[3:]] == list(range(60))
    rounds = {tuple(name for name, _ in calls[i : i + 3]) for i in range(3, 63, 3)}
    assert rounds == {("a", "b", "own"), ("b", "a", "own")}  # the order varies
    assert benchmark.rounds == 20
    assert {name: len(t.seconds) for name, t in timings.items()} == {"own": 20, "a": 20, "b": 20}


def test_a_slow_variant_sits_out_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "seconds_of", lambda call, turn, device: call(turn))
    variants = [Variant("slow", "alternative", lambda i: 10.0), Variant("quick", "alternative", lambda i: 0.01)]
    own = Variant("own", "backend", lambda i: 0.01)
    timings = measure.compare(FakeBenchmark(), own, variants, CPU, rounds=21, memory=False)
    assert {name: len(t.seconds) for name, t in timings.items()} == {"own": 21, "slow": measure.FEWEST, "quick": 21}


def test_peak_memory_counts_what_a_call_touches() -> None:
    size = 64 * 2**20

    def call(i: int) -> Tensor:
        temporary = torch.ones(size, dtype=torch.uint8)
        return temporary[: size // 2].clone()

    peak = measure.peak_memory(call, CPU)
    if peak is None:
        pytest.skip("this system does not report peak memory")
    assert 1.4 * size < peak < 1.7 * size


def example() -> Measurement:
    """h of 2 MiB, copied in 1 ms; the backend moves 5 MiB in 4 ms."""
    m = Measurement("relu, forward + backward", "cpp", "a CPU, 2 threads", [2, 128, 2048], "float32", 2**21)
    variants = [
        Variant("h.clone()", "copy", lambda i: None, 2 * 2**21),
        Variant("eager loop", "alternative", lambda i: None, 5 * 2**20),
        Variant("cpp", "backend", lambda i: None, 5 * 2**20),
    ]
    timings = {
        "h.clone()": Timing([0.001, 0.0011, 0.0009], 2**21),
        "eager loop": Timing([0.5, 0.6, 0.4], None),
        "cpp": Timing([0.004], 2 * 2**21 + 2**20),
    }
    m.add(variants, timings)
    return m


def step_example() -> Measurement:
    m = Measurement("training step, float32", "ours", "a CPU, 2 threads", [640, 2560, 32, 24], "float32", 0)
    m.add([Variant("ours", "step", lambda i: None)], {"ours": Timing([0.25], None)})
    return m


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_says_what_was_measured() -> None:
    lines = table([example(), step_example()]).splitlines()
    assert cells(lines[0]) == ["case", "variant", "ms", "x copy", "x own", "peak MiB", "x h", "of copy bandwidth"]
    both = "relu, forward + backward"
    assert cells(lines[2]) == [both, "h.clone()", "1.00", "1.00", "0.25", "2.0", "1.00", "100%"]
    assert cells(lines[3]) == [both, "eager loop", "500.00", "500.00", "125.00", "", "", "0%"]
    assert cells(lines[4]) == [both, "**cpp**", "4.00", "4.00", "1.00", "5.0", "2.50", "31%"]
    assert cells(lines[5]) == ["training step, float32", "**ours**", "250.00", "", "1.00", "", "", ""]
    assert len({len(line) for line in lines}) == 1


def write(path: Path, *measurements: Measurement) -> Path:
    """Write a file like pytest-benchmark's, with one foreign benchmark."""
    benchmarks = [{"extra_info": {"measurement": m.to_dict()}} for m in measurements] + [{"extra_info": {}}]
    machine = {"device": "a CPU", "torch": "2.13.0", "python_version": "3.12.1", "smoke": True}
    path.write_text(json.dumps({"benchmarks": benchmarks, "machine_info": machine}))
    return path


def test_a_measurement_survives_json(tmp_path: Path) -> None:
    found, machine = read_json(write(tmp_path / "a.json", example(), step_example()))
    assert found == [example(), step_example()]
    assert heading(found, machine) == (
        "a CPU, 2 threads, torch 2.13.0, Python 3.12.1, SMOKE MODE: these times mean nothing"
    )


def test_the_compact_form_holds_every_measurement(tmp_path: Path) -> None:
    found, machine = read_json(write(tmp_path / "a.json", example(), step_example()))
    write_json(tmp_path / "b.json", found, machine | {"cpu": {"flags": ["avx2"]}})
    assert read_json(tmp_path / "b.json") == (found, machine)
    assert len((tmp_path / "b.json").read_text().splitlines()) == 5


@pytest.mark.parametrize("file", sorted(RESULTS.glob("benchmarks-*.json")), ids=lambda file: file.stem)
def test_the_tables_in_the_docs_are_those_of_the_kept_results(file: Path) -> None:
    assert table(read_json(file)[0]) in file.with_suffix(".md").read_text(encoding="utf-8")


def test_the_report_prints_the_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "figures" / "benchmarks.png"
    main([str(write(tmp_path / "a.json", example(), step_example())), "--out", str(figure)])
    printed = capsys.readouterr().out
    assert table([example(), step_example()]) in printed
    assert "torch 2.13.0" in printed.splitlines()[0]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_figure_has_labelled_log_axes_and_the_floor() -> None:
    m = example()
    assert floor(m) == 1.25  # 5 MiB, where a copy moves 4
    assert floor(step_example()) is None
    figure = draw([m, step_example()], {"torch": "2.13.0"})
    kernels, step = figure.axes
    assert kernels.get_xscale() == step.get_xscale() == "log"
    assert kernels.get_xlabel() == "time, in copies of h"
    assert step.get_xlabel() == "time of a step, ms"
    assert sorted(bar.get_width() for bar in kernels.patches) == pytest.approx([1.0, 4.0, 500.0])
    assert "floor 1.25" in [text.get_text() for text in kernels.texts]
    assert "torch 2.13.0" in figure.get_suptitle()


def test_the_report_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="contains no measurement"):
        main([str(write(tmp_path / "empty.json"))])
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(SystemExit, match="is not the output of"):
        main([str(other)])
    with pytest.raises(SystemExit, match="is not the output of"):
        main([str(tmp_path / "absent.json")])
