"""Order statistics by bisection over bits, against sorting."""

from __future__ import annotations

import pytest
import torch

from tsae.parallel import selection
from tsae.parallel.axis import Axis
from tsae.parallel.selection import kth_largest, kth_largest_by_histogram, kth_largest_per_row

SINGLE_PROCESS = Axis()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kth_largest_is_that_of_sorting(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(300, generator=generator) * 10.0 ** torch.randint(-30, 30, (300,), generator=generator)).to(
        dtype
    )
    values = torch.cat([values, values[:50], torch.zeros(20, dtype=dtype), -torch.zeros(3, dtype=dtype)])
    ordered = values.sort(descending=True).values
    for k in (1, 2, 17, 180, 200, len(values) - 1, len(values)):
        for found in (kth_largest, kth_largest_by_histogram):
            assert found(values.reshape(-1, 1), k, SINGLE_PROCESS) == ordered[k - 1]


def test_infinite_values_have_their_place() -> None:
    values = torch.tensor([float("-inf"), 0.0, float("inf"), -3.0])
    found = [kth_largest_by_histogram(values, k, SINGLE_PROCESS).item() for k in (1, 2, 3, 4)]
    assert found == [float("inf"), 0.0, -3.0, float("-inf")]


def test_the_kth_largest_of_every_row() -> None:
    values = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))
    expected = values.sort(-1, descending=True).values[..., 4:5]
    assert torch.equal(kth_largest_per_row(values, 5, SINGLE_PROCESS), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_waiting_it_is_that_of_the_rows_that_count(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_SLICE", 50)  # several slices
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 9, 20, generator=generator).to(dtype)
    values[0, 0, :3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    kept = torch.rand(3, 9, generator=generator) < 0.7
    ordered = values[kept].flatten().sort(descending=True).values
    for k in (1, 2, 77, len(ordered)):
        found = selection.kth_largest_without_waiting(values, kept, torch.tensor(k), SINGLE_PROCESS)
        assert found == ordered[k - 1]
