"""Measure sparse autoencoders on a language model, and write the result into a run directory.

Definitions of the metrics: `tsae.evaluation.metrics`. Command line: `tsae.evaluate`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from tsae.config import TrainConfig
from tsae.data.harvest import content_activations
from tsae.data.sequences import TokenBatch
from tsae.errors import UserError
from tsae.evaluation.coding import Sample, coding_step
from tsae.evaluation.metrics import (
    CodeLength,
    LanguageModelMetrics,
    MassiveActivations,
    Persistence,
    ReconstructionMetrics,
    TemporalMetrics,
    shuffle_within_segments,
)
from tsae.evaluation.places import common_site, stated_site
from tsae.evaluation.subject import check_width
from tsae.lm.hooks import logits_with, reading
from tsae.lm.loading import LanguageModel
from tsae.lm.site import Site, as_site
from tsae.lm.trial_run import site_width
from tsae.rundir import layout
from tsae.sae.model import SparseAutoencoder
from tsae.utils.atomic import atomic_write, write_json, writing
from tsae.utils.nested import flatten
from tsae.utils.paths import expanded
from tsae.utils.progress import bar

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, int, int], None]
"""Called with the stage (`features` or `predictions`), the tokens done, and the total."""


@dataclass
class EvaluationResult:
    """The measurements of one autoencoder."""

    metrics: dict[str, Any]
    """The content of eval.json: finite numbers, and the objects `massive` and `temporal`."""
    density: Tensor
    """[d_sae] float64 on the CPU: fraction of tokens at which each feature is active."""
    autocorrelation_curve: dict[int, float]
    """Mean autocorrelation of the features by lag in tokens."""
    tokens: int
    """Tokens behind the reconstruction, sparsity and temporal metrics."""
    kl_divergence: dict[str, float] = field(default_factory=dict)
    """Mean KL divergence from the untouched predictions, nats per token: `with_sae` and `with_ablation`."""
    norms: tuple[float, float] = (0.0, 0.0)
    """Mean L2 norm of the activations and of their reconstruction."""
    tokens_per_sequence: Tensor | None = None
    """[d_sae] float64 on the CPU: active tokens per sequence of each feature, over sequences in which it is active."""
    weights: str | None = None
    """What in the weights is not finite (`SparseAutoencoder.not_finite`); a threshold can hide it from the metrics."""

    def not_finite(self) -> str | None:
        """A sentence naming the first metric that is not finite, or the weights that are not; None if all are."""
        for name, value in flatten(self.metrics).items():
            if not math.isfinite(value):
                return f"The metric {name} is {value}: the activations or the autoencoder's weights are not finite."
        if self.weights:
            return f"{self.weights}, so the metrics mean nothing; its training diverged, or the file is damaged."
        return None

    def check_finite(self) -> None:
        """Raise `UserError` with `not_finite`'s sentence, if there is one."""
        if sentence := self.not_finite():
            raise UserError(sentence)


@dataclass(frozen=True)
class _Settings:
    """What to measure: the keywords of `evaluate_all`."""

    place: Site
    target: Site | None
    ce_sequences: int
    lm_batch: int
    seed: int
    reference_mean: Tensor | None
    progress: ProgressCallback
    massive_ratio: float


def evaluate(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    batches: Iterable[TokenBatch],
    *,
    layer: int | Site,
    target: Site | None = None,
    ce_sequences: int = 16,
    lm_batch: int = 4,
    harvest_batch: int = 16,
    seed: int = 0,
    reference_mean: Tensor | None = None,
    massive_ratio: float = 4.0,
    progress: ProgressCallback | None = None,
) -> EvaluationResult:
    """Measure a sparse autoencoder that takes raw activations.

    sae:            the autoencoder; its arithmetic is float32
    lm:             the language model
    batches:        the evaluation set, finite: tokens [N, 1 + T] with BOS first, segments [N, T]
    layer:          block whose output is encoded, counted from 0, or another place
    target:         place that transcoders predict, of the same or a later place; None for autoencoders
    ce_sequences:   sequences, from the start of the set, that also go through the complete language model for the
                    cross-entropy and KL metrics (with 0 these are 0.0)
    lm_batch:       sequences per complete pass; two [lm_batch, 1 + T, V] logits are held at once: 1.1 GB for
                    4 sequences, float32 and a vocabulary of 262,144
    harvest_batch:  sequences per pass up to the place
    seed:           of the permutation behind `persistence_excess_shuffled`
    reference_mean: [d] activation for the mean ablation; None takes the mean of the evaluation set
    massive_ratio:  tokens whose norm is above this multiple of the median norm are massive (see `MassiveActivations`)
    progress:       called after each batch

    Metrics are defined in `tsae.evaluation.metrics`. In every pass of the language model, position 0 (BOS) and
    positions with a negative segment keep their own activation, because the autoencoder never sees them; all others are
    replaced by the reconstruction, by zeros, or by the mean. SAEBench 0.6.0 can leave special tokens out of the
    reconstruction, but its zero ablation also zeroes BOS, which in a model without biases makes every prediction
    uniform (Gemma-3-270m: ln 262,144 = 12.5 nats). With BOS kept, the zero ablation is *worse* than uniform there
    (20.5 nats after layer 9), so `ce_loss_score` is higher than SAEBench's; `ce_loss_score_mean_ablation` (7.3 nats
    with BOS, 7.5 without) does not depend on the choice.

    Raises UserError if the autoencoder's width is not the model's, it says that it encodes another place than
    `layer`, the set has no token, or a metric is not finite.
    """
    (result,) = evaluate_all(
        {"": sae},
        lm,
        batches,
        layer=layer,
        target=target,
        ce_sequences=ce_sequences,
        lm_batch=lm_batch,
        harvest_batch=harvest_batch,
        seed=seed,
        reference_mean=reference_mean,
        massive_ratio=massive_ratio,
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
    layer: int | Site,
    target: Site | None = None,
    ce_sequences: int = 16,
    lm_batch: int = 4,
    harvest_batch: int = 16,
    seed: int = 0,
    reference_mean: Tensor | None = None,
    massive_ratio: float = 4.0,
    progress: ProgressCallback | None = None,
) -> dict[str, EvaluationResult]:
    """`evaluate` for several autoencoders of one place. Each scores the same as by itself.

    Activations are harvested once, and the untouched and ablated passes of the language model are shared: each further
    autoencoder costs its own arithmetic and one pass with its reconstruction. Metrics that are not finite are returned
    (see `EvaluationResult.check_finite`), so that one broken autoencoder does not lose the others' results.

    saes: by name, at least one, all on one device
    lm, batches, layer, target, ce_sequences, lm_batch, harvest_batch, seed, reference_mean, massive_ratio, progress: as
        in `evaluate`
    out: by the same names

    Raises UserError if an autoencoder's width is not the model's, it says that it encodes another place than
    `layer`, or the set has no token.
    """
    place = as_site(layer)
    for name, sae in saes.items():
        if isinstance(sae, SparseAutoencoder):  # any other module with encode and decode has no configuration
            check_width(sae, lm, place, name, target)
            common_site({name: stated_site(name, sae)[0]}, {name: sae}, place)
    parts = [part for batch in batches for part in batch.split(harvest_batch)]
    report = progress or (lambda *_: None)
    settings = _Settings(place, target, ce_sequences, lm_batch, seed, reference_mean, report, massive_ratio)
    were_training = {name: sae.training for name, sae in saes.items()}
    for sae in saes.values():
        sae.eval()
    try:
        return _measure(saes, lm, parts, settings)
    finally:
        for name, sae in saes.items():
            sae.train(were_training[name])


class _Features:
    """The accumulators of one autoencoder's features."""

    def __init__(self, length: int, massive_ratio: float) -> None:
        self.length = length
        self.reconstruction, self.temporal = ReconstructionMetrics(), TemporalMetrics(length)
        self.shuffled = Persistence()
        self.massive = MassiveActivations(massive_ratio)
        self.bits, self.bits_shuffled = CodeLength(), CodeLength()

    def update(
        self, sae: SparseAutoencoder, x: Tensor, y: Tensor, shuffled: Tensor, segments: Tensor, half: Tensor
    ) -> None:
        """Count activations x [N, T, d], and `shuffled`: x with the positions of each segment permuted.

        y: what is reconstructed: x, or of a transcoder its target [N, T, d_out]
        half: [N, T] integers, 0 or 1, for `CodeLength`
        """
        h = sae.encode(x, segments)
        xhat = sae.decode(h)
        self.reconstruction.update(y, xhat, h, segments)
        self.massive.update(y, xhat, segments)
        self.temporal.update(x, h, segments)
        self.bits.update(h, segments, half)
        del h
        h = sae.encode(shuffled, segments)
        self.shuffled.update_features(h, segments)
        self.bits_shuffled.update(h, segments, half)

    def result(self, sae: SparseAutoencoder, predictions: LanguageModelMetrics, sample: Sample) -> EvaluationResult:
        """sample: of the activations, for the step in which amplitudes are quantized"""
        reconstruction = self.reconstruction.compute()
        temporal: dict[str, Any] = self.temporal.compute()
        temporal["persistence_excess_shuffled"] = self.shuffled.excess()
        norms = decoder_norms(sae, self.bits.d_sae)
        step = coding_step(sae, sample, self.reconstruction.rms_error(), norms)
        temporal |= self.bits.compute(step, norms)
        temporal |= {f"{name}_shuffled": bits for name, bits in self.bits_shuffled.compute(step, norms).items()}
        return EvaluationResult(
            metrics={
                "length": self.length,
                **reconstruction,
                **predictions.compute(),
                "massive": self.massive.compute(),
                "temporal": temporal,
            },
            density=self.reconstruction.density(),
            autocorrelation_curve={int(lag): r for lag, r in temporal["autocorrelation"].items()},
            tokens=self.reconstruction.tokens,
            kl_divergence={run: predictions.divergence(run) for run in ("with_sae", "with_ablation")},
            norms=self.reconstruction.norms(),
            tokens_per_sequence=self.reconstruction.tokens_per_sequence(),
        )


def _measure(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, parts: list[TokenBatch], settings: _Settings
) -> dict[str, EvaluationResult]:
    device = _device(saes)
    generator = torch.Generator().manual_seed(settings.seed)
    length = max((part.segments.shape[1] for part in parts), default=0)
    features = {name: _Features(length, settings.massive_ratio) for name in saes}
    done, total = 0, sum(part.segments.numel() for part in parts)
    sample: Sample | None = None
    settings.progress("features", 0, total)  # starts the bar's clock
    for part in parts:
        segments = part.segments.to(device)
        x = content_activations(lm, part, settings.place, settings.target).to(device, torch.float32)  # [N, T, d]
        y = x
        if settings.target is not None:
            d_in = site_width(lm, settings.place)
            x, y = x[..., :d_in].contiguous(), x[..., d_in:].contiguous()
        own = Sample(x, y, segments)
        sample = own.first() if sample is None else sample.with_more(own)
        shuffled = shuffle_within_segments(x, segments, generator)
        # Bits are counted in the first half of the text and charged in the second, and the reverse.
        position = torch.arange(done, done + segments.numel(), device=device).view(segments.shape)
        half = (2 * position >= total).int()
        for name, sae in saes.items():
            features[name].update(sae, x, y, shuffled, segments, half)
        done += segments.numel()
        settings.progress("features", done, total)
    inputs = next(iter(features.values())).reconstruction
    if sample is None or inputs.tokens == 0:
        raise UserError("The evaluation set has no token; give more text, or more sequences.")
    logger.info("evaluated %d tokens", inputs.tokens)

    mean = inputs.mean() if settings.reference_mean is None else settings.reference_mean
    predictions = _predictions(saes, lm, parts, replace(settings, reference_mean=mean))
    results = {name: features[name].result(sae, predictions[name], sample) for name, sae in saes.items()}
    for name, sae in saes.items():
        if isinstance(sae, SparseAutoencoder):
            results[name].weights = sae.not_finite()
    return results


def _predictions(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, parts: list[TokenBatch], settings: _Settings
) -> dict[str, LanguageModelMetrics]:
    """Run the language model over the first `ce_sequences` sequences: three times, and once for each autoencoder."""
    shared, own = LanguageModelMetrics(), {name: LanguageModelMetrics() for name in saes}
    device = _device(saes)
    wanted = min(settings.ce_sequences, sum(len(part.tokens) for part in parts))
    done = 0
    if wanted > 0:
        settings.progress("predictions", 0, wanted * parts[0].segments.shape[1])
    where = settings.place if settings.target is None else settings.target
    seen: list[Tensor] = []
    with ExitStack() as stack:
        if settings.target is not None:
            seen = stack.enter_context(reading(lm, settings.place))
        for batch in (small for part in parts for small in part.split(settings.lm_batch)):
            if done >= wanted:
                break
            tokens, segments = batch.tokens[: wanted - done], batch.segments[: wanted - done]

            def reconstruct(sae: SparseAutoencoder, segments: Tensor = segments) -> Callable[[Tensor], Tensor]:
                def predicted(x: Tensor) -> Tensor:  # of a transcoder from what the same pass has at the site
                    x = x if settings.target is None else seen[0][:, -segments.shape[1] :]
                    return sae(x.to(device, torch.float32), segments.to(device))

                return predicted

            runs = [
                *((own[name], "with_sae", reconstruct(sae)) for name, sae in saes.items()),
                (shared, "with_ablation", torch.zeros_like),
                (shared, "with_mean_ablation", lambda x: cast(Tensor, settings.reference_mean).expand(x.shape)),
            ]
            untouched = logits_with(lm, tokens, where, None)
            shared.update("without_sae", untouched, tokens, segments)
            for metrics, run, content in runs:
                logits = logits_with(lm, tokens, where, _replace_content(content, segments))
                # KL is reported against zero ablation alone.
                reference = untouched if run != "with_mean_ablation" else None
                metrics.update(run, logits, tokens, segments, reference)
                del logits
            done += len(tokens)
            settings.progress("predictions", done * segments.shape[1], wanted * segments.shape[1])
    for metrics in own.values():
        metrics.merge(shared)
    return own


def _replace_content(content: Callable[[Tensor], Tensor], segments: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that puts `content(x)` [N, T, d] at non-excluded content positions."""

    def hook(x: Tensor) -> Tensor:  # [N, 1 + T, d]
        out = x.clone()
        counted = (segments >= 0).to(x.device)[..., None]
        out[:, 1:] = torch.where(counted, content(x[:, 1:]).to(x), x[:, 1:])
        return out

    return hook


def decoder_norms(sae: SparseAutoencoder, d_sae: int) -> Tensor:
    """[d_sae] L2 norms of what one unit of each feature adds to the reconstruction.

    sae: or any module whose `decode` is affine
    """
    if isinstance(sae, SparseAutoencoder):
        return sae.W_dec.double().norm(dim=1) * sae.cfg.input_scale
    like = next(sae.parameters())
    zero = sae.decode(like.new_zeros(1, 1, d_sae))
    norms = []
    for features in torch.arange(d_sae, device=like.device).split(256):
        units = like.new_zeros(1, len(features), d_sae).scatter_(2, features[None, :, None], 1.0)
        norms.append((sae.decode(units) - zero)[0].norm(dim=-1))
    return torch.cat(norms)


def _device(saes: dict[str, SparseAutoencoder]) -> torch.device:
    return next(next(iter(saes.values())).parameters()).device


def write_eval(result: EvaluationResult, run_dir: str | Path, source: dict[str, Any] | None = None) -> None:
    """Write `eval.json` and `sae/sparsity.safetensors` into a run directory, each atomically.

    result: from `evaluate`
    run_dir: the run's directory; `sae/` is created if it does not exist
    source: the text that was measured, for `eval_source.json`; None, for the evaluation part of the run's own text,
        removes that file

    `sparsity.safetensors` is SAELens's optional file: `sparsity` [d_sae] float32, log10 of the firing frequency with a
    floor of 1e-10.
    """
    run_dir = expanded(run_dir)
    with writing(run_dir / layout.EVALUATION):
        (run_dir / layout.AUTOENCODER).mkdir(parents=True, exist_ok=True)
    sparsity = result.density.clamp(min=1e-10).log10().to(torch.float32).contiguous()
    with atomic_write(run_dir / layout.SPARSITY) as temporary:
        save_file({"sparsity": sparsity}, temporary)
    if source is not None:  # first: if killed in between, the run's own figures are doubted, not the reverse
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
    """The keywords of `evaluate` that a run's ``config`` sets: place, sizes and seed."""
    return {
        "layer": config.place,
        "target": config.target_place,
        "ce_sequences": config.evaluation.ce_sequences,
        "lm_batch": config.evaluation.lm_batch,
        "harvest_batch": config.buffer.harvest_batch,
        "seed": config.stream_seed,
        "massive_ratio": config.evaluation.massive_ratio,
    }
