"""The model card of an autoencoder: what it encodes, how to use it, its metrics, and how it was trained."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tsae.config import SAEConfig
from tsae.evaluation.catalogue import METRICS, lookup
from tsae.lm.site import from_option

# The metrics in the card's table.
ROWS = (
    *(
        "explained_variance",
        "ce_loss_score",
        "temporal.support_bits",
        "temporal.total_bits",
        "l0",
        "frac_alive",
        "ce_loss_score_mean_ablation",
    ),
    *("temporal.persistence", "temporal.persistence_excess", "temporal.persistence_excess_shuffled"),
    *("temporal.autocorrelation.1", "temporal.smoothness"),
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HYSTERESIS = (
    "Its features have hysteresis: along the sequence, a feature switches on above its `threshold` and stays on until "
    "it falls below its `release`. Encode complete texts, `[batch, tokens, d_in]`, not single tokens, and pass "
    "`segments` to `encode` if a row holds several documents.\n"
)
LOOKS_AHEAD = {
    "two-sided": "It also extends backwards from where the feature switches on, so it uses later tokens.\n",
    "path": "Which stretches are on is the path of least error and bits over the whole sequence (`rates`, "
    "`bit_price`), so it uses later tokens.\n",
}


def model_card(
    cfg: SAEConfig,
    repo_id: str,
    *,
    training: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    text: str | None = None,
    figure: str | None = None,
    license: str | None = None,
) -> str:
    """The card as Markdown with its YAML head.

    cfg:        the autoencoder's configuration
    repo_id:    the repository, for the example code
    training:   the run's configuration
    evaluation: the run's eval.json
    text:       the text that was evaluated on, if not the held-out part of the run's own
    figure:     an image beside the card to show
    license:    by the hub's name for it; None states none
    """
    from huggingface_hub import ModelCardData

    training = training or {}
    model, data = without_folders(str(training.get("model", ""))), without_folders(str(training.get("data", "")))
    head = ModelCardData(
        library_name="tsae",
        tags=["sparse-autoencoder", "mechanistic-interpretability", "temporal-features"],
        base_model=model if HUB_ID.fullmatch(model) else None,
        datasets=data if HUB_ID.fullmatch(data) else None,
        license=license,
    )
    kind = f"`{cfg.activation}`" + (f", k = {cfg.k}" if cfg.kind.k_sparse else "")
    parts = [f"---\n{head.to_yaml().strip()}\n---\n", f"# {plain(repo_id.split('/')[-1])}\n"]
    of = f" for {plain(model)}, {_place(training)}" if model and "layer" in training else ""
    what = "A transcoder" if cfg.d_out else "A sparse autoencoder"
    parts.append(f"{what}{of}: {cfg.d_sae:,} features of {cfg.d_in:,} dimensions ({kind}).\n")
    parts.append(
        "```python\n"
        "import tsae\n\n"
        f'sae = tsae.load("{repo_id}")\n'
        f"h = sae.encode(x)  # raw activations [batch, tokens, {cfg.d_in}] to features [batch, tokens, {cfg.d_sae}]\n"
        f"xhat = sae.decode(h){'  # the predicted activations' if cfg.d_out else ''}\n"
        "```\n"
    )
    if cfg.kind.release:
        parts.append(HYSTERESIS if cfg.hysteresis == "causal" else HYSTERESIS + LOOKS_AHEAD[cfg.hysteresis])
    if evaluation:
        parts.append("## Measured\n\n" + _measured(evaluation, data, text))
    if figure is not None:
        parts.append(f"![The run's report]({figure})\n")
    if training:
        parts.append("## Training\n\n" + _trained(training, model, data))
    parts.append(f"Weights are in `sae_weights.safetensors`, in SAELens's layout. Made with tsae {version('tsae')}.\n")
    return "\n".join(parts)


def without_folders(name: str) -> str:
    """The last part of an absolute path, to keep the author's folders private; other names are kept."""
    return Path(name).name if Path(name).is_absolute() else name


def plain(text: str) -> str:
    """Text escaped for Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _measured(evaluation: dict[str, Any], data: str, text: str | None) -> str:
    other = "held-out text" if not data else f"the held-out part of {plain(data)}"
    lines = [f"On {plain(without_folders(text)) if text else other}:\n", "| metric | value |", "| --- | --- |"]
    for metric in (METRICS[key] for key in ROWS):
        value = lookup(evaluation, metric.key)
        if isinstance(value, (int, float)):
            lines.append(f"| {metric.name} | {metric.full(value)} |")
    return "\n".join(lines) + "\n\nAll metrics are in `eval.json`.\n"


def _place(training: dict[str, Any]) -> str:
    """The place in words, from the run's configuration."""
    names = [training.get("site", "resid_post"), training.get("target")]
    sites = [from_option(name, training["layer"], any_layer=True) for name in names if name is not None]
    each = [f"the output of block {s.layer}" if s.kind == "resid_post" else f"`{s.written}`" for s in sites]
    return ", predicting ".join(each)


def _trained(training: dict[str, Any], model: str, data: str) -> str:
    steps, batch = training.get("steps"), training.get("batch")
    objective, optimizer = training.get("objective", {}), training.get("optimizer", {})
    rows = [
        ("model", model),
        ("block", training.get("layer")),
        ("site", training.get("site")),
        ("target", training.get("target")),
        ("text", data),
        ("steps", f"{steps:,} of {batch} x {training.get('length', 128)} tokens" if steps and batch else None),
        ("temporal objective", objective.get("temporal")),
        ("L1 weight", objective.get("l1")),
        ("learning rate", optimizer.get("lr")),
        ("seed", training.get("seed")),
    ]
    lines = [f"| {name} | {plain(str(value))} |" for name, value in rows if value not in (None, "")]
    return "\n".join(["| | |", "| --- | --- |", *lines]) + "\n\nThe complete configuration is in `config.json`.\n"
