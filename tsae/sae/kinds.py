"""What each activation of the encoder is, in one table.

A new activation takes a name and a row here, and its threshold in `SparseAutoencoder.thresholds`. Everything else
asks for the properties below. This module imports nothing of tsae, so that `tsae.config` can use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal[
    "relu", "gelu", "topk", "batchtopk", "jumprelu", "schmitt", "jumprelu_schmitt", "rate", "persistent"
]
"""Nonlinearities of the encoder; docs/objectives.md has the formulas."""


@dataclass(frozen=True)
class Kind:
    """Properties of one activation.

    threshold: where the threshold comes from in training.
        `none`: there is none;
        `token`: k features per token, in inference too;
        `batch`: k features per token on average over the batch; a running mean is kept for inference;
        `steered`: one number, moved towards a mean L0 of k (or found exactly, ``sae.steering``); with ``rates`` it
        scales the thresholds of all features;
        `learned`: a parameter per feature.
    release: has hysteresis, with a release threshold below the switch-on threshold.
    rates: thresholds and releases per feature follow from its transition rates (`tsae.sae.rates`).
    recurrent: features are the thresholded ones after a leaky recurrence (`tsae_kernels.leaky_recurrence`).
    nonlinearity: the kernel's activation, applied together with the threshold.
    saelens: the SAELens architecture that computes the same in inference; None if there is none.
    feature_tensors: [B, T, d_sae] tensors at the peak of a training step, without and with autocast; counted with
        torch's memory profiler on a CPU (tests/training/test_dry_run.py).
    """

    threshold: Literal["none", "token", "batch", "steered", "learned"] = "none"
    release: bool = False
    rates: bool = False
    recurrent: bool = False
    nonlinearity: Literal["relu", "gelu"] = "relu"
    saelens: str | None = None
    feature_tensors: tuple[int, int] = (4, 5)

    @property
    def k_sparse(self) -> bool:
        """Whether ``sae.k`` sets or targets the number of active features."""
        return self.threshold != "none"

    @property
    def stores_threshold(self) -> bool:
        """Whether inference needs a stored threshold per feature."""
        return self.threshold in ("batch", "steered", "learned")

    @property
    def steered(self) -> bool:
        """Whether one number is steered, which sets the thresholds of all features."""
        return self.threshold == "steered"

    @property
    def learned(self) -> bool:
        """Whether thresholds, and releases if it has them, are parameters."""
        return self.threshold == "learned"

    @property
    def shares_threshold(self) -> bool:
        """Whether all features have the same threshold after training."""
        return self.threshold in ("batch", "steered") and not self.rates

    @property
    def keeps_state(self) -> bool:
        """Whether a feature depends on earlier tokens of its segment."""
        return self.release or self.recurrent

    @property
    def thresholded(self) -> bool:
        """Whether features are pre-activations above stored thresholds."""
        return self.stores_threshold and not self.recurrent

    @property
    def threshold_parameters(self) -> int:
        """Threshold parameters per feature."""
        return self.learned * (1 + self.release)

    @property
    def homogeneous(self) -> bool:
        """Whether f(c x) = c f(x) for c > 0 once its thresholds are multiplied by c too."""
        return self.nonlinearity == "relu"

    @property
    def rescalable(self) -> bool:
        """Whether features can be rescaled one by one, which a choice between the features of a token rules out."""
        return self.homogeneous and self.threshold != "token"

    @property
    def dead_below_zero(self) -> bool:
        """Whether dead features may be below 0 on every token, so that AuxK must pass gradient through the ReLU."""
        return self.learned or (self.threshold == "none" and self.nonlinearity == "relu")


KINDS: dict[str, Kind] = {
    "relu": Kind(saelens="standard"),
    "gelu": Kind(nonlinearity="gelu"),
    "topk": Kind("token", saelens="topk"),
    "batchtopk": Kind("batch", saelens="jumprelu", feature_tensors=(5, 7)),
    "jumprelu": Kind("learned", saelens="jumprelu", feature_tensors=(5, 7)),
    "schmitt": Kind("steered", release=True),
    "jumprelu_schmitt": Kind("learned", release=True, feature_tensors=(8, 13)),
    "rate": Kind("steered", release=True, rates=True),
    "persistent": Kind("batch", recurrent=True, feature_tensors=(6, 7)),
}
