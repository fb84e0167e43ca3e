"""The page of features that last: the bits that memory saves, stretches, passages, and the ranking."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.lasting_features import documents, page, passage, saved_bits, stretches
from tsae.view.features import Activity


def test_saved_bits_of_a_chain() -> None:
    """A feature that lasts 10 tokens saves what its entropy rate says; one of independent tokens saves nothing."""
    generator = np.random.default_rng(0)
    run = np.zeros(200_000, int)
    state, on = False, []
    for u in generator.random(len(run)):
        state = u < (0.9 if state else 0.1 / 9)
        on.append(state)
    saved, share, stays = saved_bits(np.array(on), run)
    assert (share, stays) == (pytest.approx(0.1, abs=0.01), pytest.approx(0.9, abs=0.01))
    assert saved == pytest.approx(0.469 - 0.1 * 0.469 - 0.9 * 0.0881, abs=0.02)
    assert saved_bits(generator.random(len(run)) < 0.1, run)[0] == pytest.approx(0, abs=1e-3)
    assert saved_bits(np.ones(9, bool), np.zeros(9, int))[0] == 0


def test_stretches_end_with_a_segment() -> None:
    on = np.array([1, 1, 0, 1, 1, 1, 1, 1], bool)
    run = np.array([0, 0, 0, 0, 0, 1, 1, -1])
    assert stretches(on, run) == [(0, 2), (3, 2), (5, 2)]


def test_a_document_goes_on_in_the_next_row() -> None:
    rows = [[0, 0, 1, 1], [2, 2, 2, 3], [4, 4, 4, -1], [5, 5, 5, 5]]
    found = documents(np.array(rows).ravel(), 4).reshape(4, 4)
    assert found.tolist() == [[1, 1, 2, 2], [2, 2, 2, 3], [3, 3, 3, 4], [5, 5, 5, 5]]


def test_a_passage_is_escaped_and_stays_in_its_segment() -> None:
    on, run = np.array([0, 1, 1, 1], bool), np.array([0, 0, 0, 1])
    assert passage(1, on, run, ["a", "<b>", "&", "c"]) == "a<mark>&lt;b&gt;&amp;</mark>"


def test_the_feature_that_lasts_is_first_and_dense_ones_have_no_passages() -> None:
    activity = Activity(4, 64)
    h = torch.zeros(4, 64, 4)
    h[:, 5:35, 2] = 1.0  # lasts, and is dense
    h[:, 20:26, 1] = 1.0
    h[:, 7:13:2, 3] = 1.0
    h[:, 30:33, 3] = 1.0
    h[0, 0, 0] = 1.0  # too seldom
    segments = torch.arange(4)[:, None].repeat(1, 64).int()
    segments[2:, -1] = -1  # the first three rows are one document, which has one passage
    activity.update(h, segments)
    activity.finish()
    text = "\n".join(page(activity, ["x"] * 256, "run"))
    rows = [line.split(" |")[0] for line in text.splitlines() if line.startswith("| ") and "bits" not in line]
    assert rows == ["| ---", "| 2", "| 1", "| 3"]
    assert "| 2 | 0." in text
    assert text.index("## 1. Feature 1") < text.index("## 2. Feature 3")
    assert "Feature 2" not in text
    assert "6 tokens:" in text
    assert text.count("<pre>") == 4
