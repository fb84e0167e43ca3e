"""Metrics of an evaluation set, as streaming accumulators that exclude positions with a negative segment."""

from tsae.metrics.language_model import LanguageModelMetrics
from tsae.metrics.reconstruction import ReconstructionMetrics
from tsae.metrics.temporal import Persistence, TemporalMetrics, shuffle_within_segments

__all__ = [
    "LanguageModelMetrics",
    "Persistence",
    "ReconstructionMetrics",
    "TemporalMetrics",
    "shuffle_within_segments",
]
