"""One page about one run: `report.png`, drawn from what the run directory records."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, BinaryIO, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tsae.evaluation.catalogue import METRICS, lookup
from tsae.lm.site import from_option
from tsae.reports.records import History, Records, read_records
from tsae.rundir import layout
from tsae.sae.kinds import KINDS, Kind
from tsae.utils.atomic import atomic_write
from tsae.utils.paths import expanded

# Okabe and Ito's palette, safe for color-blind readers.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
GREY, INK = "#6F7780", "#20252B"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#B8BEC5",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E9EC",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
LOSS_TERMS = (("reconstruction", BLUE), ("sparsity", ORANGE), ("temporal", GREEN), ("auxiliary", PURPLE))
FLOOR = 1e-10  # firing frequency in sparsity.safetensors of a feature that never fired


def write_report(run_dir: str | Path) -> Path:
    """Draw RUN/report.png (1600 x 1080 pixels), atomically, and return its path.

    Reads metrics.jsonl, eval.json, eval_source.json, config.json and sae/sparsity.safetensors; a panel whose file is
    missing says so. The same files give the same bytes. Raises UserError for a directory or a file that cannot be read.
    """
    records, path = read_records(run_dir), expanded(run_dir) / layout.REPORT
    with atomic_write(path) as temporary:
        save_png(records, temporary)
    return path


def save_png(records: Records, to: Path | BinaryIO) -> None:
    """Draw the page into a file."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a name; it is drawn as a box
        draw(records).savefig(to, format="png", metadata={"Software": None})


def draw(records: Records) -> Figure:
    """The page as a figure."""
    figure = Figure(figsize=(40 / 3, 9), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    head, body = cast(Any, figure.subfigures(2, 1, height_ratios=(1.7, 7.3)))
    _header(head, records)
    _numbers(head, records.evaluation)
    cast(Any, figure.get_layout_engine()).set(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.03)
    grid = body.add_gridspec(2, 5)
    top = [body.add_subplot(grid[0, i]) for i in range(5)]
    bottom = [body.add_subplot(grid[1, place]) for place in (0, 1, 2, slice(3, 5))]
    _bits(top[0], records.evaluation)
    _loss(top[1], records.history)
    _explained_variance(top[2], records)
    _l0(top[3], records)
    _dead(top[4], records)
    _lags(bottom[0], records.evaluation)
    _persistence(bottom[1], records.evaluation)
    _lag_one(bottom[2], records.history)
    _density(bottom[3], records.density)
    return figure


def _header(head: SubFigure, records: Records) -> None:
    """The run's name, and its configuration in two lines."""
    config, history = records.config, records.history
    sae, objective = config.get("sae", {}), config.get("objective", {})
    plain(head.text(0.012, 0.83, records.name, fontsize=17, fontweight="bold", va="center"))
    what, how = [], []
    if "model" in config:
        what.append(str(config["model"]).rstrip("/").rsplit("/", 1)[-1])
    if "layer" in config:
        sites = [config.get("site", "resid_post"), config.get("target")]
        found = [from_option(name, config["layer"], any_layer=True) for name in sites if name is not None]
        what.append(", to ".join(site.described for site in found))
    if "data" in config:
        what.append(f"trained on {Path(str(config['data'])).name}")
    if records.text is not None:
        what.append(f"EVALUATED ON {Path(records.text).name}")
    what += [
        f"{_count(history[key][1][-1])} {unit}"
        for key, unit in (("step", "steps"), ("tokens", "tokens"))
        if key in history
    ]
    if "d_sae" in sae:
        how.append(f"{sae['d_sae']:,} features")
    if "activation" in sae:
        kind = _kind(sae)
        details = [f"k = {sae['k']}"] if "k" in sae and kind.k_sparse else []
        if kind.rates and sae.get("support_bits"):
            details = [f"{sae['support_bits']:g} support bits"]
        if kind.steered and "release_ratio" in sae:
            details += [f"release ratio {sae['release_ratio']:g}"]
            details += [sae["hysteresis"]] if sae.get("hysteresis", "causal") != "causal" else []
            details += ["exact threshold"] if sae.get("steering") == "exact" else []
        how.append(f"{sae['activation']} ({', '.join(details)})" if details else str(sae["activation"]))
    if "temporal" in objective:
        how.append(f"temporal objective: {objective['temporal']}")
    if objective.get("l1"):
        how.append(f"L1 weight {objective['l1']:g}")
    if "seed" in config:
        how.append(f"seed {config['seed']}")
    for y, parts in ((0.9, what), (0.74, how)):
        plain(head.text(0.988, y, "  ·  ".join(parts), fontsize=10, color=GREY, va="center", ha="right"))


def plain(text: Text) -> None:
    """Draw a text that holds names as it is: `$` begins no formula, and what is not Unicode is drawn as "?"."""
    text.set_parse_math(False)
    text.set_text(text.get_text().encode("utf-8", "replace").decode("utf-8"))


def _numbers(head: SubFigure, evaluation: dict[str, Any]) -> None:
    """The metrics that a reader asks for first."""

    def with_value(key: str, note: str) -> str:
        value = lookup(evaluation, key)
        return note.format(METRICS[key].short(value)) if isinstance(value, (int, float)) else ""

    notes = {
        "explained_variance": "1 is perfect, 0 the mean",
        "ce_loss_score": with_value("ce_loss_score_mean_ablation", "{} against mean ablation"),
        "temporal.support_bits": "per token, which features are on",
        "temporal.total_bits": "per token, with their amplitudes",
        "l0": "per token",
        "frac_alive": "fired in the evaluation",
        "temporal.persistence_excess": with_value("temporal.persistence_excess_shuffled", "{} with tokens shuffled"),
    }
    for i, (key, note) in enumerate(notes.items()):
        x = 0.012 + i * 0.98 / len(notes)
        value = lookup(evaluation, key)
        known = isinstance(value, (int, float)) and math.isfinite(value)
        number = METRICS[key].short(value if known else None)
        head.text(x, 0.46, number, fontsize=20, fontweight="bold", color=BLUE, va="center")
        head.text(x, 0.23, METRICS[key].name, fontsize=8, va="center")
        head.text(x, 0.1, note if known else "", fontsize=8, color=GREY, va="center")


def _bits(ax: Axes, evaluation: dict[str, Any]) -> None:
    """What the code costs in order, without memory, and with the tokens shuffled: support, and amplitudes on top."""
    ax.set_title("Bits per token")
    rows = []
    for name, support, amplitude in (
        ("in order", "support_bits", "amplitude_bits"),
        ("without\nmemory", "support_bits_memoryless", None),
        ("tokens\nshuffled", "support_bits_shuffled", "amplitude_bits_shuffled"),
    ):
        bits = [lookup(evaluation, f"temporal.{key}") if key else 0.0 for key in (support, amplitude)]
        if isinstance(bits[0], (int, float)):
            rows.append((name, bits[0], bits[1] if isinstance(bits[1], (int, float)) else 0.0))
    if not rows:
        return _empty(ax, "not measured")
    places = np.arange(len(rows))[::-1]
    widths = [row[1] for row in rows]
    ax.barh(places, widths, color=BLUE, height=0.5, label="support")
    ax.barh(places, [row[2] for row in rows], left=widths, color=ORANGE, height=0.5, label="amplitudes")
    for place, (_, first, second) in zip(places, rows, strict=True):
        ax.text(
            first / 2, place, METRICS["temporal.support_bits"].short(first), color="white", ha="center", va="center"
        )
        if second:
            label = METRICS["temporal.total_bits"].short(first + second)
            ax.text(first + second, place, f" {label}", va="center", fontweight="bold")
    ax.set_yticks(places, [row[0] for row in rows])
    ax.tick_params(axis="y", left=False)
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, 1.3 * max(max(first + second for _, first, second in rows), 1e-9))
    ax.set_ylim(-0.5, len(rows) + 0.1)  # room for the legend
    ax.legend(ncols=2, loc="upper left", handlelength=1.0, columnspacing=0.8, fontsize=8)
    ax.set_xlabel("bits per token")


def _loss(ax: Axes, history: History) -> None:
    ax.set_title("Loss terms")
    drawn = False
    for key, color in LOSS_TERMS:
        drawn |= _curve(ax, history, key, color, key, positive=True)
    if not drawn:
        return _empty(ax, "no training log")
    ax.set_yscale("log")
    ax.set_ylabel("value (logarithmic)")
    ax.legend(ncols=2, loc="upper right", handlelength=1.0, columnspacing=0.8, fontsize=8)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.18)  # room for the legend
    _steps(ax)


def _explained_variance(ax: Axes, records: Records) -> None:
    metric, history = METRICS["explained_variance"], records.history
    ax.set_title(metric.title)
    drawn = _curve(ax, history, metric.key, BLUE, "training batches")
    final = records.evaluation.get(metric.key)
    if final is not None:
        ax.axhline(final, color=RED, linestyle=(0, (4, 2)), label=f"evaluation: {metric.short(final)}")
    elif not drawn:
        return _empty(ax, "no training log")
    if drawn:
        # The first steps are far below; the end is what matters.
        values = history[metric.key][1]
        values = values[np.isfinite(values)]
        low = min(float(np.quantile(values, 0.1)) if values.size else 0.0, 1.0 if final is None else final)
        ax.set_ylim(max(low - 0.15 * (1 - low) - 0.02, -1.0 if low > -1 else low * 1.1), 1.0)
    ax.set_ylabel("share of the variance")
    ax.legend(loc="lower right")
    _steps(ax)


def _kind(sae: dict[str, Any]) -> Kind:
    """The activation of a configuration; one that this version does not know is taken to use k."""
    return KINDS.get(str(sae.get("activation")), Kind("token"))


def _l0(ax: Axes, records: Records) -> None:
    ax.set_title(METRICS["l0"].title)
    history, sae = records.history, records.config.get("sae", {})
    if not _curve(ax, history, "l0", BLUE, "training batches"):
        return _empty(ax, "no training log")
    k = sae.get("k") if _kind(sae).k_sparse else None
    if k:
        ax.axhline(k, color=RED, linestyle=(0, (4, 2)), label=f"target k = {k}")
    values = history["l0"][1]
    values = values[np.isfinite(values)]
    if values.size:
        top = max(float(np.quantile(values, 0.98)), k or 0, records.evaluation.get("l0", 0))
        ax.set_ylim(0, 1.35 * top if top > 0 else 1)
    ax.set_ylabel("features per token")
    ax.legend(loc="lower right")
    _steps(ax)


def _dead(ax: Axes, records: Records) -> None:
    history = records.history
    ax.set_title("Dead features")
    if not _curve(ax, history, "dead", BLUE, None):
        return _empty(ax, "no training log")
    ax.set_ylim(bottom=0, top=max(1.0, 1.1 * float(np.nanmax(history["dead"][1]))))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    after = records.config.get("objective", {}).get("dead_after_tokens")
    ax.set_ylabel("features" if after is None else f"silent for {_count(after)} tokens")
    _steps(ax)


def _lags(ax: Axes, evaluation: dict[str, Any]) -> None:
    ax.set_title("Memory over lags")
    temporal = evaluation.get("temporal", {})
    drawn = False
    for key, color, marker in (
        ("autocorrelation", BLUE, "o"),
        ("relative_difference", RED, "s"),
        ("relative_difference_per_feature", ORANGE, "D"),
    ):
        label = METRICS[f"temporal.{key}"].row
        values = {int(lag): value for lag, value in temporal.get(key, {}).items()}
        if values:
            lags = sorted(values)
            ax.plot(lags, [values[lag] for lag in lags], color=color, marker=marker, markersize=4.5, label=label)
            drawn = True
    if not drawn:
        return _empty(ax, "not evaluated")
    ax.set_xscale("log", base=2)
    lags = sorted(
        {int(lag) for values in temporal.values() if isinstance(values, dict) for lag in values if lag.isdigit()}
    )
    ax.xaxis.set_major_locator(FixedLocator(lags))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda lag, _: f"{lag:g}"))
    ax.axhline(0, color="#B8BEC5", linewidth=0.8)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -0.04), high + 0.32 * (high - min(low, -0.04)))  # room for the legend
    ax.set_xlabel("lag (tokens)")
    ax.set_ylabel("dimensionless")
    ax.legend(loc="upper left", handlelength=1.6, fontsize=8)


def _persistence(ax: Axes, evaluation: dict[str, Any]) -> None:
    ax.set_title("Do features stay on?")
    colors = {"persistence": BLUE, "persistence_excess": GREEN, "persistence_excess_shuffled": GREY}
    metrics = [METRICS[f"temporal.{key}"] for key in colors]
    rows = [(m, lookup(evaluation, m.key), color) for m, color in zip(metrics, colors.values(), strict=True)]
    rows = [row for row in rows if isinstance(row[1], (int, float))]
    if not rows:
        return _empty(ax, "not evaluated")
    places = np.arange(len(rows))[::-1]
    values = [value for _, value, _ in rows]
    ax.barh(places, values, color=[color for *_, color in rows], height=0.42)
    for place, (metric, value, _) in zip(places, rows, strict=True):
        ax.text(max(value, 0) + 0.01, place, metric.short(value), va="center", fontsize=10, fontweight="bold")
        ax.text(0, place + 0.27, metric.row, va="bottom")
    ax.set_yticks([])
    ax.set_xlim(min(0.0, *values), max(1.2 * max(values), 0.1))
    ax.set_ylim(-0.45, len(rows) - 0.4)
    ax.set_xlabel("probability; chance = 0 in the lower two")


def _lag_one(ax: Axes, history: History) -> None:
    ax.set_title("Lag-1 correlation in training")
    low, high = history.get("lag1_correlation_p10"), history.get("lag1_correlation_p90")
    if low is not None and high is not None and np.array_equal(low[0], high[0]):
        ax.fill_between(low[0], low[1], high[1], color=BLUE, alpha=0.15, linewidth=0, label="middle 80 % of features")
    drawn = _curve(ax, history, "lag1_correlation", BLUE, "mean over active features")
    if not drawn:
        return _empty(ax, "no training log")
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.25 * (top - bottom))
    ax.set_ylabel("correlation")
    ax.legend(loc="upper left")
    _steps(ax)


def _density(ax: Axes, density: np.ndarray | None) -> None:
    ax.set_title("How often features fire")
    if density is None or density.size == 0:
        return _empty(ax, "not evaluated")
    fired = density[density > FLOOR * 1.001]
    logs = np.log10(fired)
    low = min(-4.0, math.floor(float(logs.min()) * 2) / 2) if fired.size else -4.0
    ax.hist(logs, bins=np.arange(low, 0.01, 0.125).tolist(), color=BLUE, edgecolor="white", linewidth=0.4)
    ax.set_xlim(low, 0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda e, _: f"$10^{{{e:.0f}}}$"))
    silent = density.size - fired.size
    lines = [f"{silent:,} of {density.size:,} never fired"]
    if fired.size:
        lines.insert(0, f"median {_percent(float(np.median(fired)))} of tokens")
    ax.set_ylim(0, 1.22 * max(ax.get_ylim()[1], 1.0))
    ax.text(0.98, 0.98, "\n".join(lines), transform=ax.transAxes, ha="right", va="top", fontsize=8.5, color=GREY)
    ax.set_xlabel("share of tokens (logarithmic)")
    ax.set_ylabel("features")


def _curve(
    ax: Axes,
    history: History,
    key: str,
    color: str,
    label: str | None,
    *,
    positive: bool = False,
) -> bool:
    """Plot one series, a long one faint behind its running mean. False if there is none."""
    if key not in history:
        return False
    steps, values = history[key]
    if positive:
        steps, values = steps[values > 0], values[values > 0]
    if values.size == 0 or not np.isfinite(values).any():
        return False
    width = min(values.size // 40, 25)
    if width < 2:
        ax.plot(steps, values, color=color, label=label, marker="o" if values.size == 1 else None)
        return True
    ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    kernel = np.ones(width)
    smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
    ax.plot(steps, smooth, color=color, label=label)
    return True


def _steps(ax: Axes) -> None:
    ax.set_xlabel("step")
    ax.margins(x=0.02)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _count(step)))


def _empty(ax: Axes, why: str) -> None:
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", color=GREY, fontsize=10)
    ax.set_xticks([])
    ax.set_yticks([])


def _count(value: float) -> str:
    """12, 1.5k, 2M: three digits and a unit."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
