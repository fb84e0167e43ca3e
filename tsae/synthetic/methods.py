"""What is compared: autoencoders, each trained by the project's own trainer, and what is read from their features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tsae.config import ObjectiveConfig, OptimizerConfig, SAEConfig, TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.errors import UserError
from tsae.sae.kinds import KINDS
from tsae.synthetic.bayes import filter_states, leak_for, leaky_mean, smooth_states
from tsae.synthetic.chains import Chain, Source
from tsae.synthetic.settings import Setting
from tsae.synthetic.training import CrosscoderTraining, RunningMeansTraining, Training


@dataclass(frozen=True)
class Method:
    """One autoencoder: changes to the configuration that all share, and the read-outs besides its features.

    sae, objective: fields of `SAEConfig` and `ObjectiveConfig`
    readouts: keys of `READOUTS`
    groups: Matryoshka's prefixes, as shares of the features; a temporal term is of the first
    window: tokens that a crosscoder reads, with as many active features for each as other methods have; 1: none
    slow: share of the features that read a running mean, for each time constant
    """

    sae: dict[str, Any]
    objective: dict[str, Any] = field(default_factory=dict)
    readouts: tuple[str, ...] = ()
    groups: tuple[float, ...] = ()
    window: int = 1
    slow: float = 0.0

    @property
    def causal(self) -> bool:
        """Whether features depend on their token and those before it alone."""
        return self.window == 1


STATES = ("leaky", "hold", "filter", "smoother")
METHODS: dict[str, Method] = {
    "relu": Method({"activation": "relu"}),
    "topk": Method({"activation": "topk"}),
    "batchtopk": Method({"activation": "batchtopk"}, readouts=STATES),
    "jumprelu": Method({"activation": "jumprelu"}),
    "schmitt": Method({"activation": "schmitt", "release_ratio": 0.4}, readouts=STATES),
    "rate": Method({"activation": "rate", "release_ratio": 0.25, "gate_gradient": 0.4}, readouts=STATES),
    "persistent": Method({"activation": "persistent"}),
    "matryoshka": Method({"activation": "batchtopk"}, groups=(0.1, 0.4, 1.0)),
    "t-sae": Method({"activation": "batchtopk"}, {"temporal": "contrastive", "weight": 1.0}, groups=(0.2, 1.0)),
    "plain": Method({"activation": "schmitt", "release_ratio": 1.0}),
    "tsae": Method({"activation": "schmitt", "release_ratio": 1.0}, {"temporal": "multiscale", "weight": 30.0}),
    "tc-sae": Method({"activation": "schmitt", "release_ratio": 1.0}, {"temporal": "window", "weight": 3.0}),
    "running-means": Method({"activation": "batchtopk"}, slow=0.1),
    "crosscoder-4": Method({"activation": "batchtopk"}, window=4),
    "crosscoder-12": Method({"activation": "batchtopk"}, window=12),
}
"""A new method is a line here."""


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
    """The training configuration of a method, checked; its temporal term, if any, starts after a quarter of the steps.

    Raises:
        UserError: sequences are no multiple of the method's window, or a value of the configuration is invalid.
    """
    if setting.length % method.window:
        raise UserError(
            f"length is {setting.length}; it must be a multiple of the {method.window} tokens of a crosscoder's window."
        )
    tokens = setting.steps * setting.batch * setting.length
    groups = tuple(round(share * setting.d_sae) for share in method.groups)
    objective: dict[str, Any] = {"temporal": "none", "boost": 1.0, "l1": 0.0} | method.objective
    objective = {"hold_steps": setting.steps // 4, "ramp_steps": setting.steps // 4} | objective  # also of `rate`
    if not KINDS[method.sae["activation"]].k_sparse:
        objective |= {"l1": setting.l1}
    cfg = TrainConfig(
        preset="synthetic",
        steps=setting.steps,
        batch=setting.batch,
        length=setting.length,
        seed=seed,
        sae=SAEConfig(d_in=setting.width, d_sae=setting.d_sae, k=setting.k, groups=groups, **method.sae),
        objective=ObjectiveConfig(
            dead_after_tokens=max(tokens // 10, 1), group=groups[0] if groups else 0, **objective
        ),
        optimizer=OptimizerConfig(
            lr=setting.lr, betas=(0.9, 0.99), warmup_steps=setting.steps // 20, schedule="linear", clip_norm=0.0
        ),
    )
    cfg.sae.check()
    cfg.objective.check()
    return cfg


def _begin(method: Method, cfg: TrainConfig, first: ActivationBatch) -> Training:
    device = torch.device("cpu")
    if method.window > 1:
        active = method.window * cfg.sae.k  # as many a token as others have
        return CrosscoderTraining(active, cfg, first, device, autocast=False, window=method.window)
    if method.slow:
        return RunningMeansTraining(round(method.slow * cfg.sae.d_sae), cfg, first, device, autocast=False)
    return Training(cfg, first, device, autocast=False)


def train(
    methods: dict[str, Method], setting: Setting, source: Source, seed: int, advance: Callable[[float], None]
) -> dict[str, nn.Module]:
    """Train all methods on the same batches; the finished autoencoders take raw activations.

    advance: called with the tokens of each step
    out: by name, modules with `encode(x, segments)` and `decode(h)`
    """
    drawn = next(source.batches(1, 4 * setting.batch, setting.length, seed + 1))
    first = ActivationBatch(drawn.x, drawn.segments)
    trainings = {name: _begin(method, configuration(method, setting, seed), first) for name, method in methods.items()}
    for truth in source.batches(setting.steps, setting.batch, setting.length, seed + 2):
        batch = ActivationBatch(truth.x, truth.segments)
        for training in trainings.values():
            training.trainer.train_step(training.batch(batch))
        advance(setting.batch * setting.length)
    for training in trainings.values():
        training.trainer.check_finite()
    return {name: training.finished() for name, training in trainings.items()}
