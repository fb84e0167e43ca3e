"""Chats to tokens with the tokenizer's own chat template: what the template writes, and what the messages say.

The ids are those of `tokenizer.apply_chat_template`, with one exception. It tokenizes the rendered string, in which a
content that spells `<|im_start|>` cannot be told from the template's own. Here it stays plain text: the special tokens
that the template writes are replaced by private characters, and so are their names in a copy of the tokenizer.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from tsae.data.chats import Chat, Message
from tsae.errors import UserError, reason
from tsae.utils.notices import warn_once

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_MARKS = range(0xF0000, 0xFFFFE)  # code points for private use, which text hardly ever has
_NAMES = range(0x100000, 0x10FFFE)
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_TODAY = datetime(2024, 7, 26)  # for templates that write the date: a resumed run reads the same text on another day


@dataclass(frozen=True)
class Rendered:
    """A chat as its template writes it.

    text: what `apply_chat_template(tokenize=False)` gives
    spans: [S, 3] int64, ascending: begin and end in `text` of each content that is not blank, and the number of the
        message
    """

    text: str
    spans: np.ndarray


def encode_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[tuple[str, Chat]]) -> list[np.ndarray]:
    """The ids [n] int64 of each chat; an id i that does not count, because of `Chat.roles`, is given as -1 - i.

    chats: pairs of a name, for messages, and a chat
    With roles a token counts if its last character belongs to a content of one of them. Special tokens that a content
    spells are plain text, and a warning says so.

    Raises UserError if the tokenizer has no chat template or is no fast one, or if the template refuses the chat.
    """
    if not chats:
        return []
    if tokenizer.chat_template is None:
        raise UserError("the text holds chats, and the model's tokenizer has no chat template: use another model")
    if not tokenizer.is_fast:
        raise UserError("the text holds chats, which need a fast tokenizer, with a tokenizer.json: use another model")
    special = _special(tokenizer)
    rendered = [render(tokenizer, chat, name) for name, chat in chats]
    texts = [each.text for each in rendered]
    encoded = []
    for (_, chat), chat_text, (ids, offsets) in zip(chats, rendered, _encode(tokenizer, texts), strict=True):
        if any(inside for *_, inside in _special_places(special, tokenizer.unk_token_id, chat_text, ids, offsets)):
            warn_once(log, "a chat spells a special token: it is read as plain text, here and elsewhere")
            chat_text, ids, offsets = _encode_apart(tokenizer, special, chat_text)
        if chat.roles:
            roles = np.array([message.role in chat.roles for message in chat.messages])
            owner = _owners(chat_text.spans, offsets[:, 1])
            ids = np.where((owner >= 0) & roles[owner], ids, -1 - ids)
        encoded.append(ids)
    return encoded


def render(tokenizer: PreTrainedTokenizerBase, chat: Chat, name: str) -> Rendered:
    """The chat as the template writes it, and where its contents are.

    They are found by a second rendering, in which private characters stand around each content, or inside its outer
    whitespace if the template removes that. A template that writes the date writes 26 July 2024.

    Raises UserError if the template refuses the chat, or leaves out or changes a message.
    """
    text = _apply(tokenizer, chat.messages, name)
    used = set(text)
    free = "".join(islice((mark for mark in map(chr, _MARKS) if mark not in used), 2 * len(chat.messages)))
    if len(free) < 2 * len(chat.messages):
        raise UserError(f"the chat {name} has too many messages to be read: leave it out")
    for contents in dict.fromkeys(tuple(f(m.content) for m in chat.messages) for f in (str, str.strip)):
        marked = [
            message._replace(content=_surrounded(message.content, core, *free[2 * i : 2 * i + 2]))
            for i, (message, core) in enumerate(zip(chat.messages, contents, strict=True))
        ]
        kept, marks = _without_marks(_apply(tokenizer, marked, name), free)
        if kept == text:
            break
    else:
        raise UserError(f"the chat template does not write the messages of the chat {name} as they are: leave it out")
    spans, partial = _spans(text, contents, marks)
    names = _special(tokenizer).values() if partial else ()
    for i, message in enumerate(chat.messages):
        lost = message.content.strip() and i not in spans[:, 2]
        if lost or (i in partial and any(token in message.content for token in names)):
            raise UserError(f"the chat template leaves out or changes message {i + 1} of the chat {name}: leave it out")
    return Rendered(text, spans)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], name: str) -> str:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    try:
        template = _CLOCK.sub(lambda call: json.dumps(_TODAY.strftime(call[2])), tokenizer.get_chat_template())
        return str(tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False))
    except Exception as error:  # whatever a template raises
        raise UserError(f"the chat template cannot write the chat {name}: {reason(error)}") from error


def _surrounded(content: str, core: str, begin: str, end: str) -> str:
    """The content with two marks around its core; blank content as it is."""
    if not content.strip():
        return content
    before, _, after = content.partition(core)
    return f"{before}{begin}{core}{end}{after}"


def _without_marks(text: str, marks: str) -> tuple[str, list[tuple[int, int, int]]]:
    """The text without marks; of each its place there, the number of its message, and 1 if it is the second."""
    number = {mark: i for i, mark in enumerate(marks)}
    kept: list[str] = []
    places = []
    for character in text:
        if character in number:
            places.append((len(kept), *divmod(number[character], 2)))
        else:
            kept.append(character)
    return "".join(kept), places


def _spans(text: str, contents: Sequence[str], marks: list[tuple[int, int, int]]) -> tuple[np.ndarray, set[int]]:
    """The spans of `Rendered`, from the marks that the template has kept, and the messages with only one mark.

    A template that leaves out the beginning of a content (reasoning before `</think>`) leaves out one mark with it.
    """
    found, partial = [], set()
    begins: dict[int, int] = {}
    for at, i, is_end in marks:
        if not is_end:
            begins[i] = at
        elif i in begins:
            found.append((begins.pop(i), at, i))
        else:
            end = text[at - _common(text[:at][::-1], contents[i][::-1]) : at]
            found.append((at - len(end.lstrip()), at, i))
            partial.add(i)
    for i, at in begins.items():
        begin = text[at : at + _common(text[at:], contents[i])]
        found.append((at, at + len(begin.rstrip()), i))
        partial.add(i)
    return np.array(sorted(found), dtype=np.int64).reshape(-1, 3), partial


def _common(a: str, b: str) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids [n] and begin and end [n, 2] of each token, as `apply_chat_template(tokenize=True)` makes them."""
    try:
        found = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
    except Exception as error:
        if type(error) is not Exception:  # which the library `tokenizers` raises for all its errors
            raise
        raise UserError(f"the tokenizer cannot read the text ({reason(error)}): use the model's own") from error
    return [_arrays(*each) for each in zip(found["input_ids"], found["offset_mapping"], strict=True)]


def _arrays(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2)


def _owners(spans: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[n] number of the message whose content holds the last character of each token; -1: the template does.

    ends: [n] positions behind that character
    """
    if not len(spans):
        return np.full(len(ends), -1)
    at = np.searchsorted(spans[:, 0], ends) - 1  # the last span that begins before it
    return np.where((at >= 0) & (ends <= spans[at, 1]), spans[at, 2], -1)


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens, also those without a role, by id."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _special_places(
    special: dict[int, str], unk: int | None, text: Rendered, ids: np.ndarray, offsets: np.ndarray
) -> list[tuple[int, int, int, bool]]:
    """Begin, end and id of each special token that the text spells, and whether it overlaps a content."""
    places = []
    for at in (at for at, i in enumerate(ids.tolist()) if i in special):
        (begin, end), i = offsets[at].tolist(), int(ids[at])
        if i == unk and special[i] not in text.text[begin:end]:
            continue  # stands for something the vocabulary lacks
        overlaps = bool(((text.spans[:, 0] < end) & (begin < text.spans[:, 1])).any())
        places.append((begin, end, i, overlaps))
    return places


def _encode_apart(
    tokenizer: PreTrainedTokenizerBase, special: dict[int, str], text: Rendered
) -> tuple[Rendered, np.ndarray, np.ndarray]:
    """Ids and offsets of a chat whose contents spell special tokens, and the text that the offsets refer to.

    The template's own special tokens are those that remain if the contents are blotted out.
    """
    blotted = list(text.text)
    for begin, end, _ in text.spans:
        blotted[begin:end] = ("a " * (end - begin))[: end - begin - 1] + "a"
    ((ids, offsets),) = _encode(tokenizer, ["".join(blotted)])
    renamed = _renamed(tokenizer)
    pieces, last, begins, shifts = [], 0, [], []
    for begin, end, i, _ in _special_places(special, tokenizer.unk_token_id, text, ids, offsets):
        pieces += [text.text[last:begin], renamed.names[i]]
        last = end
        begins.append(end)
        shifts.append(len(renamed.names[i]) - (end - begin))
    pieces.append(text.text[last:])
    if any(ord(character) in _NAMES for character in text.text):
        raise UserError("a chat spells a special token and has private characters, so it cannot be read: leave it out")
    spans = text.spans.copy()
    shift = np.concatenate([[0], np.cumsum(shifts)]).astype(np.int64)
    spans[:, :2] += shift[np.searchsorted(begins, spans[:, :2], side="right")]
    encoding = renamed.tokenizer.encode("".join(pieces), add_special_tokens=False)
    ids, offsets = _arrays([renamed.ids.get(i, i) for i in encoding.ids], encoding.offsets)
    return Rendered("".join(pieces), spans), ids, offsets


class _Renamed(NamedTuple):
    """A copy of a tokenizer whose special tokens are private characters.

    names: of the special tokens, by the original's id
    ids: the original's ids of added tokens, by the copy's
    """

    tokenizer: Tokenizer
    names: dict[int, str]
    ids: dict[int, int]


_COPIES: WeakKeyDictionary[PreTrainedTokenizerBase, _Renamed] = WeakKeyDictionary()


def _renamed(tokenizer: PreTrainedTokenizerBase) -> _Renamed:
    from tokenizers import Tokenizer

    if tokenizer not in _COPIES:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None, "post_processor": None}
        names = {}
        for token, name in zip(state["added_tokens"], map(chr, _NAMES), strict=False):
            if token["special"]:
                names[token["id"]] = token["content"] = name
        copy = Tokenizer.from_str(json.dumps(state))
        own: dict[Any, int] = {copy.token_to_id(token["content"]): token["id"] for token in state["added_tokens"]}
        _COPIES[tokenizer] = _Renamed(copy, names, own)
    return _COPIES[tokenizer]
