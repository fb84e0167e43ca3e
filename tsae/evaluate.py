"""`python -m tsae.evaluate RUN|SAE ...`: measure autoencoders; what and how: `tsae.evaluation.command`."""

from __future__ import annotations

import sys

from tsae.evaluation.command import Arguments, Measured, measure, write_out, write_run
from tsae.evaluation.evaluator import EvaluationResult as EvaluationResult
from tsae.evaluation.evaluator import evaluate as evaluate
from tsae.evaluation.evaluator import write_eval as write_eval
from tsae.reports.table import print_comparison, print_table
from tsae.rundir.ownership import owning_runs
from tsae.utils.cli import deliver, parse, report_errors
from tsae.utils.output import tables


def _print(arguments: Arguments, measured: Measured, written: str | None) -> None:
    """Print the metrics, and what was written into the run's directory, if anything."""
    results, data = measured.results, measured.subject.config.data
    of, console = f" of {data}", tables(160 if len(results) > 1 else 0)
    if len(results) > 1:
        title = f"{measured.subject.config.model}, layer {measured.subject.config.layer}"
        rows = {name: {"metrics": result.metrics, "error": result.not_finite()} for name, result in results.items()}
        print_comparison(rows, console, title=title, what="autoencoder")
    else:
        (result,) = results.values()
        other = measured.text.source if arguments.rewrites else {"data": data}
        print_table(result.metrics, console, text=other and other["data"])
        if arguments.rewrites:
            of = f" of {other['data']} ({other['part']})" if other else ""
    said = f" Wrote {written}." if written else ""
    rows = "" if measured.length is None else f", in sequences of {measured.length}"
    console.print(f"{measured.tokens:,} tokens{of}{rows}.{said}", soft_wrap=bool(said))


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    argv: its arguments; None takes those of the process
    out: exit status, 2 for bad input, with one sentence on stderr
    """
    with report_errors() as status:
        arguments = parse(Arguments, sys.argv[1:] if argv is None else argv, None, "python -m tsae.evaluate")
        with owning_runs(*arguments.writes_into):
            measured = measure(arguments)
            deliver(
                lambda: write_run(arguments, measured),
                lambda: write_out(arguments, measured),
                show=lambda written, _: _print(arguments, measured, written),
            )
    return status.code


if __name__ == "__main__":
    sys.exit(main())
