"""Scores against the truth: matched features, correlations with hidden and observed states, supports."""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.evaluation.metrics.accumulator import Accumulator


def check_installed() -> None:
    """Raise UserError if scipy, which comes with scikit-learn, is not installed."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'Matching features with the true ones needs scipy ({error}): run pip install "tsae[probes]".'
        ) from error


def match(decoder: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """One feature for each true one: the one-to-one assignment with the largest sum of |cosine|.

    decoder: [d_sae, d], any norms; directions: [n, d] unit vectors
    out: the feature of each true one [n] int64, -1 if there are too few; and its |cosine| [n], 0 then
    """
    from scipy.optimize import linear_sum_assignment

    cosines = (directions @ torch.nn.functional.normalize(decoder.detach().float(), dim=1).T).abs()  # [n, d_sae]
    rows, columns = (torch.as_tensor(each) for each in linear_sum_assignment(cosines.numpy(), maximize=True))
    feature, cosine = torch.full((len(directions),), -1), torch.zeros(len(directions))
    feature[rows], cosine[rows] = columns, cosines[rows, columns]
    return feature, cosine


class StateScores(Accumulator):
    """How a value per true feature follows its hidden and its observed state.

    corr_hidden, corr_observed   Pearson correlation over all tokens, for each feature; 0 for a constant value
    f1_hidden, f1_observed       F1 of where the value is above ``above``, for each feature
    l0                           values above ``above`` per token, summed over the features

    All but l0 are [n] float64, NaN for a feature whose state never changes in these tokens.

    above: threshold of the support
    """

    def __init__(self, above: float = 0.0) -> None:
        super().__init__()
        self.above = above

    def update(self, values: Tensor, hidden: Tensor, observed: Tensor) -> None:
        """Count one batch: values [B, T, n] float, states [B, T, n] bool."""
        flat = values.flatten(0, 1)
        on = flat > self.above
        for name, state in (("hidden", hidden.flatten(0, 1)), ("observed", observed.flatten(0, 1))):
            self._add(f"{name}", _count(state))
            self._add(f"value_{name}", torch.where(state, flat, 0).sum(0).double())
            self._add(f"both_{name}", _count(on & state))
        self._add("tokens", float(len(flat)))
        self._add("value", flat.sum(0).double())
        self._add("square", flat.square().sum(0).double())
        self._add("on", _count(on))

    def correlation(self, state: str) -> Tensor:
        """[n]; state: hidden or observed."""
        n, share = self._get("tokens"), self._get(state) / self._get("tokens")
        mean = self._get("value") / n
        covariance = self._get(f"value_{state}") / n - mean * share
        spread = (self._get("square") / n - mean.square()).clamp(min=0) * share * (1 - share)
        found = torch.where(spread > 1e-18, covariance / spread.clamp(min=1e-18).sqrt(), 0.0)
        return found.masked_fill((share == 0) | (share == 1), torch.nan)

    def f1(self, state: str) -> Tensor:
        """[n]; state: hidden or observed."""
        share = self._get(state) / self._get("tokens")
        found = 2 * self._get(f"both_{state}") / (self._get("on") + self._get(state)).clamp(min=1)
        return found.masked_fill((share == 0) | (share == 1), torch.nan)

    def l0(self) -> float:
        """Features on per token."""
        return float(self._get("on").sum() / self._get("tokens"))


def _count(mask: Tensor) -> Tensor:
    return mask.sum(0, dtype=torch.int32).long()  # twice as fast on a CPU as the sum in int64


def summary(scores: StateScores, which: Tensor, ceiling: StateScores | None = None) -> dict[str, float]:
    """Means over some features, and the denoising ratio: mean corr_hidden / mean corr_observed, as published.

    which: [n] bool; features whose hidden or observed state never changes are left out
    ceiling: the scores of the Bayes filter or smoother on the same tokens, for `of_bayes`, a ratio of means
    """
    hidden, observed = scores.correlation("hidden"), scores.correlation("observed")
    which = which & ~hidden.isnan() & ~observed.isnan()
    out: dict[str, float] = {"features": int(which.sum())}
    if not out["features"]:
        return out

    def mean(values: Tensor) -> float:
        return float(values[which].mean())

    out |= {"corr_hidden": mean(hidden), "corr_observed": mean(observed)}
    out["ratio"] = out["corr_hidden"] / out["corr_observed"] if out["corr_observed"] else 0.0
    if ceiling is not None:
        out["of_bayes"] = out["corr_hidden"] / mean(ceiling.correlation("hidden"))
    return out | {"f1_hidden": mean(scores.f1("hidden")), "f1_observed": mean(scores.f1("observed"))}
