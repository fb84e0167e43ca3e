"""Matching and scores on features that are perfect, shuffled, rescaled or dead."""

import pytest
import torch
from torch.nn import functional

from tsae.synthetic.scores import StateScores, match, summary

N = 12


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(4, 500, N, generator=generator) < 0.3
    return hidden, hidden & (torch.rand(hidden.shape, generator=generator) < 0.6)


def test_a_permuted_dictionary_is_matched():
    generator = torch.Generator().manual_seed(1)
    directions = functional.normalize(torch.randn(N, 32, generator=generator), dim=1)
    order = torch.randperm(N, generator=generator)
    decoder = torch.cat([torch.randn(5, 32, generator=generator), -3.0 * directions[order]])
    feature, cosine = match(decoder, directions)
    assert torch.equal(order[feature - 5], torch.arange(N))
    torch.testing.assert_close(cosine, torch.ones(N))
    feature, cosine = match(decoder[:8], directions)  # fewer features than true ones
    assert sorted(feature[feature >= 0].tolist()) == list(range(8))
    assert (cosine[feature < 0] == 0).all()


def test_no_feature_is_matched_twice():
    directions = functional.normalize(torch.tensor([[1.0, 0.2], [1.0, -0.1]]), dim=1)
    decoder = torch.tensor([[1.0, 0.0], [0.9, -0.8]])
    feature, _ = match(decoder, directions)  # both are nearest to the first
    assert feature.tolist() == [0, 1]


def test_perfect_features(states):
    hidden, observed = states
    scores = StateScores()
    for rows in ((0, 1), (1, 4)):  # in two batches
        part = slice(*rows)
        scores.update(2.5 * hidden[part].float(), hidden[part], observed[part])
    found = summary(scores, torch.ones(N, dtype=torch.bool), scores)
    assert found["corr_hidden"] == pytest.approx(1.0)
    assert found["f1_hidden"] == pytest.approx(1.0)
    assert found["of_bayes"] == pytest.approx(1.0)
    expected = torch.corrcoef(torch.stack([hidden[..., 0].flatten().float(), observed[..., 0].flatten().float()]))[0, 1]
    assert float(scores.correlation("observed")[0]) == pytest.approx(float(expected), abs=1e-5)
    assert found["ratio"] == pytest.approx(1 / found["corr_observed"])
    assert scores.l0() == pytest.approx(hidden.float().sum(-1).mean().item())


def test_shuffled_features_score_nothing(states):
    hidden, observed = states
    scores = StateScores()
    scores.update(hidden.float().roll(1, dims=-1), hidden, observed)  # each in the place of another
    found = summary(scores, torch.ones(N, dtype=torch.bool))
    assert abs(found["corr_hidden"]) < 0.03
    assert abs(found["corr_observed"]) < 0.03
    assert found["f1_hidden"] == pytest.approx(0.3, abs=0.03)  # what chance gives


def test_dead_features_and_features_without_events(states):
    hidden, observed = states
    hidden[..., 0] = observed[..., 0] = False  # never on in these tokens: left out
    values = hidden.float()
    values[..., 1] = 0.0  # a dead feature counts, with 0
    scores = StateScores()
    scores.update(values, hidden, observed)
    found = summary(scores, torch.ones(N, dtype=torch.bool))
    assert found["features"] == N - 1
    assert found["corr_hidden"] == pytest.approx((N - 2) / (N - 1))
    assert summary(scores, torch.arange(N) == 0) == {"features": 0}
