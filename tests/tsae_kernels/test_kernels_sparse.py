"""The sparse products against dense ones, at various shapes, and their errors."""

from __future__ import annotations

import pytest
import torch

from tsae_kernels.sparse import compress, matmul, sampled_matmul, sparse_products_available, transpose

pytestmark = pytest.mark.skipif(not sparse_products_available(), reason="the compiled CPU library is not built")

SHAPES = [(0, 5, 3), (1, 1, 1), (7, 33, 5), (40, 100, 130), (3, 64, 64)]


def sparse_matrix(N: int, k: int, density: float = 0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(N * 1000 + k)
    values = torch.randn(N, k, generator=generator)
    return values * (torch.rand(N, k, generator=generator) < density)


@pytest.mark.parametrize(("N", "k", "d"), SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_products_equal_dense_ones(N: int, k: int, d: int, density: float) -> None:
    x, right = sparse_matrix(N, k, density), torch.randn(k, d)
    left = torch.randn(N, d)
    rows = compress(x)
    assert len(rows.values) == int((x != 0).sum())
    exact_x, exact_left, exact_right = x.double(), left.double(), right.double()
    torch.testing.assert_close(matmul(rows, right), (exact_x @ exact_right).float())
    torch.testing.assert_close(matmul(transpose(rows, k), left), (exact_x.T @ exact_left).float())
    torch.testing.assert_close(sampled_matmul(rows, left, right), ((exact_left @ exact_right.T) * (x != 0)).float())


@pytest.mark.parametrize(("N", "k", "d"), SHAPES)
def test_features_in_bfloat16(N: int, k: int, d: int) -> None:
    x, left, right = sparse_matrix(N, k).bfloat16(), torch.randn(N, d), torch.randn(k, d)
    rows = compress(x)
    for half, single in zip(rows, compress(x.float()), strict=True):
        assert torch.equal(half, single)
    gradient = sampled_matmul(rows, left, right, torch.bfloat16)
    assert torch.equal(gradient, sampled_matmul(rows, left, right).bfloat16())


def test_nan_stays_nan_in_bfloat16() -> None:
    rows = compress(torch.eye(3).bfloat16())
    left = torch.tensor([[1.0], [float("nan")], [float("inf")]])
    out = sampled_matmul(rows, left, torch.ones(3, 1), torch.bfloat16)
    assert out.diagonal().isnan().tolist() == [False, True, False]
    assert out[2, 2] == float("inf")


def test_compress_keeps_nan_and_tiny_numbers_and_drops_both_zeros() -> None:
    x = torch.zeros(2, 70)
    x[0, 3], x[0, 69], x[1, 40], x[1, 41] = float("nan"), 1e-45, float("-inf"), -0.0
    rows = compress(x)
    assert rows.offsets.tolist() == [0, 2, 3]
    assert rows.columns.tolist() == [3, 69, 40]
    assert rows.values.isnan().tolist() == [True, False, False]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, right = sparse_matrix(300, 500), torch.randn(500, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            rows = compress(x)
            results.append((matmul(rows, right), matmul(transpose(rows, 500), x[:, :64].contiguous())))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_mismatched_arguments_raise() -> None:
    rows = compress(sparse_matrix(7, 33))
    with pytest.raises(RuntimeError, match="columns must be less than 5"):
        matmul(rows, torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="columns must be less than 2"):
        transpose(rows, 2)
    with pytest.raises(RuntimeError, match="left must be"):
        sampled_matmul(rows, torch.randn(6, 3), torch.randn(33, 3))
    with pytest.raises(RuntimeError, match="offsets must rise"):
        matmul(rows._replace(offsets=rows.offsets[:-1].clone()), torch.randn(33, 3))
    with pytest.raises(RuntimeError, match="x has the wrong"):
        compress(torch.zeros(3, 4, dtype=torch.float64))
