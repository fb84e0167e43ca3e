"""The model card of an autoencoder: what it is of, how to use it, what was measured, how it was trained."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tsae.config import LENGTH, SAEConfig
from tsae.reports.table import metric

# What the card's table shows of an eval.json: key, what it is, the format.
ROWS = (
    ("explained_variance", "explained variance (centred)", "{:.4f}"),
    ("l0", "active features per token (L0)", "{:.1f}"),
    ("frac_alive", "features alive", "{:.3f}"),
    ("ce_loss_score", "loss recovered against zero ablation", "{:.4f}"),
    ("ce_loss_score_mean_ablation", "loss recovered against mean ablation", "{:.4f}"),
    ("temporal.persistence", "P(active at the next token, given active)", "{:.3f}"),
    ("temporal.persistence_excess", "the same beyond chance, per feature", "{:.3f}"),
    ("temporal.persistence_excess_shuffled", "control: beyond chance with tokens shuffled", "{:.3f}"),
    ("temporal.autocorrelation.1", "autocorrelation at lag 1", "{:.3f}"),
    ("temporal.smoothness", "T-SAE's smoothness (lower is smoother)", "{:.3f}"),
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HYSTERESIS = (
    "Its features have hysteresis: one switches on above its `threshold` and stays on until it falls below its "
    "`release`, along the sequence. So encode whole texts, `[batch, tokens, d_in]`, and not single tokens; give "
    "`encode` the `segments` where a row holds several documents.\n"
)


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

    cfg:        of the autoencoder
    repo_id:    where it will be, as in the example of its use
    training:   the run's configuration
    evaluation: its eval.json
    text:       what was evaluated on, if not the held-out part of the run's own text
    figure:     a file beside the card to show
    license:    the hub's name of one; none is stated unless it is given
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
    of = f" for {plain(model)}, the output of block {training['layer']}" if model and "layer" in training else ""
    parts.append(f"A sparse autoencoder{of}: {cfg.d_sae:,} features of {cfg.d_in:,} dimensions ({kind}).\n")
    parts.append(
        "```python\n"
        "import tsae\n\n"
        f'sae = tsae.load("{repo_id}")\n'
        f"h = sae.encode(x)  # raw activations [batch, tokens, {cfg.d_in}] to features [batch, tokens, {cfg.d_sae}]\n"
        "xhat = sae.decode(h)\n"
        "```\n"
    )
    if cfg.kind.release:
        parts.append(HYSTERESIS)
    if evaluation:
        parts.append("## Measured\n\n" + _measured(evaluation, data, text))
    if figure is not None:
        parts.append(f"![The run's report]({figure})\n")
    if training:
        parts.append("## Training\n\n" + _trained(training, model, data))
    parts.append(f"Weights are in `sae_weights.safetensors`, in SAELens's layout. Made with tsae {version('tsae')}.\n")
    return "\n".join(parts)


def without_folders(name: str) -> str:
    """A path's last part, as the author's folders are nobody's business; names that are no absolute path stay whole."""
    return Path(name).name if Path(name).is_absolute() else name


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _measured(evaluation: dict[str, Any], data: str, text: str | None) -> str:
    other = "held-out text" if not data else f"the held-out part of {plain(data)}"
    lines = [f"On {plain(without_folders(text)) if text else other}:\n", "| metric | value |", "| --- | --- |"]
    for key, name, form in ROWS:
        value = metric(evaluation, key)
        if isinstance(value, (int, float)):
            lines.append(f"| {name} | {form.format(value)} |")
    return "\n".join(lines) + "\n\nAll of them are in `eval.json`.\n"


def _trained(training: dict[str, Any], model: str, data: str) -> str:
    steps, batch = training.get("steps"), training.get("batch")
    objective, optimizer = training.get("objective", {}), training.get("optimizer", {})
    rows = [
        ("model", model),
        ("block", training.get("layer")),
        ("text", data),
        ("steps", f"{steps:,} of {batch} x {LENGTH} tokens" if steps and batch else None),
        ("temporal objective", objective.get("temporal")),
        ("L1 weight", objective.get("l1")),
        ("learning rate", optimizer.get("lr")),
        ("seed", training.get("seed")),
    ]
    lines = [f"| {name} | {plain(str(value))} |" for name, value in rows if value not in (None, "")]
    return "\n".join(["| | |", "| --- | --- |", *lines]) + "\n\nAll of it is in `config.json`.\n"
