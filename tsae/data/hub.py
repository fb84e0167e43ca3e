"""Datasets of the Hugging Face hub, streamed; and whether the hub can be reached at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tsae.data.files import choose_column
from tsae.data.passages import Document
from tsae.errors import UserError, reason

_PATIENCE = 10.0  # seconds to wait for the hub's first answer


def hub_is_reachable() -> bool:
    """Whether the hub answers, found out in at most about ten seconds; False when HF_HUB_OFFLINE is set.

    The hub's own client tries each file again for half a minute before it gives up; asking once first is what
    makes a machine without network fail at once (or use its cache at once).
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)  # any answer will do, also an error
    except Exception:  # of whichever HTTP library this version of the client is built on
        return False
    return True


def read_hub(
    source: str, *, split: str, subset: str | None, column: str | None, seed: int, epoch: int, buffer: int
) -> Iterator[Document]:
    """The rows of a hub dataset, streamed in an order drawn from seed and epoch through a buffer of rows.

    Raises UserError, before the first row is asked for, if the dataset, subset, split or column does not
    exist or the hub cannot be reached.
    """
    if not hub_is_reachable():
        raise UserError(
            f"cannot stream the dataset {source!r} because the Hugging Face hub cannot be reached: "
            'connect to the network, or use a local file or folder, or "python-docs"'
        )
    import datasets

    try:
        rows = datasets.load_dataset(source, name=subset, split=split, streaming=True)
        features = rows.features
        if features is None:
            first = next(iter(rows), {})
            columns = {name: isinstance(value, str) for name, value in first.items()}
        else:
            columns = {name: getattr(f, "dtype", "") in ("string", "large_string") for name, f in features.items()}
    except Exception as error:  # `datasets` raises whatever its readers and its HTTP client raise
        raise UserError(
            f"cannot open the dataset {source!r} (subset {subset!r}, split {split!r}): {reason(error)}"
        ) from error
    name = choose_column(columns, column, f"the dataset {source!r}")
    rows = rows.select_columns([name]).shuffle(seed=seed, buffer_size=buffer)
    rows.set_epoch(epoch)
    return _documents(rows, name, source)


def _documents(rows: Iterable[dict[str, Any]], column: str, source: str) -> Iterator[Document]:
    try:
        for i, row in enumerate(rows):
            yield Document(f"{source}#{i}", row[column] or "")
    except (OSError, EOFError) as error:  # the connection, or a compressed file cut short
        raise UserError(f"cannot read on in the dataset {source!r}: {reason(error)}") from error
