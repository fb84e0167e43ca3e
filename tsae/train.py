"""The main job: `python -m tsae.train [preset] [--options]`, or from Python `tsae.train("demo", steps=200)`.

The module is callable; `tsae.api.training.train` is what it calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tsae.config import TrainConfig
from tsae.presets import at_length, preset
from tsae.training.request import Request, base_of
from tsae.utils.calling import make_callable
from tsae.utils.cli import RESUME, given_options, parse, report_errors
from tsae.utils.output import say
from tsae.utils.torchrun import is_rank0

if TYPE_CHECKING:
    from tsae.training.command import Trained

PROG = "python -m tsae.train"


def command(argv: list[str]) -> tuple[TrainConfig, Request]:
    """The configuration of the run, and the command line itself (preset "" if none is given).

    Options override the file of ``--config``, which overrides the preset; either is taken `at_length`.
    """
    # The first pass finds what to start from, so that --help can show its values.
    without_help = [a for a in argv if a not in ("-h", "--help")]
    start = parse(Request, without_help, replace(Request.of(preset("demo")), preset="", length=0), PROG)
    base = base_of(start.preset, start.config)
    if start.length:  # given
        base = at_length(base, start.length)
    # --help alone: tyro leaves arguments that are given out of the help.
    asked = parse(Request, argv if without_help == argv else ["--help"], Request.of(base), PROG)
    return replace(asked.run, preset=base.preset), replace(asked, preset=start.preset)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    with report_errors(RESUME) as status:
        cfg, asked = command(argv)
        from tsae.training.command import train  # here, so that --help and a misspelt option answer at once

        _print(train(cfg, asked, given_options(argv)))
    return status.code


def _print(trained: Trained) -> None:
    """Print the metrics, or the estimate; metrics that could not be written are printed before the error is raised."""
    from tsae.reports.table import print_table
    from tsae.training.dry_run import print_estimate
    from tsae.training.fill_cache import print_filled
    from tsae.training.sweep import print_sweep

    job = trained.job
    if trained.filled is not None:
        print_filled(trained.filled)
        return
    if trained.estimate is not None:
        print_estimate(trained.estimate, job)
        return
    if is_rank0() and job.is_sweep:
        print_sweep(job.directory)
    elif is_rank0():
        (outcome,) = trained.outcomes.values()
        if outcome.evaluation is not None:
            print_table(outcome.evaluation.metrics)
        if outcome.error is not None:
            raise outcome.error
    say(f"Written: {job.directory}")


def _function() -> Callable[..., Any]:
    from tsae.api.training import train

    return train


make_callable(sys.modules[__name__], _function)

if __name__ == "__main__":
    sys.exit(main())
