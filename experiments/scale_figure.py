"""How the gain in bits and in explained variance goes with tokens and width: a table, an extrapolation and a figure.

    python experiments/scale_figure.py docs/results/scale.jsonl [--figure docs/figures/scale.png] [--bits support]

Reads the lines of experiments/scale.py. At every width, number of tokens and seed, each method's measurement is
compared with the best of plain and BatchTopK: in bits at the same explained variance, and in explained variance at the
same bits, by `tsae.reports.frontier`. The gains are fitted as a + b log10(tokens) + c log10(width), and extrapolated;
intervals are the 5th and 95th percentile of fits to measurements drawn with replacement, cell by cell, plus a drawn
residual.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsae.reports.frontier import SUPPORT, TOTAL, Curve

BASELINES = ("plain", "batchtopk")
# Tokens and width that the fits are extrapolated to.
FAR = ((100_000_000, 2_560), (100_000_000, 40_960), (1_000_000_000, 65_536))
DRAWS = 2_000
COLOURS = {
    "hysteresis-0.4": "#F0E442",
    "hysteresis-0.4-with-gate": "#009E73",
    "rate": "#0072B2",
    "rate-a6": "#56B4E9",
    "default-0.2": "#CC79A7",
    "demo": "#D55E00",
}


@dataclass(frozen=True)
class Gain:
    """One autoencoder against the best baseline of its width, tokens and seed.

    bits: share of the baseline's bits at equal explained variance, -0.1 is 10 % fewer; None where it was not measured
    quality: explained variance above the baseline's at equal bits; likewise
    """

    method: str
    d_sae: int
    tokens: int
    k: int
    seed: int
    bits: float | None
    quality: float | None


@dataclass(frozen=True)
class Fit:
    """A gain as a + b log10(tokens / 1e6) + c log10(width / 2560); slopes that the grid does not show are 0.

    draws: [DRAWS, 3] fits to measurements drawn with replacement
    residuals: [n] of the fit
    """

    coefficients: np.ndarray
    draws: np.ndarray
    residuals: np.ndarray

    def at(self, tokens: float, d_sae: float) -> tuple[float, float, float]:
        """The value there, and the 5th and 95th percentile of what a measurement would give."""
        x = _row(tokens, d_sae)
        rng = np.random.default_rng(0)
        drawn = self.draws @ x + rng.choice(self.residuals, len(self.draws))
        low, high = np.percentile(drawn, (5, 95))
        return float(self.coefficients @ x), float(low), float(high)

    def slope(self, axis: int) -> tuple[float, float, float]:
        """The change with ten times the tokens (axis 1) or the width (axis 2), and its 5th and 95th percentile."""
        low, high = np.percentile(self.draws[:, axis], (5, 95))
        return float(self.coefficients[axis]), float(low), float(high)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of cells that were measured."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [row for row in rows if "metrics" in row]


def gains(rows: Iterable[dict[str, Any]], bits: str = TOTAL) -> list[Gain]:
    """Every measurement of another method than the baselines."""
    points: dict[tuple[int, int, int], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cell, metrics = row["cell"], row["metrics"]
        point = (metrics["temporal"][bits.removeprefix("temporal.")], metrics["explained_variance"])
        points[cell["d_sae"], cell["tokens"], cell["seed"]][cell["method"]].append(point)
    curves = {size: [Curve(methods[name]) for name in BASELINES if name in methods] for size, methods in points.items()}
    found = []
    for row in rows:
        cell, metrics = row["cell"], row["metrics"]
        if cell["method"] in BASELINES:
            continue
        cost, quality = metrics["temporal"][bits.removeprefix("temporal.")], metrics["explained_variance"]
        here = curves[cell["d_sae"], cell["tokens"], cell["seed"]]
        least = _best((curve.bits_at(quality) for curve in here), min)
        most = _best((curve.quality_at(cost) for curve in here), max)
        found.append(
            Gain(
                **cell,
                bits=None if least is None else cost / least - 1,
                quality=None if most is None else quality - most,
            )
        )
    return found


def _best(values: Iterable[float | None], choose: Callable[[list[float]], float]) -> float | None:
    known = [value for value in values if value is not None]
    return choose(known) if known else None


def fit(found: list[Gain], value: Callable[[Gain], float | None], seed: int = 0) -> Fit | None:
    """Least squares over the measurements; None for fewer than three."""
    kept = [(gain, y) for gain in found if (y := value(gain)) is not None]
    if len(kept) < 3:
        return None
    x = np.stack([_row(gain.tokens, gain.d_sae) for gain, _ in kept])
    y = np.array([value for _, value in kept])
    rng = np.random.default_rng(seed)
    coefficients = _solve(x, y)
    residuals = y - x @ coefficients
    # A bootstrap of the residuals, since most cells have one seed; enlarged by what the fit has taken from them.
    spread = residuals * math.sqrt(len(y) / max(len(y) - 3, 1))
    draws = [_solve(x, x @ coefficients + rng.choice(spread, len(y))) for _ in range(DRAWS)]
    return Fit(coefficients, np.array(draws), residuals)


def _row(tokens: float, d_sae: float) -> np.ndarray:
    return np.array([1.0, math.log10(tokens / 1e6), math.log10(d_sae / 2560)])


def _solve(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares; a column that does not vary gets 0, not a share of the constant."""
    varies = np.array([True, np.ptp(x[:, 1]) > 0, np.ptp(x[:, 2]) > 0])
    out = np.zeros(3)
    out[varies] = np.linalg.lstsq(x[:, varies], y, rcond=None)[0]
    return out


def table(found: list[Gain]) -> str:
    """Means and half ranges over sizes (k) and seeds, by width, tokens and method."""
    lines = ["| features | tokens | method | runs | bits at equal EV | EV at equal bits |", "| --- " * 6 + "|"]
    groups: dict[tuple[int, int, str], list[Gain]] = defaultdict(list)
    for gain in found:
        groups[gain.d_sae, gain.tokens, gain.method].append(gain)
    for (d_sae, tokens, method), members in sorted(groups.items()):
        bits = _spread([gain.bits for gain in members], "{:+.1%}", "{:.1%}")
        quality = _spread([gain.quality for gain in members], "{:+.4f}", "{:.4f}")
        lines.append(f"| {d_sae:,} | {tokens / 1e6:g} M | {method} | {len(members)} | {bits} | {quality} |")
    return "\n".join(lines)


def _spread(values: list[float | None], form: str, around: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "outside of what was measured"
    text = form.format(sum(known) / len(known))
    if len(known) > 1:
        text += " ± " + around.format((max(known) - min(known)) / 2)
    return text + ("" if len(known) == len(values) else f" ({len(known)} of them)")


def extrapolation(found: list[Gain]) -> str:
    """Slopes and extrapolated gains of every method, with their 90 % intervals."""
    lines = [
        "| method | bits, per ten times the tokens | per ten times the width | "
        + " | ".join(f"at {tokens / 1e6:g} M tokens, {d:,} features" for tokens, d in FAR)
        + " |",
        "| --- " * (3 + len(FAR)) + "|",
    ]
    for method in dict.fromkeys(gain.method for gain in found):
        fitted = fit([gain for gain in found if gain.method == method], lambda gain: gain.bits)
        if fitted is None:
            lines.append(f"| {method} | too few measurements |" + " |" * (1 + len(FAR)))
            continue
        values = [fitted.slope(1), fitted.slope(2), *(fitted.at(tokens, d) for tokens, d in FAR)]
        cells = " | ".join(f"{value:+.1%} ({low:+.1%} to {high:+.1%})" for value, low, high in values)
        lines.append(f"| {method} | {cells} |")
    return "\n".join(lines)


def figure(found: list[Gain], path: Path, bits: str) -> None:
    """Gains against tokens, one column a width; the fit with its 90 % interval, drawn on to 100 million tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = sorted({gain.d_sae for gain in found})
    shown, axes = pyplot.subplots(
        2,
        len(widths),
        figsize=(max(3.6 * len(widths) + 1, 6.4), 7.6),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    what = {"bits": f"{bits} bits at equal EV", "quality": f"EV at equal {bits} bits"}
    for method in dict.fromkeys(gain.method for gain in found if gain.bits is not None or gain.quality is not None):
        members = [gain for gain in found if gain.method == method]
        colour = COLOURS.get(method, "#CC79A7")
        for row, name in enumerate(what):
            fitted = fit(members, lambda gain, name=name: getattr(gain, name))  # type: ignore[misc]
            for column, d_sae in enumerate(widths):
                axis = axes[row, column]
                here = [gain for gain in members if gain.d_sae == d_sae and getattr(gain, name) is not None]
                axis.scatter(
                    [g.tokens for g in here], [getattr(g, name) for g in here], s=14, color=colour, label=method
                )
                if fitted is not None:
                    tokens = np.geomspace(1e6, FAR[0][0], 40)
                    drawn = np.array([fitted.at(each, d_sae) for each in tokens])
                    axis.plot(tokens, drawn[:, 0], color=colour, linewidth=1)
                    axis.fill_between(tokens, drawn[:, 1], drawn[:, 2], color=colour, alpha=0.15, linewidth=0)
                axis.axhline(0, color="#20252B", linewidth=0.6)
                axis.set_xscale("log")
                axis.grid(alpha=0.3)
                if row == 0:
                    axis.set_title(f"{d_sae:,} features")
    for row, label in enumerate(what.values()):
        axes[row, 0].set_ylabel(f"{label},\nagainst the best of plain and BatchTopK")
    shown.supxlabel("training tokens; lines and bands, where there are: fit and its 90 % interval", fontsize=10)
    handles = axes[0, 0].get_legend_handles_labels()
    shown.legend(*handles, frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file of experiments/scale.py")
    parser.add_argument("--figure", type=Path, help="draw the figure into this file")
    parser.add_argument("--bits", choices=("total", "support"), default="total", help="which bits")
    arguments = parser.parse_args()
    found = gains(read(arguments.results), TOTAL if arguments.bits == "total" else SUPPORT)
    print(table(found) + "\n\n" + extrapolation(found))
    if arguments.figure:
        figure(found, arguments.figure, arguments.bits)


if __name__ == "__main__":
    main()
