"""Text to train and evaluate on, as a stream of documents: one function for every source."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tsae.config import TextConfig
from tsae.data import python_docs
from tsae.data.files import SUFFIXES, find_files, read_files
from tsae.data.hub import read_hub
from tsae.data.passages import Document, Part, Split, cut, decide_split, find_threshold, position, shuffled
from tsae.errors import UserError
from tsae.utils.ranges import check_ranges

PYTHON_DOCS = "python-docs"
"""Name of the text that is always there: the documentation and source of the Python installation."""

DEFAULT = TextConfig()

_LONGEST = 100_000  # characters; a longer row is cut, after its side of the split is decided


def open_text(
    source: str, *, part: Part, seed: int, config: TextConfig = DEFAULT, epoch: int = 0
) -> Iterator[Document]:
    """The documents of one part of a text source, in an order that seed and epoch determine.

    source: "python-docs", a .txt, .jsonl (both also .gz or .zst) or .parquet file, a folder of them, or the id of
        a hub dataset. Files of plain text or Python are cut to passages of about 2,000 characters.
    part: "train" or "evaluation". A hash of the document (of the passage, for plain text; of the module, for
        "python-docs") decides.
    seed, epoch: another epoch has the same documents in another order ("python-docs": and other source).

    What is guaranteed: two documents that are equal but for the blanks around them are in the same part of a
    source, and in the same part of any two sources whose threshold is the same (`config.threshold`; see
    `split_threshold`). What is not: the hash sees whole documents, so the same words cut in another way, as a
    passage of a .txt file and within a row of a .jsonl file, count as different text.

    Raises UserError, here and not when the first document is asked for: a path or dataset that is not there,
    a column that is not there, no text at all or, by the source's own threshold, none for this part.
    """
    if part not in ("train", "evaluation"):
        raise ValueError(f'part must be "train" or "evaluation", not {part!r}')
    if config.threshold is not None:
        split = Split(part, config.threshold)
    elif (texts := _hashed(source, config)) is not None:
        split = decide_split(texts, part, config.evaluation_share, source)
    else:
        split = Split(part, config.evaluation_share)
    documents = _open(source, split.keeps, seed, epoch, config)
    return documents if _is_local(source) else _not_empty(documents, source, part)


def split_threshold(source: str, config: TextConfig) -> float:
    """Where the split of a source lies: documents whose hash is below it are evaluation text.

    The share, in general; of few documents it depends on the source (`find_threshold`), so a run keeps it.
    """
    if config.threshold is not None:
        return config.threshold
    texts = _hashed(source, config)
    if texts is None and not _is_hub_id(source):
        raise UserError(f"no such file or folder: {source!r}")
    return config.evaluation_share if texts is None else find_threshold(texts, config.evaluation_share, source)


def open_unseen(
    source: str, *, seed: int, config: TextConfig, trained_on: str, trained_config: TextConfig
) -> Iterator[Document]:
    """All of a local source but the documents that are in the training part of ``trained_on``.

    Reads ``trained_on`` to its end, and holds a number for each document of ``source``.

    Raises UserError if nothing is left, or if one of the two is a hub dataset, which has no end to speak of.
    """
    texts = _hashed(source, config)
    train = Split("train", split_threshold(trained_on, trained_config))
    known = _hashed(trained_on, trained_config)
    if texts is None or known is None:
        raise UserError(
            f"there is too little evaluation text in {source!r}, and which of the rest was trained on cannot be told "
            f"because {trained_on if known is None else source!r} is not on this machine: name a larger text"
        )
    unseen = {position(text) for text in texts}
    if not unseen:
        raise UserError(f"there is no text in {source!r}: every document in it is empty")
    unseen.difference_update(position(text) for text in known if train.keeps(text))
    if not unseen:
        raise UserError(f"all text in {source!r} is training text of the run: name another text")
    return _open(source, lambda text: position(text) in unseen, seed, 0, config)


def is_same_source(a: str, b: str) -> bool:
    """Whether two sources are the same one, however a path is spelled."""
    if _is_local(a) and _is_local(b) and PYTHON_DOCS not in (a, b):
        return Path(a).expanduser().resolve() == Path(b).expanduser().resolve()
    return a == b


def absolute_source(source: str) -> str:
    """The source under a name that holds in any working directory."""
    return str(Path(source).expanduser().absolute()) if source != PYTHON_DOCS and _is_local(source) else source


def _is_local(source: str) -> bool:
    return source == PYTHON_DOCS or bool(source and Path(source).expanduser().exists())


def _hashed(source: str, config: TextConfig) -> Iterator[str] | None:
    """The texts of a source whose hashes decide the split, always in the same order; None for a hub dataset."""
    if source == PYTHON_DOCS:
        return (unit.text for unit in python_docs.units())
    if not _is_local(source):
        return None
    return (document.text for document in read_files(find_files(Path(source).expanduser()), config.column))


def _open(source: str, keeps: Callable[[str], bool], seed: int, epoch: int, config: TextConfig) -> Iterator[Document]:
    """The documents of a source whose text is to be kept, in an order that seed and epoch determine."""
    check_ranges(config, "text.")
    rng = random.Random(f"{seed} {epoch}")
    if source == PYTHON_DOCS:
        return python_docs.documents([unit for unit in python_docs.units() if keeps(unit.text)], rng, epoch)
    if _is_local(source):
        if config.subset is not None:
            raise UserError(f"subset {config.subset!r} applies to hub datasets only, but {source!r} is a local path")
        paths = find_files(Path(source).expanduser())
        rng.shuffle(paths)
        return shuffled(_kept(read_files(paths, config.column), keeps), rng, config.shuffle_buffer)
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
    return _kept(rows, keeps)


def _is_hub_id(source: str) -> bool:
    """Whether a source that is no local path can be a dataset's name, `name` or `owner/name`."""
    if source.endswith((*SUFFIXES, ".json", ".csv", ".zst", ".gz", ".md", ".py")):
        return False
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None


def _kept(documents: Iterable[Document], keeps: Callable[[str], bool]) -> Iterator[Document]:
    for document in documents:
        if not keeps(document.text):
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
