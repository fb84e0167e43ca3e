"""Probes on features whose score is known."""

import builtins

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tsae.errors import UserError
from tsae.probe import probes as module
from tsae.probe.probes import (
    CHANCE,
    KS,
    check_installed,
    choose_features,
    dense_probes,
    difference,
    sparse_probes,
    wins_between,
)
from tsae.probe.problems import Problem

N, T, LABELS = 60, 32, 6


class Passed(nn.Module):
    """Features that are the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def encode(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        assert segments is not None
        assert not torch.is_grad_enabled()
        return x


def planted(width: int = 40, seed: int = 0, shuffle: bool = False):
    """Sparse noise, in which feature 3 + label is on at two thirds of the label's tokens and at no other."""
    generator = torch.Generator().manual_seed(seed)
    segments = torch.zeros(N, T, dtype=torch.int32)
    segments[::5, -3:] = -1
    counted = segments.flatten() >= 0
    owner = torch.arange(N)[:, None].expand(N, T).flatten()[counted].numpy()  # a document a row
    y = owner % LABELS
    train = (owner // LABELS) % 2 == 0
    h = (torch.randn(N * T, width, generator=generator) - 1).relu()
    own = torch.zeros(N * T, dtype=torch.int64)
    own[counted] = torch.from_numpy(y)
    h[:, 3 : 3 + LABELS] = 0
    on = torch.rand(N * T, generator=generator) < 2 / 3
    h[torch.arange(N * T)[on], 3 + own[on]] = 1.5
    if shuffle:
        y = np.random.default_rng(seed).permutation(y)
    problem = Problem("planted", tuple("abcdef"), y, train, ~train)
    x = h.view(N, T, width)
    return [(x[:20], segments[:20]), (x[20:], segments[20:])], problem, owner


def test_a_planted_feature_is_found_and_scored():
    batches, problem, owner = planted()
    chosen = choose_features(module._features(Passed(), batches), [problem])
    assert chosen[0][:, 0].tolist() == [3, 4, 5, 6, 7, 8]
    scores = sparse_probes(Passed(), batches, [problem], owner, 0)["planted"]
    assert set(scores) == set(KS)
    # On at 2/3 of the label's tokens only: wins 2/3, ties the rest.
    assert scores[1].auc == pytest.approx(2 / 3 + 1 / 6, abs=0.02)
    assert scores[5].auc >= scores[1].auc - 0.005
    assert len(scores[1].per_label) == LABELS
    assert np.mean(scores[1].per_label) == pytest.approx(scores[1].auc)


def test_a_perfect_feature_scores_1_with_k_1():
    batches, problem, owner = planted()
    at = 0
    for x, segments in batches:
        flat = x.flatten(0, 1)
        counted = (segments >= 0).flatten()
        labels = torch.from_numpy(problem.y[at : at + int(counted.sum())])
        flat[counted, :LABELS] = -0.1 * torch.nn.functional.one_hot(labels, LABELS).float()  # absence tells, too
        flat[~counted] = float("nan")  # never read
        at += int(counted.sum())
    # Fewer features than the largest k, and three that are dead.
    only = [(torch.nn.functional.pad(x[..., :LABELS], (0, 3)), segments) for x, segments in batches]
    for score in sparse_probes(Passed(), only, [problem], owner, 0)["planted"].values():
        assert score.auc == 1
        assert score.stderr < 1e-12
    x = torch.cat([x[segments >= 0] for x, segments in only]).numpy()
    assert dense_probes(x, [problem], owner, 0)["planted"].auc == pytest.approx(1)


def test_shuffled_labels_give_chance():
    batches, problem, owner = planted(shuffle=True)
    for k, score in sparse_probes(Passed(), batches, [problem], owner, 0)["planted"].items():
        assert score.auc == pytest.approx(CHANCE, abs=0.04), k
    x = torch.cat([x[segments >= 0] for x, segments in batches]).numpy()
    assert dense_probes(x, [problem], owner, 0)["planted"].auc == pytest.approx(CHANCE, abs=0.04)


def test_nothing_of_the_test_part_is_learned():
    """Features and probes are chosen on the training part; the test part changes only the scores."""
    batches, problem, owner = planted()
    before = choose_features(module._features(Passed(), batches), [problem])[0]
    test = torch.zeros(N * T, dtype=torch.bool)
    test[torch.cat([segments for _, segments in batches]).flatten() >= 0] = torch.from_numpy(problem.test)
    test = test.view(N, T)
    spoiled = [(x.clone(), segments) for x, segments in batches]
    for (x, _), rows in zip(spoiled, test.split([20, 40]), strict=True):
        x[rows] = 0.0
        x[rows, 20] = 100.0
    after = choose_features(module._features(Passed(), spoiled), [problem])[0]
    assert torch.equal(before, after)
    # A constant test part ties everything.
    assert sparse_probes(Passed(), spoiled, [problem], owner, 0)["planted"][5].auc == CHANCE


def test_the_same_seed_gives_the_same_scores():
    batches, problem, owner = planted()

    def score(seed):
        return sparse_probes(Passed(), batches, [problem], owner, seed)["planted"][5]

    one, again, other = score(0), score(0), score(1)
    assert one.auc == again.auc == other.auc
    assert (one.draws == again.draws).all()
    assert (one.draws != other.draws).any()


def test_selection_is_by_the_difference_of_means():
    batches, problem, _ = planted(seed=3)
    h = torch.cat([x[segments >= 0] for x, segments in batches]).double().numpy()
    ranking = choose_features(module._features(Passed(), batches), [problem])[0]
    for label in range(LABELS):
        on, off = h[problem.train & (problem.y == label)], h[problem.train & (problem.y != label)]
        gap = np.abs(on.mean(0) - off.mean(0))
        assert gap[ranking[label]] == pytest.approx(np.sort(gap)[::-1][: max(KS)], abs=1e-6)
        assert len(set(ranking[label].tolist())) == max(KS)


def test_areas_equal_a_count_of_pairs_and_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    score = rng.integers(0, 6, 80) / 2.0  # many ties
    positive, group = rng.random(80) < 0.3, rng.integers(0, 4, 80)
    wins = wins_between(score, positive, group, 4)
    expected = np.zeros((4, 4))
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive):
            expected[group[i], group[j]] += 1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0
    assert (wins == expected).all()
    pairs = positive.sum() * (~positive).sum()
    assert wins.sum() / pairs == pytest.approx(roc_auc_score(positive, score))


def test_the_bootstrap_draws_documents():
    """Against a token-by-token bootstrap: a document drawn twice counts twice, and so does its label."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(9), 12)
    y = owner % 3
    part = np.ones(len(owner), dtype=bool)
    problem = Problem("p", ("a", "b", "c"), y, ~part, part)
    values = [rng.normal(size=len(owner)) + (y == label) * (1 + owner / 9) for label in range(3)]
    score = module._score(problem, owner, 5, values)
    assert score.auc == pytest.approx(np.mean([roc_auc_score(y == i, values[i]) for i in range(3)]))
    drawn = np.random.default_rng(5).multinomial(9, np.full(9, 1 / 9), size=module.DRAWS)
    expected = []
    for counts in drawn[:20]:
        tokens = np.repeat(np.arange(len(owner)), counts[owner])
        present = [i for i in range(3) if 0 < (y[tokens] == i).sum() < len(tokens)]
        areas = [roc_auc_score(y[tokens] == i, values[i][tokens]) for i in present]
        expected.append(np.average(areas, weights=[(y[tokens] == i).sum() / 36 for i in present]))
    assert score.draws[:20] == pytest.approx(np.array(expected))
    assert 0 < score.stderr < 0.1


def test_a_difference_is_paired():
    batches, problem, owner = planted()
    scores = sparse_probes(Passed(), batches, [problem], owner, 0)["planted"]
    assert difference(scores[5], scores[5]) == (0, 0)
    change, error = difference(scores[5], scores[1])
    assert change == scores[5].auc - scores[1].auc
    assert error < scores[1].stderr + scores[5].stderr


def test_features_that_are_not_finite_are_an_error():
    batches, problem, owner = planted()
    batches[1][0][3, 4, 5] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        sparse_probes(Passed(), batches, [problem], owner, 0)


def test_a_missing_scikit_learn_is_one_sentence(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'run pip install "tsae\[probes\]"'):
        check_installed()
