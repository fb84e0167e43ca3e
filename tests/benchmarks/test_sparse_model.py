"""The model of a sparse training step: its kernels are those of the benchmark, its bytes those of the launchers."""

from __future__ import annotations

import pytest
import torch

from benchmarks import sparse_model
from benchmarks.test_sparse_step import Problem, floor_bytes
from tsae_kernels.backends.triton import sparse_launch

STEP = sparse_model.Step()


def named(step: sparse_model.Step) -> dict[str, sparse_model.Kernel]:
    return {kernel.name: kernel for kernel in sparse_model.kernels(step)}


def test_every_kernel_of_the_benchmark_has_bytes() -> None:
    tiny = sparse_model.Step(tokens=16, d=4, features=8, active=2, capacity=8, length=8)
    problem = Problem(tiny, torch.device("cpu"), torch.float32)
    assert problem.check() == pytest.approx(2, abs=0.5)
    *names, b_dec, optimizer = named(tiny)
    assert list(problem.kernels()) == names
    assert (b_dec, optimizer) == ("gradient of b_dec through the encoder", "Adam")
    assert all(floor_bytes(named(tiny)[name]) > 0 for name in names)


def test_the_columns_of_a_block_are_the_launchers() -> None:
    assert sparse_model.H100.cached == sparse_launch._CACHED
    assert sparse_model.ENTRIES == sparse_launch._ENTRIES
    for rows in (1024, 16_384, 65_536, 131_072, 262_144):
        for element in (2, 4):
            columns = sparse_model._columns(rows, element, sparse_model.H100)
            assert columns == sparse_launch._block_d(2304, rows, element)


def test_gathered_rows_come_from_memory_once_while_they_fit_in_the_cache() -> None:
    small, wide = (named(sparse_model.Step(features=k))["decoder"] for k in (16_384, 262_144))
    once = 2 * STEP.d * (16_384 + STEP.tokens)
    assert small.memory == once
    assert small.l2 > 15 * once
    assert wide.memory > 0.5 * wide.l2


def test_the_cost_of_an_entry_does_not_grow_with_the_dictionary() -> None:
    narrow, wide = (named(sparse_model.Step(features=k)) for k in (16_384, 32_768))
    for name in ("decoder", "gradient of values", "gradient of statistics"):
        assert wide[name].seconds(sparse_model.H100) == pytest.approx(narrow[name].seconds(sparse_model.H100), rel=0.05)
    for name in ("x W_enc", "Adam"):
        assert wide[name].seconds(sparse_model.H100) == pytest.approx(
            2 * narrow[name].seconds(sparse_model.H100), rel=0.05
        )


def test_the_table_has_a_column_per_width() -> None:
    lines = sparse_model.table([16_384, 65_536]).splitlines()
    assert lines[0] == "| kernel | 16,384 features | 65,536 features |"
    assert all(line.count("|") == 4 for line in lines)
    assert len(lines) == 2 + len(named(STEP)) + 5


def test_the_gate_adds_passes_over_the_pre_activations_and_entries() -> None:
    plain, gated = named(STEP), named(STEP._replace(**sparse_model.GATED))
    name = "features that are nearly on"
    assert set(gated) - set(plain) == {name}
    assert gated[name].memory > 2 * STEP.tokens * STEP.features
    entries = (STEP.active + sparse_model.GATED["near"]) / STEP.active
    assert gated["decoder"].l2 == pytest.approx(entries * plain["decoder"].l2)
    dense = {kernel.name: kernel for kernel in sparse_model.dense_kernels(STEP._replace(**sparse_model.GATED))}
    assert dense[name].memory > 20 * gated[name].memory
    assert f"| {name} |" in sparse_model.table([16_384], gate=True)
    assert f"| {name} |" not in sparse_model.table([16_384])
