"""Training steps against the same steps computed by hand in float64: every mechanism, wired together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tsae.config import ObjectiveConfig, OptimizerConfig, SAEConfig, TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.sae.normalization import InputNormalizer
from tsae.training.trainer import Trainer

B, T, D, K = 5, 16, 6, 14
BANDS = ((1, 2), (3, 6), (7, 15))
WEIGHTS = (0.5, 0.25, 0.1)  # far above the papers', so that the temporal term is felt
SCALE = 2.5
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass
class Case:
    """A configuration and its schedules at steps 0 to 3, computed from the documented formulas."""

    sae: dict[str, Any]
    objective: dict[str, Any]
    optimizer: dict[str, Any]
    lr: list[float]
    boost: list[float] = field(default_factory=lambda: [1.0] * 4)
    ramp: list[float] = field(default_factory=lambda: [1.0] * 4)
    mixing: list[float] = field(default_factory=lambda: [1.0] * 4)
    noise: list[float] = field(default_factory=lambda: [0.0] * 4)

    def config(self) -> TrainConfig:
        cfg = TrainConfig(
            steps=6,
            batch=B,
            seed=3,
            sae=SAEConfig(d_in=D, d_sae=K, **self.sae),
            objective=ObjectiveConfig(bands=BANDS, weights=WEIGHTS, dead_after_tokens=70, **self.objective),
            optimizer=OptimizerConfig(lr=0.01, betas=(0.8, 0.95), **self.optimizer),
        )
        cfg.check()
        return cfg


AT_ONCE = {"boost": 1.0, "hold_steps": 0, "ramp_steps": 0}
CASES = {
    "tsae": Case(
        {"activation": "schmitt", "k": 3, "release_ratio": 0.3},
        {"l1": 0.04, "hold_steps": 1, "ramp_steps": 2, "buffer_mixing": 0.25, "min_variance": 0.05, "aux_weight": 0.5},
        {
            "name": "adamw",
            "weight_decay": 0.2,
            "warmup_steps": 2,
            "schedule": "linear",
            "decay_share": 0.75,
            "clip_norm": 0.5,
            "noise_eta": 0.3,
            "noise_steps": 3,
        },
        lr=[0.005, 0.01, 0.01 * 4 / 4.5, 0.01 * 3 / 4.5],
        boost=[2.0, 2.0, 1.5, 1.0],
        ramp=[0.0, 0.0, 0.5, 1.0],
        mixing=[0.25, 0.25, 0.25, 1.0],
        noise=[math.sqrt(0.3), math.sqrt(0.3 / 2**0.55), math.sqrt(0.3 / 3**0.55), 0.0],
    ),
    "tcsae": Case(
        {"activation": "gelu", "init": "xavier"},
        {"temporal": "window", "window": 3, "window_weight": 0.7, "l1": 0.1, "aux_weight": 0.0, **AT_ONCE},
        {"warmup_steps": 1, "schedule": "cosine", "clip_norm": 1.0},
        lr=[0.01, 0.01, 0.005 * (1 + math.cos(math.pi / 5)), 0.005 * (1 + math.cos(2 * math.pi / 5))],
    ),
    "batchtopk": Case(
        {"activation": "batchtopk", "k": 2, "unit_norm_decoder": False, "apply_b_dec_to_input": False},
        {"adaptive": False, "l1": 0.0, "aux_weight": 0.5, "aux_k": 1, **AT_ONCE},
        {"name": "adamw", "weight_decay": 0.1, "clip_norm": 0.0},
        lr=[0.01] * 4,
    ),
    "topk": Case(
        {"activation": "topk", "k": 3, "layer_norm": "pre"},
        {"temporal": "none", "l1": 0.1, "aux_weight": 0.0, **AT_ONCE},
        {"clip_norm": 0.5},
        lr=[0.01] * 4,
    ),
    "relu": Case(
        {"activation": "relu", "layer_norm": "post"},
        {"l1": 0.02, "min_variance": 0.5, "aux_weight": 0.0, **AT_ONCE},
        {"clip_norm": 0.5},
        lr=[0.01] * 4,
    ),
}


def batches(steps: int) -> list[ActivationBatch]:
    """Activations that change slowly along the sequence, far from 0, with documents and excluded positions."""
    generator = torch.Generator().manual_seed(1)
    segments = torch.zeros(B, T, dtype=torch.int32)
    segments[0, 9:] = 1
    segments[2, 0], segments[2, 6], segments[2, 7:] = -1, -1, 1
    segments[3, 12:] = -1
    segments[4] = -1
    out = []
    for _ in range(steps):
        x = torch.randn(B, T, D, generator=generator)
        for t in range(1, T):
            x[:, t] = 0.8 * x[:, t - 1] + 0.6 * x[:, t]
        out.append(ActivationBatch(3.0 * x + torch.arange(10.0, 10.0 + D), segments))
    return out


def mean() -> Tensor:
    return torch.linspace(9.5, 15.0, D)


class ByHand:
    """Training as DESIGN's formulas say it, offset by offset and step by step."""

    def __init__(self, case: Case, trainer: Trainer) -> None:
        self.case, self.cfg = case, trainer.cfg
        self.w = {name: p.detach().double().clone() for name, p in trainer.sae.named_parameters()}
        assert list(self.w) == list(NAMES)
        self.m = {name: torch.zeros_like(p) for name, p in self.w.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.w.items()}
        self.variance = trainer.temporal_buffer.variance.double().clone()
        self.silent = torch.zeros(K, dtype=torch.int64)
        self.noise = torch.Generator().manual_seed(trainer.cfg.seed + 1)
        self.theta = 0.0
        self.log_mean = 0.0
        self.n = self.tokens = 0

    def pre_activation(self, z: Tensor, w: dict[str, Tensor]) -> Tensor:
        shift = w["b_dec"] if self.cfg.sae.apply_b_dec_to_input else 0.0
        return (z - shift) @ w["W_enc"] + w["b_enc"]

    def features(self, pre: Tensor, segments: Tensor, theta: float) -> Tensor:
        kind, values = self.cfg.sae.activation, pre.detach()
        if self.cfg.sae.layer_norm == "pre":
            pre = layer_norm(pre)
            values = pre.detach()
        if kind == "gelu":
            return 0.5 * pre * (1 + torch.erf(pre / math.sqrt(2)))
        if kind == "schmitt":
            on = torch.zeros_like(values, dtype=torch.bool)
            for b in range(B):
                for t in range(T):
                    stays = t > 0 and segments[b, t] >= 0 and segments[b, t] == segments[b, t - 1]
                    before = on[b, t - 1] if stays else torch.zeros(K, dtype=torch.bool)
                    on[b, t] = (values[b, t] > theta) | before & (values[b, t] > self.cfg.sae.release_ratio * theta)
        elif kind == "topk":
            on = values >= values.sort(-1, descending=True).values[..., self.cfg.sae.k - 1, None]
        elif kind == "batchtopk":
            on = values > theta
        else:
            on = torch.ones_like(values, dtype=torch.bool)
        h = pre.clamp(min=0) * on
        return layer_norm(h) if self.cfg.sae.layer_norm == "post" else h

    def start_of_threshold(self, pre: Tensor, kept: Tensor) -> float:
        values = pre.detach()[kept].flatten().sort(descending=True).values
        return float(values[int(kept.sum()) * self.cfg.sae.k])

    def temporal(self, h: Tensor, segments: Tensor, count: int) -> Tensor:
        objective = self.cfg.objective
        if objective.temporal == "window":
            windows = [
                sum((h[b, t + i] - h[b, t + i - 1]).square().sum() for i in range(1, objective.window))
                for b in range(B)
                for t in range(T - objective.window + 1)
                if segments[b, t] >= 0 and bool((segments[b, t : t + objective.window] == segments[b, t]).all())
            ]
            return objective.window_weight * sum(windows) / len(windows) / (objective.window - 1)
        total = torch.zeros((), dtype=torch.float64)
        passing = torch.where(self.variance >= objective.min_variance, self.variance, 0.0)
        omega = passing / passing.sum() if objective.adaptive else torch.full((K,), 1 / K, dtype=torch.float64)
        for (low, high), weight in zip(BANDS, WEIGHTS, strict=True):
            for lag in range(low, high + 1):
                joined = (segments[:, lag:] == segments[:, :-lag]) & (segments[:, lag:] >= 0)
                pairs = (h[:, lag:] - h[:, :-lag]).square() * joined[..., None]
                total = total + weight * (pairs.sum((0, 1)) * omega).sum()
        return total / count

    def auxiliary(self, residual: Tensor, pre: Tensor, w: dict[str, Tensor], kept: Tensor) -> Tensor | None:
        dead = [j for j in range(K) if self.silent[j] > 70]
        if not dead or self.cfg.objective.aux_weight == 0:
            return None
        k = min(self.cfg.objective.aux_k or D // 2, len(dead))
        values, order = pre[..., dead].sort(-1, descending=True)
        rows = w["W_dec"][dead][order[..., :k]]  # [B, T, k, D]
        estimate = (values[..., :k].clamp(min=0)[..., None] * rows).sum(-2)
        residual = residual.detach()
        return (residual - estimate)[kept].square().sum() / residual[kept].square().sum()

    def step(self, batch: ActivationBatch) -> dict[str, float]:
        n, cfg, case, segments = self.n, self.cfg, self.case, batch.segments
        kept = segments >= 0
        count = int(kept.sum())
        z = (batch.x.double() - mean().double()) / SCALE
        w = {name: p.clone().requires_grad_() for name, p in self.w.items()}
        pre = self.pre_activation(z, w)
        if cfg.sae.activation == "batchtopk" or (n == 0 and cfg.sae.activation == "schmitt"):
            theta = self.start_of_threshold(pre, kept)
            if cfg.sae.activation == "schmitt":
                self.log_mean = math.log(theta)
            used, self.theta = theta, theta if n == 0 else self.theta + 0.05 * (theta - self.theta)
        else:
            used = self.theta
        h = self.features(pre, segments, used)
        xhat = h @ w["W_dec"] + w["b_dec"]
        reconstruction = (z - xhat)[kept].square().sum(-1).mean()
        sparsity = h[kept].abs().sum(-1).mean()
        total = case.boost[n] * reconstruction + cfg.objective.l1 * sparsity
        auxiliary = self.auxiliary(z - xhat, pre, w, kept)
        if auxiliary is not None:
            total = total + cfg.objective.aux_weight * auxiliary * reconstruction.detach()

        rows = [h.detach()[b][kept[b]] for b in range(B) if kept[b].any()]
        batch_variance = torch.stack([row.var(0, correction=0) for row in rows]).mean(0)
        if cfg.objective.temporal == "multiscale" and cfg.objective.adaptive:
            self.variance = (1 - case.mixing[n]) * self.variance + case.mixing[n] * batch_variance
        temporal = torch.zeros(())
        if cfg.objective.temporal != "none" and case.ramp[n] > 0:
            temporal = self.temporal(h, segments, count)
            total = total + case.ramp[n] * temporal

        gradients = dict(zip(NAMES, torch.autograd.grad(total, list(w.values())), strict=True))
        norm = self.update(gradients)
        active = h.detach()[kept] > 0  # [count, K]
        l0 = float(active.sum(-1).double().mean())
        if cfg.sae.activation == "schmitt":
            self.theta *= math.exp(0.3 * max(-1.0, min(1.0, l0 / cfg.sae.k - 1)))
            self.log_mean = 0.95 * self.log_mean + 0.05 * math.log(self.theta)
        fired = (h.detach()[kept] != 0).any(0)
        self.silent = torch.where(fired, 0, self.silent + count)
        self.n, self.tokens = n + 1, self.tokens + count
        spread = (z[kept] - z[kept].mean(0)).square().sum(-1).mean()
        correlation = lag1(h.detach(), segments)[active.any(0)]
        logged = {
            "step": n + 1,
            "tokens": self.tokens,
            "loss": float(total.detach()),
            "reconstruction": float(reconstruction.detach()),
            "sparsity": float(sparsity.detach()) if cfg.objective.l1 > 0 else 0.0,
            "temporal": float(temporal.detach()),
            "auxiliary": 0.0 if auxiliary is None else float(auxiliary.detach()),
            "explained_variance": float(1 - reconstruction.detach() / spread),
            "l0": l0,
            "dead": int((self.silent > 70).sum()),
            "gradient_norm": norm,
            "lr": case.lr[n],
            "lag1_correlation": float(correlation.mean()),
            "lag1_correlation_p10": float(correlation.quantile(0.1)),
            "lag1_correlation_p50": float(correlation.quantile(0.5)),
            "lag1_correlation_p90": float(correlation.quantile(0.9)),
        }
        if cfg.sae.activation in ("schmitt", "batchtopk"):
            logged["threshold"] = used if cfg.sae.activation == "schmitt" else self.theta
        return logged

    def update(self, gradients: dict[str, Tensor]) -> float:
        cfg, n = self.cfg.optimizer, self.n
        if self.case.noise[n] > 0:
            for g in gradients.values():
                draw = torch.randn(g.shape, generator=self.noise).double()
                g += self.case.noise[n] * g.square().mean().sqrt() * draw
        unit = self.w["W_dec"] / self.w["W_dec"].norm(dim=1, keepdim=True)
        if self.cfg.sae.unit_norm_decoder:
            g = gradients["W_dec"]
            gradients["W_dec"] = g - (g * unit).sum(1, keepdim=True) * unit
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        clip = min(1.0, cfg.clip_norm / norm) if cfg.clip_norm > 0 else 1.0
        first, second = cfg.betas
        for name, p in self.w.items():
            g = clip * gradients[name]
            self.m[name] = first * self.m[name] + (1 - first) * g
            self.v[name] = second * self.v[name] + (1 - second) * g**2
            if cfg.name == "adamw":
                p = p * (1 - self.case.lr[n] * cfg.weight_decay)
            m, v = self.m[name] / (1 - first ** (n + 1)), self.v[name] / (1 - second ** (n + 1))
            self.w[name] = p - self.case.lr[n] * m / (v.sqrt() + 1e-8)
        if self.cfg.sae.unit_norm_decoder:
            self.w["W_dec"] /= self.w["W_dec"].norm(dim=1, keepdim=True)
        return norm


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def lag1(h: Tensor, segments: Tensor) -> Tensor:
    kept = segments >= 0
    centred = h - h[kept].mean(0)
    joined = (segments[:, 1:] == segments[:, :-1]) & kept[:, 1:]
    return (centred[:, 1:] * centred[:, :-1])[joined].mean(0) / centred[kept].square().mean(0).clamp(min=1e-30)


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Trainer, ByHand]:
    case = CASES[request.param]
    normalizer = InputNormalizer(mean(), SCALE)
    trainer = Trainer(case.config(), normalizer, torch.device("cpu"), autocast=False)
    with torch.no_grad():
        trainer.sae.b_enc[:4] = -1.5  # seldom on, so that some features die
        trainer.sae.b_dec += torch.linspace(-0.2, 0.3, D)
    return trainer, ByHand(case, trainer)


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        actual.detach().double(), expected, rtol=2e-4, atol=2e-6, msg=lambda text: f"{what}: {text}"
    )


def test_steps_are_the_formulas(pair: tuple[Trainer, ByHand]) -> None:
    trainer, hand = pair
    logs = []
    for n, batch in enumerate(batches(4)):
        logged, expected = trainer.train_step(batch, log=True), hand.step(batch)
        assert set(logged) == set(expected)
        for name, value in expected.items():
            assert logged[name] == pytest.approx(value, rel=2e-4, abs=2e-5), f"step {n}: {name}"
        for name, parameter in trainer.sae.named_parameters():
            state = trainer.optimizer.state[parameter]
            close(state["exp_avg"], hand.m[name], f"step {n}: first moment of {name}")
            close(state["exp_avg_sq"], hand.v[name], f"step {n}: second moment of {name}")
            close(parameter, hand.w[name], f"step {n}: {name}")
        close(trainer.temporal_buffer.variance, hand.variance, f"step {n}: temporal buffer")
        assert trainer.dead.silent.tolist() == hand.silent.tolist()
        logs.append(logged)
    if hand.cfg.objective.aux_weight > 0:  # else the case would not show that AuxK is there
        assert any(log["auxiliary"] > 0 for log in logs)
    if hand.cfg.optimizer.clip_norm > 0:
        assert all(log["gradient_norm"] > hand.cfg.optimizer.clip_norm for log in logs)


def test_the_finished_autoencoder_works_on_raw_activations(pair: tuple[Trainer, ByHand]) -> None:
    trainer, hand = pair
    *training, last = batches(4)
    for batch in training:
        trainer.train_step(batch)
        hand.step(batch)
    sae, kept = trainer.finished(), last.segments >= 0
    theta = math.exp(hand.log_mean) if hand.cfg.sae.activation == "schmitt" else hand.theta
    assert theta != pytest.approx(hand.theta, rel=1e-3) or hand.cfg.sae.activation != "schmitt"
    z = (last.x.double() - mean().double()) / SCALE
    h = hand.features(hand.pre_activation(z, hand.w), last.segments, theta)
    xhat = SCALE * (h @ hand.w["W_dec"] + hand.w["b_dec"]) + mean().double()
    homogeneous = hand.cfg.sae.activation != "gelu" and hand.cfg.sae.layer_norm == "none"
    features = sae.encode(last.x, last.segments)
    close(features[kept], (SCALE * h if homogeneous else h)[kept], "features")
    close(sae.decode(features)[kept], xhat[kept], "reconstruction")


def test_without_log_nothing_is_measured(pair: tuple[Trainer, ByHand]) -> None:
    trainer, hand = pair
    (batch,) = batches(1)
    assert trainer.train_step(batch) == {}
    hand.step(batch)
    close(trainer.sae.W_enc, hand.w["W_enc"], "W_enc")
