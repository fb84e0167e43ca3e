"""Reading and replacing a block's output with module hooks."""

from __future__ import annotations

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
    """Raises UserError unless the model has block `layer`, counted from 0."""
    if not 0 <= layer < lm.n_layers:
        raise UserError(f"layer {layer} does not exist: {lm.name} has {lm.n_layers} layers, 0 to {lm.n_layers - 1}")


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
    out: [N, P + T, d_model] in the model's dtype, on its device, detached.
    Raises UserError if the layer does not exist, or a token's id has no row in the embedding.
    """
    check_layer(lm, layer)
    check_tokens(lm, tokens)

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Reached(_hidden(output))

    with _hook(lm.blocks[layer], stop):
        try:
            with torch.inference_mode():
                lm.model(input_ids=tokens.to(lm.device), use_cache=False)
        except _Reached as reached:
            return reached.hidden.clone()
    raise RuntimeError(f"the forward pass of {lm.name} did not reach block {layer}")


@torch.no_grad()
def logits_with(
    lm: LanguageModel, tokens: Tensor, layer: int, replace: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The model's logits with the output of block `layer` replaced.

    tokens: [N, P + T] int64, moved to the model's device if necessary.
    replace: the block's output [N, P + T, d_model] -> its replacement of the same shape, which is cast to the
        model's dtype. None leaves the output unchanged.
    out: [N, P + T, vocabulary] in the model's dtype, on its device; large for large vocabularies.
    Raises UserError if the layer does not exist or a token's id has no row in the embedding, ValueError if `replace`
    changes the shape.
    """
    check_layer(lm, layer)
    check_tokens(lm, tokens)

    def substitute(module: nn.Module, inputs: Any, output: Any) -> Any:
        if replace is None:
            return None
        hidden = _hidden(output)
        new = replace(hidden)
        if new.shape != hidden.shape:
            raise ValueError(f"replace must keep the shape {tuple(hidden.shape)}, but gave {tuple(new.shape)}")
        new = new.to(hidden.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with _hook(lm.blocks[layer], substitute):
        return lm.model(input_ids=tokens.to(lm.device), use_cache=False).logits


def _hidden(output: Tensor | tuple[Any, ...]) -> Tensor:
    """A block's hidden state: its output or, in some models and versions, the first entry of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _hook(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
