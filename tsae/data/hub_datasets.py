"""Text from Hugging Face hub datasets, streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tsae.config import TextConfig
from tsae.data.documents import Document
from tsae.data.text_files import choose_column
from tsae.errors import UserError, reason
from tsae.utils.hub import hub_is_reachable


def read_hub(source: str, config: TextConfig, *, seed: int, epoch: int) -> Iterator[Document]:
    """The rows of a hub dataset, streamed and shuffled by seed and epoch through a buffer of rows.

    Raises UserError, before the first row is requested, if the dataset, subset, split or column does not exist or the
    hub cannot be reached.
    """
    if not hub_is_reachable():
        raise UserError(
            f"cannot stream the dataset {source!r} because the Hugging Face hub cannot be reached: "
            'connect to the network, or use a local file or folder, or "python-docs"'
        )
    import datasets

    try:
        rows = datasets.load_dataset(source, name=config.subset, split=config.split, streaming=True)
        if rows.features is None:
            first = next(iter(rows), {})
            columns = {name: isinstance(value, str) for name, value in first.items()}
        else:
            columns = {n: getattr(f, "dtype", "") in ("string", "large_string") for n, f in rows.features.items()}
    except Exception as error:  # `datasets` passes on whatever its readers and HTTP client raise
        raise UserError(
            f"cannot open the dataset {source!r} (subset {config.subset!r}, split {config.split!r}): {reason(error)}"
        ) from error
    name = choose_column(columns, config.column, f"the dataset {source!r}")
    rows = rows.select_columns([name]).shuffle(seed=seed, buffer_size=config.shuffle_buffer)
    rows.set_epoch(epoch)
    return _documents(rows, name, source)


def _documents(rows: Iterable[dict[str, Any]], column: str, source: str) -> Iterator[Document]:
    try:
        for i, row in enumerate(rows):
            yield Document(f"{source}#{i}", row[column] or "")
    except (OSError, EOFError) as error:  # a lost connection or a truncated compressed file
        raise UserError(f"cannot read on in the dataset {source!r}: {reason(error)}") from error
