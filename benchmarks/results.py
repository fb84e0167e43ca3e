"""Measurements, which can be stored as JSON, and the Markdown table of them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Timing, Variant

HEADER = ("case", "variant", "ms", "x copy", "x own", "peak MiB", "x h", "of copy bandwidth")


@dataclass
class Row:
    """One variant.

    seconds: the median
    bytes: the minimum memory traffic, or 0 if unspecified
    refused: why the result is less accurate than the gate allows; "" if it is accurate
    """

    variant: str
    kind: str
    seconds: float
    rounds: int
    peak_bytes: int | None = None
    bytes: int = 0
    refused: str = ""


@dataclass
class Measurement:
    """One case, whose variants were interleaved in one process.

    own: the variant that the others are compared with
    tensor_bytes: size of h, which the copy reads once and writes once; 0 if the case has no copy
    notes: other numbers by name
    """

    case: str
    own: str
    device: str
    shape: list[int]
    dtype: str
    tensor_bytes: int
    rows: list[Row] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)

    def add(self, variants: list[Variant], timings: dict[str, Timing]) -> None:
        for v in variants:
            timing = timings[v.name]
            rounds = len(timing.seconds)
            self.rows.append(Row(v.name, v.kind, timing.median, rounds, timing.peak_bytes, v.bytes, v.refused))

    def row(self, variant: str) -> Row:
        return next(row for row in self.rows if row.variant == variant)

    def seconds(self, variant: str) -> float:
        return self.row(variant).seconds

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.kind == kind]

    @property
    def copy_seconds(self) -> float | None:
        """The time of `h.clone()`, or None if the case has no copy."""
        copies = self.of_kind("copy")
        return copies[0].seconds if copies else None

    def copies(self, row: Row) -> float | None:
        """The row's time in copies of h."""
        return row.seconds / self.copy_seconds if self.copy_seconds else None

    def bandwidth_share(self, row: Row) -> float | None:
        """Bandwidth as a fraction of the copy's, which reads and writes h."""
        if not self.copy_seconds or not row.bytes:
            return None
        return (row.bytes / row.seconds) / (2 * self.tensor_bytes / self.copy_seconds)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurement:
        return cls(**{**values, "rows": [Row(**row) for row in values["rows"]]})


def read_json(path: Path) -> tuple[list[Measurement], dict[str, Any]]:
    """The measurements in a file of `--benchmark-json`, and its machine information."""
    values = json.loads(path.read_text())
    found = [b["extra_info"]["measurement"] for b in values["benchmarks"] if "measurement" in b["extra_info"]]
    return [Measurement.from_dict(m) for m in found], values.get("machine_info", {})


def write_json(path: Path, measurements: list[Measurement], machine: dict[str, Any]) -> None:
    """Write what `read_json` reads and nothing else, one measurement per line."""
    about = {key: machine[key] for key in ("device", "torch", "python_version", "smoke") if key in machine}
    lines = ",\n".join(json.dumps({"extra_info": {"measurement": m.to_dict()}}) for m in measurements)
    path.write_text(f'{{"machine_info": {json.dumps(about)},\n"benchmarks": [\n{lines}\n]}}\n')


def table(measurements: list[Measurement]) -> str:
    """A Markdown table of every variant of every case, with padded columns.

    `own` is in bold, and `x own` is a variant's time relative to it. (refused) marks results less accurate than the
    gate allows.
    """
    lines = [HEADER, *(_cells(m, row) for m in measurements for row in m.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], "-" * widths[1], *("-" * (w - 1) + ":" for w in widths[2:])]
    out = []
    for line in (HEADER, rule, *lines[1:]):
        padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        out.append(f"| {' | '.join(padded)} |")
    return "\n".join(out)


def _cells(m: Measurement, row: Row) -> list[str]:
    peak = row.peak_bytes
    return [
        m.case,
        (f"**{row.variant}**" if row.variant == m.own else row.variant) + " (refused)" * bool(row.refused),
        f"{1e3 * row.seconds:.2f}",
        _number(m.copies(row), "{:.2f}"),
        f"{row.seconds / m.seconds(m.own):.2f}",
        "" if peak is None else f"{peak / 2**20:.1f}",
        _number(peak / m.tensor_bytes if peak is not None and m.tensor_bytes else None, "{:.2f}"),
        _number(m.bandwidth_share(row), "{:.0%}"),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
