"""Temporal objectives: T-SAE's contrastive loss, slowness, and TC-SAE's window from statistics. Pure functions.

docs/objectives.md compares the formulas and their cost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tsae.parallel.axis import SINGLE_PROCESS, Ranks
from tsae.training.feature_lists import FeatureLists
from tsae.utils.device import runs_behind
from tsae_kernels import TemporalStats
from tsae_kernels.losses import window_weights
from tsae_kernels.segments import find_runs


class Pairs(NamedTuple):
    """Pairs of positions of a batch (B, T), as indices into B * T; both (P) int64."""

    anchors: Tensor
    partners: Tensor


class MaskedPairs(NamedTuple):
    """`Pairs` in a list of fixed length; valid: (P) bool, False for places that hold no pair."""

    anchors: Tensor
    partners: Tensor
    valid: Tensor


def draw_pairs(segments: Tensor, offset: int, count: int, generator: torch.Generator) -> Pairs:
    """Positions (anchors), each with a partner 1 to ``offset`` later in its segment, drawn uniformly.

    segments: (B, T) on the CPU
    count: anchors drawn, without replacement; 0 takes every position with a later neighbour in its segment
    generator: on the CPU
    """
    end = find_runs(segments).end
    later = end - 1 - torch.arange(segments.shape[1])  # [B, T] positions left in the segment, negative if excluded
    anchors = (later > 0).flatten().nonzero().squeeze(1)
    if 0 < count < len(anchors):
        anchors = anchors[torch.randperm(len(anchors), generator=generator)[:count]].sort().values
    lag = torch.ones_like(anchors)
    if offset > 1:
        choices = later.flatten()[anchors].clamp(max=offset)
        # float64, which never rounds up to `choices` itself
        lag = 1 + (torch.rand(len(anchors), generator=generator, dtype=torch.float64) * choices).long()
    return Pairs(anchors, anchors + lag)


def draw_pairs_by_hash(segments: Tensor, offset: int, count: int, seed: int, step: Tensor) -> MaskedPairs:
    """As `draw_pairs`, on any device and without waiting for it.

    Every position gets a number that depends on (seed, step, position) alone; the ``count`` lowest are the anchors.

    segments: (B, T), of the full batch
    step: int64 scalar on the same device
    """
    end = find_runs(segments).end
    later = (end - 1 - torch.arange(segments.shape[1], device=segments.device)).flatten()
    position = torch.arange(later.numel(), device=segments.device)
    stream = _mix(_mix(step + (seed * 1_000_003) % 2**62) + 2 * position)
    drawn = torch.where(later > 0, stream >> 1 & _POSITIVE, _POSITIVE)
    anchors, valid = position, later > 0
    if 0 < count < later.numel():
        anchors = drawn.topk(count, largest=False).indices.sort().values
        valid = valid.index_select(0, anchors)
    lag = torch.ones_like(anchors)
    if offset > 1:
        choices = later.index_select(0, anchors).clamp(1, offset)
        uniform = (_mix(stream.index_select(0, anchors) + 1) >> 11 & (1 << 53) - 1).double() * 2.0**-53
        lag = 1 + (uniform * choices).long()
    return MaskedPairs(anchors, torch.where(valid, anchors + lag, anchors), valid)


_POSITIVE = (1 << 62) - 1


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 that looks random: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * (factor - (1 << 64))
    return x ^ (x >> 31 & (1 << 33) - 1)


def contrastive_loss(
    h: Tensor | FeatureLists,
    pairs: Pairs | MaskedPairs,
    temperature: float = 0.1,
    *,
    group: int | None = None,
    other_sequences: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    first: int = 0,
) -> Tensor:
    """Symmetric InfoNCE between tokens and their neighbours: the contrastive term of T-SAE (Bhalla et al. 2025, arXiv
    2511.05541), on its high-level features, with cosine similarity.

        z_i = h[t_i, :group] / |h[t_i, :group]|,   y_i the same of the partner,   s_ij = z_i . y_j / temperature
        L   = -1/(2P) sum_i [ log softmax_j(s_ij)_i + log softmax_j(s_ji)_i ]

    Our readings, each an option: a temperature; a sample of the batch's pairs instead of all; offsets above 1. Our
    batches hold whole sequences, so the negatives include other pairs of the same text; ``other_sequences`` excludes
    these.

    h: (B, T, d_sae); only the rows of ``pairs`` are read
    pairs: from `draw_pairs` or `draw_pairs_by_hash`, of the full batch (B, T)
    group: number of features used, the first ones; None: all
    ranks: with several processes ``h`` is a shard of the batch and the dictionary, and ``pairs`` those of the full
        batch, whose rows every process gathers
    first: index in the full batch of the first sequence of ``h``
    out: scalar, float32 (float64 for float64 h), at least 0; 0 without pairs. A token without an active feature in the
        group has similarity 0 to all others, and no gradient.
    """
    tokens, count = h.shape[1], len(pairs.anchors)
    if ranks.world.size > 1:  # every process needs the rows of all: another computation, of the same value
        rows = _rows_of_all_shards(h, torch.cat(pairs[:2]) - first * tokens, group, ranks)
        return _cross_entropy(_cosines(rows, ranks) / temperature, pairs, tokens, other_sequences=other_sequences)
    # Rows before columns: the gradient is then scattered once, over few rows.
    rows = _rows(h, torch.cat(pairs[:2]), group)  # [2P, group]
    dtype = torch.promote_types(rows.dtype, torch.float32)
    rows = _unit(rows.to(dtype)).to(h.dtype)  # under autocast the product is in bfloat16, as all others
    z, y = rows[:count], rows[count:]
    if count == 0:
        return z.sum().to(dtype)
    scores = (z @ y.T).to(dtype) / temperature  # [P, P]
    return _cross_entropy(scores, pairs, tokens, other_sequences=other_sequences)


def _cross_entropy(scores: Tensor, pairs: Pairs | MaskedPairs, tokens: int, *, other_sequences: bool) -> Tensor:
    if len(scores) == 0:
        return scores.sum()
    if other_sequences:
        sequence = pairs.anchors // tokens
        same = sequence[:, None] == sequence
        scores = scores.masked_fill(same.fill_diagonal_(False), -torch.inf)
    target = torch.arange(len(scores), device=scores.device)
    if isinstance(pairs, Pairs):
        return 0.5 * (functional.cross_entropy(scores, target) + functional.cross_entropy(scores.T, target))
    # The diagonal stays, so that every loss is finite.
    absent = ~(pairs.valid[:, None] & pairs.valid)
    scores = scores.masked_fill(absent.fill_diagonal_(False), -torch.inf)
    losses = [functional.cross_entropy(each, target, reduction="none") for each in (scores, scores.T)]
    return 0.5 * torch.where(pairs.valid, sum(losses), 0.0).sum() / pairs.valid.sum().clamp(min=1)


def _rows(h: Tensor | FeatureLists, tokens: Tensor, width: int | None) -> Tensor:
    """(n, width): the first ``width`` features (None: all) of the ``tokens`` (n), indices into B * T."""
    if isinstance(h, FeatureLists):
        return h.rows(tokens, h.shape[2] if width is None else width)
    return h.flatten(0, 1).index_select(0, tokens)[:, :width]


def _rows_of_all_shards(h: Tensor | FeatureLists, indices: Tensor, group: int | None, ranks: Ranks) -> Tensor:
    """The rows ``indices`` of ``h`` flattened to (B * T, d_sae), from all shards of the batch; float32 or float64."""
    if isinstance(h, FeatureLists) or runs_behind(h.device):
        length = h.shape[0] * h.shape[1]
        own = (indices >= 0) & (indices < length)
        rows = _rows(h, indices.clamp(0, max(length - 1, 0)), group)
        rows = torch.where(own[:, None], rows.to(torch.promote_types(rows.dtype, torch.float32)), 0.0)
        return ranks.data.sum_identity_grad(rows)
    tokens = h.flatten(0, 1)
    own = (indices >= 0) & (indices < len(tokens))
    rows = tokens.index_select(0, indices[own])[:, :group]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scattered = rows.new_zeros(len(indices), rows.shape[1]).index_copy(0, own.nonzero().squeeze(1), rows)
    return ranks.data.sum_identity_grad(scattered)


def _cosines(rows: Tensor, ranks: Ranks) -> Tensor:
    """[P, P]: cosine similarity of each row of the first half to each row of the second, over the full dictionary.

    Products and lengths are each summed over the shards before they are combined, so all processes hold the same value.
    """
    z, y = rows.chunk(2)
    lengths = _inverse_length(ranks.features.sum_identity_grad(rows.square().sum(-1)))
    before, after = lengths.chunk(2)
    return ranks.features.sum_identity_grad(z @ y.T) * before[:, None] * after


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays, and gets no gradient."""
    return rows * _inverse_length(rows.square().sum(-1, keepdim=True))


def _inverse_length(square: Tensor) -> Tensor:
    """1 / sqrt(square), and 0 without gradient for 0."""
    some = square > 0
    return torch.where(some, torch.where(some, square, 1.0).rsqrt(), 0.0)


def count_pairs(segments: Tensor, offset: int) -> Tensor:
    """Number of pairs 1 to ``offset`` apart inside a segment, a scalar int64; segments: (B, T)."""
    end = find_runs(segments).end
    later = end - 1 - torch.arange(segments.shape[1], device=segments.device)
    return later.clamp(min=0, max=offset).sum()


def slow_loss(
    stats: TemporalStats, positions: int | Tensor, pairs: int | Tensor, ranks: Ranks = SINGLE_PROCESS
) -> Tensor:
    """Slowness: each feature's squared differences over its own variance, which is 1 - autocorrelation.

        L = mean_j  D_j / (2 pairs var_j),    var_j = Q_j / positions - (A_j / positions)^2

    with D, A and Q summed over the batch. For one offset it is 1 minus the autocorrelation there, up to the effect of
    segment edges on the mean; for several it is the mean over their pairs. It is the delta value of slow feature
    analysis (Wiskott and Sejnowski 2002) as a penalty: a feature lowers it neither by shrinking nor by becoming
    constant. All features have equal weight, rare ones too; features constant in the batch are left out.

    stats: of one band, (1, offset); its gradient enters the backward pass of the activation, so there is no second pass
        over the features
    positions, pairs: in the full batch: non-excluded positions, and `count_pairs`
    ranks: with several processes ``stats`` are those of a shard of the batch and the dictionary
    out: scalar in the statistics' dtype; 0 with zero gradient if no feature varies
    """
    D, A, Q = (s.sum(0).double() for s in (stats.differences[:, 0], stats.total, stats.square))  # [d_sae]
    D, A, Q = ranks.data.sum_identity_grad(torch.stack([D, A, Q]))
    n = torch.as_tensor(positions, device=A.device).clamp(min=1)
    p = torch.as_tensor(pairs, device=A.device).clamp(min=1)
    variance = Q / n - (A / n) ** 2
    varies = variance > 1e-6 * Q / n  # the precision of float32 sums
    ratio = torch.where(varies, D, 0.0) / (2.0 * p * torch.where(varies, variance, 1.0))
    features = ranks.features
    return (features.sum_identity_grad(ratio.sum()) / features.sum_no_grad(varies.sum()).clamp(min=1)).to(
        stats.total.dtype
    )


class WindowEdges(NamedTuple):
    """The pairs (t, t + 1) of a batch (B, T) near the ends of a segment, which lie in fewer windows than the others.

    full: [] the weight of the other pairs
    firsts: (P) int64, t as index into B * T; missing: (P) ``full`` minus the weight of the pair
    """

    full: Tensor
    firsts: Tensor
    missing: Tensor


def find_window_edges(segments: Tensor, window: int) -> WindowEdges:
    """For `window_loss`; segments: (B, T), best on the CPU, since the number of edges must be known there."""
    weights = window_weights(torch.empty(*segments.shape, 1, dtype=torch.float64), window, segments.cpu())  # [B, T]
    runs = find_runs(segments.cpu())
    t = torch.arange(segments.shape[1])
    windows = torch.where(runs.start == t, (runs.end - t - window + 1).clamp(min=0), 0).sum()
    full = torch.where(windows > 0, 1.0 / windows.clamp(min=1).double(), 0.0)
    missing = torch.where(runs.valid & (t + 1 < runs.end), full - weights, 0.0).flatten()
    firsts = (missing > 1e-9 * full).nonzero().squeeze(1)  # `weights` has rounding of its own
    return WindowEdges(full, firsts, missing[firsts])


def window_loss_of_lists(h: FeatureLists, segments: Tensor, window: int, *, group: int | None = None) -> Tensor:
    """`window_loss` for lists, from the products of neighbouring tokens; segments: (B, T); a scalar, float32."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    weights = window_weights(h.values.new_empty(*h.shape[:2], 1, dtype=dtype), window, segments)  # [B, T]
    return (weights * h.squared_steps(h.shape[2] if group is None else group)).sum()


def window_loss(h: Tensor, stats: TemporalStats, edges: WindowEdges, *, group: int | None = None) -> Tensor:
    """TC-SAE's window (equation 3), `tsae_kernels.window_consistency`, from the statistics.

    Away from the ends of a segment a pair of neighbours lies in window - 1 windows. The loss is therefore D of the band
    (1, 1), minus a correction for the few pairs at the ends, the only rows of h that are read.

    h: (B, T, d_sae); stats: of h, the first band (1, 1)
    edges: from `find_window_edges`, on h's device
    group: number of features used, the first ones; None: all
    out: scalar in the statistics' dtype
    """
    pairs = stats.differences[:, 0, :group].sum()
    rows = h.flatten(0, 1).index_select(0, torch.cat([edges.firsts, edges.firsts + 1]))  # [2P, d_sae]
    before, after = rows[:, :group].to(pairs.dtype).chunk(2)
    missing = edges.missing.to(pairs.dtype) @ (after - before).square().sum(1)
    return edges.full.to(pairs.dtype) * pairs - missing
