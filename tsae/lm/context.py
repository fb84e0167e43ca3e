"""How many tokens a language model takes at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

# Where configurations keep the number, the first that is there counts: GPT-2 also carries an n_ctx that nothing reads.
_FIELDS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length", "max_sequence_length"),
    *("seq_length", "n_ctx", "context_length"),
)
_POSITIONS = re.compile(r"rotary|rope|position|(^|[._])wpe($|[._])|inv_freq|freqs_cis|pos_?emb", re.IGNORECASE)
# Kinds of rotary scaling whose configurations already give the extended number (longrope, llama3), or do not extend it.
_NOT_MULTIPLIED = ("default", "longrope", "su", "llama3", "mrope", "proportional")


def context_limit(model: nn.Module) -> int | None:
    """The most tokens that the model takes in one sequence; None if nothing limits them (ALiBi, Mamba).

    The number is the configuration's, for learned and for rotary positions, times the factor of a rotary scaling that
    extends it. A table of learned positions with fewer usable rows limits it further: some tables have rows before the
    first position (OPT 2, RoBERTa its padding id and 1).
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    config = config.get_text_config(decoder=True)
    limits = list(_table_limits(model))
    if limits or _has_positions(model, config):
        found = (getattr(config, name, None) for name in _FIELDS)
        number = next((value for value in found if _is_count(value)), None)
        if number is not None:
            limits.append(_rotary_limit(config, number))
    return min(limits, default=None)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _table_limits(model: nn.Module) -> Iterator[int]:
    """Usable rows of each table of learned positions beside the table of tokens (a vision tower has its own)."""
    tokens: nn.Module = cast(Any, model).get_input_embeddings()
    owner = next((module for module in model.modules() if tokens in module.children()), model)
    for name, module in owner.named_children():
        if isinstance(module, nn.Embedding) and module is not tokens and _POSITIONS.search(name):
            before = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            yield module.num_embeddings - before


def _has_positions(model: nn.Module, config: object) -> bool:
    """Whether the configuration's number is one that the model's positions depend on.

    Falcon with ALiBi has a rotary module that it never calls. MPT's ALiBi is a table of `max_seq_len` rows. A class
    that is not transformers' own may compute positions under any name, so its number counts.
    """
    if getattr(config, "model_type", None) == "mpt":
        return True
    if getattr(config, "alibi", False) is True or getattr(config, "position_embedding_type", None) == "alibi":
        return False
    if not type(model).__module__.startswith("transformers."):
        return True
    modules = (f"{name} {type(module).__name__}" for name, module in model.named_modules())
    return any(map(_POSITIONS.search, modules)) or any(_POSITIONS.search(name) for name, _ in model.named_buffers())


def _rotary_limit(config: object, number: int) -> int:
    """The number of positions, from the configuration's `number` and its rotary scaling.

    A scaling that gives the number before it, as YaRN's does, extends that: `number` may be the one before (Qwen 2.5)
    or the extended one (DeepSeek V3).
    """
    scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None)
    if not isinstance(scaling, dict):
        return number
    nested = [value for value in scaling.values() if isinstance(value, dict)]  # by kind of layer
    limits = []
    for each in nested or [scaling]:
        factor, kind = each.get("factor"), each.get("rope_type", each.get("type", "default"))
        if (
            not isinstance(factor, (int, float))
            or isinstance(factor, bool)
            or not factor >= 1
            or kind in _NOT_MULTIPLIED
        ):
            factor = 1.0
        before = each.get("original_max_position_embeddings")
        limits.append(
            max(number, int(before * factor)) if isinstance(before, int) and _is_count(before) else int(number * factor)
        )
    return min(limits)
