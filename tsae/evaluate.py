"""Measure autoencoders: `python -m tsae.evaluate RUN|SAE ...`, or from Python `tsae.evaluate("runs/a", data="my.txt")`.

The module is callable; `tsae.api.evaluation.evaluate` is what it calls. `tsae.evaluation.command` measures and writes.
"""

from __future__ import annotations

import sys

from tsae.api.evaluation import evaluate as _evaluate
from tsae.api.evaluation import run
from tsae.evaluation.command import Arguments
from tsae.evaluation.evaluator import EvaluationResult as EvaluationResult
from tsae.evaluation.evaluator import evaluate as evaluate
from tsae.evaluation.evaluator import write_eval as write_eval
from tsae.utils.calling import make_callable
from tsae.utils.cli import parse, report_errors


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    argv: its arguments; None takes those of the process
    out: exit status, 2 for bad input, with one sentence on stderr
    """
    with report_errors() as status:
        run(parse(Arguments, sys.argv[1:] if argv is None else argv, None, "python -m tsae.evaluate")).print()
    return status.code


make_callable(sys.modules[__name__], lambda: _evaluate)

if __name__ == "__main__":
    sys.exit(main())
