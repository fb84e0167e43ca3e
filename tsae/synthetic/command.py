"""Run the benchmark: for every setting train all methods on one stream, score them on another, write the results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import torch

from tsae.errors import UserError
from tsae.reproduce.results import processor
from tsae.rundir.ownership import check_output_directory
from tsae.synthetic.measure import measure
from tsae.synthetic.methods import METHODS, train
from tsae.synthetic.report import markdown, print_results, write_figure
from tsae.synthetic.scores import check_installed
from tsae.synthetic.settings import SETTINGS, Setting, quick
from tsae.utils.atomic import atomic_write, write_json
from tsae.utils.cli import check_counts, deliver
from tsae.utils.output import say
from tsae.utils.progress import bar

RESULTS, TABLE, FIGURE = "synthetic.json", "synthetic.md", "synthetic.png"


def run(
    settings: Sequence[str],
    methods: Sequence[str],
    *,
    steps: int | None = None,
    seed: int = 0,
    small: bool = False,
    out: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run settings, and write synthetic.json, synthetic.md and synthetic.png.

    settings: keys of `SETTINGS`; methods: keys of `METHODS`
    steps: optimizer steps in place of the settings'
    small: `tsae.synthetic.settings.quick` versions
    out: directory, by default runs/synthetic/TIMESTAMP

    Raises:
        UserError: an unknown or repeated name, a directory with results without ``overwrite``, or scipy is missing.
    """
    began = time.perf_counter()
    check_installed()
    check_counts(steps=steps)
    _check_names("setting", settings, SETTINGS)
    _check_names("method", methods, METHODS)
    directory = _directory(out, overwrite=overwrite)
    results: dict[str, Any] = {"date": date.today().isoformat(), "seed": seed, "quick": small, "settings": {}}
    for name in settings:
        setting = quick(SETTINGS[name]) if small else SETTINGS[name]
        setting = setting if steps is None else replace(setting, steps=steps)
        results["settings"][name] = run_setting(name, setting, methods, seed)
    results["machine"] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    results["seconds"] = time.perf_counter() - began
    directory.mkdir(parents=True, exist_ok=True)
    deliver(
        lambda: write_json(directory / RESULTS, results),
        lambda: _write_table(results, directory / TABLE),
        lambda: write_figure(results, directory / FIGURE),
        show=lambda *_: print_results(results),
    )
    say(f"Written: {directory}")
    return results


def run_setting(name: str, setting: Setting, methods: Sequence[str], seed: int) -> dict[str, Any]:
    """Train and measure the methods in one setting; what synthetic.json says of it."""
    setting.check()
    chosen = {method: METHODS[method] for method in methods}
    source = setting.source(seed)
    with bar(f"{name}: training", setting.steps * setting.batch * setting.length) as advance:
        saes = train(chosen, setting, source, seed, advance)
    tokens = setting.eval_sequences * setting.eval_length
    with bar(f"{name}: scoring", tokens) as advance:
        measured = measure(saes, chosen, setting, source, seed + 1000, advance)
    chain = setting.source(seed).chain
    first = range(0, setting.features, setting.features // len(setting.groups))
    groups = [{"rho": float(chain.rho[j]), "dwell": float(chain.dwell[j])} for j in first]
    return {"setting": asdict(setting), "groups": groups, "tokens": tokens, "methods": measured}


def _check_names(what: str, names: Sequence[str], known: dict[str, Any]) -> None:
    if not names:
        raise UserError(f"No {what} is named; name one or more of {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise UserError(f"There is no {what} {name!r}; use {', '.join(known)}.")
        if list(names).count(name) > 1:
            raise UserError(f"The {what} {name} is named twice; name each once.")


def _directory(out: Path | None, *, overwrite: bool) -> Path:
    if out is None:
        return Path("runs") / "synthetic" / datetime.now().strftime("%Y%m%d-%H%M%S")
    check_output_directory(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a directory for --out.")
    if (out / RESULTS).exists() and not overwrite:
        raise UserError(f"{out} holds results already; name another directory, or add --overwrite.")
    return out


def _write_table(results: dict[str, Any], path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
