"""SAELens's trainer step, from the installed package (`make peers`)."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ABSENT = "sae-lens is not installed; run `make peers`"


def have_sae_lens() -> bool:
    return importlib.util.find_spec("sae_lens") is not None


def sae_lens_topk_step(
    d_in: int, d_sae: int, k: int, tokens: int, lr: float, device: torch.device, *, autocast: bool, sparse: bool
) -> Callable[[Tensor], Any]:
    """One step of `SAETrainer` on a batch [tokens, d_in]: TopK, auxiliary loss (no feature is dead), Adam, clipping.

    sparse: sets `use_sparse_activations`, which SAELens recommends for float32 without autocast, and turns off
        `rescale_acts_by_decoder_norm`, with which its backward pass fails
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = TopKTrainingSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        device=str(device),
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,
    )
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=tokens,
            lr=lr,
            lr_end=lr,
            device=str(device),
            autocast=autocast,
        ),
        TopKTrainingSAE(config),
        iter(()),
    )

    def step(batch: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse invariant checks")
            output = trainer.step(batch)
        trainer.n_training_steps += 1
        return output

    return step
