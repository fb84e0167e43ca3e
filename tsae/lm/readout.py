"""The activations in what a module is given or puts out.

A module puts out a tensor [N, T, d], or a tuple or list that starts with one; it is given one as its first argument.
Gemma 3n's blocks pass several streams [A, N, T, d]; the active one is read and replaced. Inside a block some classes
flatten sequences, [N * T, d] (OPT). Anything else is refused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.lm.loading import LanguageModel

ARGUMENTS = ("hidden_states", "x", "input")  # names of a module's first argument


def forward(lm: LanguageModel, tokens: Tensor) -> Any:
    """The model's output, without a key-value cache; some classes have none, and no argument for it (GPT-1)."""
    accepted = inspect.signature(lm.model.forward).parameters
    cached = "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return lm.model(input_ids=tokens.to(lm.device), **({"use_cache": False} if cached else {}))


class Activations:
    """The activations in a value that a module puts out, or was given.

    value: the module's output, or `(args, kwargs)` of its call with `of_input`
    shape: N and P + T, of the tokens that the model was given; None takes any [N, T, d]
    what: the module and its place, for the message: "Block 3 of gpt2 (GPT2Block)"
    flat: whether [N * T, d] is read too
    Raises UserError if there are no activations [N, P + T, d].
    """

    def __init__(
        self,
        lm: LanguageModel,
        value: Any,
        shape: tuple[int, ...] | None,
        what: str,
        *,
        of_input: bool = False,
        flat: bool = False,
    ) -> None:
        self.value, self.of_input = value, of_input
        self.name: str | None = None
        held = value
        if of_input:
            args, kwargs = value
            self.name = None if args else next((name for name in ARGUMENTS if name in kwargs), None)
            held = args[0] if args else kwargs.get(self.name)
        self.held = held
        self.tensor = held[0] if type(held) in (tuple, list) and held else held
        self.stream = _active_stream(lm, self.tensor)
        self.flat = flat and shape is not None and isinstance(self.tensor, Tensor) and self.tensor.ndim == 2
        if isinstance(self.tensor, Tensor):
            hidden = self.tensor if self.stream is None else self.tensor[self.stream]
            if self.flat and shape is not None and len(hidden) == shape[0] * shape[1]:
                hidden = hidden.unflatten(0, shape)
            if hidden.ndim == 3 and hidden.shape[:2] == (shape or hidden.shape[:2]) and hidden.is_floating_point():
                self.hidden = hidden
                return
        N, T = shape or ("N", "T")
        verb = "is given" if of_input else "puts out"
        raise UserError(
            f"{what} {verb} {_described(held)} for {N} sequences of {T} tokens; only a model whose blocks put out "
            f"activations [{N}, {T}, width], alone or first in a tuple, can be used."
        )

    def replaced(self, new: Tensor) -> Any:
        """The value with `new` [N, P + T, d] in the place of the activations."""
        if self.flat:
            new = new.flatten(0, 1)
        if self.stream is not None:
            tensor = self.tensor.clone()
            tensor[self.stream] = new
            new = tensor
        held = type(self.held)((new, *self.held[1:])) if type(self.held) in (tuple, list) else new
        if not self.of_input:
            return held
        args, kwargs = self.value
        return (args, kwargs | {self.name: held}) if self.name else ((held, *args[1:]), kwargs)


def _active_stream(lm: LanguageModel, output: Any) -> int | None:
    """The index, in [A, N, T, d] of Gemma 3n's blocks, of the stream they compute on; None for others."""
    if not isinstance(output, Tensor) or output.ndim != 4 or getattr(lm.model, "config", None) is None:
        return None
    config = lm.model.config.get_text_config(decoder=True)
    streams, active = getattr(config, "altup_num_inputs", None), getattr(config, "altup_active_idx", None)
    return active if streams == len(output) and isinstance(active, int) else None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if type(value) in (tuple, list) and value:
        return f"a {type(value).__name__} that starts with {_described(value[0])}"
    return f"an object of type {type(value).__name__}"


def made_up(lm: LanguageModel, sequences: int, tokens: int, *, varied: bool = False) -> Tensor:
    """[sequences, tokens] token ids: all 0, or 1 where 0 is the padding token, for which RoBERTa counts no position.

    varied: different ids, as far as the embedding has rows
    """
    padding = getattr(getattr(lm.model, "config", None), "pad_token_id", None)
    ids = torch.full((sequences, tokens), int(padding == 0), dtype=torch.int64)
    if not varied:
        return ids
    other = torch.arange(sequences * tokens).view(sequences, tokens) * 7919 % (lm.embedding_rows or 1)
    return torch.where(other == padding, ids, other) if isinstance(padding, int) else other
