"""The content of the page, as one object that JSON can hold: what a run directory says, and its features on its text.

The text is the evaluation part of the run's own, which training never saw, as in `tsae.evaluate`. Features come as
columns. The activations of a feature are kept in the passages where it, or a feature that has it as its neighbour, is
strongest: everywhere else the page has its statistics alone. That bounds the page's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsae.config import LENGTH, TrainConfig
from tsae.data.sequences import TokenBatch
from tsae.errors import UserError
from tsae.evaluation.evaluator import check_width
from tsae.evaluation.metrics.temporal import CURVE_LAGS, MIN_ACTIVATIONS
from tsae.lm.hooks import activations
from tsae.lm.loading import load_language_model
from tsae.reports.figure import read_history, read_source
from tsae.rundir import layout
from tsae.rundir.directory import read_config
from tsae.sae.model import SparseAutoencoder
from tsae.training.assemble import evaluation_batches, resolve_device
from tsae.utils.config_json import load_json
from tsae.view.features import NEIGHBOUR_LAGS, Activity, neighbours
from tsae.view.packing import pack, rounded
from tsae_kernels import MULTISCALE

LEVELS = 1023  # steps of an activation, of the feature's largest one
PASSAGES = 8  # of a feature, at most
TOP_TOKENS = 6
POINTS = 300  # of a training curve
ENTRIES = 3_500_000  # activations in a page, of about 4 bytes; fewer passages a feature where there are more
CURVES = (
    *("reconstruction", "sparsity", "temporal", "auxiliary", "explained_variance", "l0", "dead"),
    *("lag1_correlation", "lag1_correlation_p10", "lag1_correlation_p90"),
)


def collect(run: Path, tokens: int | None = None, progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Run the language model and the autoencoder over held-out text and gather the page's content.

    run:      a finished run's directory
    tokens:   of the text; None takes as many as the run's evaluation
    progress: called with the tokens done since its last call

    Raises UserError for a directory that is not a run's, or a model or a text that cannot be read.
    """
    cfg, sae = open_run(run)
    if tokens is not None and tokens < 1:
        raise UserError(f"--tokens is {tokens}; it must be at least 1.")
    device = resolve_device(cfg.device)
    lm = load_language_model(cfg.model, device=device, dtype=cfg.lm_dtype, revision=cfg.revision)
    check_width(sae, lm, str(run))
    sae.to(device)
    sequences = cfg.evaluation.sequences if tokens is None else math.ceil(tokens / LENGTH)
    batches = evaluation_batches(cfg, lm, sequences)
    activity = Activity(sae.cfg.d_sae)
    for batch in batches:
        segments = batch.segments.to(device)
        x = activations(lm, batch.tokens, cfg.layer)[:, -segments.shape[1] :].to(device, torch.float32)
        with torch.no_grad():
            activity.update(sae.encode(x, segments), segments)
        if progress is not None:
            progress(segments.numel())
    activity.finish()
    ids, texts = token_texts(lm.tokenizer, torch.cat([content(batch) for batch in batches]))
    return page_data(run, cfg, sae, activity, ids, texts)


def open_run(run: Path) -> tuple[TrainConfig, SparseAutoencoder]:
    """The configuration and the autoencoder of a finished run; `UserError` says what is not there."""
    if (run / layout.SWEEP).is_file():
        raise UserError(f"{run} is a sweep's directory; name one of the runs in it.")
    if not run.is_dir():
        raise UserError(f"There is no run directory {run}; name the directory that training wrote.")
    cfg = read_config(run)
    if not layout.has_autoencoder(run):
        raise UserError(f"{run} has no trained autoencoder in sae/; let training finish, or resume it.")
    return cfg, SparseAutoencoder.load(run / layout.AUTOENCODER)


def content(batch: TokenBatch) -> Tensor:
    """[N, T] the tokens that have an activation: all but the first."""
    return batch.tokens[:, -batch.segments.shape[1] :]


def token_texts(tokenizer: Any, tokens: Tensor) -> tuple[np.ndarray, list[str]]:
    """What the tokens of a text say.

    tokens: [N, T] ids
    out: [N * T] indices into the list of strings; what is no whole character alone is the tokenizer's name for it
    """
    ids, index = np.unique(tokens.flatten().numpy(), return_inverse=True)
    (anchor,) = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    before = tokenizer.decode([anchor])
    texts = []
    for token, name in zip(ids.tolist(), tokenizer.convert_ids_to_tokens(ids.tolist()), strict=True):
        # Behind another token: some tokenizers drop the space of one that stands alone.
        text = tokenizer.decode([anchor, token], clean_up_tokenization_spaces=False)
        text = text.removeprefix(before)
        texts.append(str(name) if "\ufffd" in text or not text else text)
    return index.reshape(-1), texts


def page_data(
    run: Path, cfg: TrainConfig, sae: SparseAutoencoder, activity: Activity, ids: np.ndarray, texts: list[str]
) -> dict[str, Any]:
    """The page's content from what was collected.

    activity: finished
    ids:      [N * T] what each position says, an index into `texts`
    """
    T = activity.segments.shape[1]
    evaluation = load_json(run / layout.EVALUATION) if (run / layout.EVALUATION).exists() else {}
    return {
        "run": {"name": run.resolve().name, "facts": facts(cfg, int((activity.segments >= 0).sum()))},
        "evaluation": {"metrics": evaluation, "text": read_source(run).get("data")},
        "history": curves(run / layout.METRICS),
        "lags": list(CURVE_LAGS),
        "bands": [list(band) for band in MULTISCALE],
        "neighbour_lags": [NEIGHBOUR_LAGS[0], NEIGHBOUR_LAGS[-1]],
        "min_activations": MIN_ACTIVATIONS,
        "levels": LEVELS,
        "texts": texts,
        "rows": [pack(row) for row in ids.reshape(-1, T)],
        "runs": run_bounds(activity.run, T),
        "features": columns(sae, activity, ids),
    }


def facts(cfg: TrainConfig, tokens: int) -> list[tuple[str, str]]:
    """What was trained on what, by name."""
    sae, objective = cfg.sae, cfg.objective
    activation = str(sae.activation)
    details = [f"k = {sae.k}"] if sae.kind.k_sparse else []
    details += [f"release ratio {sae.release_ratio:g}"] if sae.kind.release else []
    return [
        ("model", f"{_last(cfg.model)}, layer {cfg.layer}"),
        ("trained on", f"{_last(cfg.data)}, {cfg.steps * cfg.batch * LENGTH:,} tokens in {cfg.steps:,} steps"),
        ("features", f"{sae.d_sae:,}, {activation}" + (f" ({', '.join(details)})" if details else "")),
        ("temporal objective", str(objective.temporal)),
        ("text on this page", f"{tokens:,} held-out tokens of {_last(cfg.data)}"),
    ]


def _last(name: str) -> str:
    """A path's last part: folders of the author's are nobody's business. A hub id stays whole."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def curves(path: Path) -> dict[str, list[list[float | None]]]:
    """Training curves as [steps, values], thinned to at most `POINTS`."""
    out = {}
    for key, (steps, values) in read_history(path).items():
        if key in CURVES:
            every = math.ceil(len(steps) / POINTS)
            keep = sorted({*range(0, len(steps), every), len(steps) - 1})
            out[key] = [[int(step) for step in steps[keep]], rounded(values[keep])]
    return out


def run_bounds(run: np.ndarray, T: int) -> list[list[int]]:
    """Row, first position and length of every stretch of text, by number; [] for an excluded one."""
    positions = np.flatnonzero(run >= 0)
    numbers, first, length = np.unique(run[positions], return_index=True, return_counts=True)
    out: list[list[int]] = [[] for _ in range(int(run.max(initial=-1)) + 1)]
    for number, start, count in zip(numbers.tolist(), positions[first].tolist(), length.tolist(), strict=True):
        out[number] = [start // T, start % T, count]
    return out


def columns(sae: SparseAutoencoder, activity: Activity, ids: np.ndarray) -> dict[str, Any]:
    """Everything that is one value, or one list, for each feature."""
    persistence = activity.persistence.per_feature()
    neighbour, correlation = neighbours(activity)
    threshold, release = thresholds(sae)
    passages, kept = select(activity, neighbour)
    bounds = np.searchsorted(activity.feature, np.arange(sae.cfg.d_sae + 1))
    peak = activity.peak
    where, level = [], []
    for j in range(sae.cfg.d_sae):
        own = np.arange(bounds[j], bounds[j + 1])
        own = own[kept[own]]
        where.append(pack(np.diff(activity.position[own], prepend=0)))
        value = activity.value[own]
        steps = np.maximum(np.rint(value / max(peak[j], 1e-30) * LEVELS), 1).astype(np.int64)
        held = value <= threshold[j] if release is not None else np.zeros(len(own), dtype=bool)
        level.append(pack(2 * steps + held))
    return {
        "active": persistence.active.long().tolist(),
        "density": rounded(persistence.density),
        "persistence": rounded(persistence.stays),
        "excess": rounded(persistence.excess),
        "dwell": rounded(persistence.dwell),
        "autocorrelation": [rounded(row, 3) for row in activity.lags.autocorrelation_per_feature()],
        "band_autocorrelation": [rounded(row, 3) for row in activity.bands.compute()],
        "peak": rounded(peak),
        "threshold": None if threshold is None else rounded(threshold),
        "release": None if release is None else rounded(release),
        "neighbour": neighbour.tolist(),
        "neighbour_correlation": rounded(correlation, 3),
        "tokens": activity.top_tokens(ids, TOP_TOKENS),
        "passages": passages,
        "positions": where,
        "activations": level,
    }


def thresholds(sae: SparseAutoencoder) -> tuple[np.ndarray | None, np.ndarray | None]:
    """[d_sae] the threshold above which a feature switches on, and the release; None where there is none."""
    if not sae.cfg.kind.stores_threshold or sae.cfg.layer_norm == "post":
        return None, None
    release = sae.release.cpu().numpy() if sae.cfg.kind.release else None
    return sae.threshold.cpu().numpy(), release


def select(activity: Activity, neighbour: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """The strongest passages of each feature, and which activations the page needs for them.

    out: for each feature the runs, the strongest first; [n] bool over the activations
    """
    stretches = int(activity.run.max(initial=0)) + 1
    run = activity.run[activity.position]
    key = activity.feature * stretches + run
    count = PASSAGES
    while True:
        feature, strongest = activity.strongest(count)
        beside = neighbour[feature]
        wanted = np.concatenate(
            [feature * stretches + strongest, (beside * stretches + strongest)[beside >= 0]], dtype=np.int64
        )
        kept = np.isin(key, wanted)
        if count == 1 or int(kept.sum()) <= ENTRIES:
            break
        count -= 1
    passages: list[list[int]] = [[] for _ in range(activity.d_sae)]
    for j, number in zip(feature.tolist(), strongest.tolist(), strict=True):
        passages[j].append(number)
    return passages, kept
