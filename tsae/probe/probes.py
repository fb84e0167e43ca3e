"""Sparse linear probes: one-vs-rest logistic regressions on the k features whose means differ most.

As in Gurnee et al. 2023 (arXiv 2305.01610) and SAEBench: on the training part, features are ranked by the absolute
difference between their means on and off a label ("max mean difference"), and a logistic regression with balanced
classes is fitted on the first k.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.probe.problems import Problem
from tsae.sae.model import SparseAutoencoder

KS = (1, 5, 20)  # features per sparse probe
CHANCE = 0.5  # AUC of an uninformed score
DRAWS = 1000  # bootstrap draws
STRENGTHS = (1e-4, 1e-3, 1e-2)  # C of the dense probe, which can overfit
TUNED = 8  # labels used to choose C

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Score:
    """The score of one kind of probe on one problem.

    auc:       area under the ROC curve, one label against the rest, on the test part; the mean over labels
    per_label: the areas, in the order of `Problem.labels`
    draws:     [DRAWS] the mean over documents drawn with replacement. All probes of a problem share the draws, so that
               two probes' draws can be subtracted.
    """

    auc: float
    per_label: tuple[float, ...]
    draws: np.ndarray

    @property
    def stderr(self) -> float:
        """Bootstrap standard error of `auc` over documents."""
        return float(self.draws.std())


def difference(a: Score, b: Score) -> tuple[float, float]:
    """a.auc - b.auc, and its bootstrap standard error."""
    return a.auc - b.auc, float((a.draws - b.draws).std())


def check_installed() -> None:
    """Raise UserError if scikit-learn is not installed."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise UserError(f'The probes need scikit-learn ({error}): run pip install "tsae[probes]".') from error


def sparse_probes(
    sae: SparseAutoencoder, batches: Batches, problems: list[Problem], owner: np.ndarray, seed: int
) -> dict[str, dict[int, Score]]:
    """Score probes on the k features of an autoencoder chosen for each label, for k in `KS`.

    Features are computed twice, once to choose among them and once to keep the chosen ones, to bound the memory.

    sae:      in ``eval()`` mode, on raw activations
    batches:  x [N, T, d] float32 and segments [N, T] of the complete evaluation set, iterable more than once
    problems: over its n counted positions
    owner:    [n] document of each counted position, the unit of the bootstrap
    out:      by problem name and k

    Raises UserError if a feature is not finite.
    """
    chosen = choose_features(_features(sae, batches), problems)
    columns = torch.cat([ranking.flatten() for ranking in chosen]).unique()
    values = torch.cat([h.index_select(1, columns.to(h.device)).cpu() for h in _features(sae, batches)]).numpy()
    out: dict[str, dict[int, Score]] = {}
    for problem, ranking in zip(problems, chosen, strict=True):
        at = torch.searchsorted(columns, ranking.contiguous()).numpy()  # [L, max(KS)] features as columns of values
        train, test = values[problem.train], values[problem.test]
        out[problem.name] = {}
        with _one_thread():
            for k in KS:
                scores = (_sparse_scores(train, test, problem.y[problem.train] == i, at[i, :k]) for i in range(len(at)))
                out[problem.name][k] = _score(problem, owner, seed, scores)
    return out


@torch.no_grad()
def _features(sae: SparseAutoencoder, batches: Batches) -> Iterator[Tensor]:
    """Features [m, d_sae] at counted positions, batch by batch."""
    device = next(sae.parameters()).device
    for x, segments in batches:
        h = sae.encode(x.to(device), segments.to(device))[(segments >= 0).to(device)]
        if not bool(torch.isfinite(h).all()):
            raise UserError("A feature is not finite: the activations or the autoencoder's weights are broken.")
        yield h


def choose_features(features: Iterable[Tensor], problems: list[Problem]) -> list[Tensor]:
    """For each problem [L, max(KS)] int64: the features with the largest difference of means, in descending order.

    features: batches [m, d_sae] that together cover the n counted positions
    """
    sums: list[Tensor] = []
    start = 0
    for h in features:
        stop = start + len(h)
        for i, problem in enumerate(problems):
            y = torch.from_numpy(np.where(problem.train, problem.y, -1)[start:stop]).to(h.device)
            labels = torch.arange(len(problem.labels), device=h.device)
            part = ((y == labels[:, None]).to(h.dtype) @ h).double().cpu()  # [L, d_sae]
            if i < len(sums):
                sums[i] += part
            else:
                sums.append(part)
        start = stop
    chosen = []
    for problem, total in zip(problems, sums, strict=True):
        counts = torch.from_numpy(np.bincount(problem.y[problem.train], minlength=len(problem.labels)))[:, None]
        on, off = total / counts, (total.sum(0) - total) / (counts.sum() - counts)
        ranking = (on - off).abs().argsort(dim=1, descending=True, stable=True)
        chosen.append(ranking[:, : max(KS)])
    return chosen


def _sparse_scores(train: np.ndarray, test: np.ndarray, positive: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[test tokens] scores of one label's probe."""
    train, test = train[:, columns], test[:, columns]
    scale = train.std(axis=0)
    scale[scale == 0] = 1.0
    return _fit(train / scale, positive, 1.0)(test / scale)


def dense_probes(x: np.ndarray, problems: list[Problem], owner: np.ndarray, seed: int) -> dict[str, Score]:
    """An upper reference: the same regression on all dimensions of the standardised activations.

    x:   [n, d] float32, at counted positions
    out: by problem name

    The penalty of each problem is chosen on the last quarter of each label's training tokens.
    """
    with _one_thread():
        return {problem.name: _dense(x, problem, owner, seed) for problem in problems}


def _dense(x: np.ndarray, problem: Problem, owner: np.ndarray, seed: int) -> Score:
    train, test = x[problem.train], x[problem.test]
    mean, scale = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    scale[scale == 0] = 1.0
    train, test = (((part - mean) / scale).astype(np.float32) for part in (train, test))
    y, labels = problem.y[problem.train], range(len(problem.labels))

    late = np.zeros(len(y), dtype=bool)
    for label in labels:
        tokens = np.flatnonzero(y == label)
        late[tokens[len(tokens) * 3 // 4 :]] = True
    some = labels[:: -(-len(labels) // TUNED)]

    def validated(strength: float) -> float:
        scores = (_fit(train[~late], y[~late] == label, strength)(train[late]) for label in some)
        return sum(_auc(score, y[late] == label) for score, label in zip(scores, some, strict=True))

    strength = max(STRENGTHS, key=validated)
    return _score(problem, owner, seed, [_fit(train, y == label, strength)(test) for label in labels])


def _one_thread() -> AbstractContextManager[Any]:
    """One BLAS thread: the fits are many small products, which threads make ten times slower on a busy machine."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def _fit(x: np.ndarray, positive: np.ndarray, strength: float) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a logistic regression of `positive` [n] on x [n, features]; out: its scores as a function of features."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=strength, class_weight="balanced", max_iter=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the order of the scores has settled by then
        probe.fit(x, positive)
    return probe.decision_function


def _score(problem: Problem, owner: np.ndarray, seed: int, scores: Iterable[np.ndarray]) -> Score:
    """Areas under the ROC curves of each label's scores [test tokens], and their bootstrap."""
    y, owner = problem.y[problem.test], owner[problem.test]
    documents, group = np.unique(owner, return_inverse=True)
    G = len(documents)
    drawn = np.random.default_rng(seed).multinomial(G, np.full(G, 1 / G), size=DRAWS).astype(np.float64)  # [DRAWS, G]
    areas, total, weight = [], np.zeros(DRAWS), np.zeros(DRAWS)
    for label, score in enumerate(scores):
        wins = wins_between(score, y == label, group, G)
        positives = np.bincount(group[y == label], minlength=G).astype(np.float64)
        negatives = np.bincount(group[y != label], minlength=G).astype(np.float64)
        areas.append(wins.sum() / (positives.sum() * negatives.sum()))
        won, pairs = ((drawn @ wins) * drawn).sum(axis=1), (drawn @ positives) * (drawn @ negatives)
        share = (drawn @ positives) / positives.sum() * (pairs > 0)
        total += share * won / np.where(pairs > 0, pairs, 1)
        weight += share
    draws = total / np.where(weight > 0, weight, 1)
    return Score(float(np.mean(areas)), tuple(map(float, areas)), draws[weight > 0])


def wins_between(score: np.ndarray, positive: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """[groups, groups] float64: among pairs of a positive token of one document and a negative token of another, the
    number in which the positive one scores higher; a tie counts half. Their sum over the number of pairs is the area
    under the ROC curve.

    score: [n]; positive: [n] bool; group: [n] int, below `groups`
    """
    wins = np.empty((groups, groups))
    for of in range(groups):
        others = np.sort(score[~positive & (group == of)])
        below = sum(np.searchsorted(others, score[positive], side=side) for side in ("left", "right"))
        wins[:, of] = np.bincount(group[positive], weights=below / 2, minlength=groups)
    return wins


def _auc(score: np.ndarray, positive: np.ndarray) -> float:
    wins = wins_between(score, positive, np.zeros(len(score), dtype=int), 1)
    return float(wins.sum() / (positive.sum() * (~positive).sum()))
