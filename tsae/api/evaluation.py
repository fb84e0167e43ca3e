"""`tsae.evaluate`: measuring autoencoders from Python."""

from __future__ import annotations

import inspect
import os
from typing import Any

from rich.table import Table

from tsae.api.options import keywords, override
from tsae.api.tables import as_html, as_text
from tsae.evaluation.command import Arguments, Measured, measure, write_out, write_run
from tsae.reports.table import comparison, listing
from tsae.rundir.ownership import owning_runs
from tsae.utils.calling import from_python
from tsae.utils.cli import deliver
from tsae.utils.output import tables
from tsae.utils.paths import with_expanded_paths


class Evaluation:
    """The metrics of one or several autoencoders, shown as a table.

    metrics: the content of eval.json (docs/metrics.md) by the autoencoder's name
    written: what was written into a run's directory, a clause; may be empty
    """

    def __init__(self, arguments: Arguments, measured: Measured) -> None:
        config, results = measured.subject.config, measured.results
        self.metrics: dict[str, dict[str, Any]] = {name: result.metrics for name, result in results.items()}
        self.written = ""
        of = f" of {config.data}"
        self._errors = {name: result.not_finite() for name, result in results.items()}
        self._title = f"{config.model}, {config.described}"
        self._text: str | None = None
        if len(results) == 1:
            other = measured.text.source if arguments.rewrites else {"data": config.data}
            self._text = None if not other else str(other["data"])
            if arguments.rewrites:
                of = f" of {other['data']} ({other['part']})" if other else ""
        rows = "" if measured.length is None else f", in sequences of {measured.length}"
        self._tokens = f"{measured.tokens:,} tokens{of}{rows}."

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The metrics by the autoencoder's name, as JSON would hold them."""
        return dict(self.metrics)

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.metrics[name]

    def print(self) -> None:
        """Print the table on stdout, with what was measured below it."""
        console = tables(160 if len(self.metrics) > 1 else 0)
        console.print(self._table())
        for name, error in self._errors.items():
            if error and len(self.metrics) > 1:
                console.print(f"{name}: {error}")
        console.print(self._note, soft_wrap=bool(self.written))

    @property
    def _note(self) -> str:
        return self._tokens + (f" Wrote {self.written}." if self.written else "")

    def _table(self) -> Table:
        if len(self.metrics) == 1:
            return listing(next(iter(self.metrics.values())), self._text)
        rows = {name: {"metrics": metrics} for name, metrics in self.metrics.items()}
        return comparison(rows, title=self._title, what="autoencoder")

    def __repr__(self) -> str:
        return f"{as_text(self._table())}\n{self._note}"

    def _repr_html_(self) -> str:
        errors = [f"{name}: {error}" for name, error in self._errors.items() if error]
        return as_html(self._table(), " ".join([*errors, self._note]))


def evaluate(*saes: Any, **options: Any) -> Evaluation:
    """Measure autoencoders on text that no run among them trained on, as `python -m tsae.evaluate` does.

    saes: run directories, autoencoders of other libraries as directories or `OWNER/NAME/FOLDER` on the hub, or what
        `tsae.train` and `tsae.open` return. A run alone is evaluated again: its eval.json and report.png are rewritten.
    options: those of the command line: ``data`` (another text), ``tokens``, ``model``, ``layer`` and
        ``site`` (what autoencoders that are no runs encode), ``out`` (a JSON file), ...
    out: a table; `Evaluation.to_dict` has the numbers

    Raises:
        UserError: bad options, or an autoencoder, model or text that cannot be used.
    """
    with from_python():
        sources = tuple(str(getattr(sae, "source", sae)) for sae in saes)
        for sae in saes:
            if not isinstance(sae, (str, os.PathLike)) and not hasattr(sae, "source"):
                raise TypeError(
                    f"{type(sae).__name__} names no autoencoder; give a directory, or what tsae.open returns"
                )
        return run(with_expanded_paths(override(Arguments(saes=sources), options)))


def run(arguments: Arguments) -> Evaluation:
    """Measure, write what is asked for, and return the table; where something cannot be written it is printed first."""
    with owning_runs(*arguments.writes_into):
        measured = measure(arguments)
        found = Evaluation(arguments, measured)

        def show(written: str | None, out: bool | None) -> None:
            found.written = written or ""
            if written is None or out is None:
                found.print()

        deliver(lambda: write_run(arguments, measured), lambda: write_out(arguments, measured), show=show)
    return found


def _signature() -> inspect.Signature:
    """Every option by name, as help and completion show them."""
    saes = inspect.Parameter("saes", inspect.Parameter.VAR_POSITIONAL, annotation="str | Path | Run")
    return inspect.Signature([saes, *keywords(Arguments, without=("saes",))], return_annotation=Evaluation)


evaluate.__signature__ = _signature()  # type: ignore[attr-defined]
