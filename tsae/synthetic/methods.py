"""What is compared: autoencoders, each trained by the project's own trainer, and what is read from their features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.config import ObjectiveConfig, OptimizerConfig, SAEConfig, TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.sae.kinds import KINDS
from tsae.sae.model import SparseAutoencoder
from tsae.sae.normalization import InputNormalizer
from tsae.synthetic.bayes import filter_states, leak_for, leaky_mean, smooth_states
from tsae.synthetic.chains import Chain, Source
from tsae.synthetic.settings import Setting
from tsae.training.trainer import Trainer


@dataclass(frozen=True)
class Method:
    """One autoencoder: changes to the configuration that all share, and the read-outs besides its features.

    sae, objective: fields of `SAEConfig` and `ObjectiveConfig`
    readouts: keys of `READOUTS`
    """

    sae: dict[str, Any]
    objective: dict[str, Any] = field(default_factory=dict)
    readouts: tuple[str, ...] = ()


STATES = ("leaky", "hold", "filter", "smoother")
METHODS: dict[str, Method] = {
    "relu": Method({"activation": "relu"}),
    "topk": Method({"activation": "topk"}),
    "batchtopk": Method({"activation": "batchtopk"}, readouts=STATES),
    "jumprelu": Method({"activation": "jumprelu"}),
    "schmitt": Method({"activation": "schmitt", "release_ratio": 0.4}, readouts=STATES),
    "rate": Method({"activation": "rate", "release_ratio": 0.4, "gate_gradient": 0.2}, readouts=STATES),
    "persistent": Method({"activation": "persistent"}),
}
"""A new activation is a line here."""


class Readout(NamedTuple):
    """What is read from features, without labels.

    read: (h [B, T, n], segments [B, T], estimated chain of each feature) -> values [B, T, n]
    causal: whether a value depends on its token and those before it alone
    above: where a value counts as on
    support: whether the values are 0 where off, so that they can be features, whose bits are counted
    """

    read: Callable[[Tensor, Tensor, Chain], Tensor]
    causal: bool = True
    above: float = 0.5
    support: bool = False


def _hold(h: Tensor, segments: Tensor, chain: Chain) -> Tensor:
    return (filter_states(h > 0, segments, chain) > 0.5).to(h)


READOUTS: dict[str, Readout] = {
    "leaky": Readout(lambda h, segments, chain: leaky_mean(h, segments, leak_for(chain))),
    "hold": Readout(_hold, support=True),
    "filter": Readout(lambda h, segments, chain: filter_states(h > 0, segments, chain)),
    "smoother": Readout(lambda h, segments, chain: smooth_states(h > 0, segments, chain), causal=False),
}


def configuration(method: Method, setting: Setting, seed: int) -> TrainConfig:
    """The training configuration of a method, checked: no temporal term, so that activations alone differ."""
    tokens = setting.steps * setting.batch * setting.length
    objective: dict[str, Any] = {"temporal": "none", "boost": 1.0, "l1": 0.0} | method.objective
    objective = {"hold_steps": setting.steps // 4, "ramp_steps": setting.steps // 4} | objective  # of `rate`
    if not KINDS[method.sae["activation"]].k_sparse:
        objective |= {"l1": setting.l1}
    cfg = TrainConfig(
        preset="synthetic",
        steps=setting.steps,
        batch=setting.batch,
        length=setting.length,
        seed=seed,
        sae=SAEConfig(d_in=setting.width, d_sae=setting.d_sae, k=setting.k, **method.sae),
        objective=ObjectiveConfig(dead_after_tokens=max(tokens // 10, 1), **objective),
        optimizer=OptimizerConfig(
            lr=setting.lr, betas=(0.9, 0.99), warmup_steps=setting.steps // 20, schedule="linear", clip_norm=0.0
        ),
    )
    cfg.sae.check()
    cfg.objective.check()
    return cfg


def train(
    methods: dict[str, Method], setting: Setting, source: Source, seed: int, advance: Callable[[float], None]
) -> dict[str, SparseAutoencoder]:
    """Train all methods on the same batches; the finished autoencoders take raw activations.

    advance: called with the tokens of each step
    """
    shape = (setting.batch, setting.length)
    first = next(source.batches(1, 4 * setting.batch, setting.length, seed + 1))
    normalizer = InputNormalizer.estimate(first.x)
    trainers = {
        name: Trainer(
            configuration(method, setting, seed),
            replace(normalizer),
            torch.device("cpu"),
            autocast=False,
        )
        for name, method in methods.items()
    }
    for truth in source.batches(setting.steps, *shape, seed + 2):
        batch = ActivationBatch(truth.x, truth.segments)
        for trainer in trainers.values():
            trainer.train_step(batch)
        advance(setting.batch * setting.length)
    for trainer in trainers.values():
        trainer.check_finite()
    return {name: trainer.finished() for name, trainer in trainers.items()}
