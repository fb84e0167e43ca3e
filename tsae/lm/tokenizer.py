"""Transformers tokenizers: text to ids that the model knows, special tokens, and whether a tokenizer is complete."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tsae.errors import UserError, reason
from tsae.utils.notices import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SAMPLE = "The river ran under a stone bridge"
_UNKNOWN = "\ue000\U0010fffd"  # private characters: UNK, unless the tokenizer falls back to bytes


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text: no special token is added, and one that the text spells, such as "<bos>", is plain text.

    A warning names the spelled ones that have a role (BOS, EOS, padding, ...).
    Raises UserError if the tokenizer has no token for a part of a text.
    """
    for token in tokenizer.all_special_tokens:
        if any(token in text for text in texts):
            warn_once(log, f"the text spells the special token {token!r}: it is read as plain text, here and elsewhere")
    try:
        return tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    except Exception as error:
        if type(error) is not Exception:  # which the library `tokenizers` raises for all its errors
            raise
        raise UserError(f"the tokenizer cannot read the text ({reason(error)}): use the model's own") from error


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that can start every sequence: BOS, or else EOS, or None.

    `declines_bos` tells whether it should. Without it the first token of text starts the sequence.
    """
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def declines_bos(tokenizer: PreTrainedTokenizerBase, declared: object) -> bool:
    """Whether a model was trained without BOS: its tokenizer has one, for chats perhaps, but does not add it.

    A BOS that is also EOS separates documents (GPT-2, Pythia), and is fed.

    declared: `add_bos_token` in tokenizer_config.json, which transformers itself does not keep; None if it is not there
    """
    return declared is False and tokenizer.bos_token_id not in (None, tokenizer.eos_token_id)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids of all special tokens; `all_special_ids` alone lacks those without a role (Gemma's <start_of_turn>).

    Raises UserError if one has no id.
    """
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if None in tokenizer.all_special_ids:
        names = ", ".join(map(repr, tokenizer.all_special_tokens))
        raise UserError(f"a special token of the tokenizer has no id (they are {names}): its files are damaged")
    return np.array(sorted(marked | set(tokenizer.all_special_ids)), dtype=np.int64)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or any other: its positions are excluded."""
    return next((t for t in (tokenizer.pad_token_id, prefix_token(tokenizer)) if t is not None), 0)


def is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has only special tokens and at most the mark of a word's start.

    transformers makes such a tokenizer if the vocabulary's files are missing.
    """
    return len(set(tokenizer.get_vocab().values()).difference(special_tokens(tokenizer).tolist())) <= 1


def fit_to_model(tokenizer: PreTrainedTokenizerBase, rows: int | None, bos: object, name: str) -> None:
    """Make sure that every id the tokenizer can make has a row in the model's embedding.

    A padding token without one is replaced in `tokenizer`, with a warning; another special token without a role cannot
    be made from text (see `encode`). Warnings also name a prefix that is not the model's BOS, and lost text.

    rows: of the embedding; None if it has none.
    bos: the model's `bos_token_id`.
    name: of the model, for messages.
    Raises UserError if BOS (or EOS in its place), UNK or a token of text has no row, or if the tokenizer fails.
    """
    try:
        read = tokenizer.decode(encode(tokenizer, [_SAMPLE])[0])
        if rows is not None:
            _check_ids(tokenizer, rows, name)
    except (TypeError, AttributeError, LookupError) as error:  # values of other types in its files
        raise UserError(f"the tokenizer of {name!r} cannot be used: {reason(error)}") from error
    if tokenizer.bos_token_id is None:
        prefix = prefix_token(tokenizer)
        first = "its first token of text, which is not trained on" if prefix is None else repr(tokenizer.eos_token)
        warn_once(log, f"the tokenizer of {name!r} has no BOS token: every sequence starts with {first}")
    elif isinstance(bos, int) and bos != tokenizer.bos_token_id:
        own = f"{tokenizer.bos_token!r} with id {tokenizer.bos_token_id}"
        warn_once(log, f"BOS of {name!r} is {bos} in its config.json, but its tokenizer has {own}, which is used")
    if str(read).casefold().split() != _SAMPLE.casefold().split():
        warn_once(log, f"the tokenizer of {name!r} reads {_SAMPLE!r} as {read!r}: are its files complete?")


def _check_ids(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    """The part of `fit_to_model` about ids beyond the embedding's rows."""
    beyond = {i: token for token, i in sorted(tokenizer.get_vocab().items(), reverse=True) if i >= rows}
    prefix = prefix_token(tokenizer)
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id in encode(tokenizer, [_UNKNOWN])[0] else None
    made = [i for i in (prefix, unknown) if i is not None and i >= rows]
    made += sorted(set(beyond).difference(special_tokens(tokenizer).tolist()))
    if made:
        token = beyond.get(made[0], tokenizer.convert_ids_to_tokens(made[0]))
        others = f" (and {len(made) - 1} more such tokens)" if len(made) > 1 else ""
        raise UserError(
            f"the tokenizer of {name!r} has the token {token!r} with id {made[0]}, but the model's embedding has only "
            f"{rows} rows{others}: use the tokenizer that belongs to the model, or resize the embedding and save it"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        pad, number = tokenizer.pad_token, tokenizer.pad_token_id
        tokenizer.pad_token = None if prefix is None else tokenizer.convert_ids_to_tokens(prefix)
        warn_once(
            log,
            f"the padding token {pad!r} of {name!r} has id {number}, beyond the {rows} rows of the model's embedding: "
            f"padding with id {padding_token(tokenizer)} instead",
        )
