"""Text to train and evaluate on: every source as a stream of documents."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from tsae.config import TextConfig
from tsae.data import python_docs
from tsae.data.documents import Document, cut, shuffle
from tsae.data.folders import NAMED
from tsae.data.hub_datasets import hub_holds_chats, read_hub
from tsae.data.mixtures import Weighted, exists, interleave, parse_mixture, spell_mixture
from tsae.data.split import Part, Split, decide_split, find_threshold, hash_fraction
from tsae.data.text_files import choose_files, read_files
from tsae.errors import UserError
from tsae.utils.notices import warn_once
from tsae.utils.paths import expanded
from tsae.utils.ranges import check_ranges

log = logging.getLogger(__name__)

PYTHON_DOCS = "python-docs"
"""Source that is always available: the documentation and source code of the Python installation."""

DEFAULT = TextConfig()

_MAX_CHARACTERS = 100_000  # longer rows are cut, after the split has decided their side


def open_text(
    source: str, *, part: Part, seed: int, config: TextConfig = DEFAULT, epoch: int = 0
) -> Iterator[Document]:
    """The documents of one part of a text source, in an order that seed and epoch determine.

    source: "python-docs", a .txt, .jsonl, .csv (all also .gz or .zst) or .parquet file, a folder of them or of a saved
        dataset, the id of a hub dataset, or several of these (`tsae.data.mixtures`). `choose_files` in
        `tsae.data.text_files` says which files and column are read. Plain text and Python files are cut to passages of
        about 2,000 characters.
    part: "train" or "evaluation". A hash of the document decides (plain text: of the passage; "python-docs": of the
        module).
    seed, epoch: each epoch has the same documents in another order ("python-docs": and other source code).

    Documents that differ only in surrounding whitespace are in the same part of a source, and in the same part of
    any two sources with the same threshold (`config.threshold`; see `split_threshold`). The hash covers complete
    documents: the same words cut differently, as a passage of a .txt file and within a row of a .jsonl file, count as
    different text.

    Raises UserError, immediately rather than at the first document, if the path, dataset or column does not exist, if
    a file does not begin with text, if there is no text or, with the source's own threshold, none for this part. Also
    at a later document, where a file is damaged or in another encoding.
    """
    if part not in ("train", "evaluation"):
        raise ValueError(f'part must be "train" or "evaluation", not {part!r}')
    if config.threshold is not None:
        split = Split(part, config.threshold)
    elif (texts := _split_texts(source, config)) is not None:
        split = decide_split(texts, part, config.evaluation_share, source)
    else:
        split = Split(part, config.evaluation_share)
    return _open(source, part, split.contains, seed, config, epoch)


def split_threshold(source: str, config: TextConfig) -> float:
    """The threshold of a source's split: documents whose hash is below it are evaluation text.

    Usually `config.evaluation_share`; for a source of few documents it depends on them (`find_threshold`), so a run
    stores it.
    """
    if config.threshold is not None:
        return config.threshold
    texts = _split_texts(source, config)
    if texts is None and parse_mixture(source) is None and not _is_hub_id(source):
        raise UserError(f"no such file or folder: {source!r}")
    return config.evaluation_share if texts is None else find_threshold(texts, config.evaluation_share, source)


def open_unseen(
    source: str, *, seed: int, config: TextConfig, trained_on: str, trained_config: TextConfig
) -> Iterator[Document]:
    """All documents of a local source except those in the training part of ``trained_on``.

    Reads all of ``trained_on``, and holds one number for each document of ``source``.

    Raises UserError if nothing is left, or if either is a hub dataset, which cannot be read to its end.
    """
    texts = _split_texts(source, config)
    train = Split("train", split_threshold(trained_on, trained_config))
    known = _split_texts(trained_on, trained_config)
    if texts is None or known is None:
        raise UserError(
            f"there is too little evaluation text in {source!r}, and its other documents cannot be compared with the "
            f"training text because {trained_on if known is None else source!r} is not on this machine: name a "
            "larger text"
        )
    unseen = {hash_fraction(text) for text in texts}
    if not unseen:
        raise UserError(f"there is no text in {source!r}: every document in it is empty")
    unseen.difference_update(hash_fraction(text) for text in known if train.contains(text))
    if not unseen:
        raise UserError(f"all text in {source!r} is training text of the run: name another text")
    return _open(source, "evaluation", lambda text: hash_fraction(text) in unseen, seed, config, 0)


def is_same_source(a: str, b: str) -> bool:
    """Whether two sources are the same, however their paths are spelled."""
    if parse_mixture(a) is not None and parse_mixture(b) is not None:
        return absolute_source(a) == absolute_source(b)
    if is_local(a) and is_local(b) and PYTHON_DOCS not in (a, b):
        return expanded(a).resolve() == expanded(b).resolve()
    return a == b


def absolute_source(source: str) -> str:
    """The source under a name that is valid in every working directory; of a mixture in YAML, what the file says."""
    if (mixture := parse_mixture(source)) is not None:
        return spell_mixture(mixture, absolute_source)
    return str(expanded(source).absolute()) if source != PYTHON_DOCS and is_local(source) else source


def shown_source(source: str) -> str:
    """The source in short, without the folders that paths lie in."""
    if (mixture := parse_mixture(source)) is not None:
        return ", ".join(f"{shown_source(each.data)} ({each.weight:g})" for each in mixture)
    return Path(source).name if Path(source).is_absolute() or exists(source) else source


def holds_chats(source: str, config: TextConfig) -> bool:
    """Whether a source, or one of a mixture, has chats, which the tokenizer's template writes."""
    if (mixture := parse_mixture(source)) is not None:
        return any(holds_chats(each.data, _config(each, config)) for each in mixture)
    if source == PYTHON_DOCS:
        return False
    if is_local(source):
        return choose_files(expanded(source), config.column, config.split).chats
    return hub_holds_chats(source, config)


def is_local(source: str) -> bool:
    """Whether a source is on this machine: "python-docs", or a path that exists. A mixture is not local itself."""
    if parse_mixture(source) is not None:
        return False
    try:
        return source == PYTHON_DOCS or bool(source and expanded(source).exists())
    except OSError as error:  # a folder on the way that may not be entered, a name that is too long
        raise UserError(f"cannot read {source!r}: {error.strerror or error}") from error


def _is_hub_id(source: str) -> bool:
    """Whether a source that is no local path can be a dataset's id, `name` or `owner/name`."""
    if source.endswith((*NAMED, ".arrow", ".yaml", ".yml", ".zst", ".gz", ".md", ".py")):
        return False
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None


def _split_texts(source: str, config: TextConfig) -> Iterator[str] | None:
    """The texts of a local source whose hashes decide the split, in a fixed order; None for a hub dataset."""
    if source == PYTHON_DOCS:
        return (unit.text for unit in python_docs.units())
    if (mixture := parse_mixture(source)) is not None:
        texts = [_split_texts(each.data, _config(each, config)) for each in mixture]
        return None if None in texts else _in_turn([each for each in texts if each is not None])
    if not is_local(source):
        return None
    return (document.text for document in read_files(choose_files(expanded(source), config.column, config.split)))


def _in_turn(texts: list[Iterator[str]]) -> Iterator[str]:
    """The next text of each iterator in turn, to the end of all."""
    while texts:
        for each in list(texts):
            if (text := next(each, None)) is None:
                texts.remove(each)
            else:
                yield text


def _config(source: Weighted, config: TextConfig) -> TextConfig:
    return source.config(config, hub=not is_local(source.data))


def _open(
    source: str, part: Part, wanted: Callable[[str], bool], seed: int, config: TextConfig, epoch: int
) -> Iterator[Document]:
    """The non-blank documents whose text is `wanted`; raises UserError if there are none where that is not known.

    part: of a mixture, training text is repeated for the shares
    """
    if (mixture := parse_mixture(source)) is None:
        documents = _read(source, wanted, seed, epoch, config)
        limited = bool(config.min_characters or config.max_characters)
        return documents if is_local(source) and not limited else _require_text(documents, source, part, limited)
    openers = [partial(_open, each.data, part, wanted, seed, _config(each, config)) for each in mixture]
    return interleave(openers, mixture, epoch, repeat=part == "train")


def _read(source: str, wanted: Callable[[str], bool], seed: int, epoch: int, config: TextConfig) -> Iterator[Document]:
    """The documents whose text is `wanted`, in an order that seed and epoch determine."""
    check_ranges(config, "text.")
    rng = random.Random(f"{seed} {epoch}")
    if source == PYTHON_DOCS:
        documents = python_docs.documents([unit for unit in python_docs.units() if wanted(unit.text)], rng, epoch)
        return _fit(_with_roles(documents, source, config, chats=False), config)
    if is_local(source):
        if config.subset is not None:
            raise UserError(f"subset {config.subset!r} applies to hub datasets only, but {source!r} is a local path")
        files = choose_files(expanded(source), config.column, config.split)
        rng.shuffle(files.paths)
        documents = _with_roles(read_files(files), source, config, chats=files.chats)
        return shuffle(_select(documents, wanted, config), rng, config.shuffle_buffer)
    if not _is_hub_id(source):
        raise UserError(f"no such file or folder: {source!r}")
    hub = read_hub(source, config, seed=seed, epoch=epoch)
    return _select(_with_roles(hub.documents, source, config, chats=hub.chats), wanted, config)


def _with_roles(documents: Iterator[Document], source: str, config: TextConfig, *, chats: bool) -> Iterator[Document]:
    """The documents, chats among them with the roles to count."""
    if not config.roles:
        return documents
    if not chats:
        warn_once(log, f"text.roles is not looked for in {source!r}, which has no chats: all of it counts")
        return documents
    return (replace(d, chat=d.chat and d.chat._replace(roles=config.roles)) for d in documents)


def _select(documents: Iterable[Document], wanted: Callable[[str], bool], config: TextConfig) -> Iterator[Document]:
    """The documents whose text is `wanted`, at the lengths that `config` asks for; very long ones cut."""
    for document in _fit((document for document in documents if wanted(document.text)), config):
        if document.chat is not None or len(document.text) <= _MAX_CHARACTERS:
            yield document
        else:
            for i, piece in enumerate(cut([document.text], _MAX_CHARACTERS)):
                if not piece.isspace():
                    yield Document(f"{document.name}.{i}", piece)


def _fit(documents: Iterator[Document], config: TextConfig) -> Iterator[Document]:
    """The documents that have `config.min_characters`, up to `config.max_characters` of each."""
    for document in documents:
        length = len(document.text) if document.chat is None else document.chat.characters
        if length < config.min_characters:
            continue
        if config.max_characters == 0 or length <= config.max_characters:
            yield document
        elif document.chat is None:
            text = next(cut([document.text], config.max_characters))
            if not text.isspace():
                yield replace(document, text=text)
        elif (chat := document.chat.cut(config.max_characters)) is not None:
            yield replace(document, text=chat.text, chat=chat)


def _require_text(documents: Iterator[Document], source: str, part: Part, limited: bool = False) -> Iterator[Document]:
    """The documents without blank ones; raises UserError at the end if there were none.

    limited: whether documents were left out by their length
    """
    found = False
    for document in documents:
        if document.text and not document.text.isspace():
            found = True
            yield document
    if not found and limited:
        raise UserError(
            f"no {part} text in {source!r} of the length that text.min_characters and text.max_characters ask for: "
            "change them, or use another text"
        )
    if not found:
        raise UserError(f"no {part} text in the dataset {source!r}: use a larger one, or another for evaluation")
