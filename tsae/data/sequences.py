"""Documents packed into token sequences of equal length."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.data.documents import Document
from tsae.errors import UserError
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
    segments: [N, T] int32; index of the document within the row, -1 for special and padding tokens.
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


class SequenceStream:
    """Tokenizes documents and packs them, one after another, into rows of `length` tokens.

    There is no separator between documents. A document that does not fit continues in the next row, as a new segment.

    documents: epoch -> the documents of that epoch, the same ones on every call.
    tokenizer: a transformers tokenizer; no special tokens are added, and those spelled in the text are plain text.
    length: T, content tokens per row, at least 1.
    repeat: continue with the next epoch when the text ends.
    prefix: begin every row with BOS, if the tokenizer has one; else its first token is text, whose position is dropped.
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
        tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
        owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])

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

        if self._prefix is None:
            content, owner = tokens[:, 1:], owner[:, 1:]
        else:
            content = tokens
            tokens = np.concatenate([np.full((len(tokens), 1), self._prefix), tokens], axis=1)
        segments = owner - owner[:, :1]
        segments[np.isin(content, self._special)] = -1
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
            if texts := self._next_texts():
                self._tokenized.extend(np.array(ids, dtype=np.int64) for ids in encode(self._tokenizer, texts))
                return True
            self._end_epoch(wanted)
        return False

    def _next_texts(self) -> list[str]:
        """Texts of the epoch's next documents, enough for one call of the tokenizer; none at the end of the epoch."""
        if self._source is None:
            self._source = self._documents(self._epoch)
            skipped = sum(1 for _ in islice(self._source, self._documents_read))
            if skipped < self._documents_read:
                raise UserError(
                    f"the text has changed: {self._documents_read} documents of it were read before, "
                    f"but now it has only {skipped}"
                )
        texts: list[str] = []
        characters = 0
        while len(texts) < _DOCUMENTS_AT_ONCE and characters < _CHARACTERS_AT_ONCE:
            if (document := next(self._source, None)) is None:
                break
            texts.append(document.text)
            characters += len(document.text)
        return texts

    def _end_epoch(self, wanted: int) -> None:
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
