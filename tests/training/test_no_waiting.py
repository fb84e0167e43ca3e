"""A training step on a GPU reads no value of a tensor: checked without a GPU.

`Forbidden` sees every operator that a step calls on a CPU which counts as a GPU. On the meta device tensors have shapes
and no values, so whatever asks for a value raises, and so does an operation on tensors of two devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_sparse_step import CASES, CPU, B, D, T, batches, config, make
from torch.utils._python_dispatch import TorchDispatchMode

from tsae.config import TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.sae.normalization import InputNormalizer
from tsae.training import schedules
from tsae.training.trainer import Trainer
from tsae.utils.device import pretend_to_run_behind
from tsae_kernels import arguments, scans

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "is_nonzero", "equal", "unique_consecutive")


class Forbidden(TorchDispatchMode):
    """Raises where the host would wait for a GPU: a value is read, or a shape depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING or (name.startswith("index") and _by_mask(args)):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def _by_mask(args: tuple) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


@contextlib.contextmanager
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # On a GPU it checks no values; see its docstring.
    monkeypatch.setattr(arguments, "_check_release", lambda threshold, release: None)
    monkeypatch.setattr(scans, "_checks_values", lambda tensor: False)
    with pretend_to_run_behind(), Forbidden():
        yield


DENSE: dict[str, Callable[[], TrainConfig]] = {
    "relu": lambda: config("relu", {"l1": 0.04, "temporal": "multiscale", "aux_weight": 0.1}),
    "gelu": lambda: config("gelu", {"temporal": "window", "l1": 0.1}),
    "jumprelu": lambda: config("jumprelu"),
    "jumprelu_schmitt, l0": lambda: config("jumprelu_schmitt", {"l0": 0.01, "temporal": "contrastive"}),
    "two-sided": lambda: config(sae={"hysteresis": "two-sided", "steering": "exact"}),
    "rate with the gate's gradient": lambda: config("rate", {"hold_steps": 1}, sae={"gate_gradient": 0.3}),
    "rate, path": lambda: config("rate", {"hold_steps": 1}, sae={"hysteresis": "path", "support_bits": 20.0}),
    "layer norm, matryoshka": lambda: config("batchtopk", sae={"layer_norm": "pre", "groups": (20, 96)}),
    "noise": lambda: config("topk", optimizer={"noise_eta": 0.1}),
}


def check_steps(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = batches(4)
    with pretend_to_run_behind():
        trainer.train_step(first, log=True)  # the start of the threshold reads values
    trainer._any_dead = trainer.cfg.objective.aux_weight > 0
    with forbidden(monkeypatch):
        for batch in others:
            trainer.train_step(batch)
    assert trainer.step == 4


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_steps_on_lists_wait_for_nothing(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_steps(make(CASES[name](), True, autocast=autocast), monkeypatch)


@pytest.mark.parametrize("name", [*DENSE, *CASES])
def test_dense_steps_wait_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_steps(make((DENSE | CASES)[name](), False), monkeypatch)


@pytest.mark.parametrize("sparse", [False, True])
def test_steps_in_pieces_wait_for_nothing(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_steps(make(replace(CASES["all terms"](), chunk=3), sparse), monkeypatch)


def test_the_guard_notices_the_steps_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(CASES["topk"](), False)
    with pytest.raises(AssertionError, match="waits for the device"), Forbidden():
        trainer.train_step(batches(1)[0])


def without_what_meta_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has no autocast and no fused Adam for the meta device; the latter then updates no bias."""
    real = torch.optim.Adam.__init__

    def unfused(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **options | {"fused": None})
        self.step = lambda: None

    monkeypatch.setattr(torch.optim.Adam, "__init__", unfused)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())


@pytest.mark.parametrize(
    "name",
    [
        *("all terms", "AuxK", "batchtopk, l1", "schmitt, exact", "matryoshka"),
        *(name for name in CASES if "gate" in name),
    ],
)
def test_steps_without_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step on lists, with row-wise Adam: every tensor is on the device, and none has a value."""
    cfg = replace(CASES[name](), sparse_step="on")
    without_what_meta_lacks(monkeypatch)
    normalizer = InputNormalizer(torch.zeros(D), 1.0)
    trainer = Trainer(cfg, normalizer, torch.device("meta"), autocast=False)
    trainer.controller.start(torch.ones((), device="meta"))
    trainer.step, trainer._any_dead = 1, cfg.objective.aux_weight > 0
    for batch in batches(2):
        trainer.train_step(batch)
    assert trainer.step == 3
    assert trainer.sae.W_enc.grad is None or trainer.sae.W_enc.grad.device.type == "meta"


def test_the_plan_of_a_step_is_its_schedules() -> None:
    cfg = config(
        objective={"temporal": "slow", "hold_steps": 2, "ramp_steps": 4, "weight": 3.0},
        optimizer={"warmup_steps": 3, "schedule": "linear", "noise_eta": 0.5, "noise_steps": 2},
    )
    for step in range(8):
        plan = schedules.step_plan(step, cfg.steps, cfg.objective, cfg.optimizer)
        ramp = schedules.temporal_ramp(step, cfg.objective)
        assert plan.loss.temporal == (None if step <= 2 else ramp * 3.0)
        assert plan.loss.reconstruction == schedules.reconstruction_weight(step, cfg.objective)
        assert plan.ramp == ramp
        assert plan.mixing == schedules.buffer_mixing(step, cfg.objective)
        assert plan.lr == schedules.learning_rate(step, cfg.steps, cfg.optimizer)
        assert plan.noise == schedules.noise_std(step, cfg.optimizer)


def test_batches_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a device differ from those of a CPU in what is drawn alone."""
    behind, plain = make(CASES["multiscale"](), False), make(CASES["multiscale"](), False)
    for batch in batches(4):
        with pretend_to_run_behind():
            one = behind.train_step(batch, log=True)
        other = plain.train_step(ActivationBatch(batch.x.clone(), batch.segments), log=True)
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert (B, T, CPU.type) == (*batches(1)[0].x.shape[:2], "cpu")
