"""The neighbours that read more than one token, trained on the stream of experiments/neighbours.yaml.

    python -m tsae.train --sweep experiments/neighbours.yaml --out runs/neighbours
    python -m experiments.neighbours runs/neighbours-inputs --json docs/results/neighbours-inputs.json
    python experiments/summary.py runs/neighbours docs/results/neighbours-inputs.json

`crosscoder-K`: windows of four tokens, K active features a window. `running-means-N`: N features for each of the time
constants 4, 16 and 64, the others reading the token. All with BatchTopK and the sweep's base options, batch by batch
on the same tokens. Of a crosscoder `l0` and bits are those of its codes, one a window, per token; all else in
`temporal` is of the features that the tokens of a window share. A run that is in the directory is not repeated.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments import inputs
from tsae.config import TrainConfig
from tsae.data.harvest import content_activations
from tsae.data.sequences import TokenBatch
from tsae.evaluation.evaluator import evaluate_all, evaluation_options
from tsae.evaluation.held_out import evaluation_batches
from tsae.evaluation.metrics import CodeLength
from tsae.lm.loading import LanguageModel
from tsae.rundir import layout
from tsae.synthetic.inputs import Crosscoder, RunningMeans
from tsae.synthetic.training import CrosscoderTraining, RunningMeansTraining
from tsae.training.assemble import Setup, open_stream, prepare
from tsae.training.job import Job
from tsae.training.sweep_file import read_sweep
from tsae.utils.atomic import write_json

SWEEP = Path(__file__).with_name("neighbours.yaml")
ACTIVE = (80, 112, 144, 176)  # of a crosscoder's window; 144 is 36 a token
SIZES = (32, 64, 128, 256)  # features of each running mean
EVALUATION = layout.EVALUATION

Codes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


METHODS = {f"crosscoder-{k}": (CrosscoderTraining, k) for k in ACTIVE}
METHODS |= {f"running-means-{size}": (RunningMeansTraining, size) for size in SIZES}


def train(setup: Setup, names: list[str], log: int = 100) -> dict[str, RunningMeans | Crosscoder]:
    """Train the methods of ``METHODS`` with these names, each step of all on one batch."""
    cfg = setup.job.shared
    with open_stream(setup, lambda: None) as stream:
        first = stream.buffer.first(cfg.buffer.estimate_sequences)
        methods = {}
        for name in names:
            kind, size = METHODS[name]
            methods[name] = kind(size, cfg, first, setup.device, autocast=setup.uses_autocast(cfg))
        for step in range(1, cfg.steps + 1):
            batch = stream.buffer.next_batch(cfg.batch)
            logged = step % log == 0 or step in (1, cfg.steps)
            for name, method in methods.items():
                values = method.trainer.train_step(method.batch(batch), log=logged)
                if logged:
                    print(f"{name}, step {step}: explained variance {values['explained_variance']:.4f}", flush=True)
    return {name: method.finished() for name, method in methods.items()}


def measure(modules: dict[str, nn.Module], cfg: TrainConfig, lm: LanguageModel) -> dict[str, dict[str, Any]]:
    """The metrics of `eval.json` by name, on the run's own evaluation text.

    Raises:
        UserError: a metric is not finite.
    """
    batches = evaluation_batches(cfg, lm, cfg.evaluation.sequences)
    results = evaluate_all(modules, lm, batches, **evaluation_options(cfg))
    for name, result in results.items():
        result.check_finite()
        module = modules[name]
        if isinstance(module, Crosscoder):
            norms, step = module.inner.W_dec.double().norm(dim=1), result.metrics["mse"] ** 0.5
            found = code_bits(window_codes(module), norms, step, batches, cfg, lm)
            result.metrics["l0"] = found.pop("l0")
            result.metrics["temporal"] |= found
    return {name: result.metrics for name, result in results.items()}


def window_codes(module: Crosscoder) -> Codes:
    """The codes of activations, for `code_bits`."""
    return lambda x, segments: module.window_codes(module.encode(x, segments), segments)


@torch.no_grad()
def code_bits(
    codes: Codes, norms: Tensor, step: float, batches: list[TokenBatch], cfg: TrainConfig, lm: LanguageModel
) -> dict[str, float]:
    """`l0` and the bits of `CodeLength` per token, of a code that is not what `encode` gives.

    codes: of activations (B, T, d) and segments (B, T) the code (B, N, d_sae), its segments (B, N), and the token at
        which each begins (B, N)
    norms: (d_sae), root of the squared error that an error of 1 in one value makes
    step: of the quantization: the rms reconstruction error per dimension
    """
    bits, tokens, active, coded, done = CodeLength(), 0, 0, 0, 0
    total = sum(batch.segments.numel() for batch in batches)
    for batch in batches:
        h, ids, place = codes(content_activations(lm, batch, cfg.place).float(), batch.segments)
        row = torch.arange(done, done + batch.segments.numel(), batch.segments.shape[1])[:, None]
        bits.update(h, ids, (2 * (row + place) >= total).int())
        tokens, done = tokens + int((batch.segments >= 0).sum()), done + batch.segments.numel()
        active, coded = active + int((h[ids >= 0] > 0).sum()), coded + int((ids >= 0).sum())
    found = {name: value * coded / tokens for name, value in bits.compute(step, norms).items()}
    return found | {"l0": active / tokens}


def to_json(found: dict[str, dict[str, Any]], path: Path, sweep: str = "neighbours-inputs") -> None:
    """Write ``{sweep: {name: metrics}}``, which experiments/summary.py reads, one run per line."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        return float(f"{value:.6g}") if isinstance(value, float) else value

    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(rounded(metrics))}" for name, metrics in found.items())
    path.write_text(f"{{{json.dumps(sweep)}: {{\n{lines}\n}}}}\n")


def configured(sweep: Path, steps: int | None, cache: str | None) -> TrainConfig:
    """The configuration that the runs of a sweep file share, with the options of its first run."""
    cfg = next(iter(read_sweep(sweep).values()))
    return replace(cfg, steps=steps or cfg.steps, cache=cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--json", type=Path, help="write the metrics of all runs into this file")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    parser.add_argument("--steps", type=int, help="in the place of the sweep's")
    parser.add_argument("--cache", help="directory of cached activations")
    arguments = parser.parse_args()
    missing = [name for name in arguments.only if not (arguments.out / name / EVALUATION).is_file()]
    if missing:
        cfg = configured(SWEEP, arguments.steps, arguments.cache)
        setup = prepare(Job({"": cfg}, arguments.out))
        modules = train(setup, missing)
        for name, module in modules.items():
            inputs.save(module, arguments.out / name)
        metrics = measure(dict(modules), setup.job.shared, setup.lm)
        for name in missing:
            write_json(arguments.out / name / EVALUATION, metrics[name])
    found = {name: json.loads((arguments.out / name / EVALUATION).read_text()) for name in arguments.only}
    for name, metrics_ in found.items():
        bits = metrics_["temporal"]
        print(
            f"{name}: explained variance {metrics_['explained_variance']:.4f}, L0 {metrics_['l0']:.1f}, "
            f"support bits {bits['support_bits']:.1f}, total bits {bits['total_bits']:.1f}"
        )
    if arguments.json:
        to_json(found, arguments.json)


if __name__ == "__main__":
    main()
