"""Special tokens of a transformers tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that starts every sequence: BOS, or else EOS, or None (the first content token then starts it)."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids of all special tokens; `all_special_ids` alone lacks those without a role (Gemma's <start_of_turn>)."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return np.array(sorted(marked | set(tokenizer.all_special_ids)), dtype=np.int64)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or any other: its positions are excluded."""
    return next((t for t in (tokenizer.pad_token_id, prefix_token(tokenizer)) if t is not None), 0)
