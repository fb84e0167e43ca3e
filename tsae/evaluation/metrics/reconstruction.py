"""Reconstruction quality and sparsity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsae.evaluation.metrics.accumulator import Accumulator, ratio


class ReconstructionMetrics(Accumulator):
    """Reconstruction and sparsity over an evaluation set, without positions that have a negative segment.

    With r = x - xhat, tokens t, d dimensions, and E the mean over all counted tokens:

    explained_variance          1 - sum_t |r_t|^2 / sum_t |x_t - m|^2, m the mean of x over the complete set
    explained_variance_legacy   E[1 - |r_t|^2 / |x_t - m_batch|^2]: a mean of ratios, with each batch's own mean.
                                Reported by SAEBench's paper and Neuronpedia.
    explained_variance_saebench 1 - E|r|^2 / (E|x|^2 - s^2), s = the mean over tokens *and dimensions* of x^2.
                                SAEBench 0.6.0 (`evals/core/main.py`) squares x where it needs the mean
                                activation, and its concatenation of batches collapses the dimensions. The
                                variance is nearly uncentred while values are small, and negative (a score
                                above 1) once s^2 exceeds E|x|^2, as for x of the order of d. Only for
                                comparison with published tables.
    mse                         sum |r|^2 / (tokens * d): mean over tokens and dimensions, squared activation
                                units. (SAEBench divides the sum over dimensions by the token count twice.)
    cossim                      E[x.xhat / (|x| |xhat|)]; a zero vector counts as 0
    l2_ratio                    E[|xhat| / |x|]; |x| below 1e-4 counts as 1, as in SAEBench
    relative_reconstruction_bias  E|xhat|^2 / E[x.xhat] (arXiv 2404.16014, eq. 10), over the complete set
    l0                          E[number of h > 0]
    l1                          E[sum of h], activation units. SAEBench's definition, without absolute value;
                                it equals the papers' |h|_1 if h >= 0 (all activations except gelu).
    frac_alive                  fraction of features with h > 0 at least once in the set

    Every value is finite: a ratio whose denominator is 0 is 0.0 (no token, constant x, an SAE that outputs
    nothing), and a token equal to its batch mean adds 0 to `explained_variance_legacy`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shift: Tensor | None = None  # [d]

    def update(self, x: Tensor, xhat: Tensor, h: Tensor, segments: Tensor) -> None:
        """Count one batch.

        x, xhat:  [B, T, d] activations and their reconstruction, any float dtype
        h:        [B, T, d_sae] feature activations
        segments: [B, T] integers, negative = excluded
        """
        counted = segments >= 0  # [B, T]
        n = int(counted.sum())
        if n == 0:
            return
        weights = counted.flatten().to(h.dtype)  # [B * T]
        flat = h.reshape(-1, h.shape[-1])
        if n < counted.numel():
            flat = flat.masked_fill(~counted.flatten()[:, None], 0)
        active = flat > 0
        self._add("active", weights @ active.to(h.dtype))  # [d_sae]
        self._add("sequences_active", active.view(h.shape).any(dim=1).sum(dim=0))  # [d_sae]
        self._add("l1", (weights @ flat).sum(dtype=torch.float64))

        x = x[counted].to(torch.float64)  # [n, d]
        xhat = xhat[counted].to(torch.float64)
        if self._shift is None:
            # Sums of squares about the first batch's mean do not cancel.
            self._shift = x.mean(dim=0)
        y = x - self._shift
        residual = (x - xhat).square().sum(dim=-1)  # [n]
        centred = (x - x.mean(dim=0)).square().sum(dim=-1)
        dot = (x * xhat).sum(dim=-1)
        norm_x, norm_xhat = x.norm(dim=-1), xhat.norm(dim=-1)

        self._add("tokens", float(n))
        self._add("dimensions", float(n * x.shape[1]))
        self._add("y", y.sum(dim=0))
        self._add("y_square", y.square().sum(dim=0))
        self._add("norm_x", norm_x.sum())
        self._add("norm_xhat", norm_xhat.sum())
        self._add("x_square", norm_x.square().sum())
        self._add("residual", residual.sum())
        self._add("legacy", torch.where(centred > 0, 1 - residual / centred, 0).sum())
        norms = norm_x * norm_xhat
        self._add("cossim", torch.where(norms > 0, dot / norms, 0).sum())
        self._add("l2_ratio", (norm_xhat / torch.where(norm_x < 1e-4, 1, norm_x)).sum())
        self._add("xhat_square", norm_xhat.square().sum())
        self._add("dot", dot.sum())

    def merge(self, other: Accumulator) -> None:
        """Add the sums of `other`, over other batches."""
        if isinstance(other, ReconstructionMetrics) and other._shift is not None:
            if self._shift is None:
                self._shift = other._shift
            other = other._shifted(self._shift)
        super().merge(other)

    def _shifted(self, shift: Tensor) -> ReconstructionMetrics:
        """The same sums about another shift."""
        assert self._shift is not None  # `merge` has seen to it
        moved = ReconstructionMetrics()
        moved._sums, moved._shift = dict(self._sums), shift
        delta, n = self._shift - shift, self._sums["tokens"]
        moved._sums["y"] = self._sums["y"] + n * delta
        moved._sums["y_square"] = self._sums["y_square"] + 2 * delta * self._sums["y"] + n * delta.square()
        return moved

    @property
    def tokens(self) -> int:
        """Number of counted positions."""
        return int(self._get("tokens"))

    def mean(self) -> Tensor:
        """[d] float64, the mean of x over all counted positions."""
        if self._shift is None:
            raise ValueError("mean: no position has been counted yet")
        return self._shift + self._sums["y"] / self._sums["tokens"]

    def density(self) -> Tensor:
        """[d_sae] float64 on the CPU: fraction of counted positions at which each feature is active."""
        return self._get("active") / max(self.tokens, 1)

    def norms(self) -> tuple[float, float]:
        """E|x| and E|xhat|."""
        n = self._get("tokens")
        return ratio(self._get("norm_x"), n), ratio(self._get("norm_xhat"), n)

    def rms_error(self) -> float:
        """Root of `mse`, or 2^-20 of the activations' root mean square if that is more: float32 resolves no less."""
        dimensions = self._get("dimensions")
        error, size = ratio(self._get("residual"), dimensions), ratio(self._get("x_square"), dimensions)
        return max(math.sqrt(error), math.sqrt(size) * 2**-20) if math.isfinite(error) else math.nan

    def tokens_per_sequence(self) -> Tensor:
        """[d_sae] float64 on the CPU: active positions of each feature per sequence in which it is active."""
        return self._get("active") / self._get("sequences_active").clamp(min=1)

    def compute(self) -> dict[str, float]:
        """Every metric of the class docstring, as finite Python floats."""
        n = self._get("tokens")
        residual, x_square = self._get("residual"), self._get("x_square")
        y = self._get("y")
        total = (self._get("y_square") - y.square() / n.clamp(min=1)).sum()
        # mean over tokens of |x|^2, and of x^2 over tokens and dimensions
        mean_square, per_element = ratio(x_square, n), ratio(x_square, self._get("dimensions"))
        active = self._get("active")
        return {
            "explained_variance": 1 - ratio(residual, total) if total > 0 else 0.0,
            "explained_variance_legacy": ratio(self._get("legacy"), n),
            "explained_variance_saebench": (
                1 - ratio(residual, n) / (mean_square - per_element**2) if mean_square != per_element**2 else 0.0
            ),
            "mse": ratio(residual, self._get("dimensions")),
            "cossim": ratio(self._get("cossim"), n),
            "l2_ratio": ratio(self._get("l2_ratio"), n),
            "relative_reconstruction_bias": ratio(self._get("xhat_square"), self._get("dot")),
            "l0": ratio(active.sum(), n),
            "l1": ratio(self._get("l1"), n),
            "frac_alive": ratio((active > 0).sum(), active.numel()),
        }
