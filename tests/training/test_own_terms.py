"""Temporal terms that are the user's own functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import fork
from tiny_runs import lines, same

import tsae
from tsae.config import ObjectiveConfig, TrainConfig
from tsae.errors import UserError
from tsae.train import command, main
from tsae.training.objectives import LossInputs, bands_for, objective
from tsae.training.own_terms import check_own_terms, joined, named, own_terms
from tsae.training.sparse_step import dense_reason
from tsae_kernels import activate_with_stats


def steps_term(inputs: LossInputs, step: int, cfg: ObjectiveConfig) -> torch.Tensor:
    return 0.001 * inputs.stats.differences[:, 0].sum() / inputs.h.shape[0]


def inputs_of(cfg: ObjectiveConfig) -> LossInputs:
    torch.manual_seed(0)
    pre = torch.randn(2, 12, 5, requires_grad=True)
    h, stats = activate_with_stats(pre, threshold=0.5, release=0.2, bands=bands_for(cfg))
    return LossInputs(x=torch.zeros(2, 12, 3), xhat=torch.zeros(2, 12, 3), h=h, stats=stats)


def test_it_is_the_temporal_term_with_its_weight_and_ramp() -> None:
    seen: list[Any] = []

    def term(inputs: LossInputs, step: int, cfg: ObjectiveConfig) -> torch.Tensor:
        seen.append((step, cfg.weight))
        return 2.0 * inputs.stats.differences[:, 0].sum()

    cfg = ObjectiveConfig(temporal="python:term", weight=3.0, l1=0.0, hold_steps=10, ramp_steps=10)
    inputs = inputs_of(cfg)
    steps = (inputs.h[:, 1:] - inputs.h[:, :-1]).square().sum()
    with own_terms({"term": term}):
        assert objective(inputs, 5, cfg).temporal == 0
        late = objective(inputs, 100, cfg)
    assert seen == [(100, 3.0)]
    torch.testing.assert_close(late.temporal, 2.0 * steps.detach())
    torch.testing.assert_close(late.total, 6.0 * steps)


@pytest.mark.parametrize("temporal", ["multiscale", "slow", "window"])
def test_beside_other_terms_and_the_first_band_is_neighbours(temporal: str) -> None:
    plain = ObjectiveConfig(temporal=temporal, offset=4, hold_steps=0, ramp_steps=0)
    both = ObjectiveConfig(temporal=f"{temporal}+python:steps_term", offset=4, hold_steps=0, ramp_steps=0)
    both._check_combinations()
    assert bands_for(both)[0] == (1, 1)
    with own_terms({"steps_term": steps_term}):
        added = objective(inputs_of(both), 9, both).temporal - objective(inputs_of(plain), 9, plain).temporal
    h = inputs_of(plain).h
    torch.testing.assert_close(added, (0.001 * (h[:, 1:] - h[:, :-1]).square().sum() / 2).detach())


def test_what_is_no_term_is_one_sentence() -> None:
    for bad in (3, {}, {"x": 1}, {"a b": steps_term}, {"": steps_term}, lambda *_: None):
        with pytest.raises(UserError):
            named(bad)
    assert named(steps_term) == {"steps_term": steps_term}
    assert joined(None, ["a", "b"]) == joined("none", ["a", "b"]) == "python:a+python:b"
    assert joined("slow", ["a"]) == "slow+python:a"
    cfg = ObjectiveConfig(temporal="python:bad", hold_steps=0, ramp_steps=0)
    for value, said in ((1.0, "returned 1.0"), (torch.ones(2), r"a tensor \[2\]"), (torch.tensor(1), "int64")):
        with own_terms({"bad": lambda *_, v=value: v}), pytest.raises(UserError, match=said):
            objective(inputs_of(cfg), 9, cfg)
    for temporal in ("python:a+python:a", "slow+slow+python:a", "nothing+python:a"):
        with pytest.raises(UserError, match="each once"):
            ObjectiveConfig(temporal=temporal).check()


def test_lists_and_graphs_are_refused() -> None:
    cfg = TrainConfig(objective=ObjectiveConfig(temporal="python:steps_term"))
    assert "needs all features of a token" in str(dense_reason(cfg))
    cfg.cuda_graph = True
    with own_terms({"steps_term": steps_term}), pytest.raises(UserError, match="cuda_graph cannot capture"):
        check_own_terms(cfg)


@pytest.mark.usefixtures("blank_report")
def test_a_run_records_the_name_and_is_continued_with_the_function(
    argv_of: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], at_step: Callable[..., None]
) -> None:
    def config(name: str) -> TrainConfig:
        return command([*argv_of(tmp_path / name), "--steps", "12"])[0]

    plain = tsae.train(config=config("plain"), out=tmp_path / "plain")
    whole = tsae.train(config=config("whole"), out=tmp_path / "whole", temporal=steps_term)
    assert json.loads((tmp_path / "whole/config.json").read_text())["objective"]["temporal"] == "python:steps_term"
    assert whole.config.objective.temporal == "python:steps_term"
    assert not torch.equal(plain.sae.W_dec, whole.sae.W_dec)
    assert lines(tmp_path / "whole/metrics.jsonl")[-1]["temporal"] > 0

    def fail() -> None:
        raise RuntimeError("stop")

    at_step(6, fail)
    with pytest.raises(RuntimeError, match="stop"):
        tsae.train(config=config("cut"), out=tmp_path / "cut", temporal=steps_term)
    at_step()
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "cut")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == (
        "error: objective.temporal has the Python function 'steps_term', which no file holds; train or resume from "
        "Python and pass it again: tsae.train(..., temporal={'steps_term': steps_term})."
    )
    tsae.train(resume=tmp_path / "cut", temporal=steps_term)
    same(tmp_path / "whole", tmp_path / "cut")


def several(argv: list[str]) -> None:
    cfg, _ = command(argv)
    with pytest.raises(UserError, match="there are 2 processes; such a function runs in one process"):
        tsae.train(config=cfg, temporal=steps_term)


def test_in_one_process_only(argv_of: Callable[..., list[str]], tmp_path: Path) -> None:
    fork(2, several, argv_of(tmp_path / "run"), folder=tmp_path)
