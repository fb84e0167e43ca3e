"""Documents packed into token sequences of equal length."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.data.documents import Document
from tsae.errors import UserError
from tsae.lm.chat_template import encode_chats
from tsae.lm.tokenizer import encode, padding_token, prefix_token, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_DOCUMENTS_AT_ONCE = 64  # fast tokenizers use all cores for a batch
_CHARACTERS_AT_ONCE = 1 << 20


class TooShortError(UserError):
    """A text has too few tokens."""


class TokenBatch(NamedTuple):
    """Sequences for the language model, and the positions to train on.

    tokens: [N, 1 + T] int64; position 0 is the prefix (BOS), whose activation is dropped.
    segments: [N, T] int32; index of the document within the row, -1 for special and padding tokens, and for tokens of
        a chat that do not count (`Chat.roles`). All tokens of a document have its index; the kernels take each maximal
        run of equal indices for a segment, so that a document counts as several where others lie between.
    """

    tokens: Tensor
    segments: Tensor

    @classmethod
    def concat(cls, parts: Iterable[TokenBatch]) -> TokenBatch:
        """The sequences of all ``parts`` (at least one), in order."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def split(self, size: int) -> Iterator[TokenBatch]:
        """The batch in parts of ``size`` sequences; the last may have fewer."""
        for tokens, segments in zip(self.tokens.split(size), self.segments.split(size), strict=True):
            yield TokenBatch(tokens, segments)

    def equals(self, other: TokenBatch) -> bool:
        """Whether all tokens and segments are equal."""
        return torch.equal(self.tokens, other.tokens) and torch.equal(self.segments, other.segments)


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> list[np.ndarray]:
    """The ids [n] int64 of each document, of chats by the tokenizer's template; an id i that does not count as -1 - i.

    Special tokens that the text spells are plain text. Raises UserError as `encode` and `encode_chats` do.
    """
    texts = [document.text for document in documents if document.chat is None]
    plain = iter(encode(tokenizer, texts) if texts else ())
    chats = iter(encode_chats(tokenizer, [(d.name, d.chat) for d in documents if d.chat is not None]))
    return [np.array(next(plain), dtype=np.int64) if d.chat is None else next(chats) for d in documents]


def true_ids(tokens: np.ndarray) -> np.ndarray:
    """The ids behind those of `encode_documents`."""
    return np.where(tokens < 0, -1 - tokens, tokens)


def follows_prefix(document: np.ndarray, position: int, row: int, prefix: int | None) -> bool:
    """Whether a document's first token repeats the prefix of a row that it begins: it is then left out.

    A chat template may begin with BOS, which plain text never has.

    document: ids of `encode_documents`
    position: of the document in the text of a batch, whose rows have `row` tokens
    """
    return prefix is not None and position % row == 0 and len(document) > 0 and int(true_ids(document[0])) == prefix


class SequenceStream:
    """Tokenizes documents and packs them, one after another, into rows of `length` tokens.

    There is no separator between documents. A document that does not fit continues in the next row, as a new segment.
    Chats are written by the tokenizer's chat template; if that begins with BOS, it is not repeated behind the prefix.

    documents: epoch -> the documents of that epoch, the same ones on every call.
    tokenizer: a transformers tokenizer; no special tokens are added, and those spelled in the text are plain text.
    length: T, content tokens per row, at least 1.
    repeat: continue with the next epoch when the text ends.
    prefix: begin every row with BOS, if the tokenizer has one; else its first token is text, whose position is dropped
        all the same, since many models give the first position a norm far beyond the others', whichever token it has.
    """

    def __init__(
        self,
        documents: Callable[[int], Iterator[Document]],
        tokenizer: PreTrainedTokenizerBase,
        length: int = 128,
        *,
        repeat: bool = True,
        prefix: bool = True,
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, not {length}")
        self.length = length
        self.repeat = repeat
        self._documents = documents
        self._tokenizer = tokenizer
        self._prefix = prefix_token(tokenizer) if prefix else None
        self._row = length + (self._prefix is None)  # tokens of text per row
        self._shortest = self._row - self.length + max(1, length // 4)  # least tokens of a last, padded row
        self._special = special_tokens(tokenizer)

        self._source: Iterator[Document] | None = None  # of the current epoch; opened on demand
        self._epoch = 0
        self._documents_read = 0  # documents of this epoch that were handed out at least in part
        self._epoch_tokens = 0  # tokens of those documents
        self._tokens_read = 0
        self._tokenized: deque[np.ndarray] = deque()  # tokenized documents; the first may be a remainder
        self._remainder = 0  # tokens in the first of `_tokenized` if part of it was handed out, else 0
        self._ended = False
        self._warned = False
        self._without_count: list[Document] | None = []  # chats so far, while no token of any document counts

    @property
    def tokens_read(self) -> int:
        """Content tokens handed out so far, over all epochs."""
        return self._tokens_read

    @property
    def epoch(self) -> int:
        """The epoch of the next token, or the last epoch if the text has ended."""
        return self._epoch

    def next_batch(self, n: int) -> TokenBatch:
        """The next n sequences; fewer, and then none, only if the text ends and `repeat` is False.

        The last row is then padded, with segment -1, or dropped if it has less than a quarter of its tokens.
        Raises TooShortError if the complete text does not fill one batch (with `repeat`) or one row (without).
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        pieces = self._take(n * self._row)
        tokens: np.ndarray = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
        owner: np.ndarray = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])

        padding = 0
        if partial := len(tokens) % self._row:
            if partial >= self._shortest:
                padding = self._row - partial
                tokens = np.concatenate([tokens, np.full(padding, padding_token(self._tokenizer))])
                owner = np.concatenate([owner, np.full(padding, len(pieces))])
            else:
                tokens, owner = tokens[:-partial], owner[:-partial]
        tokens, owner = tokens.reshape(-1, self._row), owner.reshape(-1, self._row)
        self._tokens_read += tokens.size - padding
        is_left_out, tokens = tokens < 0, true_ids(tokens)

        if self._prefix is None:
            content, owner, is_left_out = tokens[:, 1:], owner[:, 1:], is_left_out[:, 1:]
        else:
            content = tokens
            tokens = np.concatenate([np.full((len(tokens), 1), self._prefix), tokens], axis=1)
        segments = owner - owner[:, :1]
        segments[np.isin(content, self._special) | is_left_out] = -1
        if padding:
            segments[-1, -padding:] = -1
        return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(segments.astype(np.int32)))

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, for JSON; a stream that loads it continues with exactly the same batches."""
        return {
            "epoch": self._epoch,
            "documents": self._documents_read,
            "epoch_tokens": self._epoch_tokens,
            "tokens_read": self._tokens_read,
            "rest": self._tokenized[0].tolist() if self._remainder else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; the next batch skips earlier documents without tokenizing them.

        The stream must have the same documents, tokenizer and length.
        """
        self._source = None
        self._epoch = state["epoch"]
        self._documents_read = state["documents"]
        self._epoch_tokens = state["epoch_tokens"]
        self._tokens_read = state["tokens_read"]
        self._remainder = len(state["rest"])
        self._tokenized = deque([np.array(state["rest"], dtype=np.int64)] if self._remainder else [])
        self._ended = False

    def _take(self, count: int) -> list[np.ndarray]:
        """The next `count` tokens, one array per document; fewer if the text ends."""
        pieces = []
        wanted = count
        while count:
            if not self._tokenized and not self._tokenize_more(wanted):
                break
            document = self._tokenized.popleft()
            if not self._remainder:
                self._documents_read += 1
                self._epoch_tokens += len(document)
                if follows_prefix(document, wanted - count, self._row, self._prefix):
                    document = document[1:]
            piece, remainder = document[:count], document[count:]
            self._remainder = len(remainder)
            if self._remainder:
                self._tokenized.appendleft(remainder)
            if len(piece):
                pieces.append(piece)
            count -= len(piece)
        return pieces

    def _tokenize_more(self, wanted: int) -> bool:
        """Tokenize more documents, of the next epoch if necessary; False if the text has ended."""
        while not self._ended:
            if documents := self._next_documents():
                tokenized = encode_documents(self._tokenizer, documents)
                self._tokenized.extend(tokenized)
                self._check_counts(documents, tokenized)
                return True
            self._end_epoch(wanted)
        return False

    def _check_counts(self, documents: list[Document], tokenized: list[np.ndarray]) -> None:
        """Raise UserError if many chats have no token that counts, as if a role in `text.roles` were misspelled."""
        if self._without_count is None:
            return
        self._without_count += [d for d in documents if d.chat is not None and d.chat.roles]
        if any((ids >= 0).any() for ids in tokenized):
            self._without_count = None
        elif len(self._without_count) >= _DOCUMENTS_AT_ONCE:
            raise _nothing_counts(self._without_count)

    def _next_documents(self) -> list[Document]:
        """The epoch's next documents, enough for one call of the tokenizer; none at the end of the epoch."""
        if self._source is None:
            self._source = self._documents(self._epoch)
            skipped = sum(1 for _ in islice(self._source, self._documents_read))
            if skipped < self._documents_read:
                raise UserError(
                    f"the text has changed: {self._documents_read} documents of it were read before, "
                    f"but now it has only {skipped}"
                )
        documents: list[Document] = []
        characters = 0
        while len(documents) < _DOCUMENTS_AT_ONCE and characters < _CHARACTERS_AT_ONCE:
            if (document := next(self._source, None)) is None:
                break
            documents.append(document)
            characters += len(document.text)
        return documents

    def _end_epoch(self, wanted: int) -> None:
        if self._without_count:
            raise _nothing_counts(self._without_count)
        needed = wanted if self.repeat else self._shortest
        if self._epoch_tokens < needed:
            raise TooShortError(
                f"the text is too short: it has {self._epoch_tokens} tokens, and {needed} are needed "
                f"for {'a batch of' if self.repeat else 'the shortest of'} sequences of {self.length} tokens"
            )
        if not self.repeat:
            self._ended = True
            return
        if not self._warned:
            log.warning(
                "the text ended after %s tokens (epoch %d): reading it again, in another order",
                f"{self._epoch_tokens:,}",
                self._epoch,
            )
            self._warned = True
        self._source = None
        self._epoch += 1
        self._documents_read = self._epoch_tokens = 0


def _nothing_counts(documents: list[Document]) -> UserError:
    chats = [document.chat for document in documents if document.chat is not None]
    wanted = ", ".join(dict.fromkeys(role for chat in chats for role in chat.roles))
    found = ", ".join(dict.fromkeys(message.role for chat in chats for message in chat.messages))
    return UserError(
        f"no token of the first {len(documents)} chats counts: text.roles is {wanted}, and their messages have the "
        f"roles {found}"
    )
