"""Reading and replacing a block's output with module hooks.

A block's output is a tensor [N, T, d], or a tuple or list that starts with one. Gemma 3n's blocks put out several
streams [A, N, T, d]; the active one is read and replaced. Anything else is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tsae.errors import UserError
from tsae.lm.loading import LanguageModel


class _Reached(Exception):  # noqa: N818  (not an error: carries the activations out of the forward pass)
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def check_layer(lm: LanguageModel, layer: int) -> None:
    """Raise UserError unless the model has block `layer`, counted from 0."""
    if not 0 <= layer < lm.n_layers:
        raise UserError(f"layer {layer} does not exist: {lm.name} has {lm.n_layers} layers, 0 to {lm.n_layers - 1}")


def check_context(lm: LanguageModel, tokens: int) -> None:
    """Raise UserError if sequences of `tokens` tokens, the prefix included, are longer than the model takes."""
    limit = lm.context
    if limit is not None and tokens > limit:
        raise UserError(
            f"{lm.name} takes at most {limit} tokens at once, but {tokens} are fed (1 + {tokens - 1}; the first's "
            "activation is dropped); lower --length, or use a model with a longer context."
        )


def check_tokens(lm: LanguageModel, tokens: Tensor) -> None:
    """Raise UserError unless every id has a row in the model's embedding."""
    rows = lm.embedding_rows
    if rows is not None and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < rows:
        number = int(tokens.max()) if tokens.max() >= rows else int(tokens.min())
        token = lm.tokenizer.convert_ids_to_tokens(number) if number >= 0 else None
        raise UserError(
            f"the token {token!r} has id {number}, but the embedding of {lm.name} has {rows} rows: use the tokenizer "
            "that belongs to the model"
        )


def activations(lm: LanguageModel, tokens: Tensor, layer: int) -> Tensor:
    """The residual stream after block `layer` (SAELens's `blocks.{layer}.hook_resid_post`).

    The forward pass stops there: no later block, no language-model head, no key-value cache. It runs in inference
    mode; the result is cloned outside it, because autograd cannot save tensors created inside.

    tokens: [N, P + T] int64, moved to the model's device if necessary.
    layer: blocks counted from 0.
    out: [N, P + T, d] in the block's dtype, which is the model's (Mamba's residual stream can be float32), on its
        device, detached.
    Raises UserError if the layer does not exist, the tokens are more than the model takes at once, a token's id has no
    row in the embedding, or the block puts out no activations [N, P + T, d].
    """
    check_layer(lm, layer)
    check_context(lm, tokens.shape[1])
    check_tokens(lm, tokens)

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Reached(_Output(lm, layer, output, tokens).hidden)

    with _hook(lm.blocks[layer], stop):
        try:
            with torch.inference_mode():
                _forward(lm, tokens)
        except _Reached as reached:
            return reached.hidden.clone().to(lm.device)  # a block of a divided model has a device of its own
    raise RuntimeError(f"the forward pass of {lm.name} did not reach block {layer}")


@torch.no_grad()
def logits_with(
    lm: LanguageModel, tokens: Tensor, layer: int, replace: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The model's logits with the output of block `layer` replaced.

    tokens: [N, P + T] int64, moved to the model's device if necessary.
    replace: the block's output [N, P + T, d] -> its replacement of the same shape, which is cast to its
        dtype. None leaves the output unchanged.
    out: [N, P + T, vocabulary] in the model's dtype, on its device; large for large vocabularies.
    Raises UserError as `activations`, ValueError if `replace` changes the shape.
    """
    check_layer(lm, layer)
    check_context(lm, tokens.shape[1])
    check_tokens(lm, tokens)

    def substitute(module: nn.Module, inputs: Any, output: Any) -> Any:
        if replace is None:
            return None
        found = _Output(lm, layer, output, tokens)
        hidden = found.hidden
        new = replace(hidden.to(lm.device))
        if new.shape != hidden.shape:
            raise ValueError(f"replace must keep the shape {tuple(hidden.shape)}, but gave {tuple(new.shape)}")
        return found.replaced(new.to(hidden.device, hidden.dtype))

    with _hook(lm.blocks[layer], substitute):
        return _forward(lm, tokens).logits


@contextmanager
def replacing(lm: LanguageModel, layer: int, replace: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """Within the block every forward pass of the model has the output of block `layer` replaced, generation included.

    replace: the output [N, T, d] and the column of its first token, above 0 where the pass continues a key-value cache
        -> its replacement of the same shape, which is cast to its dtype
    Nested blocks replace from the outermost to the innermost.
    Raises UserError if there is no such block. In a forward pass: for a padded batch, whose columns are not positions,
        a cache that does not say how many tokens it has, or a block as in `activations`.
    """
    check_layer(lm, layer)
    seen: list[tuple[Tensor, int]] = []  # the tokens [N, T] of the pass that runs, and the column of the first

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            raise UserError("The batch is padded, and its activations are to be changed; pass its texts one by one.")
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs["inputs_embeds"][..., 0]
        seen[:] = [(tokens, _cached_tokens(kwargs))]

    def substitute(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not seen:
            raise UserError(f"Only a part of {lm.name} was run, and its activations are to be changed; run all of it.")
        tokens, start = seen.pop()
        found = _Output(lm, layer, output, tokens)
        return found.replaced(replace(found.hidden, start).to(found.hidden.dtype))

    before = lm.model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with _hook(lm.blocks[layer], substitute):
            yield
    finally:
        before.remove()


def _cached_tokens(kwargs: dict[str, Any]) -> int:
    """How many tokens the cache holds that a forward pass continues; 0 without one."""
    cache = next((kwargs[name] for name in ("past_key_values", "cache_params") if kwargs.get(name) is not None), None)
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"The cache of this model, a {type(cache).__name__}, does not say how many tokens it has; generate with "
            "use_cache=False."
        ) from None


def _forward(lm: LanguageModel, tokens: Tensor) -> Any:
    """The model's output, without a key-value cache; some classes have none, and no argument for it (GPT-1)."""
    accepted = inspect.signature(lm.model.forward).parameters
    cached = "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return lm.model(input_ids=tokens.to(lm.device), **({"use_cache": False} if cached else {}))


class _Output:
    """A block's output, and the activations in it.

    tokens: [N, P + T], what the model was given
    Raises UserError if it has no activations [N, P + T, d].
    """

    def __init__(self, lm: LanguageModel, layer: int, output: Any, tokens: Tensor) -> None:
        self.output = output
        self.tensor = output[0] if type(output) in (tuple, list) and output else output
        self.stream = _active_stream(lm, self.tensor)
        if isinstance(self.tensor, Tensor):
            self.hidden = self.tensor if self.stream is None else self.tensor[self.stream]
            if self.hidden.ndim == 3 and self.hidden.shape[:2] == tokens.shape and self.hidden.is_floating_point():
                return
        N, T = tokens.shape
        raise UserError(
            f"Block {layer} of {lm.name} ({type(lm.blocks[layer]).__name__}) puts out {_described(output)} for {N} "
            f"sequences of {T} tokens; only a model whose blocks put out activations [{N}, {T}, width], alone or first "
            "in a tuple, can be used."
        )

    def replaced(self, new: Tensor) -> Any:
        """The output with `new` [N, P + T, d] in the place of the activations."""
        if self.stream is not None:
            tensor = self.tensor.clone()
            tensor[self.stream] = new
            new = tensor
        return type(self.output)((new, *self.output[1:])) if type(self.output) in (tuple, list) else new


def _active_stream(lm: LanguageModel, output: Any) -> int | None:
    """The index, in the output [A, N, T, d] of Gemma 3n's blocks, of the stream they compute on; None for others."""
    if not isinstance(output, Tensor) or output.ndim != 4 or getattr(lm.model, "config", None) is None:
        return None
    config = lm.model.config.get_text_config(decoder=True)
    streams, active = getattr(config, "altup_num_inputs", None), getattr(config, "altup_active_idx", None)
    return active if streams == len(output) and isinstance(active, int) else None


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)} of {str(output.dtype).removeprefix('torch.')}"
    if type(output) in (tuple, list) and output:
        return f"a {type(output).__name__} that starts with {_described(output[0])}"
    return f"an object of type {type(output).__name__}"


@contextmanager
def _hook(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
