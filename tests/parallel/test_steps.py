"""Training steps with a split batch or a split dictionary, against the same steps in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch import fork, torchrun
from once import made_once
from steps import RUNS, record_reductions, train_all, trained

Measured = dict[str, list[dict[str, float]]]
CLOSE = 1e-5  # relative, of every loss of 50 steps


@pytest.fixture(scope="module")
def alone() -> Callable[[str], tuple[list[dict[str, float]], dict[str, torch.Tensor]]]:
    done = {}

    def run(name: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        if name not in done:
            done[name] = trained(name)
        return done[name]

    return run


def written(out: Path) -> tuple[Measured, dict[str, dict[str, torch.Tensor]]]:
    return json.loads(out.read_text()), torch.load(out.with_suffix(".pt"), weights_only=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, dict[str, dict[str, torch.Tensor]]]:
    def make(folder: Path) -> None:
        fork(2, train_all, folder / "measured.json", [1, 2], folder=folder)

    return written(made_once(tmp_path_factory, "two", make) / "measured.json")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, dict[str, dict[str, torch.Tensor]]]:
    def make(folder: Path) -> None:
        result = torchrun(4, "steps.py", folder / "measured.json", 1, 2, 4)  # the launcher itself, where time allows
        assert result.returncode == 0, result.stderr

    return written(made_once(tmp_path_factory, "four", make) / "measured.json")


@pytest.mark.parametrize("features", [1, 2], ids=["2 shares", "2 parts"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_steps_of_one(name: str, features: int, two: tuple, alone: Callable) -> None:
    check_same(two, f"{features}: {name}", *alone(name))


@pytest.mark.slow
@pytest.mark.parametrize("features", [1, 2, 4], ids=["4 shares", "2 x 2", "4 parts"])
@pytest.mark.parametrize("name", RUNS)
def test_four_processes_make_the_steps_of_one(name: str, features: int, four: tuple, alone: Callable) -> None:
    check_same(four, f"{features}: {name}", *alone(name))


def test_gradients_are_summed_while_the_last_backward_pass_runs(tmp_path: Path) -> None:
    fork(2, record_reductions, tmp_path / "one.json", 0, folder=tmp_path)
    missing = [names for _, names in json.loads((tmp_path / "one.json").read_text())]
    assert len(missing) == 4
    assert any("W_enc" in names and "W_dec" not in names for names in missing)  # before the encoder's gradient is there

    fork(2, record_reductions, tmp_path / "two.json", 2, folder=tmp_path)
    found = json.loads((tmp_path / "two.json").read_text())
    assert [piece for piece, _ in found] == [2] * 4  # none during the first piece's backward pass


def check_same(found: tuple, key: str, wanted: list[dict[str, float]], weights: dict[str, torch.Tensor]) -> None:
    measured, found_weights = found
    assert len(measured[key]) == len(wanted) == 50
    for step, (one, several) in enumerate(zip(wanted, measured[key], strict=True), start=1):
        assert several["tokens"] == one["tokens"]
        assert several["dead"] == one["dead"]
        for name in ("loss", "reconstruction", "sparsity", "temporal", "auxiliary", "l0"):
            assert several[name] == pytest.approx(one[name], rel=CLOSE, abs=1e-7), (step, name)
        for name in ("gradient_norm", "lag1_correlation", "lag1_correlation_p50"):
            assert several[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), (step, name)
    for name, tensor in weights.items():
        torch.testing.assert_close(found_weights[key][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_the_runs_pass_through_what_they_are_to_test(alone: Callable) -> None:
    assert max(line["dead"] for line in alone("topk, matryoshka, AuxK, contrastive")[0]) > 0
    assert all(line["auxiliary"] > 0 for line in alone("topk, matryoshka, AuxK, contrastive")[0] if line["dead"] > 4)
    for name in RUNS:
        if "L0" not in name:
            assert alone(name)[0][-1]["temporal"] > 0, name
