"""Chats: lists of messages, each with a role and content, as they stand in rows of data."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tsae.data.encodings import row_text
from tsae.errors import UserError
from tsae.utils.notices import warn_once

log = logging.getLogger(__name__)

COLUMNS = ("messages", "conversations")
"""Columns whose chats are read without being named."""

_KEYS = (("role", "content"), ("from", "value"))  # OpenAI's and ShareGPT's names
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for the roles of chat templates
_ROLE = re.compile(r"[\w.-]+")  # a role is written by the template: it may not spell a special token


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


class Chat(NamedTuple):
    """A conversation, which the tokenizer's chat template turns into tokens (`tsae.lm.chat_template`).

    messages: at least one, and some content is not blank.
    roles: only the contents of these roles are counted; empty: everything that is no special token.
    """

    messages: tuple[Message, ...]
    roles: tuple[str, ...] = ()

    @property
    def characters(self) -> int:
        """Characters in all contents."""
        return sum(len(message.content) for message in self.messages)

    @property
    def text(self) -> str:
        """The messages as text, each after its role: what the split hashes, and what messages show."""
        return "\n\n".join(f"{message.role}: {message.content}" for message in self.messages)

    def cut(self, characters: int) -> Chat | None:
        """The chat up to the last complete message within this many characters; None if the first is longer."""
        used = 0
        for count, message in enumerate(self.messages):
            used += len(message.content)
            if used > characters:
                kept = self.messages[:count]
                return Chat(kept, self.roles) if any(not _is_blank(m.content) for m in kept) else None
        return self


def is_message(names: Iterable[str]) -> bool:
    """Whether an object with these keys is a message."""
    return any(set(keys) <= set(names) for keys in _KEYS)


def parse_chat(value: Any, place: str) -> Chat | None:
    """The chat in a row's value; None if it says nothing: null, an empty list, or messages without content.

    place: of the row, for messages, as in "line 3 of 'x.jsonl'"
    Raises UserError if it is no list of messages whose role and content are strings.
    """
    if value is None or value == [] or (isinstance(value, str) and _is_blank(value)):
        return None
    if not isinstance(value, list):
        raise UserError(f"{place} does not hold a chat, a list of messages: it is {_named(value)}")
    messages = tuple(_message(item, f"message {number} of {place}", place) for number, item in enumerate(value, 1))
    return None if all(_is_blank(message.content) for message in messages) else Chat(messages)


def _message(item: Any, place: str, row: str) -> Message:
    keys = next((keys for keys in _KEYS if isinstance(item, Mapping) and set(keys) <= set(item)), None)
    if keys is None:
        raise UserError(f"{place} is not an object with role and content (or from and value)")
    role, content = (item[key] for key in keys)
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise UserError(f"{place} has the {keys[0]} {role!r}, which is not the name of a role")
    if not isinstance(content, str):
        raise UserError(f"{place} has a {keys[1]} that is no string but {_named(content)}")
    ignored = sorted(key for key, other in item.items() if key not in keys and other not in (None, [], {}, ""))
    if ignored:
        warn_once(log, f"of the messages in {row.partition(' of ')[2] or row} only {keys[0]} and {keys[1]} are read")
    return Message(_ROLES.get(role, role) if keys[0] == "from" else role, row_text(content, row))


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _named(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value), repr(value)[:40])
