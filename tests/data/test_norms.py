"""Tokens with massive activations: what is said of them, and leaving them out of the buffer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tsae.data.buffer import ActivationBuffer
from tsae.data.harvest import ActivationBatch
from tsae.data.norms import large_tokens, report_norms

N, T, D = 8, 128, 16


def sequences(seed: int, n: int = N) -> ActivationBatch:
    """Activations of which every fourth sequence has one that is 500 times the others' size."""
    x = torch.randn(n, T, D, generator=torch.Generator().manual_seed(seed))
    x[::4, 10] *= 500
    segments = torch.zeros(n, T, dtype=torch.int32)
    segments[:, 100:] = 1
    segments[:, 50] = -1
    return ActivationBatch(x, segments)


def test_report() -> None:
    x, segments = sequences(0)
    x[1, 50] = 1e6  # excluded
    report = report_norms(x, segments, 3.0)
    norms = x.double().norm(dim=-1)[segments >= 0]
    assert (report.tokens, report.large) == (N * (T - 1), 2)
    assert report.median == pytest.approx(float(norms.median()))
    assert report.limit == pytest.approx(3 * report.median)
    large = norms > report.limit
    assert report.share == pytest.approx(float(norms[large].square().sum() / norms.square().sum()))
    assert report.share > 0.99
    assert int(large_tokens(x, report.limit).sum()) == 3


def test_report_of_nothing_and_of_overflow() -> None:
    x, segments = sequences(0)
    assert report_norms(x, torch.full_like(segments, -1), 4.0).share == 0.0
    assert report_norms(0 * x, segments, 4.0).large == 0
    x[0, 0] = float("inf")
    assert report_norms(x, segments, 10.0).share == 1.0


def buffer(seed: int = 0) -> ActivationBuffer:
    stream = iter(range(100))

    def harvest(n: int) -> Iterator[ActivationBatch]:
        for _ in range(n):
            yield sequences(next(stream), 1)  # each with a large token at 10

    return ActivationBuffer(harvest, 6, 2, 100, torch.Generator().manual_seed(seed))


def test_left_out_of_what_the_buffer_holds_and_of_what_comes() -> None:
    plain, without = buffer(), buffer()
    first = plain.first(6)
    without.first(6)
    without.exclude_above(100.0)
    assert (first.segments[:, 10] == 0).all()
    expected = first.segments.clone()
    expected[:, 10] = -1
    assert torch.equal(without.first(6).segments, expected)
    for _ in range(20):
        ours, theirs = without.next_batch(3), plain.next_batch(3)
        assert torch.equal(ours.x, theirs.x)
        assert (ours.segments[:, 10] == -1).all()
        ours.segments[:, 10] = theirs.segments[:, 10]
        assert torch.equal(ours.segments, theirs.segments)
    assert without.refills > 2


def test_the_limit_is_part_of_the_state() -> None:
    one, two = buffer(), buffer()
    one.first(6)
    one.exclude_above(100.0)
    two.first(6)
    two.load_state_dict(one.state_dict(), one.contents())
    for _ in range(10):
        assert (two.next_batch(3).segments[:, 10] == -1).all()
    old = one.state_dict()
    del old["norm_limit"]
    two.load_state_dict(old, one.contents())
    assert two.norm_limit == 0.0
