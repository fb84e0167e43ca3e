"""For SAELens's trainer and loader: temporal objectives in training, and hysteresis in inference.

Importing this module registers with SAELens

* the training SAEs `temporal_topk` and `temporal_batchtopk`: SAELens's TopK and BatchTopK, AuxK included, plus one of
  our temporal objectives. For inference they are saved as ordinary SAEs, SAELens's `topk` and `jumprelu`;
* the SAEs `tsae_schmitt` and `tsae_jumprelu_schmitt`, so that ``SAE.load_from_disk(run / "sae")`` reads a run with
  hysteresis.

A temporal objective needs complete sequences, but SAELens's activation store shuffles tokens. So the trainer's data
provider must be a `SequenceBatches`, and the SAE must `follow` it, as in examples/train_with_sae_lens.py.

Needs sae-lens 6.54 (``pip install 'tsae[peers]'``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tsae.config import ObjectiveConfig
from tsae.errors import UserError
from tsae.sae.normalization import InputNormalizer
from tsae.training.objectives import FeatureBatch, bands_for, temporal_term
from tsae.training.temporal_objectives import Pairs, draw_pairs
from tsae_kernels import activate_with_stats, temporal_stats

try:
    from sae_lens import register_sae_class, register_sae_training_class
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import SAE, SAEConfig, TrainCoefficientConfig, TrainStepInput
    from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
except ImportError as error:
    raise UserError(
        f"tsae.integrations.sae_lens cannot import sae-lens ({error}); pip install 'tsae[peers]'."
    ) from None


class SequenceBatches(Iterator[Tensor]):
    """A data provider for SAELens's trainer that keeps sequences intact: (B * T, d_in) float32, sequence by sequence.

    ``segments`` holds the ids (B, T) of the latest batch; None before the first.

    Args:
        batches: pairs of activations (B, T, d_in) and segments (B, T), for example from `tsae.data.harvest.Harvester`.
        normalizer: centring and scaling of the activations, None for none. SAELens does not centre, but the mean of a
            residual stream is many times its spread; after training `SparseAutoencoder.folded` puts both into the
            weights.
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], normalizer: InputNormalizer | None = None) -> None:
        self._batches, self._normalizer = iter(batches), normalizer
        self.segments: Tensor | None = None

    def __next__(self) -> Tensor:
        x, self.segments = next(self._batches)
        x = x.float() if self._normalizer is None else self._normalizer(x)
        return x.flatten(0, 1)


@dataclass
class _TemporalConfig:
    """The fields that both training SAEs add to SAELens's.

    temporal: `contrastive`, `multiscale`, `window` or `slow`
    temporal_coefficient: weight of the term
    temporal_warm_up_steps: steps over which the weight rises from 0
    temporal_options: other fields of `ObjectiveConfig`, such as {"temperature": 0.1, "group": 512}
    temporal_seed: seed of the contrastive pairs
    """

    temporal: str = "contrastive"
    temporal_coefficient: float = 1.0
    temporal_warm_up_steps: int = 0
    temporal_options: dict[str, Any] = field(default_factory=dict)
    temporal_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        self.objective()

    def objective(self) -> ObjectiveConfig:
        """The objective; `UserError` for an unknown option or an invalid value."""
        try:
            objective = ObjectiveConfig(temporal=self.temporal, **self.temporal_options)  # type: ignore[arg-type]
        except TypeError:
            raise UserError(
                f"temporal_options is {self.temporal_options}; ObjectiveConfig has no such field."
            ) from None
        objective.check()
        return objective


@dataclass
class TemporalTopKTrainingSAEConfig(_TemporalConfig, TopKTrainingSAEConfig):
    """SAELens's TopK with a temporal objective; saved for inference as `topk`."""

    @classmethod
    def architecture(cls) -> str:
        return "temporal_topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


@dataclass
class TemporalBatchTopKTrainingSAEConfig(_TemporalConfig, BatchTopKTrainingSAEConfig):
    """SAELens's BatchTopK with a temporal objective; saved for inference as `jumprelu`."""

    @classmethod
    def architecture(cls) -> str:
        return "temporal_batchtopk"


class _Temporal:
    """The loss that both training SAEs add to SAELens's: `temporal_loss`, on the sequences of the batch."""

    cfg: Any
    batches: SequenceBatches | None = None

    def follow(self, batches: SequenceBatches) -> None:
        """Use the segments of ``batches``, which must be the trainer's data provider."""
        self.batches = batches

    def get_coefficients(self) -> dict[str, Any]:
        own = TrainCoefficientConfig(self.cfg.temporal_coefficient, self.cfg.temporal_warm_up_steps)
        return {**super().get_coefficients(), "temporal": own}  # type: ignore[misc]

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)  # type: ignore[misc]
        term = self._temporal_term(feature_acts, step_input.n_training_steps)
        return {**losses, "temporal_loss": step_input.coefficients["temporal"] * term}

    def _temporal_term(self, feature_acts: Tensor, step: int) -> Tensor:
        segments = None if self.batches is None else self.batches.segments
        if segments is None or segments.numel() != feature_acts.shape[0]:
            raise UserError(
                "A temporal objective needs whole sequences, but SAELens's activation store shuffles tokens; use a "
                "SequenceBatches as the trainer's data provider, and pass it to sae.follow."
            )
        objective = self.cfg.objective()
        h = feature_acts.to_dense() if feature_acts.is_sparse else feature_acts
        h = h.reshape(*segments.shape, -1)  # [B, T, d_sae]
        pairs = None
        if "contrastive" in objective.terms:
            generator = torch.Generator().manual_seed(self.cfg.temporal_seed + step)
            pairs = draw_pairs(segments.cpu(), objective.offset, objective.pairs, generator)
            pairs = Pairs(*(index.to(h.device) for index in pairs))
        segments = segments.to(h.device)
        stats = temporal_stats(h, bands_for(objective), segments)
        return temporal_term(FeatureBatch(h=h, stats=stats, segments=segments, pairs=pairs), objective)


class TemporalTopKTrainingSAE(_Temporal, TopKTrainingSAE):
    """`temporal_topk`: SAELens's TopK with a temporal objective."""


class TemporalBatchTopKTrainingSAE(_Temporal, BatchTopKTrainingSAE):
    """`temporal_batchtopk`: SAELens's BatchTopK with a temporal objective."""


@dataclass
class SchmittSAEConfig(SAEConfig):
    """Hysteresis with a threshold and a release per feature."""

    @classmethod
    def architecture(cls) -> str:
        return "tsae_schmitt"


@dataclass
class LearnedSchmittSAEConfig(SchmittSAEConfig):
    """The same, for thresholds that were learned."""

    @classmethod
    def architecture(cls) -> str:
        return "tsae_jumprelu_schmitt"


class SchmittSAE(SAE[SchmittSAEConfig]):
    """Hysteresis for inference in SAELens.

    ``encode`` takes (..., T, d_in) with T along one sequence. In SAELens the first position is BOS, which training left
    out, so hysteresis is reset after it.
    """

    b_enc: nn.Parameter
    threshold: nn.Parameter
    release: nn.Parameter

    def initialize_weights(self) -> None:
        super().initialize_weights()
        for name in ("b_enc", "threshold", "release"):
            value = torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
            setattr(self, name, nn.Parameter(value))

    def encode(self, x: Tensor) -> Tensor:
        """Features (..., T, d_sae)."""
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        rows = pre.reshape(-1, pre.shape[-2] if pre.dim() > 1 else 1, pre.shape[-1])  # [B, T, d_sae]
        segments = torch.ones(rows.shape[:2], dtype=torch.int32, device=rows.device)
        segments[:, 0] = 0
        thresholds = self.threshold.detach(), self.release.detach()
        h, _ = activate_with_stats(rows, None, "relu", *thresholds, ((1, 1),), segments)
        return self.hook_sae_acts_post(h.reshape(pre.shape))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction (..., T, d_in)."""
        out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)


register_sae_training_class("temporal_topk", TemporalTopKTrainingSAE, TemporalTopKTrainingSAEConfig)
register_sae_training_class("temporal_batchtopk", TemporalBatchTopKTrainingSAE, TemporalBatchTopKTrainingSAEConfig)
register_sae_class("tsae_schmitt", SchmittSAE, SchmittSAEConfig)
register_sae_class("tsae_jumprelu_schmitt", SchmittSAE, LearnedSchmittSAEConfig)
