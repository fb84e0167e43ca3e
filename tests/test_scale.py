"""The estimate of memory against what was measured of large dictionaries (docs/scale.md)."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.large_dictionary import OURS, config
from tsae.estimate import sae_bytes, step_bytes

ROWS = json.loads((Path(__file__).parents[1] / "docs/results/large-dictionary.json").read_text())
MEASURED = [row for row in ROWS if row["trainer"] in OURS and "peak" in row]


def expected(row: dict[str, Any]) -> int:
    cfg = config(row["trainer"], row["d_sae"], row["chunk"])
    return sae_bytes(cfg.sae) + step_bytes(cfg, autocast=True)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['d_sae']}-{row['trainer']}-{row['chunk']}")
def test_the_estimate_is_what_was_measured(row: dict[str, Any]) -> None:
    """Resident memory has libraries and the allocator in it, some 0.2 GiB."""
    assert 0.85 < (row["peak"] - 0.2 * 2**30) / expected(row) < 1.1


@pytest.mark.parametrize("chunk", sorted({row["chunk"] for row in MEASURED}))
@pytest.mark.parametrize("trainer", OURS)
def test_a_feature_takes_what_the_estimate_says(trainer: str, chunk: int) -> None:
    rows = sorted((r for r in MEASURED if (r["trainer"], r["chunk"]) == (trainer, chunk)), key=lambda r: r["d_sae"])
    for smaller, larger in pairwise(rows):
        grown = (larger["peak"] - smaller["peak"]) / (expected(larger) - expected(smaller))
        assert 0.85 < grown < 1.1
