"""The metrics of eval.json: key, label, unit and digits of each. Tables, figures, cards and pages read them here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """How a metric is shown. Definitions: `tsae.evaluation.metrics`."""

    key: str
    """Its place in eval.json, dotted: `temporal.persistence`."""
    label: str
    """In a few words; if `of` is set, without the metric that it refines."""
    digits: int = 4
    """Decimals where metrics are listed in full."""
    unit: str = ""
    heading: str = ""
    """A short name for columns; a line break shows where a narrow column breaks it."""
    short_digits: int = 3
    """Decimals in columns and figures."""
    of: str = ""
    """The label of the metric that this one refines."""

    @property
    def name(self) -> str:
        """The label on its own."""
        return f"{self.of}, {self.label}" if self.of else self.label

    @property
    def row(self) -> str:
        """The label in a list, indented if it refines the metric above."""
        return f"  {self.label}" if self.of else self.label

    @property
    def title(self) -> str:
        """The label as a title."""
        return self.name[0].upper() + self.name[1:]

    @property
    def column(self) -> str:
        """The heading on one line."""
        return self.heading.replace("-\n", "").replace("\n", " ")

    def full(self, value: float) -> str:
        """The value where metrics are listed in full."""
        return f"{value:.{self.digits}f}"

    def short(self, value: Any) -> str:
        """The value in columns and figures; a dash if there is none."""
        return f"{value:.{self.short_digits}f}" if isinstance(value, (int, float)) else "–"

    def at(self, part: str) -> Metric:
        """One entry of a metric that is an object: a lag, or a transition."""
        label = f"lag {part}" if part.isdigit() else part.replace("_", " to ")
        return Metric(f"{self.key}.{part}", label, self.digits, self.unit, of=self.name)


EV, PERSISTENCE, DIFFERENCE = "explained variance", "P(stays on)", "relative difference"
TOTAL, SUPPORT, AMPLITUDE = "total bits", "support bits", "amplitude bits"


def _bits(name: str, label: str, of: str = "", heading: str = "") -> Metric:
    return Metric(f"temporal.{name}", label, 2, "per token", heading, short_digits=1, of=of)


GROUPS: dict[str, tuple[Metric, ...]] = {
    # The yardstick stands first: what the reconstruction is worth, and what its code costs.
    "Quality and code length": (
        Metric("explained_variance", EV, heading="EV"),
        Metric("massive.explained_variance_without", "without massive activations", of=EV),
        Metric("ce_loss_score", "loss recovered (zero ablation)", heading="CE\nscore"),
        _bits("support_bits", SUPPORT, heading="support\nbits"),
        _bits("support_bits_memoryless", "without memory", SUPPORT),
        _bits("support_bits_shuffled", "tokens shuffled", SUPPORT),
        _bits("support_bits_memoryless_shuffled", "without memory, tokens shuffled", SUPPORT),
        _bits("amplitude_bits", AMPLITUDE),
        _bits("amplitude_bits_shuffled", "tokens shuffled", AMPLITUDE),
        _bits("total_bits", TOTAL, heading="total\nbits"),
        _bits("total_bits_shuffled", "tokens shuffled", TOTAL),
    ),
    "Reconstruction": (
        Metric("mse", "mean squared error", unit="act²"),
        Metric("cossim", "cosine similarity", heading="cosine"),
        Metric("l2_ratio", "norm out / norm in", heading="L2 ratio"),
        Metric("relative_reconstruction_bias", "relative reconstruction bias", heading="rel. bias", short_digits=2),
        Metric("explained_variance_legacy", "explained variance, mean of per-token ratios (legacy)"),
        Metric("explained_variance_saebench", "explained variance, as SAEBench 0.6.0"),
        Metric("massive.tokens", "massive activations", unit="of tokens"),
        Metric("massive.norm_share", "squared norm that they hold", of="massive activations"),
        Metric("massive.norm_ratio", "least norm", 1, "x median", of="massive activations"),
    ),
    "Sparsity": (
        Metric("l0", "active features (L0)", 2, "per token", heading="L0", short_digits=1),
        Metric("l1", "sum of features (L1)", 2, "act/token", heading="L1", short_digits=2),
        Metric("frac_alive", "features alive", unit="of all", heading="alive"),
    ),
    "Language model": (
        Metric("ce_loss_without_sae", "cross-entropy, untouched", unit="nats/token"),
        Metric("ce_loss_with_sae", "cross-entropy with the SAE", unit="nats/token"),
        Metric("ce_loss_with_mean_ablation", "cross-entropy, mean ablation", unit="nats/token"),
        Metric("ce_loss_with_ablation", "cross-entropy, zero ablation", unit="nats/token"),
        Metric("ce_loss_score_mean_ablation", "loss recovered (mean ablation)"),
        Metric("kl_div_score", "KL recovered (zero ablation)"),
    ),
    "Temporal": (
        Metric("length", "sequence length", 0, "tokens"),
        Metric("temporal.relative_difference", DIFFERENCE, 3),
        Metric("temporal.relative_difference_per_feature", "mean over features", 3, of=DIFFERENCE),
        Metric("temporal.autocorrelation", "autocorrelation", 3),
        Metric("temporal.persistence", PERSISTENCE),
        Metric("temporal.persistence_excess", "beyond chance", of=PERSISTENCE, heading="stays on\nexcess"),
        Metric(
            "temporal.persistence_excess_shuffled",
            "beyond chance, tokens shuffled",
            of=PERSISTENCE,
            heading="stays on\nshuffled",
        ),
        Metric("temporal.transitions", "transitions", unit="of pairs"),
        Metric("temporal.smoothness", "smoothness (T-SAE, lower is smoother)", heading="smooth-\nness"),
    ),
}
_LISTED = {metric.key: metric for group in GROUPS.values() for metric in group}
# Entries of objects that have columns of their own.
_LAG_1 = (
    Metric("temporal.relative_difference.1", "lag 1", of=DIFFERENCE, digits=3, heading="lag 1\npooled"),
    Metric(
        "temporal.relative_difference_per_feature.1",
        "mean over features, lag 1",
        of=DIFFERENCE,
        digits=3,
        heading="lag 1\nfeature",
    ),
)
METRICS: dict[str, Metric] = _LISTED | {metric.key: metric for metric in _LAG_1}
METRICS["temporal.autocorrelation.1"] = METRICS["temporal.autocorrelation"].at("1")


def lookup(metrics: dict[str, Any], key: str) -> Any:
    """The value at a dotted ``key`` of an eval.json; an empty mapping if it has none."""
    value: Any = metrics
    for part in key.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    return value
