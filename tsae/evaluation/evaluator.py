"""Measuring sparse autoencoders on a language model: `evaluate`, and what its result becomes on disk.

The metrics themselves: `tsae.evaluation.metrics`. The command line: `tsae.evaluate`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tsae.config import TrainConfig
from tsae.data.sequences import TokenBatch
from tsae.errors import UserError
from tsae.evaluation.metrics import (
    LanguageModelMetrics,
    Persistence,
    ReconstructionMetrics,
    TemporalMetrics,
    shuffle_within_segments,
)
from tsae.lm.hooks import activations, logits_with
from tsae.lm.loading import LanguageModel
from tsae.rundir import layout
from tsae.sae.model import SparseAutoencoder
from tsae.utils.atomic import atomic_write, write_json
from tsae.utils.progress import bar

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, int, int], None]
"""Called with what is being measured, the tokens done and the tokens in all."""


@dataclass
class EvaluationResult:
    """What an evaluation measured."""

    metrics: dict[str, Any]
    """The content of eval.json: finite floats, and the `temporal` object."""
    density: Tensor
    """[d_sae] float64 on the CPU: share of the tokens at which each feature is active."""
    autocorrelation_curve: dict[int, float]
    """Mean autocorrelation of the features by lag in tokens."""
    tokens: int
    """Tokens behind the reconstruction, sparsity and temporal metrics."""
    kl_divergence: dict[str, float] = field(default_factory=dict)
    """Mean KL divergence from the untouched predictions, nats per token: `with_sae` and `with_ablation`."""
    norms: tuple[float, float] = (0.0, 0.0)
    """Mean norm of the activations and of their reconstruction."""
    tokens_per_sequence: Tensor | None = None
    """[d_sae] float64 on the CPU: active tokens of each feature in the sequences where it is active at all."""

    def check_finite(self) -> None:
        """Raise `UserError`, naming the metric, unless all are finite."""
        for name, value in _leaves(self.metrics):
            if not math.isfinite(value):
                raise UserError(
                    f"The metric {name} is {value}: the activations or the autoencoder's weights are not finite."
                )


def evaluate(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    batches: Iterable[TokenBatch],
    *,
    layer: int,
    ce_sequences: int = 16,
    lm_batch: int = 4,
    harvest_batch: int = 16,
    seed: int = 0,
    reference_mean: Tensor | None = None,
    progress: ProgressCallback | None = None,
) -> EvaluationResult:
    """Measure a sparse autoencoder that works on raw activations.

    sae:            the autoencoder; its arithmetic is done in float32
    lm:             the language model
    batches:        the evaluation set, finite: tokens [N, 1 + T] with BOS first, segments [N, T]
    layer:          block whose output is encoded, counted from 0
    ce_sequences:   the first so many sequences also go through the whole language model, for the
                    cross-entropy and KL metrics (0 leaves those at 0.0)
    lm_batch:       sequences in one pass of it; two [lm_batch, 1 + T, V] logits are held at once: 1.1 GB for
                    4 sequences, float32 and a vocabulary of 262,144
    harvest_batch:  sequences in one pass up to `layer`
    seed:           of the permutation behind `persistence_excess_shuffled`
    reference_mean: [d] activation of the mean ablation; None takes the evaluation set's own mean
    progress:       called as the work goes on

    Definitions: `tsae.evaluation.metrics`. What reaches the language model: position 0 (BOS) and positions with a
    negative segment keep their own activation in every run, for the autoencoder never sees them; all others
    are replaced by the reconstruction, by zeros, or by the mean. SAEBench 0.6.0 leaves special tokens out of
    the reconstruction on request, yet its zero ablation does put BOS to zero, which in a model without biases
    makes every prediction uniform (Gemma-3-270m: ln 262,144 = 12.5 nats). With BOS in place the zero ablation
    is *worse* than uniform there (20.5 nats after layer 9), so `ce_loss_score` comes out higher than
    SAEBench's; `ce_loss_score_mean_ablation` (7.3 nats with BOS, 7.5 without) does not depend on the choice.

    Raises UserError if the autoencoder's width is not the model's, there is no token to evaluate, or a metric is not
    finite.
    """
    (result,) = evaluate_all(
        {"": sae},
        lm,
        batches,
        layer=layer,
        ce_sequences=ce_sequences,
        lm_batch=lm_batch,
        harvest_batch=harvest_batch,
        seed=seed,
        reference_mean=reference_mean,
        progress=progress,
    ).values()
    result.check_finite()
    return result


@torch.no_grad()
def evaluate_all(
    saes: dict[str, SparseAutoencoder],
    lm: LanguageModel,
    batches: Iterable[TokenBatch],
    *,
    layer: int,
    ce_sequences: int = 16,
    lm_batch: int = 4,
    harvest_batch: int = 16,
    seed: int = 0,
    reference_mean: Tensor | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, EvaluationResult]:
    """`evaluate` for several autoencoders of one layer, by name; each scores what it would score alone.

    The activations are harvested once, and the language model's untouched and ablated passes are shared: another
    autoencoder costs its own arithmetic and one pass with its reconstruction. Metrics that are not finite are
    returned as they are (`EvaluationResult.check_finite`), so that one autoencoder does not lose the others'.

    saes: at least one, all on one device
    lm, batches, layer, ce_sequences, lm_batch, harvest_batch, seed, reference_mean, progress: as in `evaluate`
    out: by the same names

    Raises UserError if an autoencoder's width is not the model's, or there is no token to evaluate.
    """
    for name, sae in saes.items():
        if isinstance(sae, SparseAutoencoder):  # whatever else encodes and decodes has no configuration to ask
            check_width(sae, lm, name)
    parts = [part for batch in batches for part in _split(batch, harvest_batch)]
    were_training = {name: sae.training for name, sae in saes.items()}
    for sae in saes.values():
        sae.eval()
    try:
        return _measure(saes, lm, parts, layer, ce_sequences, lm_batch, seed, reference_mean, progress or _no_progress)
    finally:
        for name, sae in saes.items():
            sae.train(were_training[name])


class _Features:
    """What one autoencoder's features are measured with."""

    def __init__(self) -> None:
        self.reconstruction, self.temporal, self.shuffled = ReconstructionMetrics(), TemporalMetrics(), Persistence()

    def update(self, sae: SparseAutoencoder, x: Tensor, mixed: Tensor, segments: Tensor) -> None:
        """Count activations x [N, T, d], and `mixed`, the same with the positions of each segment permuted."""
        h = sae.encode(x, segments)
        self.reconstruction.update(x, sae.decode(h), h, segments)
        self.temporal.update(x, h, segments)
        del h
        self.shuffled.update_features(sae.encode(mixed, segments), segments)

    def result(self, predictions: LanguageModelMetrics) -> EvaluationResult:
        temporal = self.temporal.compute()
        temporal["persistence_excess_shuffled"] = self.shuffled.excess()
        return EvaluationResult(
            metrics={**self.reconstruction.compute(), **predictions.compute(), "temporal": temporal},
            density=self.reconstruction.density(),
            autocorrelation_curve={int(lag): r for lag, r in temporal["autocorrelation"].items()},
            tokens=self.reconstruction.tokens,
            kl_divergence={run: predictions.divergence(run) for run in ("with_sae", "with_ablation")},
            norms=self.reconstruction.norms(),
            tokens_per_sequence=self.reconstruction.tokens_per_sequence(),
        )


def _measure(
    saes: dict[str, SparseAutoencoder],
    lm: LanguageModel,
    parts: list[TokenBatch],
    layer: int,
    ce_sequences: int,
    lm_batch: int,
    seed: int,
    reference_mean: Tensor | None,
    progress: ProgressCallback,
) -> dict[str, EvaluationResult]:
    device = _device(saes)
    generator = torch.Generator().manual_seed(seed)
    features = {name: _Features() for name in saes}
    any_of_them = next(iter(features.values())).reconstruction
    done, total = 0, sum(part.segments.numel() for part in parts)
    progress("features", 0, total)  # the bar's clock starts with the work
    for part in parts:
        segments = part.segments.to(device)
        x = activations(lm, part.tokens, layer)[:, 1:].to(device, torch.float32)  # [N, T, d]
        mixed = shuffle_within_segments(x, segments, generator)
        for name, sae in saes.items():
            features[name].update(sae, x, mixed, segments)
        done += segments.numel()
        progress("features", done, total)
    if any_of_them.tokens == 0:
        raise UserError("The evaluation set has no token; give more text, or more sequences.")
    logger.info("evaluated %d tokens", any_of_them.tokens)

    mean = any_of_them.mean() if reference_mean is None else reference_mean
    predictions = _predictions(saes, lm, parts, layer, mean, ce_sequences, lm_batch, progress)
    return {name: features[name].result(predictions[name]) for name in saes}


def _predictions(
    saes: dict[str, SparseAutoencoder],
    lm: LanguageModel,
    parts: list[TokenBatch],
    layer: int,
    mean: Tensor,
    ce_sequences: int,
    lm_batch: int,
    progress: ProgressCallback,
) -> dict[str, LanguageModelMetrics]:
    """The runs of the language model over the first `ce_sequences` sequences: three, and one for each autoencoder."""
    shared, own = LanguageModelMetrics(), {name: LanguageModelMetrics() for name in saes}
    device = _device(saes)
    ce_sequences = min(ce_sequences, sum(len(part.tokens) for part in parts))
    done = 0
    if ce_sequences > 0:
        progress("predictions", 0, ce_sequences * parts[0].segments.shape[1])
    for batch in (small for part in parts for small in _split(part, lm_batch)):
        if done >= ce_sequences:
            break
        tokens, segments = batch.tokens[: ce_sequences - done], batch.segments[: ce_sequences - done]

        def replaced(content: Callable[[Tensor], Tensor], segments: Tensor = segments) -> Callable:
            """A hook that puts `content(x)` [N, T, d] in place of the counted positions."""

            def hook(x: Tensor) -> Tensor:  # [N, 1 + T, d]
                out = x.clone()
                counted = (segments >= 0).to(x.device)[..., None]
                out[:, 1:] = torch.where(counted, content(x[:, 1:]).to(x), x[:, 1:])
                return out

            return hook

        def reconstructed(sae: SparseAutoencoder, segments: Tensor = segments) -> Callable[[Tensor], Tensor]:
            return lambda x: sae(x.to(device, torch.float32), segments.to(device))

        runs = [
            *((own[name], "with_sae", reconstructed(sae)) for name, sae in saes.items()),
            (shared, "with_ablation", torch.zeros_like),
            (shared, "with_mean_ablation", lambda x: mean.expand(x.shape)),
        ]
        untouched = logits_with(lm, tokens, layer, None)
        shared.update("without_sae", untouched, tokens, segments)
        for metrics, run, content in runs:
            logits = logits_with(lm, tokens, layer, replaced(content))
            # KL is reported against zero ablation alone.
            reference = untouched if run != "with_mean_ablation" else None
            metrics.update(run, logits, tokens, segments, reference)
            del logits
        done += len(tokens)
        progress("predictions", done * segments.shape[1], ce_sequences * segments.shape[1])
    for metrics in own.values():
        metrics.merge(shared)
    return own


def _device(saes: dict[str, SparseAutoencoder]) -> torch.device:
    return next(next(iter(saes.values())).parameters()).device


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


def _split(batch: TokenBatch, size: int) -> Iterator[TokenBatch]:
    for tokens, segments in zip(batch.tokens.split(size), batch.segments.split(size), strict=True):
        yield TokenBatch(tokens, segments)


def _leaves(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def write_eval(result: EvaluationResult, run_dir: str | Path, source: dict[str, Any] | None = None) -> None:
    """Write `eval.json` and `sae/sparsity.safetensors` into a run directory, each atomically.

    result: of `evaluate`
    run_dir: a run's directory; `sae/` is made in it if need be
    source: what text was measured, in `eval_source.json`; None, the run's own evaluation part, leaves no such file.

    `sparsity.safetensors` is SAELens's optional file: `sparsity` [d_sae] float32, log10 of the firing frequency with a
    floor of 1e-10.
    """
    run_dir = Path(run_dir)
    (run_dir / layout.AUTOENCODER).mkdir(parents=True, exist_ok=True)
    sparsity = result.density.clamp(min=1e-10).log10().to(torch.float32).contiguous()
    with atomic_write(run_dir / layout.SPARSITY) as temporary:
        save_file({"sparsity": sparsity}, temporary)
    if source is not None:  # first: killed in between, figures of the run's own text are doubted, not the reverse
        write_json(run_dir / layout.EVALUATION_SOURCE, source)
    write_json(run_dir / layout.EVALUATION, result.metrics)
    if source is None:
        (run_dir / layout.EVALUATION_SOURCE).unlink(missing_ok=True)


@contextmanager
def evaluation_progress() -> Iterator[ProgressCallback]:
    """Progress bars with throughput for `evaluate(progress=...)`, on stderr."""
    with ExitStack() as bars:
        stages: dict[str, list[Any]] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                bars.close()  # one live display at a time
                stages[stage] = [bars.enter_context(bar(f"evaluating {stage}", total)), 0]
            advance, before = stages[stage]
            advance(done - before)
            stages[stage][1] = done

        yield update


def evaluation_options(config: TrainConfig) -> dict[str, Any]:
    """The layer, sizes and seed that ``config``, a run's, asks of its evaluation: keywords of `evaluate`."""
    return {
        "layer": config.layer,
        "ce_sequences": config.evaluation.ce_sequences,
        "lm_batch": config.evaluation.lm_batch,
        "harvest_batch": config.buffer.harvest_batch,
        "seed": config.stream_seed,
    }


def check_width(sae: SparseAutoencoder, lm: LanguageModel, name: str) -> None:
    """Raise `UserError` unless an autoencoder takes what the model's blocks put out. No token goes through the model.

    sae:  the autoencoder
    lm:   the language model
    name: which one, if there are several; or empty
    """
    if sae.cfg.d_in != lm.d_model:
        raise UserError(
            f"{' '.join(filter(None, ('The autoencoder', name)))} takes activations of width {sae.cfg.d_in}, but the "
            f"blocks of {lm.name} put out {lm.d_model}; name the model that it was trained on."
        )
