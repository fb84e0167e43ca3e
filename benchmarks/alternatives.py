"""Alternatives to `activate_with_stats` in plain PyTorch, with ordinary autograd, as baselines for the kernels.

They are as accurate as the kernels: features are centred first, because float32 differences are otherwise wrong once a
feature's mean is a hundred times its standard deviation (`gate.py` rejects such results). They are also as fast as we
could make them: lagged products are shared, band matrices are built once, and `total` and `square`, which no loss here
differentiates, are computed from detached features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tsae_kernels import MULTISCALE, Bands

Differences = Callable[[Tensor], Tensor]
"""h [B, T, k] -> the squared differences of each band, [B, S, k] float32."""

DifferencesFor = Callable[[int, torch.device, torch.dtype, Bands], Differences]
"""T, device, dtype of h, bands -> the function, with everything precomputed that does not depend on h."""

States = Callable[[Tensor, Tensor, Tensor], Tensor]
"""pre [B, T, k], threshold [k], release [k] -> where the Schmitt trigger is on, [B, T, k] bool."""


class Output(NamedTuple):
    """The results of `activate_with_stats` in one tuple."""

    h: Tensor  # [B, T, k]
    differences: Tensor  # [B, S, k]
    total: Tensor  # [B, k]
    square: Tensor  # [B, k]


def eager_loop(T: int, device: torch.device, dtype: torch.dtype, bands: Bands) -> Differences:
    """The definition: a difference of slices for every offset."""

    def differences(h: Tensor) -> Tensor:
        x = h.float()
        per_band = []
        for first, last in bands:
            band = torch.zeros_like(x[:, 0])
            for offset in range(first, min(last, T - 1) + 1):
                band = band + (x[:, offset:] - x[:, :-offset]).square().sum(1)
            per_band.append(band)
        return torch.stack(per_band, 1)

    return differences


def prefix_sums(T: int, device: torch.device, dtype: torch.dtype, bands: Bands) -> Differences:
    """Linear in T: D = sum_t degree_t y_t^2 - 2 sum_t y_t (sum of y over the band before t).

    The sum over the band (a, b) before t is P[t - a] - P[t - b - 1] for the prefix sum P, so adjacent bands share a
    lagged product.
    """
    degrees = [_adjacency(T, band, device).sum(1, keepdim=True) for band in bands]  # [T, 1] each
    lags = sorted({lag for first, last in bands for lag in (first, last + 1)})

    def differences(h: Tensor) -> Tensor:
        y = _centred(h)
        P = y.cumsum(1)
        product = {lag: (y[:, lag:] * P[:, : T - lag]).sum(1) if lag < T else 0.0 for lag in lags}
        square = y.square()
        per_band = [
            (degree * square).sum(1) - 2 * (product[first] - product[last + 1])
            for degree, (first, last) in zip(degrees, bands, strict=True)
        ]
        return torch.stack(per_band, 1)

    return differences


def banded_laplacian(T: int, device: torch.device, dtype: torch.dtype, bands: Bands) -> Differences:
    """Quadratic in T: one matrix product [T, T] @ [B, T, k] per band, D = y' L y. Autograd needs another per band."""
    laplacians = _laplacians(T, device, dtype, bands)

    def differences(h: Tensor) -> Tensor:
        y = _centred(h)
        operand = y.to(h.dtype)  # bfloat16 products accumulate in float32
        return torch.stack([(y * (L @ operand)).sum(1) for L in laplacians], 1)

    return differences


def banded_laplacian_once(T: int, device: torch.device, dtype: torch.dtype, bands: Bands) -> Differences:
    """`banded_laplacian` without products in the backward pass: the forward pass has the gradient 2 L y already."""
    laplacians = _laplacians(T, device, dtype, bands)

    def differences(h: Tensor) -> Tensor:
        y = _centred(h)
        fixed = y.detach()
        operand = fixed.to(h.dtype)
        # Has the value y and the derivative 2, so that (2 y - y) L y is D and its gradient is 2 L y.
        doubled = 2 * y - fixed
        return torch.stack([(doubled * (L @ operand)).sum(1) for L in laplacians], 1)

    return differences


def loop_over_time(pre: Tensor, threshold: Tensor, release: Tensor) -> Tensor:
    """The definition of the Schmitt trigger: T steps on [B, k]."""
    above, holds = pre > threshold, pre > release
    on = above[:, 0]
    states = [on]
    for t in range(1, pre.shape[1]):
        on = above[:, t] | (on & holds[:, t])
        states.append(on)
    return torch.stack(states, 1)


def two_cumulative_maxima(pre: Tensor, threshold: Tensor, release: Tensor) -> Tensor:
    """On where pre has stayed above the release since it exceeded the threshold (docs/mathematics.md, section 7)."""
    t = torch.arange(pre.shape[1], device=pre.device, dtype=torch.int32)[:, None]  # [T, 1]
    exceeded = torch.where(pre > threshold, t, -1).cummax(1).values
    released = torch.where(pre > release, -1, t).cummax(1).values
    return (exceeded >= 0) & (exceeded >= released)


DIFFERENCES: dict[str, DifferencesFor] = {
    "eager loop": eager_loop,
    "prefix sums": prefix_sums,
    "banded Laplacian": banded_laplacian,
    "banded Laplacian, three products in all": banded_laplacian_once,
}
STATES: dict[str, States] = {
    "loop over T": loop_over_time,
    "two cumulative maxima": two_cumulative_maxima,
}


def statistics(h: Tensor, differences: Differences) -> Output:
    """h and its `temporal_stats`."""
    x = h.detach().float()
    return Output(h, differences(h), x.sum(1), x.square().sum(1))


def activation_with_statistics(
    pre: Tensor, threshold: Tensor | None, release: Tensor | None, differences: Differences, states: States | None
) -> Output:
    """`activate_with_stats` of relu, with a threshold [k], or of a Schmitt trigger with one of `STATES`."""
    if threshold is None:
        h = pre.relu()
    elif release is None or states is None:
        h = pre * (pre > threshold)
    else:
        with torch.no_grad():
            on = states(pre, threshold, release)
        h = pre * on
    return statistics(h, differences)


def _centred(h: Tensor) -> Tensor:
    x = h.float()
    return x - x.detach().mean(1, keepdim=True)  # neither D nor its gradient depends on the mean


def _adjacency(T: int, band: tuple[int, int], device: torch.device) -> Tensor:
    t = torch.arange(T, device=device)
    offset = (t[:, None] - t).abs()
    return ((offset >= band[0]) & (offset <= band[1])).float()


def _laplacians(T: int, device: torch.device, dtype: torch.dtype, bands: Bands = MULTISCALE) -> list[Tensor]:
    """[T, T] for every band: degrees on the diagonal, -1 for each pair. Integers, exact in bfloat16 up to 256."""
    adjacencies = [_adjacency(T, band, device) for band in bands]
    return [(adjacency.sum(1).diag() - adjacency).to(dtype) for adjacency in adjacencies]
