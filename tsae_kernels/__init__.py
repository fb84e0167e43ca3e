"""Temporal kernels for sparse autoencoders: activation and squared temporal differences in one pass.

Needs torch alone. See docs/mathematics.md for the derivations and `python -m tsae_kernels` for the backends.
"""

from tsae_kernels.backends.registry import available_backends
from tsae_kernels.bands import MULTISCALE, Bands
from tsae_kernels.functions import TemporalStats, activate_with_stats, encode_with_stats, temporal_stats
from tsae_kernels.losses import (
    temporal_loss,
    temporal_loss_from_stats,
    window_consistency,
    within_sequence_variance,
)
from tsae_kernels.scans import leaky_recurrence, viterbi_path
from tsae_kernels.segments import count_positions

__all__ = [
    "MULTISCALE",
    "Bands",
    "TemporalStats",
    "activate_with_stats",
    "available_backends",
    "count_positions",
    "encode_with_stats",
    "leaky_recurrence",
    "temporal_loss",
    "temporal_loss_from_stats",
    "temporal_stats",
    "viterbi_path",
    "window_consistency",
    "within_sequence_variance",
]
