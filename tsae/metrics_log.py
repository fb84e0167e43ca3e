"""`metrics.jsonl`: one JSON object a line, appended, cut back to a checkpoint's length on resume."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from tsae.trackers import Tracker

__all__ = ["MetricsLog", "NoLog"]


class MetricsLog:
    """Appends measurements to a file; numbers that are not finite are written as null.

    Args:
        path: the file.
        keep_bytes: how much of an existing file to keep.
        trackers: what the same numbers go to; they are closed with the file.
    """

    def __init__(self, path: Path, keep_bytes: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers
        self._file: BinaryIO = path.open("a+b")
        self._file.truncate(keep_bytes)
        self._file.seek(0, 2)

    def write(self, values: dict[str, float]) -> None:
        """One line, flushed."""
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in values.items()}
        self._file.write(json.dumps(clean).encode() + b"\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(values)

    @property
    def bytes_written(self) -> int:
        """Length of the file."""
        return self._file.tell()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


class NoLog(MetricsLog):
    """Writes nothing: for all processes but the first."""

    def __init__(self) -> None:
        self._file, self._trackers = io.BytesIO(), ()

    def write(self, values: dict[str, float]) -> None:
        """Nothing."""
