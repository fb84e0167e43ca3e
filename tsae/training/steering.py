"""Thresholds in training: where they start, how a step moves them, and their values for inference."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tsae.config import TrainConfig
from tsae.parallel.axis import Ranks
from tsae.parallel.sharding import split, whole
from tsae.sae.model import SparseAutoencoder
from tsae.sae.rates import MEMORY, SwitchCosts, TransitionRates, decision_rates, switch_costs
from tsae.sae.thresholds import ThresholdController, initial_threshold
from tsae_kernels.segments import count_pairs

log = logging.getLogger(__name__)


class Steering:
    """Keeps the mean L0 of a run at ``sae.k`` (or the support's bits at ``sae.support_bits``), if its activation has
    steered or learned thresholds.

    The thresholds of `rate` begin as a common one with releases at ``sae.release_ratio`` of it; over the steps in which
    the temporal term sets in (``objective.hold_steps``, ``ramp_steps``) thresholds from the features' rates replace it.
    From the first step, they would kill most features: rates mean nothing before features do.

    Args:
        cfg: configuration of the run.
        sae: the autoencoder in training, whose buffers (or parameters) this sets.
        ranks: position of this process.
    """

    def __init__(self, cfg: TrainConfig, sae: SparseAutoencoder, ranks: Ranks) -> None:
        self.cfg, self.sae, self.ranks = cfg, sae, ranks
        self.controller = ThresholdController(cfg.sae.support_bits or cfg.sae.k)
        self.rates: TransitionRates | None = None
        if cfg.sae.kind.rates:
            self.rates = TransitionRates(cfg.sae.d_sae // ranks.features.size, sae.threshold.device)

    @property
    def active(self) -> bool:
        """Whether the controller holds the mean L0 at ``sae.k``, or the bits of the support."""
        if self.cfg.sae.kind.steered:
            return self.cfg.sae.steering == "controller"
        return self.sae.thresholds_learned and self.cfg.objective.l0 == 0

    @property
    def priced(self) -> bool:
        """Whether the L0 penalty of learned thresholds has the Lagrange multiplier that keeps their common scale."""
        return self.sae.thresholds_learned and self.active

    @torch.no_grad()
    def start_from(self, theta: float | None) -> None:
        """Continue from the thresholds of the autoencoder, which has those of a trained one.

        theta: of the controller; None: what the first batch gives. With thresholds that follow from the rates of the
            autoencoder, these and the price of a bit decide.
        """
        if self.rates is not None and bool(self.sae.bit_price > 0):
            self.rates.start(self.sae.rates, MEMORY * self.cfg.batch * self.cfg.length)
            costs, mean = self._costs(self.rates)
            follow = torch.isclose(self.sae.threshold.square(), self.sae.bit_price * costs.from_off, rtol=1e-2)
            self.rates.settled = not self.ranks.features.any(~follow)[0]
            if not self.rates.settled:
                log.warning(
                    "The thresholds of the autoencoder to start from do not follow from its rates: training begins "
                    "with a common threshold."
                )
            self.controller.start((self.sae.bit_price * mean).sqrt())
        elif theta is not None:
            self.controller.start(torch.tensor(theta, device=self.sae.threshold.device))

    @torch.no_grad()
    def prepare(self, pre: Tensor, segments: Tensor, step: int, ramp: float | Tensor = 1.0) -> None:
        """Set the thresholds of a step, before its activation.

        pre: (B, T, d_sae), without bias; segments: (B, T); step: from 0
        ramp: `tsae.training.schedules.temporal_ramp` of the step
        """
        if not self.active and not self.sae.thresholds_learned:
            return
        if step == 0 and not self.controller.started:
            self.controller.start(initial_threshold(pre, self.sae.b_enc, self.cfg.sae.k, segments, self.ranks))
            if self.sae.log_threshold is not None:
                self.sae.log_threshold.fill_(self.controller.theta.log())
        if self.cfg.sae.kind.steered:
            self._set(self.controller.theta, ramp)

    def _set(self, theta: Tensor, ramp: float | Tensor) -> None:
        """The steered thresholds of the autoencoder, from the controller's scalar."""
        sae = self.sae
        if self.rates is None:
            sae.threshold.fill_(theta)
            sae.release.copy_(sae.threshold * self.cfg.sae.release_ratio)
            return
        costs, mean = self._costs(self.rates)
        share = 1.0 if self.rates.settled else ramp
        from_off = (1 - share) + share * costs.from_off / mean
        from_on = (1 - share) * self.cfg.sae.release_ratio**2 + share * costs.from_on / mean
        sae.threshold.copy_(theta * from_off.sqrt())
        sae.release.copy_(theta * from_on.sqrt())
        sae.rates.copy_(self.rates.rates)
        sae.bit_price.copy_(theta.square() / mean)

    def _costs(self, rates: TransitionRates) -> tuple[SwitchCosts, Tensor]:
        """Bits of switching, and their mean: theta^2 is the price of a bit times the mean.

        So theta is the rms of the thresholds, weighted by how often features are on, and keeps its size while
        thresholds per feature replace the common one.
        """
        cfg, features = self.cfg.sae, self.ranks.features
        decisive = decision_rates(rates.rates, cfg.amplitude_bits, cfg.release_ratio, features)
        costs = switch_costs(decisive, cfg.amplitude_bits)
        weights = rates.active_pairs + 1
        total = features.sum_no_grad((weights * costs.from_off).sum())
        return costs, total / features.sum_no_grad(weights.sum())

    @torch.no_grad()
    def update(self, l0: Tensor, transitions: Sequence[Tensor | None], segments: Tensor) -> None:
        """One step of the controller, after the optimizer's. It moves the common factor of learned thresholds.

        l0: of the step, a scalar
        transitions: of activations with rates, the counts of each piece of the batch, (B, 3, d_sae)
        segments: (B, T), of the full batch
        """
        if not self.active:
            return
        measured = l0
        if self.rates is not None:
            parts = [each.sum(0, dtype=torch.float32) for each in transitions if each is not None]
            counts = self.ranks.data.sum_no_grad(torch.stack(parts).sum(0))
            pairs = count_pairs(segments).sum().float().to(counts.device)
            if self.cfg.sae.support_bits:
                measured = self.ranks.features.sum_no_grad(self.rates.support_bits(counts, pairs))
            self.rates.update(counts, pairs)
        before = self.controller.theta.clone()
        after = self.controller.update(measured)
        if self.sae.log_threshold is not None:
            self.sae.log_threshold.add_((after / before).log())

    def rates_state(self) -> dict[str, Any]:
        """The running rates as an entry `rates` of a checkpoint, with full tensors; empty if there are none."""
        if self.rates is None:
            return {}
        state = self.rates.state_dict()
        return {"rates": state | {"counts": whole(state["counts"], 1, self.ranks.features)}}

    def load_rates_state(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of `rates_state`."""
        if self.rates is not None:
            device, state = self.rates.counts.device, checkpoint["rates"]
            counts = split(state["counts"], 1, self.ranks.features)
            self.rates.load_state_dict({name: each.to(device) for name, each in {**state, "counts": counts}.items()})

    @property
    def _frozen(self) -> bool:
        return self.active and self.controller.started

    @torch.no_grad()
    def freeze(self, ramp: float) -> None:
        """Set steered thresholds to their values for inference; ramp: of the step that would follow."""
        if self._frozen and not self.sae.thresholds_learned:
            self._set(self.controller.frozen, ramp)

    @torch.no_grad()
    def freeze_learned(self, finished: SparseAutoencoder) -> None:
        """The same for learned thresholds, in the autoencoder for inference: the mean of their common factor."""
        if self._frozen and self.sae.thresholds_learned:
            factor = self.controller.frozen / self.controller.theta
            finished.threshold *= factor
            finished.release *= factor
            finished.update_threshold_parameters()
