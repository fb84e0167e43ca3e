"""Temporal objectives beyond the two papers': T-SAE's contrast, and slowness. Pure functions.

docs/objectives.md holds the formulas side by side, with the cost of each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tsae.parallel.axis import SINGLE_PROCESS, Ranks
from tsae_kernels import TemporalStats
from tsae_kernels.losses import window_weights
from tsae_kernels.segments import find_runs


class Pairs(NamedTuple):
    """Pairs of positions of a batch (B, T), as indices into B * T; both (P) int64."""

    anchors: Tensor
    partners: Tensor


def draw_pairs(segments: Tensor, offset: int, count: int, generator: torch.Generator) -> Pairs:
    """Positions and, for each, one 1 to ``offset`` later in its segment, drawn uniformly from those there are.

    segments: (B, T) on the CPU
    count: positions drawn, without replacement; 0 takes every one that has a later neighbour in its segment
    generator: of the CPU
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


def contrastive_loss(
    h: Tensor,
    pairs: Pairs,
    temperature: float = 0.1,
    *,
    group: int | None = 0,
    other_sequences: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    first: int = 0,
) -> Tensor:
    """Symmetric InfoNCE between tokens and their neighbours: the contrastive term of T-SAE (Bhalla et al. 2025, arXiv
    2511.05541), on its high-level features, with cosine similarity.

        z_i = h[t_i, :group] / |h[t_i, :group]|,   y_i the same of the partner,   s_ij = z_i . y_j / temperature
        L   = -1/(2P) sum_i [ log softmax_j(s_ij)_i + log softmax_j(s_ji)_i ]

    Our readings, each an option: a temperature; a sample of the batch's pairs rather than all; offsets above 1. A batch
    of ours holds whole sequences, so that other pairs of the same text are among the negatives, and pull apart what
    lies together; ``other_sequences`` leaves them out.

    h: (B, T, d_sae); only the rows of ``pairs`` are read
    pairs: from `draw_pairs`
    group: the first so many features; 0 takes all, None has none
    ranks: with several, ``h`` is a share of the batch and the dictionary, and ``pairs`` are those of the whole batch,
        whose rows are put together on every process
    first: the sequence of the batch that ``h`` begins with
    out: scalar, float32 (float64 for float64 h), at least 0; 0 without pairs. A token without an active feature in the
        group has similarity 0 to all, and no gradient.
    """
    tokens, count = h.shape[1], len(pairs.anchors)
    if ranks.world.size > 1:
        rows = _rows_of_all(h, torch.cat(pairs) - first * tokens, group, ranks)
        return _cross_entropy(_cosines(rows, ranks) / temperature, pairs, tokens, other_sequences=other_sequences)
    # Rows before columns: the gradient is then spread once, over few rows.
    rows = h.flatten(0, 1).index_select(0, torch.cat(pairs))[:, : group or None]  # [2P, group]
    dtype = torch.promote_types(rows.dtype, torch.float32)
    rows = _unit(rows.to(dtype)).to(h.dtype)  # under autocast the product is in bfloat16, as all others
    z, y = rows[:count], rows[count:]
    if count == 0:
        return z.sum().to(dtype)
    scores = (z @ y.T).to(dtype) / temperature  # [P, P]
    return _cross_entropy(scores, pairs, tokens, other_sequences=other_sequences)


def _cross_entropy(scores: Tensor, pairs: Pairs, tokens: int, *, other_sequences: bool) -> Tensor:
    if len(scores) == 0:
        return scores.sum()
    if other_sequences:
        sequence = pairs.anchors // tokens
        same = sequence[:, None] == sequence
        scores = scores.masked_fill(same.fill_diagonal_(False), -torch.inf)
    target = torch.arange(len(scores), device=scores.device)
    return 0.5 * (functional.cross_entropy(scores, target) + functional.cross_entropy(scores.T, target))


def _rows_of_all(h: Tensor, indices: Tensor, group: int | None, ranks: Ranks) -> Tensor:
    """The rows of ``h`` [N, features here] that ``indices`` name, of all shares of the batch; float32, or float64."""
    tokens = h.flatten(0, 1)
    own = (indices >= 0) & (indices < len(tokens))
    rows = tokens.index_select(0, indices[own])
    rows = rows[:, : group or None] if group is not None else rows[:, :0]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return ranks.data.sum(rows.new_zeros(len(indices), rows.shape[1]).index_copy(0, own.nonzero().squeeze(1), rows))


def _cosines(rows: Tensor, ranks: Ranks) -> Tensor:
    """[P, P]: similarity of each of the first half of rows to each of the second, over all parts of the dictionary.

    Products and lengths are each whole before they meet, so that all that follows is the same on every process.
    """
    z, y = rows.chunk(2)
    lengths = _inverse_length(ranks.features.sum(rows.square().sum(-1)))
    before, after = lengths.chunk(2)
    return ranks.features.sum(z @ y.T) * before[:, None] * after


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

    with D, A and Q summed over the batch; for one offset it is 1 minus the autocorrelation there, apart from what the
    edges of segments do to the mean, and for several the mean over their pairs. It is slow feature analysis's
    delta value (Wiskott and Sejnowski 2002) made a penalty: a feature cannot lower it by shrinking, nor by becoming
    constant. Every feature counts alike, rare ones too. Those that do not vary in the batch are left out.

    stats: of one band, (1, offset): its gradient is what the activation's own backward expects, so that there is no
        second pass over the features
    positions, pairs: in the whole batch: positions that count, and `count_pairs`
    ranks: with several, ``stats`` are of a share of the batch and the dictionary
    out: scalar in the statistics' dtype; 0 with zero gradient if no feature varies
    """
    D, A, Q = (s.sum(0).double() for s in (stats.differences[:, 0], stats.total, stats.square))  # [d_sae]
    if ranks.data.size > 1:
        D, A, Q = ranks.data.sum(torch.stack([D, A, Q]))
    n = torch.as_tensor(positions, device=A.device).clamp(min=1)
    p = torch.as_tensor(pairs, device=A.device).clamp(min=1)
    variance = Q / n - (A / n) ** 2
    varies = variance > 1e-6 * Q / n  # float32 sums do not know less
    ratio = torch.where(varies, D, 0.0) / (2.0 * p * torch.where(varies, variance, 1.0))
    features = ranks.features
    return (features.sum(ratio.sum()) / features.total(varies.sum()).clamp(min=1)).to(stats.total.dtype)


class WindowEdges(NamedTuple):
    """The pairs (t, t + 1) of a batch (B, T) that lie in fewer windows than those amid a segment, at its two ends.

    full: [] the weight of a pair amid a segment
    firsts: (P) int64, t as index into B * T; missing: (P) what the pair's weight is short of ``full``
    """

    full: Tensor
    firsts: Tensor
    missing: Tensor


def find_window_edges(segments: Tensor, window: int) -> WindowEdges:
    """For `window_loss`; segments: (B, T), best on the CPU, as how many edges there are must be known."""
    weights = window_weights(torch.empty(*segments.shape, 1, dtype=torch.float64), window, segments.cpu())  # [B, T]
    runs = find_runs(segments.cpu())
    t = torch.arange(segments.shape[1])
    windows = torch.where(runs.start == t, (runs.end - t - window + 1).clamp(min=0), 0).sum()
    full = torch.where(windows > 0, 1.0 / windows.clamp(min=1).double(), 0.0)
    missing = torch.where(runs.valid & (t + 1 < runs.end), full - weights, 0.0).flatten()
    firsts = (missing > 1e-9 * full).nonzero().squeeze(1)  # `weights` has rounding of its own
    return WindowEdges(full, firsts, missing[firsts])


def window_loss(h: Tensor, stats: TemporalStats, edges: WindowEdges, *, group: int = 0) -> Tensor:
    """TC-SAE's window (equation 3), `tsae_kernels.window_consistency` of the first ``group`` features, from statistics.

    A pair of neighbours amid a segment lies in window - 1 windows, so that the loss is a sum over all pairs, D of the
    band (1, 1), less what the few at a segment's ends are short of it. Of h only those few rows are read.

    h: (B, T, d_sae); stats: of h, the first band (1, 1)
    edges: from `find_window_edges`, on h's device
    group: the first so many features; 0 takes all
    out: scalar in the statistics' dtype
    """
    pairs = stats.differences[:, 0, : group or None].sum()
    rows = h.flatten(0, 1).index_select(0, torch.cat([edges.firsts, edges.firsts + 1]))  # [2P, d_sae]
    before, after = rows[:, : group or None].to(pairs.dtype).chunk(2)
    missing = edges.missing.to(pairs.dtype) @ (after - before).square().sum(1)
    return edges.full.to(pairs.dtype) * pairs - missing
