"""How much of the variance is slow, and which share of that each run explains.

    python -m experiments.slow_variance docs/results/slow-variance.json runs/neighbours/* runs/neighbours-inputs/*

Slow directions: the linear functions of an activation whose autocorrelation at `--lag` is largest on training text (a
generalized eigenproblem), of which those stay whose autocorrelation on held-out text is above `--above`. The slow
part of an activation is what these functions predict of it, linearly and with the training text's covariance; their
share of the variance is its held-out variance over that of the activation. With P that prediction, a run explains of
the slow part 1 - |P (x - xhat)|^2 / |P (x - mean)|^2. Tokens above four median norms are left out everywhere, and
counted.

The first run with a config.json says the model, the place, the text and the length, which all runs must have in common.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.inputs import load
from tsae.config import TrainConfig
from tsae.data.harvest import ActivationBatch, content_activations
from tsae.errors import UserError
from tsae.evaluation.held_out import evaluation_batches, training_sample
from tsae.evaluation.subject import open_run
from tsae.lm.loading import LanguageModel
from tsae.rundir import layout

MASSIVE = 4.0  # times the median norm


class Moments:
    """Mean, covariance and lagged covariance of activations, in float64, without massive tokens."""

    def __init__(self, d: int, lag: int, limit: float) -> None:
        self.lag, self.limit = lag, limit
        self.n = self.pairs = self.left_out = 0
        self.total, self.square = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        self.ends, self.cross = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        self.shift: Tensor | None = None

    def update(self, x: Tensor, segments: Tensor) -> None:
        """Count x (B, T, d) and its pairs ``lag`` tokens apart in a segment (B, T)."""
        kept = counted(x, segments, self.limit)
        self.left_out += int((segments >= 0).sum() - kept.sum())
        x = x.double()
        if self.shift is None:
            self.shift = x[kept].mean(0)
        x = x - self.shift
        inside = x[kept]
        self.n, self.total = self.n + len(inside), self.total + inside.sum(0)
        self.square += inside.T @ inside
        lag = self.lag
        pair = (segments[:, lag:] == segments[:, :-lag]) & kept[:, lag:] & kept[:, :-lag]
        first, second = x[:, :-lag][pair], x[:, lag:][pair]
        self.pairs += len(first)
        self.ends += first.sum(0) + second.sum(0)
        self.cross += first.T @ second

    @property
    def mean(self) -> Tensor:
        assert self.shift is not None
        return self.shift + self.total / self.n

    def covariance(self) -> Tensor:
        """(d, d)."""
        mean = self.total / self.n
        return self.square / self.n - mean[:, None] * mean

    def lagged(self) -> Tensor:
        """(d, d) E[(x_t - mean)(x_{t + lag} - mean)^T], made symmetric."""
        mean, ends = self.total / self.n, self.ends / (2 * self.pairs)
        cross = self.cross / self.pairs
        return (cross + cross.T) / 2 - mean[:, None] * ends - ends[:, None] * mean + mean[:, None] * mean


def counted(x: Tensor, segments: Tensor, limit: float) -> Tensor:
    """(B, T) bool: positions that are neither excluded nor massive."""
    return (segments >= 0) & (x.float().norm(dim=-1) <= limit)


@dataclass
class Slow:
    """Slow directions and the prediction from them.

    weights: (d, m); the slow functions are ``(x - mean) @ weights``, with variance 1 on training text
    patterns: (m, d); the slow part is ``(x - mean) @ weights @ patterns``
    """

    weights: Tensor
    patterns: Tensor
    autocorrelation: Tensor

    def part(self, centred: Tensor) -> Tensor:
        """The slow part of centred activations (..., d), float64."""
        return centred.double() @ self.weights @ self.patterns


def slow_directions(train: Moments, held_out: Moments, above: float) -> Slow:
    """The directions of largest autocorrelation in ``train`` with more than ``above`` in ``held_out``."""
    covariance = train.covariance()
    ridge = 1e-6 * covariance.diagonal().mean()
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64))
    half = torch.linalg.solve_triangular(factor, train.lagged(), upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    _, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
    weights = torch.linalg.solve_triangular(factor.T, vectors.flip(1), upper=True)  # (d, d), largest first
    spread = (weights * (held_out.covariance() @ weights)).sum(0)
    found = (weights * (held_out.lagged() @ weights)).sum(0) / spread
    chosen = found > above
    if not bool(chosen.any()):
        raise UserError(f"No direction has a held-out autocorrelation above {above:g} (most: {found.max():.3f}).")
    weights = weights[:, chosen]
    return Slow(weights, (covariance @ weights).T, found[chosen])


def variance_share(slow: Slow, held_out: Moments) -> float:
    """Held-out variance of the slow part over that of the activations."""
    project = slow.weights @ slow.patterns  # (d, d)
    covariance = held_out.covariance()
    return float((project.T @ covariance @ project).trace() / covariance.trace())


class Explained:
    """What an autoencoder leaves of the slow part, and of everything."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)

    def update(self, x: Tensor, xhat: Tensor, kept: Tensor, slow: Slow, mean: Tensor) -> None:
        """Count activations and reconstructions (B, T, d) at ``kept`` (B, T)."""
        centred, residual = x[kept].double() - mean, (x[kept] - xhat[kept]).double()
        parts = (slow.part(residual), slow.part(centred), residual, centred)
        self.sums += torch.stack([part.square().sum() for part in parts])

    def compute(self) -> dict[str, float]:
        """`slow_explained_variance` and `explained_variance`, the second without massive tokens."""
        slow, slow_all, residual, everything = self.sums.tolist()
        return {"slow_explained_variance": 1 - slow / slow_all, "explained_variance": 1 - residual / everything}


def median_norm(batches: Iterable[ActivationBatch]) -> float:
    """Of the tokens that count."""
    norms = [x.float().norm(dim=-1)[segments >= 0] for x, segments in batches]
    return float(torch.cat(norms).median())


def held_out_activations(cfg: TrainConfig, lm: LanguageModel, sequences: int) -> Iterator[ActivationBatch]:
    """Activations of the run's evaluation text, float32."""
    for batch in evaluation_batches(cfg, lm, sequences):
        yield ActivationBatch(content_activations(lm, batch, cfg.place).float(), batch.segments)


@torch.no_grad()
def measure(
    modules: dict[str, nn.Module],
    train: Iterable[ActivationBatch],
    held_out: list[ActivationBatch],
    lag: int,
    above: float,
) -> dict[str, Any]:
    """The slow directions of activations, their share of the variance, and what each module explains of it."""
    limit = MASSIVE * median_norm(held_out)
    moments = [Moments(held_out[0].x.shape[-1], lag, limit) for _ in range(2)]
    for counts, batches in zip(moments, (train, held_out), strict=True):
        for batch in batches:
            counts.update(*batch)
    slow = slow_directions(moments[0], moments[1], above)
    explained = {name: Explained() for name in modules}
    for x, segments in held_out:
        kept = counted(x, segments, limit)
        for name, module in modules.items():
            explained[name].update(x, module(x, segments), kept, slow, moments[1].mean)
    return {
        "lag": lag,
        "above": above,
        "training_tokens": moments[0].n,
        "held_out_tokens": moments[1].n,
        "massive_tokens": moments[1].left_out,
        "directions": len(slow.autocorrelation),
        "autocorrelation": [round(float(value), 4) for value in slow.autocorrelation],
        "variance_share": variance_share(slow, moments[1]),
        "runs": {name: result.compute() for name, result in explained.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON file")
    parser.add_argument("runs", type=Path, nargs="+", help="directories; those without an autoencoder are left out")
    parser.add_argument("--lag", type=int, default=16)
    parser.add_argument("--above", type=float, default=0.3)
    parser.add_argument("--training", type=int, default=2048, help="sequences to find directions on")
    parser.add_argument("--held-out", type=int, default=192, help="sequences to measure on")
    arguments = parser.parse_args()
    runs = [run for run in arguments.runs if layout.has_autoencoder(run)]
    own = [run for run in runs if (run / layout.CONFIG).is_file()]
    if not own:
        raise UserError("None of these directories is a finished run with a config.json.")
    subject = open_run(own[0])
    lm = subject.load_lm()
    cfg = subject.config
    sample = replace(cfg, evaluation=replace(cfg.evaluation, sequences=arguments.training))
    modules = {run.absolute().name: load(run) for run in runs}
    held_out = list(held_out_activations(cfg, lm, arguments.held_out))
    found = measure(modules, training_sample(sample, lm), held_out, arguments.lag, arguments.above)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"{found['directions']} directions with an autocorrelation above {arguments.above:g} at lag {arguments.lag}: "
        f"{found['variance_share']:.1%} of the variance"
    )
    for name, values in found["runs"].items():
        print(f"{name}: {values['slow_explained_variance']:.4f} of it, {values['explained_variance']:.4f} of all")


if __name__ == "__main__":
    main()
