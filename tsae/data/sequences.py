"""Documents packed into token sequences of one length."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.data.passages import Document
from tsae.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_DOCUMENTS_AT_ONCE = 64  # fast tokenizers spread a batch over the cores
_CHARACTERS_AT_ONCE = 1 << 20


class TooShortError(UserError):
    """A text does not fill what it must."""


class TokenBatch(NamedTuple):
    """Sequences for the language model, and what of them to train on.

    tokens: [N, 1 + T] int64; position 0 is the prefix (BOS), whose activation is dropped.
    segments: [N, T] int32; documents of the row counted from 0, -1 for special and padding tokens.
    """

    tokens: Tensor
    segments: Tensor

    @classmethod
    def joined(cls, parts: Iterable[TokenBatch]) -> TokenBatch:
        """The sequences of all ``parts``, at least one, in order."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def split(self, size: int) -> Iterator[TokenBatch]:
        """The batch in parts of ``size`` sequences; the last may have fewer."""
        for tokens, segments in zip(self.tokens.split(size), self.segments.split(size), strict=True):
            yield TokenBatch(tokens, segments)

    def equals(self, other: TokenBatch) -> bool:
        """Whether all tokens and segments are the same."""
        return torch.equal(self.tokens, other.tokens) and torch.equal(self.segments, other.segments)


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token every sequence begins with: BOS, else EOS, else None (the first token of content serves)."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


class SequenceStream:
    """Reads documents, tokenizes them and packs them one after another into rows of `length` tokens.

    Documents follow each other without a separator. One that does not fit goes on in the next row, where it
    begins a new segment.

    documents: epoch -> the documents of that epoch. The same epoch must give the same documents each time.
    tokenizer: a transformers tokenizer; it adds no special tokens, and those the text spells get segment -1.
    length: T, content tokens in a row, at least 1.
    repeat: go on with the next epoch when the text ends.
    """

    def __init__(
        self,
        documents: Callable[[int], Iterator[Document]],
        tokenizer: PreTrainedTokenizerBase,
        length: int = 128,
        *,
        repeat: bool = True,
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, not {length}")
        self.length = length
        self.repeat = repeat
        self._documents = documents
        self._tokenizer = tokenizer
        self._prefix = prefix_token(tokenizer)
        self._row = length + (self._prefix is None)  # content tokens that a row takes
        self._shortest = self._row - self.length + max(1, length // 4)  # that a last row is kept for
        # Of those marked special, `all_special_ids` has only the ones with a role: not Gemma's <start_of_turn>.
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = np.array(sorted(marked | set(tokenizer.all_special_ids)), dtype=np.int64)

        self._source: Iterator[Document] | None = None  # of the current epoch; opened when first needed
        self._epoch = 0
        self._begun = 0  # documents of this epoch of which some token was handed out
        self._epoch_tokens = 0  # tokens of those documents
        self._tokens_read = 0
        self._ready: deque[np.ndarray] = deque()  # tokenized; the first may be the rest of a begun document
        self._rest = 0  # tokens of the first of `_ready` if it is such a rest, else 0
        self._ended = False
        self._warned = False

    @property
    def tokens_read(self) -> int:
        """Content tokens handed out so far, over all epochs."""
        return self._tokens_read

    @property
    def epoch(self) -> int:
        """The epoch that the next token comes from, or the last one where the text has ended."""
        return self._epoch

    def next_batch(self, n: int) -> TokenBatch:
        """The next n sequences; fewer only where `repeat` is False and the text ends, none after that.

        The last row is then padded, with segment -1, if it has a quarter of its tokens, and dropped if not.
        Raises TooShortError if the whole text does not fill one batch (with `repeat`) or one row (without).
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
                tokens = np.concatenate([tokens, np.full(padding, self._pad_token())])
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
        """Where the stream stands, for JSON. A stream that loads it goes on with exactly the same batches."""
        return {
            "epoch": self._epoch,
            "documents": self._begun,
            "epoch_tokens": self._epoch_tokens,
            "tokens_read": self._tokens_read,
            "rest": self._ready[0].tolist() if self._rest else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where the state was taken; what lies before is skipped at the next batch, not tokenized.

        The stream must have been made with the same documents, tokenizer and length.
        """
        self._source = None
        self._epoch = state["epoch"]
        self._begun = state["documents"]
        self._epoch_tokens = state["epoch_tokens"]
        self._tokens_read = state["tokens_read"]
        self._rest = len(state["rest"])
        self._ready = deque([np.array(state["rest"], dtype=np.int64)] if self._rest else [])
        self._ended = False

    def _take(self, count: int) -> list[np.ndarray]:
        """The next `count` tokens, one array for each document; fewer if the text ends."""
        pieces = []
        wanted = count
        while count:
            if not self._ready and not self._tokenize_more(wanted):
                break
            document = self._ready.popleft()
            if not self._rest:
                self._begun += 1
                self._epoch_tokens += len(document)
            piece, rest = document[:count], document[count:]
            self._rest = len(rest)
            if self._rest:
                self._ready.appendleft(rest)
            if len(piece):
                pieces.append(piece)
            count -= len(piece)
        return pieces

    def _tokenize_more(self, wanted: int) -> bool:
        """Tokenizes some documents, of the next epoch if need be; False if the text has ended."""
        if self._ended:
            return False
        while True:
            if self._source is None:
                self._source = self._documents(self._epoch)
                skipped = sum(1 for _ in islice(self._source, self._begun))
                if skipped < self._begun:
                    raise UserError(
                        f"the text has changed: {self._begun} documents of it were read before, "
                        f"but now it has only {skipped}"
                    )
            texts: list[str] = []
            characters = 0
            while len(texts) < _DOCUMENTS_AT_ONCE and characters < _CHARACTERS_AT_ONCE:
                if (document := next(self._source, None)) is None:
                    break
                texts.append(document.text)
                characters += len(document.text)
            if texts:
                encoded = self._tokenizer(
                    texts,
                    add_special_tokens=False,
                    return_attention_mask=False,
                    return_token_type_ids=False,
                    verbose=False,
                )
                self._ready.extend(np.array(ids, dtype=np.int64) for ids in encoded["input_ids"])
                return True
            self._end_epoch(wanted)
            if self._ended:
                return False

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
        self._begun = self._epoch_tokens = 0

    def _pad_token(self) -> int:
        """Any token that exists will do where there is no padding token: its position is excluded."""
        pad = self._tokenizer.pad_token_id
        return next((t for t in (pad, self._prefix) if t is not None), 0)
