"""Temporal sparse autoencoders for language models."""

from tsae.config import SAEConfig, TrainConfig
from tsae.errors import UserError
from tsae.sae.model import SparseAutoencoder

__all__ = ["SAEConfig", "SparseAutoencoder", "TrainConfig", "UserError"]
