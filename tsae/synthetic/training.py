"""Autoencoders in training, each with its own view of the batches that all share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from tsae.config import TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.sae.normalization import InputNormalizer
from tsae.synthetic.inputs import Crosscoder, RunningMeans, encoder_mask, running_means, windows
from tsae.training.trainer import Trainer

CONSTANTS = (4.0, 16.0, 64.0)  # time constants of running means, in tokens


class Training:
    """An autoencoder of single tokens in training.

    Args:
        cfg: the configuration, with ``sae.d_in`` the width of the activations.
        first: activations from which the input's mean and scale are estimated.
        device, autocast: as for `Trainer`.
    """

    def __init__(self, cfg: TrainConfig, first: ActivationBatch, device: torch.device, *, autocast: bool) -> None:
        self.cfg = self.adapted(cfg)
        batch = self.batch(first)
        d_in, d_out = self.cfg.sae.d_in, self.cfg.sae.d_out
        estimate = InputNormalizer.estimate_pair(*batch, d_in) if d_out else InputNormalizer.estimate(*batch)
        self.trainer = Trainer(self.cfg, estimate, device, autocast=autocast)

    def adapted(self, cfg: TrainConfig) -> TrainConfig:
        """The configuration of the trainer."""
        return cfg

    def batch(self, batch: ActivationBatch) -> ActivationBatch:
        """What the trainer reads of a batch."""
        return batch

    def finished(self) -> nn.Module:
        """The autoencoder on raw activations, with `encode(x, segments)` and `decode(h)`."""
        return self.trainer.finished()


class CrosscoderTraining(Training):
    """`Crosscoder` with ``active`` features a window; windows that cross segments are left out of training."""

    def __init__(
        self,
        active: int,
        cfg: TrainConfig,
        first: ActivationBatch,
        device: torch.device,
        *,
        autocast: bool,
        window: int = 4,
    ) -> None:
        self.active, self.window = active, window
        super().__init__(cfg, first, device, autocast=autocast)

    def adapted(self, cfg: TrainConfig) -> TrainConfig:
        sae = replace(cfg.sae, d_in=self.window * cfg.sae.d_in, activation="batchtopk", k=self.active)
        dead = cfg.objective.dead_after_tokens // self.window
        return replace(cfg, sae=sae, objective=replace(cfg.objective, temporal="none", dead_after_tokens=dead))

    def batch(self, batch: ActivationBatch) -> ActivationBatch:
        return ActivationBatch(*windows(batch.x, batch.segments, self.window))

    def finished(self) -> Crosscoder:
        return Crosscoder(self.trainer.finished(), self.window).eval()


class RunningMeansTraining(Training):
    """`RunningMeans` with ``size`` features for each time constant."""

    def __init__(
        self, size: int, cfg: TrainConfig, first: ActivationBatch, device: torch.device, *, autocast: bool
    ) -> None:
        super().__init__(cfg, first, device, autocast=autocast)
        sae = self.trainer.sae
        mask = encoder_mask(sae.cfg.d_out, sae.cfg.d_sae, size, len(CONSTANTS)).to(sae.W_enc.device)
        with torch.no_grad():  # tied, as an autoencoder begins; what is 0 and has no gradient stays 0
            tied = sae.W_dec.T.repeat(1 + len(CONSTANTS), 1) * sae.cfg.encoder_scale
            sae.W_enc.copy_(tied * mask)
        sae.W_enc.register_hook(lambda gradient: gradient * mask)

    def adapted(self, cfg: TrainConfig) -> TrainConfig:
        d = cfg.sae.d_in
        wide = replace(cfg.sae, d_in=d * (1 + len(CONSTANTS)), d_out=d, apply_b_dec_to_input=False)
        sae = replace(wide, activation="batchtopk")
        return replace(cfg, sae=sae, objective=replace(cfg.objective, temporal="none"))

    def batch(self, batch: ActivationBatch) -> ActivationBatch:
        x = batch.x.float()
        return ActivationBatch(torch.cat([x, running_means(x, batch.segments, CONSTANTS), x], dim=-1), batch.segments)

    def finished(self) -> RunningMeans:
        return RunningMeans(self.trainer.finished(), CONSTANTS).eval()
