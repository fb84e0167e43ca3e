"""Text that a language model continues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.lm.tokenizer import encode, padding_token

if TYPE_CHECKING:
    from tsae.lm.loading import LanguageModel


def prompt_tokens(lm: LanguageModel, text: str) -> Tensor:
    """[1, 1 + T] int64: the tokens of a text after BOS, as in training; where sequences have no BOS, the text's alone.

    Raises UserError if it is no text, or there is no token besides the first.
    """
    if not isinstance(text, str):
        raise UserError(f"The text is of type {type(text).__name__}; give one string.")
    ids = encode(lm.tokenizer, [text])[0]
    first = [] if lm.prefix_id is None else [lm.prefix_id]
    if len(first) + len(ids) < 2:
        raise UserError("The text has too few tokens; give some words.")
    return torch.tensor([[*first, *ids]])


@torch.no_grad()
def generate(lm: LanguageModel, prompt: str, max_new_tokens: int = 40, **options: Any) -> str:
    """The continuation of a prompt, without the prompt.

    max_new_tokens: at least 1; fewer come if the model ends its text.
    options: of transformers' `generate`; by default greedy, ``do_sample=False``. ``do_sample=True, temperature=0.7``
        samples, with PyTorch's generator. Within `tsae.lm.steering.ablation` of features with hysteresis there is no
        key-value cache, otherwise the model's default.
    Raises UserError if there is no token, the model takes fewer tokens in all, or it cannot generate.
    """
    tokens = prompt_tokens(lm, prompt)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if lm.context is not None and tokens.shape[1] + max_new_tokens > lm.context:
        raise UserError(
            f"{lm.name} takes at most {lm.context} tokens; the prompt has {tokens.shape[1]} and {max_new_tokens} are "
            "to follow: shorten one of them."
        )
    if not hasattr(lm.model, "generate"):
        raise UserError(f"{lm.name} ({type(lm.model).__name__}) cannot generate text; use a causal language model.")
    tokens = tokens.to(lm.device)
    options = {"do_sample": False, "pad_token_id": padding_token(lm.tokenizer)} | options
    if not options["do_sample"]:  # else transformers warns of the model's own sampling options
        options = {"temperature": None, "top_p": None, "top_k": None} | options
    model: Any = lm.model  # its own types leave `generate` out
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, **options)
    return str(lm.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True))
