"""Cutting long text at natural boundaries, and deciding which side of the split a text is on."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from tsae.errors import UserError

Part = Literal["train", "evaluation"]
"""The sides of a text's split: what is trained on, and what is held out."""

PASSAGE_CHARACTERS = 2_000
"""Length that files are cut to: about four sequences of 128 tokens."""

_SAMPLE = 1_000  # documents looked at to make sure that both sides of a small source have text
_BUFFER_CHARACTERS = 64_000_000  # bounds the memory of a shuffle buffer full of very long documents
_LAST_BOUNDARY = tuple(re.compile(p, re.DOTALL) for p in (r".*\n[ \t]*\n", r".*\n", r".*[.!?] ", r".*\s"))


@dataclass(frozen=True)
class Document:
    """A piece of text that is packed as one segment.

    name: where it comes from, for messages.
    text: never blank.
    """

    name: str
    text: str


def cut(chunks: Iterable[str], length: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Cuts text into pieces of at most `length` characters, whose concatenation is the text.

    A piece ends at the last paragraph boundary in its second half, else at the last line, sentence or space
    there, else in the middle of a word.

    chunks: the text in any number of parts; only one part is held at a time.
    length: characters, at least 2.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > length:
            end = _boundary(rest, start + length // 2, start + length)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _boundary(text: str, first: int, last: int) -> int:
    for pattern in _LAST_BOUNDARY:
        if found := pattern.match(text, first, last):
            return found.end()
    return last


def position(text: str) -> float:
    """A stable number in [0, 1), uniform over texts, that does not depend on the blanks around the text."""
    digest = hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


@dataclass(frozen=True)
class Split:
    """Which texts belong to a part: those whose hash lies below the threshold are evaluation text."""

    part: Part
    threshold: float

    def keeps(self, text: str) -> bool:
        """Whether the text is in this part; the same text is always in the same part."""
        return (position(text) < self.threshold) == (self.part == "evaluation")


def find_threshold(texts: Iterable[str], share: float, source: str) -> float:
    """The threshold of a source's own split, with something on both sides of it.

    It is the share, unless of few documents the hash puts none on one side: then it moves just past the nearest
    one, so it depends on the source. The first 1,000 documents decide, so any part and epoch comes to the same.

    texts: the documents' texts in an order that does not depend on seed or part.
    share: of the documents that are evaluation text, in [0, 1]; 0 and 1 are kept exactly.
    Raises UserError if there is no text.
    """
    positions = sorted({position(text) for text in islice(texts, _SAMPLE)})
    if not positions:
        raise UserError(f"there is no text in {source!r}: every document in it is empty")
    if share in (0, 1):
        return share
    if len(positions) == 1:
        return 0.0  # one document: all of it is training text
    if positions[0] >= share:
        return (positions[0] + positions[1]) / 2
    if positions[-1] < share:
        return (positions[-2] + positions[-1]) / 2
    return share


def decide_split(texts: Iterable[str], part: Part, share: float, source: str) -> Split:
    """The split of a source that can be read twice; its threshold is `find_threshold`'s.

    Raises UserError if there is no text, or none for this part.
    """
    threshold = find_threshold(texts, share, source)
    if part == "evaluation" and threshold == 0:
        why = "the evaluation share is 0" if share == 0 else "it holds a single document or passage"
        raise UserError(f"no evaluation text in {source!r} because {why}: name another text for the evaluation")
    if part == "train" and threshold == 1:
        raise UserError(f"no training text in {source!r} because the evaluation share is 1: choose a smaller share")
    return Split(part, threshold)


def shuffled(documents: Iterable[Document], rng: random.Random, size: int) -> Iterator[Document]:
    """The documents in an order drawn from `rng`, through a buffer of `size` of them."""
    buffer: list[Document] = []
    characters = 0
    for document in documents:
        if len(buffer) < size and characters < _BUFFER_CHARACTERS:
            buffer.append(document)
            characters += len(document.text)
            continue
        i = rng.randrange(len(buffer))
        characters += len(document.text) - len(buffer[i].text)
        document, buffer[i] = buffer[i], document
        yield document
    rng.shuffle(buffer)
    yield from buffer
