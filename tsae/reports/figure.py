"""One page about one run: `report.png` from what the run directory holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from safetensors.numpy import load_file

from tsae.errors import UserError
from tsae.rundir import layout
from tsae.sae.kinds import KINDS, Kind
from tsae.utils.atomic import atomic_write

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
GREY, INK = "#6F7780", "#20252B"
STYLE = {
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
LOSS_TERMS = (
    ("reconstruction", "reconstruction", BLUE),
    ("sparsity", "sparsity", ORANGE),
    ("temporal", "temporal", GREEN),
    ("auxiliary", "auxiliary", PURPLE),
)
FLOOR = 1e-10  # of the firing frequency in sparsity.safetensors: a feature at it never fired


def write_report(run_dir: str | Path) -> Path:
    """Draw RUN/report.png (1600 x 1080 pixels), atomically, and return its path.

    Reads metrics.jsonl, eval.json, eval_source.json, config.json and sae/sparsity.safetensors; what is missing
    leaves its panel saying so. The same files give the same bytes. Raises UserError for a directory or a file that
    cannot be read.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"There is no run directory {run_dir}; name the directory that training wrote.")
    history = read_history(run_dir / layout.METRICS)
    evaluation = _read_object(run_dir / layout.EVALUATION)
    config = _read_object(run_dir / layout.CONFIG)
    sparsity_file = run_dir / layout.SPARSITY
    density = 10.0 ** load_file(sparsity_file)["sparsity"].astype(np.float64) if sparsity_file.exists() else None

    with matplotlib.rc_context(STYLE):
        text = read_source(run_dir).get("data")
        figure = draw(history, evaluation, config, density, title=run_dir.resolve().name, text=text)
        path = run_dir / layout.REPORT
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def read_source(run_dir: str | Path) -> dict[str, Any]:
    """The text that eval.json was measured on; empty if it is the run's own evaluation part."""
    return _read_object(Path(run_dir) / layout.EVALUATION_SOURCE)


def read_history(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every numeric key of a metrics.jsonl as (steps, values), ascending in the step.

    A step logged twice, as after a resumed run, counts with its last line; a last line cut short is left out.
    Raises UserError for any other line that is not a JSON object with a `step`.
    """
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            by_step[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(f"Line {number} of {path} is not a JSON object with a step; mend or delete it.") from None
    series: dict[str, list[tuple[int, float]]] = {}
    for step in sorted(by_step):
        for key, value in by_step[step].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                series.setdefault(key, []).append((step, float(value)))
    return {key: (np.array([s for s, _ in v]), np.array([x for _, x in v])) for key, v in series.items()}


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); evaluate the run again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; evaluate the run again.")
    return value


def draw(
    history: dict[str, tuple[np.ndarray, np.ndarray]],
    evaluation: dict[str, Any],
    config: dict[str, Any],
    density: np.ndarray | None,
    *,
    title: str,
    text: str | None = None,
) -> Figure:
    """The page as a figure.

    density: [d_sae] each feature's share of active tokens
    text: what was evaluated on, if it is not the run's own evaluation part
    """
    figure = Figure(figsize=(40 / 3, 9), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    head, body = figure.subfigures(2, 1, height_ratios=(1.7, 7.3))
    _header(head, history, evaluation, config, title, text)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.03)
    axes = body.subplots(2, 4)
    _loss(axes[0, 0], history)
    _explained_variance(axes[0, 1], history, evaluation)
    _l0(axes[0, 2], history, evaluation, config)
    _dead(axes[0, 3], history, config)
    _lags(axes[1, 0], evaluation)
    _persistence(axes[1, 1], evaluation)
    _lag_one(axes[1, 2], history)
    _density(axes[1, 3], density)
    return figure


def _header(
    head: SubFigure,
    history: dict[str, tuple[np.ndarray, np.ndarray]],
    evaluation: dict[str, Any],
    config: dict[str, Any],
    title: str,
    text: str | None,
) -> None:
    """The run's name, its configuration in two lines, and the numbers one asks for first."""
    sae, objective = config.get("sae", {}), config.get("objective", {})
    head.text(0.012, 0.83, title, fontsize=17, fontweight="bold", va="center")
    what, how = [], []
    if "model" in config:
        what.append(str(config["model"]).rstrip("/").rsplit("/", 1)[-1])
    if "layer" in config:
        what.append(f"layer {config['layer']}")
    if "data" in config:
        what.append(f"trained on {Path(str(config['data'])).name}")
    if text is not None:
        what.append(f"EVALUATED ON {Path(text).name}")
    if "step" in history:
        what.append(f"{_count(history['step'][1][-1])} steps")
    if "tokens" in history:
        what.append(f"{_count(history['tokens'][1][-1])} tokens")
    if "d_sae" in sae:
        how.append(f"{sae['d_sae']:,} features")
    if "activation" in sae:
        kind = _kind(sae)
        details = [f"k = {sae['k']}"] if "k" in sae and kind.k_sparse else []
        if kind.steered and "release_ratio" in sae:
            details.append(f"release ratio {sae['release_ratio']:g}")
            details += ["two-sided"] if sae.get("hysteresis") == "two-sided" else []
            details += ["exact threshold"] if sae.get("steering") == "exact" else []
        how.append(f"{sae['activation']} ({', '.join(details)})" if details else str(sae["activation"]))
    if "temporal" in objective:
        how.append(f"temporal objective: {objective['temporal']}")
    if objective.get("l1"):
        how.append(f"L1 weight {objective['l1']:g}")
    if "seed" in config:
        how.append(f"seed {config['seed']}")
    for y, parts in ((0.9, what), (0.74, how)):
        head.text(0.988, y, "  ·  ".join(parts), fontsize=10, color=GREY, va="center", ha="right")

    temporal = evaluation.get("temporal", {})
    numbers = [
        (
            "explained variance",
            evaluation.get("explained_variance"),
            "{:.3f}",
            "1 is perfect, 0 the mean",
        ),
        ("active features per token", evaluation.get("l0"), "{:.1f}", "L0"),
        ("features alive", evaluation.get("frac_alive"), "{:.1%}", "fired in the evaluation"),
        (
            "loss recovered",
            evaluation.get("ce_loss_score_mean_ablation"),
            "{:.1%}",
            _with(evaluation.get("ce_loss_score"), "vs mean ablation; {:.1%} vs zero"),
        ),
        (
            "stays on, beyond chance",
            temporal.get("persistence_excess"),
            "{:.3f}",
            _with(temporal.get("persistence_excess_shuffled"), "{:.3f} with tokens shuffled"),
        ),
        (
            "lag-1 relative difference",
            temporal.get("relative_difference", {}).get("1"),
            "{:.3f}",
            "0 constant, 1 unrelated",
        ),
    ]
    for i, (label, value, form, note) in enumerate(numbers):
        x = 0.012 + i * 0.98 / len(numbers)
        known = isinstance(value, (int, float)) and math.isfinite(value)
        number = form.format(value) if known else "–"
        head.text(x, 0.46, number, fontsize=20, fontweight="bold", color=BLUE, va="center")
        head.text(x, 0.23, label, fontsize=9.5, va="center")
        head.text(x, 0.1, note if known else "", fontsize=8.5, color=GREY, va="center")


def _loss(ax: Axes, history: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    ax.set_title("Loss terms")
    drawn = False
    for key, label, colour in LOSS_TERMS:
        drawn |= _curve(ax, history, key, colour, label, positive=True)
    if not drawn:
        return _empty(ax, "no training log")
    ax.set_yscale("log")
    ax.set_ylabel("value (logarithmic)")
    ax.legend(ncols=2, loc="upper right", handlelength=1.0, columnspacing=0.8, fontsize=8)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.18)  # room for the legend
    _steps(ax)


def _explained_variance(
    ax: Axes, history: dict[str, tuple[np.ndarray, np.ndarray]], evaluation: dict[str, Any]
) -> None:
    ax.set_title("Explained variance")
    drawn = _curve(ax, history, "explained_variance", BLUE, "training batches")
    final = evaluation.get("explained_variance")
    if final is not None:
        ax.axhline(final, color=RED, linestyle=(0, (4, 2)), label=f"evaluation: {final:.3f}")
    elif not drawn:
        return _empty(ax, "no training log")
    if drawn:
        # The first steps are far below; the interesting part is where it ends.
        values = history["explained_variance"][1]
        values = values[np.isfinite(values)]
        low = min(float(np.quantile(values, 0.1)) if values.size else 0.0, 1.0 if final is None else final)
        ax.set_ylim(max(low - 0.15 * (1 - low) - 0.02, -1.0 if low > -1 else low * 1.1), 1.0)
    ax.set_ylabel("share of the variance")
    ax.legend(loc="lower right")
    _steps(ax)


def _kind(sae: dict[str, Any]) -> Kind:
    """What the activation of a configuration is; a name that this version does not know may well use k."""
    return KINDS.get(str(sae.get("activation")), Kind("token"))


def _l0(
    ax: Axes,
    history: dict[str, tuple[np.ndarray, np.ndarray]],
    evaluation: dict[str, Any],
    config: dict[str, Any],
) -> None:
    ax.set_title("Active features (L0)")
    if not _curve(ax, history, "l0", BLUE, "training batches"):
        return _empty(ax, "no training log")
    sae = config.get("sae", {})
    k = sae.get("k") if _kind(sae).k_sparse else None
    if k:
        ax.axhline(k, color=RED, linestyle=(0, (4, 2)), label=f"target k = {k}")
    values = history["l0"][1]
    values = values[np.isfinite(values)]
    if values.size:
        top = max(float(np.quantile(values, 0.98)), k or 0, evaluation.get("l0", 0))
        ax.set_ylim(0, 1.35 * top if top > 0 else 1)
    ax.set_ylabel("features per token")
    ax.legend(loc="lower right")
    _steps(ax)


def _dead(ax: Axes, history: dict[str, tuple[np.ndarray, np.ndarray]], config: dict[str, Any]) -> None:
    ax.set_title("Dead features")
    if not _curve(ax, history, "dead", BLUE, None):
        return _empty(ax, "no training log")
    ax.set_ylim(bottom=0, top=max(1.0, 1.1 * float(np.nanmax(history["dead"][1]))))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    after = config.get("objective", {}).get("dead_after_tokens")
    ax.set_ylabel("features" if after is None else f"silent for {_count(after)} tokens")
    _steps(ax)


def _lags(ax: Axes, evaluation: dict[str, Any]) -> None:
    ax.set_title("Memory of the features over lags")
    temporal = evaluation.get("temporal", {})
    drawn = False
    for key, label, colour, marker in (
        ("autocorrelation", "autocorrelation", BLUE, "o"),
        ("autocorrelation_shuffled", "autocorrelation, tokens shuffled", GREY, "o"),
        ("relative_difference", "relative difference", RED, "s"),
        ("relative_difference_per_feature", "relative difference, per feature", ORANGE, "D"),
    ):
        values = {int(lag): value for lag, value in temporal.get(key, {}).items()}
        if values:
            lags = sorted(values)
            ax.plot(lags, [values[lag] for lag in lags], color=colour, marker=marker, markersize=4.5, label=label)
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
    ax.set_title("Does an active feature stay on?")
    temporal = evaluation.get("temporal", {})
    rows = [
        ("P(on at the next token | on)", temporal.get("persistence"), BLUE),
        ("beyond chance (per feature)", temporal.get("persistence_excess"), GREEN),
        ("beyond chance, tokens shuffled", temporal.get("persistence_excess_shuffled"), GREY),
    ]
    rows = [row for row in rows if row[1] is not None]
    if not rows:
        return _empty(ax, "not evaluated")
    places = np.arange(len(rows))[::-1]
    values = [value for _, value, _ in rows]
    ax.barh(places, values, color=[colour for *_, colour in rows], height=0.42)
    for place, (label, value, _) in zip(places, rows, strict=True):
        ax.text(max(value, 0) + 0.01, place, f"{value:.3f}", va="center", fontsize=10, fontweight="bold")
        ax.text(0, place + 0.27, label, va="bottom")
    ax.set_yticks([])
    ax.set_xlim(min(0.0, *values), max(1.2 * max(values), 0.1))
    ax.set_ylim(-0.45, len(rows) - 0.4)
    ax.set_xlabel("probability; chance = 0 in the lower two")


def _lag_one(ax: Axes, history: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
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
    ax.hist(logs, bins=np.arange(low, 0.01, 0.125), color=BLUE, edgecolor="white", linewidth=0.4)
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
    history: dict[str, tuple[np.ndarray, np.ndarray]],
    key: str,
    colour: str,
    label: str | None,
    *,
    positive: bool = False,
) -> bool:
    """Plot one series, faint behind its running mean if it is long; False if it is absent."""
    if key not in history:
        return False
    steps, values = history[key]
    if positive:
        steps, values = steps[values > 0], values[values > 0]
    if values.size == 0 or not np.isfinite(values).any():
        return False
    width = min(values.size // 40, 25)
    if width < 2:
        ax.plot(steps, values, color=colour, label=label, marker="o" if values.size == 1 else None)
        return True
    ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    kernel = np.ones(width)
    smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
    ax.plot(steps, smooth, color=colour, label=label)
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


def _with(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, (int, float)) else ""


def _count(value: float) -> str:
    """12, 1.5k, 2M: three digits and a unit."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
