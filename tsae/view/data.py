"""The content of the page as one JSON object: what a run directory says, and its features on held-out text.

Features come as columns. The activations of a feature are kept only in the passages where it, or a feature that has it
as its neighbour, is strongest; elsewhere the page has its statistics alone. That bounds the page's size.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tsae.config import TrainConfig
from tsae.data.sequences import TokenBatch
from tsae.data.text import shown_source
from tsae.evaluation.catalogue import METRICS
from tsae.evaluation.metrics.temporal import MIN_ACTIVATIONS
from tsae.reports.records import read_history, read_source
from tsae.rundir import layout
from tsae.sae.model import SparseAutoencoder
from tsae.utils.config_json import load_json
from tsae.view.features import NEIGHBOUR_LAGS, Activity, neighbours
from tsae.view.packing import pack, rounded

LEVELS = 1023  # activations are quantized to this many steps of the feature's largest one
PASSAGES = 8  # at most, per feature
TOP_TOKENS = 6
POINTS = 300  # at most, per training curve
ENTRIES = 3_500_000  # activations in a page, about 4 bytes each; beyond it each feature gets fewer passages
# Metrics of eval.json whose labels the page shows.
LABELED = (
    *("explained_variance", "ce_loss_score_mean_ablation", "temporal.support_bits", "temporal.total_bits"),
    *("l0", "frac_alive", "temporal.persistence_excess"),
)
CURVES = (
    *("reconstruction", "sparsity", "temporal", "auxiliary", "explained_variance", "l0", "dead"),
    *("lag1_correlation", "lag1_correlation_p10", "lag1_correlation_p90"),
)


def content_tokens(batch: TokenBatch) -> Tensor:
    """[N, T] the tokens that have an activation: all but the prefix (BOS)."""
    return batch.tokens[:, -batch.segments.shape[1] :]


def token_texts(tokenizer: Any, tokens: Tensor) -> tuple[np.ndarray, list[str]]:
    """The strings of the tokens of a text.

    tokens: [N, T] ids
    out: [N * T] indices into the list of strings; a token that is only part of a character has the tokenizer's name
    """
    ids, index = np.unique(tokens.flatten().numpy(), return_inverse=True)
    (anchor,) = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    before = tokenizer.decode([anchor])
    texts = []
    for token, name in zip(ids.tolist(), tokenizer.convert_ids_to_tokens(ids.tolist()), strict=True):
        # After another token: some tokenizers drop the leading space of a token decoded alone.
        text = tokenizer.decode([anchor, token], clean_up_tokenization_spaces=False)
        text = text.removeprefix(before)
        texts.append(str(name) if "\ufffd" in text or not text else text)
    return index.reshape(-1), texts


def page_data(
    run: Path, cfg: TrainConfig, sae: SparseAutoencoder, activity: Activity, ids: np.ndarray, texts: list[str]
) -> dict[str, Any]:
    """The page's content.

    cfg:      of the run
    activity: of the features on the text, finished
    ids:      [N * T] the token at each position, as an index into `texts`
    """
    T = activity.segments.shape[1]
    evaluation = load_json(run / layout.EVALUATION) if (run / layout.EVALUATION).exists() else {}
    source = read_source(run).get("data")
    return {
        "run": {"name": run.resolve().name, "facts": facts(cfg, int((activity.segments >= 0).sum()), T)},
        "evaluation": {"metrics": evaluation, "text": source and shown_source(source)},
        "labels": {
            key: {"name": metric.name, "title": metric.title, "digits": metric.short_digits}
            for key, metric in METRICS.items()
            if key in LABELED
        },
        "history": curves(run / layout.METRICS),
        "lags": list(activity.lags.reported),
        "bands": [list(band) for band in activity.bands.bands],
        "neighbour_lags": [NEIGHBOUR_LAGS[0], NEIGHBOUR_LAGS[-1]],
        "min_activations": MIN_ACTIVATIONS,
        "levels": LEVELS,
        "texts": texts,
        "rows": [pack(row) for row in ids.reshape(-1, T)],
        "runs": run_bounds(activity.run, T),
        "features": columns(sae, activity, ids),
    }


def facts(cfg: TrainConfig, tokens: int, length: int) -> list[tuple[str, str]]:
    """The run and the page's text (``tokens``, in sequences of ``length``) in a few words: pairs of name and value."""
    sae, objective = cfg.sae, cfg.objective
    activation = str(sae.activation)
    details = [f"k = {sae.k}"] if sae.kind.k_sparse else []
    if sae.support_bits:
        details = [f"{sae.support_bits:g} support bits"]
    details += [f"release ratio {sae.release_ratio:g}"] if sae.kind.release else []
    trained_on = cfg.steps * cfg.batch * cfg.length
    return [
        ("model", f"{_last(cfg.model)}, {cfg.described}"),
        ("trained on", f"{shown_source(cfg.data)}, {trained_on:,} tokens in {cfg.steps:,} steps"),
        ("features", f"{sae.d_sae:,}, {activation}" + (f" ({', '.join(details)})" if details else "")),
        ("temporal objective", str(objective.temporal)),
        ("text on this page", f"{tokens:,} held-out tokens of {shown_source(cfg.data)}, in sequences of {length:,}"),
    ]


def _last(name: str) -> str:
    """A path's last part, to keep the author's folders private; a hub id is kept."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def curves(path: Path) -> dict[str, list[list[float | None]]]:
    """Training curves as [steps, values], thinned to at most `POINTS`."""
    out: dict[str, list[list[float | None]]] = {}
    for key, (steps, values) in read_history(path).items():
        if key in CURVES:
            every = math.ceil(len(steps) / POINTS)
            keep = sorted({*range(0, len(steps), every), len(steps) - 1})
            out[key] = [[int(step) for step in steps[keep]], rounded(values[keep])]
    return out


def run_bounds(run: np.ndarray, T: int) -> list[list[int]]:
    """Row, first position and length of every segment run, by number; [] for an excluded one."""
    positions = np.flatnonzero(run >= 0)
    numbers, first, length = np.unique(run[positions], return_index=True, return_counts=True)
    out: list[list[int]] = [[] for _ in range(int(run.max(initial=-1)) + 1)]
    for number, start, count in zip(numbers.tolist(), positions[first].tolist(), length.tolist(), strict=True):
        out[number] = [start // T, start % T, count]
    return out


def columns(sae: SparseAutoencoder, activity: Activity, ids: np.ndarray) -> dict[str, Any]:
    """Columns with one value, or one list, per feature."""
    persistence = activity.persistence.per_feature()
    by_lag = dict(zip(activity.lags.lags, activity.lags.autocorrelation_per_feature(), strict=True))
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
        held = (
            value <= threshold[j] if threshold is not None and release is not None else np.zeros(len(own), dtype=bool)
        )
        level.append(pack(2 * steps + held))
    return {
        "active": persistence.active.long().tolist(),
        "density": rounded(persistence.density),
        "persistence": rounded(persistence.stays),
        "excess": rounded(persistence.excess),
        "dwell": rounded(persistence.dwell),
        "autocorrelation": [rounded(by_lag[lag], 3) for lag in activity.lags.reported],
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
    """[d_sae] switch-on threshold and release of each feature; None if the activation has none."""
    if not sae.cfg.kind.thresholded or sae.cfg.layer_norm == "post" or sae.cfg.hysteresis == "path":
        return None, None
    release = sae.release.cpu().numpy() if sae.cfg.kind.release else None
    return sae.threshold.cpu().numpy(), release


def select(activity: Activity, neighbour: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """The strongest passages of each feature, and which activations the page needs to show them.

    out: the runs of each feature, strongest first; [n] bool over the activations
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
