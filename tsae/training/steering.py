"""Thresholds in training: where they start, how a step moves them, and their values for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.config import TrainConfig
from tsae.parallel.axis import Ranks
from tsae.sae.model import SparseAutoencoder
from tsae.sae.thresholds import ThresholdController, initial_threshold


class Steering:
    """Keeps the mean L0 of a run at ``sae.k``, if its activation has steered or learned thresholds.

    Args:
        cfg: configuration of the run.
        sae: the autoencoder in training, whose buffers (or parameters) this sets.
        ranks: position of this process.
    """

    def __init__(self, cfg: TrainConfig, sae: SparseAutoencoder, ranks: Ranks) -> None:
        self.cfg, self.sae, self.ranks = cfg, sae, ranks
        self.controller = ThresholdController(cfg.sae.k)

    @property
    def active(self) -> bool:
        """Whether the controller holds the mean L0 at ``sae.k``."""
        if self.cfg.sae.kind.steered:
            return self.cfg.sae.steering == "controller"
        return self.sae.thresholds_learned and self.cfg.objective.l0 == 0

    @property
    def priced(self) -> bool:
        """Whether the L0 penalty of learned thresholds has the Lagrange multiplier that keeps their common scale."""
        return self.sae.thresholds_learned and self.active

    @torch.no_grad()
    def prepare(self, pre: Tensor, segments: Tensor, step: int) -> None:
        """Set the thresholds of a step, before its activation.

        pre: (B, T, d_sae), without bias; segments: (B, T); step: from 0
        """
        if not self.active and not self.sae.thresholds_learned:
            return
        if step == 0 and not self.controller.started:
            self.controller.start(initial_threshold(pre, self.sae.b_enc, self.cfg.sae.k, segments, self.ranks))
            if self.sae.log_threshold is not None:
                self.sae.log_threshold.fill_(self.controller.theta.log())
        if self.cfg.sae.kind.steered:
            self._set(self.controller.theta)

    def _set(self, theta: Tensor) -> None:
        """The steered thresholds of the autoencoder, from the controller's scalar."""
        self.sae.threshold.fill_(theta)
        self.sae.release.copy_(self.sae.threshold * self.cfg.sae.release_ratio)

    @torch.no_grad()
    def update(self, l0: Tensor) -> None:
        """One step of the controller, a scalar ``l0`` after the optimizer's. It moves the common factor of learned
        thresholds."""
        if not self.active:
            return
        before = self.controller.theta.clone()
        after = self.controller.update(l0)
        if self.sae.log_threshold is not None:
            self.sae.log_threshold.add_((after / before).log())

    @property
    def _frozen(self) -> bool:
        return self.active and self.controller.started

    @torch.no_grad()
    def freeze(self) -> None:
        """Set steered thresholds to their values for inference."""
        if self._frozen and not self.sae.thresholds_learned:
            self._set(self.controller.frozen)

    @torch.no_grad()
    def freeze_learned(self, finished: SparseAutoencoder) -> None:
        """The same for learned thresholds, in the autoencoder for inference: the mean of their common factor."""
        if self._frozen and self.sae.thresholds_learned:
            factor = self.controller.frozen / self.controller.theta
            finished.threshold *= factor
            finished.release *= factor
            finished.update_threshold_parameters()
