"""Documents: pieces of text, cut at natural boundaries and shuffled."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tsae.data.chats import Chat

PASSAGE_CHARACTERS = 2_000
"""Maximum length of a passage of a file: about four sequences of 128 tokens."""

_BUFFER_CHARACTERS = 64_000_000  # bounds the memory of a shuffle buffer of very long documents
_BOUNDARIES = tuple(re.compile(p, re.DOTALL) for p in (r".*\n[ \t]*\n", r".*\n", r".*[.!?] ", r".*\s"))  # best first


@dataclass(frozen=True)
class Document:
    """A piece of text that is packed as one segment.

    name: where it comes from, for messages.
    text: never blank; of a chat, its messages behind their roles (`Chat.text`).
    chat: the messages that a chat template renders, once the tokenizer is known; None for plain text.
    """

    name: str
    text: str
    chat: Chat | None = None


def cut(chunks: Iterable[str], length: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Cut text into passages of at most `length` characters; joined, they are the text again.

    A passage ends at the last paragraph boundary in its second half, or else the last line end, sentence end or
    space there, or else in the middle of a word.

    chunks: the text in any number of parts; one part is held at a time.
    length: characters, at least 2.
    """
    text = ""
    for chunk in chunks:
        text += chunk
        start = 0
        while len(text) - start > length:
            end = _boundary(text, start + length // 2, start + length)
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


def _boundary(text: str, first: int, last: int) -> int:
    for pattern in _BOUNDARIES:
        if found := pattern.match(text, first, last):
            return found.end()
    return last


def shuffle(documents: Iterable[Document], rng: random.Random, size: int) -> Iterator[Document]:
    """The documents in random order, drawn through a shuffle buffer of `size` documents."""
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
