"""The features of a text, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape

import torch
from torch import Tensor

SHOWN = 8  # features in the table of a view from which none were chosen
_SHADES = "·░▒▓█"  # 0, and quarters of the feature's maximum
_WIDTH = 96  # characters of text in a line


@dataclass(frozen=True, repr=False)
class FeatureView:
    """The features of a text, token by token.

    tokens: the text's T tokens as strings, without BOS
    activations: (T, d_sae) float32 on the CPU, in the units of the features
    chosen: the features in the table; None: the strongest
    """

    tokens: list[str]
    activations: Tensor
    chosen: list[int] | None = None

    @property
    def features(self) -> list[int]:
        """The features in the table, in its order."""
        return self.strongest(SHOWN).features if self.chosen is None else self.chosen

    def strongest(self, n: int = 10) -> FeatureView:
        """The view of the at most ``n`` features with the largest activation at any token, the largest first."""
        return self._ranked(self.activations.amax(0), n)

    def longest(self, n: int = 10) -> FeatureView:
        """The view of the at most ``n`` features that stay on for the most tokens in a row; of equals the stronger."""
        runs, peak = self.longest_runs(), self.activations.amax(0)
        return self._ranked(runs + peak / (1 + peak.amax().clamp(min=0)), n)

    def longest_runs(self) -> Tensor:
        """(d_sae) int64: the most tokens in a row at which each feature is on, above 0."""
        most = current = torch.zeros(self.activations.shape[1], dtype=torch.int64)
        for on in self.activations > 0:
            current = torch.where(on, current + 1, 0)
            most = torch.maximum(most, current)
        return most

    def only(self, features: list[int]) -> FeatureView:
        """The view of these features."""
        return replace(self, chosen=list(features))

    def _ranked(self, score: Tensor, n: int) -> FeatureView:
        active = (self.activations > 0).any(0)
        order = torch.where(active, score, -torch.inf).argsort(descending=True, stable=True)
        return self.only(order[: min(n, int(active.sum()))].tolist())

    def __repr__(self) -> str:
        """The text, and below it each feature as shades: · is off, █ above three quarters of its maximum."""
        lines = [self._heading]
        texts = [token.replace("\n", "⏎").replace("\t", " ") for token in self.tokens]
        shades = {feature: self._shades(feature) for feature in self.features}
        width = max([len(str(feature)) for feature in shades], default=0)
        for first, last in _lines([len(text) for text in texts]):
            lines += ["", " " * width + "  " + "".join(texts[first:last])]
            for feature, levels in shades.items():
                strip = "".join(_SHADES[levels[i]] * len(texts[i]) for i in range(first, last))
                lines.append(f"{feature:>{width}}  {strip}")
        longest = self.longest_runs()
        return "\n".join([*lines, "", *(self._facts(feature, int(longest[feature])) for feature in shades)])

    def _repr_html_(self) -> str:
        rows, longest = [], self.longest_runs()
        for feature in self.features:
            peak = float(self.activations[:, feature].max())
            marked = []
            for token, value in zip(self.tokens, self.activations[:, feature].tolist(), strict=True):
                share = max(value / peak, 0.0) if peak > 0 else 0.0
                shown = escape(token).replace("\n", "⏎")
                style = f"background:rgba(230,159,0,{share:.2f});white-space:pre-wrap"
                marked.append(f"<span title='{value:.3g}' style='{style}'>{shown}</span>")
            rows.append(
                f"<tr><td>{feature}</td><td>{peak:.3g}</td><td>{int(longest[feature])}</td>"
                f"<td style='text-align:left'>{''.join(marked)}</td></tr>"
            )
        head = "<tr><th>feature</th><th>maximum</th><th>longest</th><th style='text-align:left'>text</th></tr>"
        return f"<div>{escape(self._heading)}</div><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"

    @property
    def _heading(self) -> str:
        active = int((self.activations > 0).any(0).sum())
        return f"{len(self.tokens)} tokens; {len(self.features)} of {active:,} active features"

    def _shades(self, feature: int) -> list[int]:
        values = self.activations[:, feature]
        peak = values.max().clamp(min=1e-30)
        return torch.where(values > 0, (4 * values / peak).ceil().clamp(1, 4), 0).to(torch.int64).tolist()

    def _facts(self, feature: int, longest: int) -> str:
        values = self.activations[:, feature]
        return (
            f"feature {feature}: maximum {float(values.max()):.3g}, on at {int((values > 0).sum())} tokens, "
            f"{longest} in a row"
        )


def _lines(lengths: list[int]) -> list[tuple[int, int]]:
    """Ranges of tokens whose strings, of these lengths, fit into a line."""
    found, first, used = [], 0, 0
    for number, length in enumerate(lengths):
        if used and used + length > _WIDTH:
            found.append((first, number))
            first, used = number, 0
        used += length
    return [*found, (first, len(lengths))]
