"""`metrics.jsonl`: one JSON object per line; truncated to the length in the checkpoint on resume."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from tsae.rundir.trackers import Tracker
from tsae.utils.atomic import writing

log = logging.getLogger(__name__)


class MetricsLog:
    """Appends measurements to a file and to trackers; non-finite numbers are written as null.

    Args:
        path: the file.
        keep_bytes: bytes of an existing file to keep.
        trackers: closed with the file.
    """

    def __init__(self, path: Path, keep_bytes: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        self._path, self._trackers = path, trackers
        self._file: BinaryIO = path.open("a+b")
        self._file.seek(0)
        kept = self._file.read(keep_bytes)
        if len(kept) < keep_bytes:  # lost in a crash of the machine; complete lines are kept
            log.warning("%s is shorter than when the checkpoint was made: lines of it are lost", path)
            kept = kept[: kept.rfind(b"\n") + 1]
        self._file.truncate(len(kept))
        self._file.seek(0, 2)

    def write(self, values: dict[str, float]) -> None:
        """Write and flush one line; raises `WriteError` if that fails."""
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in values.items()}
        with writing(self._path):
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
        with suppress(OSError):  # from a line that could not be written; all others are flushed
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


class NoLog(MetricsLog):
    """Writes nothing: for all ranks but 0."""

    def __init__(self) -> None:
        self._file, self._trackers = io.BytesIO(), ()

    def write(self, values: dict[str, float]) -> None:
        """Nothing."""
