"""Text to train and evaluate on, as a stream of documents: one function for every source."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tsae.data import python_docs
from tsae.data.files import SUFFIXES, find_files, read_files
from tsae.data.hub import read_hub
from tsae.data.passages import Document, Part, Split, cut, decide_split, shuffled
from tsae.errors import UserError

__all__ = ["PYTHON_DOCS", "Document", "Part", "TextConfig", "open_text"]

PYTHON_DOCS = "python-docs"
"""Name of the text that is always there: the documentation and source of the Python installation."""

_LONGEST = 100_000  # characters; a longer row is cut, after its side of the split is decided


@dataclass(frozen=True)
class TextConfig:
    """How to read a text source."""

    column: str | None = None
    """Column that holds the text, in jsonl, parquet and hub data: "text", or the only column of strings."""
    split: str = "train"
    """Split of a hub dataset; training and evaluation text are both taken from it."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset."""
    evaluation_share: float = 0.05
    """Share of the documents held out for evaluation, from 0 to 1."""
    shuffle_buffer: int = 10_000
    """Documents among which the order is shuffled."""


def open_text(
    source: str, *, part: Part, seed: int, config: TextConfig = TextConfig(), epoch: int = 0
) -> Iterator[Document]:
    """The documents of one part of a text source, in an order that seed and epoch determine.

    source: "python-docs", a .txt, .jsonl (both also .gz or .zst) or .parquet file, a folder of them, or the id of a
        hub dataset. Files of plain text or Python are cut to passages of about 2,000 characters.
    part: "train" or "evaluation". No text is in both: a hash of the document (of the passage, for plain text;
        of the module, for "python-docs") decides, so that identical documents are on the same side.
    seed, epoch: another epoch has the same documents in another order ("python-docs": and other source).

    Raises UserError, here and not when the first document is asked for: a path or dataset that is not there,
    a column that is not there, no text at all or none for this part.
    """
    if part not in ("train", "evaluation"):
        raise ValueError(f'part must be "train" or "evaluation", not {part!r}')
    if not 0 <= config.evaluation_share <= 1:
        raise UserError(f"evaluation_share must be from 0 to 1, not {config.evaluation_share}")
    if config.shuffle_buffer < 1:
        raise UserError(f"shuffle_buffer must be at least 1, not {config.shuffle_buffer}")
    share = config.evaluation_share
    rng = random.Random(f"{seed} {epoch}")

    if source == PYTHON_DOCS:
        units = python_docs.units()
        split = decide_split((unit.text for unit in units), part, share, source)
        return python_docs.documents([unit for unit in units if split.keeps(unit.text)], rng, epoch)

    path = Path(source).expanduser()
    if source and path.exists():
        if config.subset is not None:
            raise UserError(f"subset {config.subset!r} applies to hub datasets only, but {source!r} is a local path")
        paths = find_files(path)
        documents = read_files(paths, config.column)
        split = decide_split((document.text for document in documents), part, share, source)
        rng.shuffle(paths)
        kept = _one_side(read_files(paths, config.column), split)
        return shuffled(kept, rng, config.shuffle_buffer)

    if not _is_hub_id(source):
        raise UserError(f"no such file or folder: {source!r}")
    rows = read_hub(
        source,
        split=config.split,
        subset=config.subset,
        column=config.column,
        seed=seed,
        epoch=epoch,
        buffer=config.shuffle_buffer,
    )
    return _not_empty(_one_side(rows, Split(part, share)), source, part)


def _is_hub_id(source: str) -> bool:
    """Whether a source that is no local path can be a dataset's name, `name` or `owner/name`."""
    if source.endswith((*SUFFIXES, ".json", ".csv", ".zst", ".gz", ".md", ".py")):
        return False
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None


def _one_side(documents: Iterable[Document], split: Split) -> Iterator[Document]:
    for document in documents:
        if not split.keeps(document.text):
            continue
        if len(document.text) <= _LONGEST:
            yield document
        else:
            for i, piece in enumerate(cut([document.text], _LONGEST)):
                if not piece.isspace():
                    yield Document(f"{document.name}.{i}", piece)


def _not_empty(documents: Iterator[Document], source: str, part: Part) -> Iterator[Document]:
    count = 0
    for document in documents:
        if document.text and not document.text.isspace():
            count += 1
            yield document
    if not count:
        raise UserError(f"no {part} text in the dataset {source!r}: use a larger one, or another for evaluation")
