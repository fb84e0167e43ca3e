"""Metrics of an evaluation set, as streaming accumulators that exclude positions with a negative segment."""

from tsae.evaluation.metrics.bits import CodeLength
from tsae.evaluation.metrics.language_model import LanguageModelMetrics
from tsae.evaluation.metrics.massive import MassiveActivations
from tsae.evaluation.metrics.reconstruction import ReconstructionMetrics
from tsae.evaluation.metrics.temporal import Persistence, TemporalMetrics, shuffle_within_segments

__all__ = [
    "CodeLength",
    "LanguageModelMetrics",
    "MassiveActivations",
    "Persistence",
    "ReconstructionMetrics",
    "TemporalMetrics",
    "shuffle_within_segments",
]
