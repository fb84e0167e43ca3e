"""The page's content against the features."""

from __future__ import annotations

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import made_up_activity, made_up_page

from tsae.evaluation.metrics.temporal import MIN_ACTIVATIONS
from tsae.view import data as view_data
from tsae.view.data import LEVELS, run_bounds, select, token_texts
from tsae.view.features import Activity, neighbours
from tsae.view.packing import pack, rounded
from tsae.view.page import embedded, render


def unpack(text: str) -> list[int]:
    """The inverse of `pack`, as the page's script has it."""
    out, value, shift = [], 0, 0
    for byte in base64.b64decode(text):
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            out.append(value)
            value = shift = 0
    assert shift == 0
    return out


def dense(activity: Activity) -> np.ndarray:
    h = np.zeros((activity.segments.numel(), activity.d_sae), dtype=np.float32)
    h[activity.position, activity.feature] = activity.value
    return h


@pytest.fixture
def activity() -> Activity:
    return made_up_activity(12, 24, T=40, on=0.04)


def test_integers_come_back() -> None:
    values = [0, 1, 127, 128, 129, 16383, 16384, 2**21 - 1, 2**21, 2**28 - 1, 0]
    assert unpack(pack(np.array(values))) == values
    assert unpack(pack(np.array([], dtype=np.int64))) == []
    generator = np.random.default_rng(0)
    values = (2 ** generator.uniform(0, 27.9, 5000)).astype(np.int64)
    assert unpack(pack(values)) == values.tolist()


def test_numbers_that_are_none_are_null() -> None:
    assert rounded(torch.tensor([1 / 3, math.nan, math.inf, 0.0, 123456.0]), 3) == [0.333, None, None, 0.0, 123000.0]


def test_activity_keeps_what_it_was_given() -> None:
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(5, 9, 4, generator=generator)
    segments = torch.zeros(5, 9, dtype=torch.int32)
    segments[1, 4:] = 1
    segments[2, 3] = -1
    activity = Activity(4)
    activity.update(h[:2], segments[:2])
    activity.update(h[2:], segments[2:])
    activity.finish()
    expected = h.clamp(min=0).masked_fill((segments < 0)[..., None], 0)
    assert np.array_equal(dense(activity), expected.flatten(0, 1).numpy())
    assert np.array_equal(activity.peak, expected.flatten(0, 1).amax(0).numpy())
    expected_runs = [[0, 0, 9], [1, 0, 4], [1, 4, 5], [2, 0, 3], [2, 4, 5], [3, 0, 9], [4, 0, 9]]
    assert [bounds for bounds in run_bounds(activity.run, 9) if bounds] == expected_runs


def test_strongest_passages_are_the_runs_with_the_highest_peaks(activity: Activity) -> None:
    h = dense(activity)
    feature, run = activity.strongest(3)
    for j in range(12):
        peaks = {r: h[activity.run == r, j].max() for r in set(activity.run.tolist()) - {-1}}
        expected = [r for r in sorted(peaks, key=lambda r: -peaks[r]) if peaks[r] > 0][:3]
        assert run[feature == j].tolist() == expected


def test_top_tokens_hold_most_of_the_activation(activity: Activity) -> None:
    token = np.random.default_rng(0).integers(7, size=activity.segments.numel())
    h = dense(activity)
    for j, found in enumerate(activity.top_tokens(token, 3)):
        total = [h[token == t, j].sum() for t in range(7)]
        expected = [t for t in sorted(range(7), key=lambda t: -total[t]) if total[t] > 0][:3]
        assert found == expected


def test_the_neighbour_is_the_most_correlated_at_a_short_lag(activity: Activity) -> None:
    h, run = dense(activity).astype(np.float64), activity.run.reshape(activity.segments.shape)
    counted = activity.run >= 0
    scaled = (h - h[counted].mean(0)) / h[counted].std(0).clip(1e-12)
    scaled = scaled.reshape(*run.shape, -1)
    r, pairs = np.zeros((12, 12)), 0
    for row in range(run.shape[0]):
        for t in range(run.shape[1]):
            for u in range(t + 1, min(t + 4, run.shape[1] - 1) + 1):
                if run[row, t] == run[row, u] >= 0:
                    r += np.outer(scaled[row, t], scaled[row, u])
                    pairs += 1
    r /= pairs
    np.fill_diagonal(r, -np.inf)
    often = (h > 0).sum(0) >= MIN_ACTIVATIONS
    r[:, ~often] = -np.inf
    neighbour, strength = neighbours(activity)
    for j in range(12):
        if not often[j]:
            assert neighbour[j] == -1
            assert math.isnan(strength[j])
        else:
            assert neighbour[j] == r[j].argmax()
            assert strength[j] == pytest.approx(r[j].max(), abs=1e-4)
    assert often.sum() >= 10
    # By construction an odd feature repeats the even one before it two tokens later.
    assert sum(neighbour[j] == j + 1 for j in range(0, 10, 2)) >= 4


def test_neighbours_in_blocks_are_the_same(activity: Activity, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = neighbours(activity)
    monkeypatch.setattr("tsae.view.features.DENSE", 5 * activity.segments.numel())
    parts = neighbours(activity)
    assert np.array_equal(whole[0], parts[0])
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-5)


def test_features_that_are_hardly_on_have_no_neighbour() -> None:
    activity = Activity(3)
    activity.update(torch.zeros(2, 8, 3), torch.zeros(2, 8, dtype=torch.int32))
    activity.finish()
    neighbour, strength = neighbours(activity)
    assert neighbour.tolist() == [-1, -1, -1]
    assert np.isnan(strength).all()
    assert activity.strongest(4)[0].size == 0


def test_the_page_has_the_activations_of_every_passage_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Activity] = []
    real = view_data.select
    monkeypatch.setattr(view_data, "select", lambda activity, n: seen.append(activity) or real(activity, n))
    content = made_up_page(tmp_path / "run", d_sae=16, sequences=20, on=0.02)
    (activity,), features, h = seen, content["features"], dense(seen[0])
    T = activity.segments.shape[1]

    def read(j: int) -> dict[int, int]:
        places = np.cumsum(unpack(features["positions"][j])).tolist()
        return dict(zip(places, unpack(features["activations"][j]), strict=True))

    checked = 0
    for j in range(16):
        for other in {j, features["neighbour"][j]} - {-1}:
            entries = read(other)
            for run in features["passages"][j]:
                row, start, length = content["runs"][run]
                for position in range(row * T + start, row * T + start + length):
                    value = h[position, other]
                    step = entries.get(position, 0)
                    assert (step > 0) == (value > 0)
                    if value > 0:
                        assert abs((step >> 1) / LEVELS * h[:, other].max() - value) <= 0.6 * h[:, other].max() / LEVELS
                        assert (step & 1) == (value <= 4.0)  # the made-up autoencoder's threshold
                        checked += 1
    assert checked > 100


def test_a_page_with_too_much_shows_fewer_passages(activity: Activity, monkeypatch: pytest.MonkeyPatch) -> None:
    neighbour, _ = neighbours(activity)
    passages, kept = select(activity, neighbour)
    monkeypatch.setattr(view_data, "ENTRIES", int(kept.sum()) // 2)
    fewer, less = select(activity, neighbour)
    assert less.sum() <= kept.sum() // 2
    assert max(map(len, fewer)) < max(map(len, passages))
    assert all(few == many[: len(few)] for few, many in zip(fewer, passages, strict=True))


def test_token_texts_keep_spaces_and_name_parts_of_characters(tokenizer: Any) -> None:
    ids = tokenizer("bar bon é bar", add_special_tokens=False)["input_ids"]
    index, texts = token_texts(tokenizer, torch.tensor([ids]))
    said = [texts[i] for i in index]
    assert len(said) == len(ids)
    plain = tokenizer("bar bon bar", add_special_tokens=False)["input_ids"]
    index, texts = token_texts(tokenizer, torch.tensor([plain]))
    assert "".join(texts[i] for i in index) == "bar bon bar"
    assert all("\ufffd" not in text and text for text in said)


def test_embedded_json_cannot_end_its_place_and_says_the_same() -> None:
    content = {"texts": ["</script>", "<!--", "&amp;", "\u2028\u2029", "é", "\\u003c"]}
    text = embedded(content)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == content
    embedded({"half of a pair": "\ud83d"}).encode("utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded([math.nan])


def test_the_page_asks_for_nothing(content: dict[str, Any]) -> None:
    page = render(content)
    head = page[: page.index("<style>")]
    assert "default-src 'none'" in html.unescape(head)
    assert "<title>run&lt;b&gt;: features over time</title>" in head
    for fetching in ("http://", "https://", "src=", "@import", "url(", "import(", "fetch("):
        outside = page.replace("http://www.w3.org/2000/svg", "").split('id="data">')
        assert fetching not in outside[0], fetching
        assert fetching not in outside[1].split("</script>", 1)[1], fetching
