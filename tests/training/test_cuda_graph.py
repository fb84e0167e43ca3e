"""The training step as a CUDA graph: on a GPU, and on a CPU with graphs that `recorded_graph` makes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from recorded_graph import RecordedGraph, record_graphs
from test_sparse_step import CASES, CPU, batches, config, make

from tsae.config import TrainConfig
from tsae.sae.normalization import InputNormalizer
from tsae.training.cuda_graph import WARM_UP, GraphedSteps
from tsae.training.optimization import keep_rates_on_device
from tsae.training.trainer import DivergedError, Trainer
from tsae.utils.device import pretend_to_run_behind

STEPS = 12
RUNS: dict[str, tuple[bool, Callable[[], TrainConfig]]] = {
    "lists, all terms": (
        True,
        lambda: config(
            objective={
                "temporal": "multiscale+window+contrastive+slow",
                "pairs": 20,
                "hold_steps": 4,
                "ramp_steps": 4,
                "l1": 0.02,
                "buffer_mixing": 0.3,
            },
            optimizer={"schedule": "cosine", "warmup_steps": 3},
        ),
    ),
    "lists, AuxK": (True, CASES["AuxK"]),
    "lists, batchtopk": (True, CASES["batchtopk, l1"]),
    "lists, free decoder, adamw": (True, CASES["free decoder, adamw"]),
    "dense, jumprelu": (False, lambda: config("jumprelu", {"temporal": "slow"}, optimizer={"schedule": "linear"})),
    "lists, rate": (
        True,
        lambda: config("rate", {"hold_steps": 4, "ramp_steps": 4}, sae={"release_ratio": 0.5}),
    ),
    "lists, rate, gate gradient": (
        True,
        lambda: config("rate", {"hold_steps": 4, "ramp_steps": 4}, sae={"release_ratio": 0.5, "gate_gradient": 0.2}),
    ),
    "dense, rate, gate gradient": (
        False,
        lambda: config("rate", {"hold_steps": 4, "ramp_steps": 4}, sae={"release_ratio": 0.5, "gate_gradient": 0.2}),
    ),
    "dense, gelu": (False, lambda: config("gelu", {"temporal": "window", "l1": 0.1, "ramp_steps": 5})),
    "dense, relu, AuxK": (False, lambda: config("relu", {"l1": 0.04, "aux_weight": 0.1, "dead_after_tokens": 200})),
    "lists, pieces": (True, lambda: replace(CASES["all terms"](), chunk=3)),
}


def check_same(graphed: Trainer, plain: Trainer, logged: tuple[int, ...]) -> None:
    for step, batch in enumerate(batches(STEPS)):
        one, other = (trainer.train_step(batch, log=step in logged) for trainer in (graphed, plain))
        assert one == other, step
        for name, tensor in plain.sae.state_dict().items():
            assert torch.equal(graphed.sae.state_dict()[name], tensor), (step, name)
    for name, value in plain.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(graphed.state_dict()[name], value), name


def with_recorded_graphs(trainer: Trainer) -> Trainer:
    trainer.graphs = GraphedSteps(trainer._make_step, CPU)
    return with_rates_on_device(trainer)


def with_rates_on_device(trainer: Trainer) -> Trainer:
    """In float32, as a graph needs them."""
    keep_rates_on_device(trainer.optimizer)
    return trainer


@pytest.mark.parametrize("name", RUNS)
def test_replayed_steps_are_the_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, while the schedules change, and the temporal term, AuxK and thresholds from rates begin."""
    record_graphs(monkeypatch)
    sparse, cfg = RUNS[name]
    graphed, plain = with_recorded_graphs(make(cfg(), sparse)), with_rates_on_device(make(cfg(), sparse))
    with pretend_to_run_behind():
        check_same(graphed, plain, logged=(0, 1, 5, STEPS - 1))
    graphs = [each.graph for each in graphed.graphs.captured.values() if each.graph is not None]
    assert graphs, "no step was replayed"
    assert all(isinstance(graph, RecordedGraph) for graph in graphs)


def test_a_larger_capacity_gets_its_own_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    record_graphs(monkeypatch)
    trainer = with_recorded_graphs(make(config(), True))
    trainer.lists.capacity = 4
    with pretend_to_run_behind():
        for step, batch in enumerate(batches(2 * WARM_UP + 4)):
            trainer.train_step(batch, log=step == WARM_UP + 1)
    first, second = trainer.graphs.captured.values()
    assert first.graph is not None
    assert second.graph is not None
    steps = [int(state["step"]) for state in trainer.optimizer.state.values()]
    assert steps == [WARM_UP + 2] * 4  # those before the check are lost


def test_a_state_kept_in_new_tensors_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    record_graphs(monkeypatch)
    graphed, plain = with_recorded_graphs(make(config(), True)), with_rates_on_device(make(config(), True))

    def update(l0: torch.Tensor) -> torch.Tensor:
        graphed.controller.theta = graphed.controller.theta * torch.exp((l0 / 6 - 1).clamp(-1, 1) * 0.3)
        return graphed.controller.theta

    monkeypatch.setattr(graphed.controller, "update", update)
    with pretend_to_run_behind(), pytest.raises(AssertionError):
        check_same(graphed, plain, logged=())


def test_divergence_is_noticed_where_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    record_graphs(monkeypatch)
    trainer = with_recorded_graphs(make(config(), True))
    *good, bad = batches(WARM_UP + 2)
    bad.x[0] = torch.nan
    with pretend_to_run_behind():
        for batch in good:
            trainer.train_step(batch)
        with pytest.raises(DivergedError, match="is nan"):
            trainer.train_step(bad, log=True)


def test_a_checkpoint_does_not_depend_on_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    record_graphs(monkeypatch)
    graphed, plain = with_recorded_graphs(make(config(), True)), make(config(), True)
    with pretend_to_run_behind():
        for batch in batches(WARM_UP + 2):
            graphed.train_step(batch)
            plain.train_step(batch)
    one, other = graphed.state_dict()["optimizer"], plain.state_dict()["optimizer"]
    assert one["param_groups"][0]["lr"] == pytest.approx(other["param_groups"][0]["lr"], rel=1e-7)
    assert one["param_groups"][0]["capturable"] is other["param_groups"][0]["capturable"] is False
    resumed = make(config(), True)
    resumed.load_state_dict(copy.deepcopy(graphed.state_dict()))
    assert not isinstance(resumed.optimizer.param_groups[0]["lr"], torch.Tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_on_a_gpu(name: str, autocast: bool) -> None:
    sparse, cfg = RUNS[name]
    device = torch.device("cuda")
    normalizer = InputNormalizer.estimate(*batches(1)[0])
    cfg = replace(cfg(), sparse_step="on" if sparse else "off")
    graphed = Trainer(replace(cfg, cuda_graph=True), normalizer, device, autocast=autocast)
    plain = Trainer(cfg, normalizer, device, autocast=autocast)
    for step, batch in enumerate(batches(STEPS)):
        one, other = (trainer.train_step(batch, log=step in (0, 5, STEPS - 1)) for trainer in (graphed, plain))
        for key, value in other.items():
            assert one[key] == pytest.approx(value, rel=1e-3, abs=1e-3), (step, key)
    assert any(each.graph is not None for each in graphed.graphs.captured.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that can be waited for")
@pytest.mark.parametrize("name", [name for name in RUNS if "pieces" not in name])
def test_no_step_waits_for_the_gpu(name: str) -> None:
    """PyTorch's own check raises at every synchronisation."""
    sparse, cfg = RUNS[name]
    normalizer = InputNormalizer.estimate(*batches(1)[0])
    cfg = replace(cfg(), sparse_step="on" if sparse else "off")
    trainer = Trainer(cfg, normalizer, torch.device("cuda"), autocast=True)
    first, *others = batches(4)
    trainer.train_step(first, log=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in others:
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
