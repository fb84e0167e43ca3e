"""Reading and replacing activations with module hooks.

A place is a block's number, for its output, or a `tsae.lm.site.Site`; `tsae.lm.hook_points` finds its module, and
`tsae.lm.readout` the activations in what that module is given or puts out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from tsae.errors import UserError
from tsae.lm.hook_points import HookPoint, check_layer, find
from tsae.lm.loading import LanguageModel
from tsae.lm.readout import Activations, forward
from tsae.lm.site import Site, as_site

__all__ = [
    "activations",
    "activations_at",
    "check_context",
    "check_layer",
    "check_tokens",
    "logits_with",
    "reading",
    "replacing",
]


class _Reached(Exception):  # noqa: N818  (not an error: the last place has been read)
    pass


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


def activations(lm: LanguageModel, tokens: Tensor, place: int | Site) -> Tensor:
    """The activations at a place; for a block's number the residual stream after it (`blocks.N.hook_resid_post`).

    The forward pass stops there: no later module, no language-model head, no key-value cache. It runs in inference
    mode; the result is cloned outside it, because autograd cannot save tensors created inside.

    tokens: [N, P + T] int64, moved to the model's device if necessary.
    place: a block, counted from 0, or a `Site`.
    out: [N, P + T, d] in the dtype of the activations, which is the model's (Mamba's residual stream can be float32),
        on its device, detached.
    Raises UserError if the place does not exist, the tokens are more than the model takes at once, a token's id has no
    row in the embedding, or there are no activations [N, P + T, d].
    """
    (x,) = activations_at(lm, tokens, place)
    return x


def activations_at(lm: LanguageModel, tokens: Tensor, *places: int | Site) -> tuple[Tensor, ...]:
    """The activations at several places in one forward pass, which stops once all have been read.

    tokens, places: as in `activations`; the places in any order
    out: one [N, P + T, d] for each place; widths may differ
    Raises UserError as `activations`.
    """
    sites, points = _check(lm, tokens, places)
    found: dict[int, Tensor] = {}
    own = get_ident()

    def keep(number: int, value: Any) -> None:
        if get_ident() != own:  # another thread's pass through the same module
            return
        found[number] = _read(lm, sites[number], points[number], value, tokens.shape).hidden
        if len(found) == len(points):
            raise _Reached
        found[number] = found[number].clone()  # later modules may write into it

    with ExitStack() as stack:
        for number, point in enumerate(points):
            stack.enter_context(_hook(point, partial(keep, number)))
        try:
            with torch.inference_mode():
                forward(lm, tokens)
        except _Reached:
            # The blocks of a divided model are on several devices.
            return tuple(found[number].clone().to(lm.device) for number in range(len(points)))
    missing = next(site for number, site in enumerate(sites) if number not in found)
    raise RuntimeError(f"the forward pass of {lm.name} did not reach {missing.name}")


@torch.no_grad()
def logits_with(
    lm: LanguageModel, tokens: Tensor, place: int | Site, replace: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The model's logits with the activations at a place replaced.

    tokens: [N, P + T] int64, moved to the model's device if necessary.
    place: as in `activations`.
    replace: the activations [N, P + T, d] -> their replacement of the same shape, which is cast to their dtype.
        None leaves them unchanged.
    out: [N, P + T, vocabulary] in the model's dtype, on its device; large for large vocabularies.
    Raises UserError as `activations`, ValueError if `replace` changes the shape.
    """
    _check(lm, tokens, (place,))
    with ExitStack() as stack:
        if replace is not None:
            stack.enter_context(replacing(lm, place, lambda x, start: replace(x)))
        return forward(lm, tokens).logits


@contextmanager
def reading(lm: LanguageModel, place: int | Site) -> Iterator[list[Tensor]]:
    """While the block runs, the list that it is given holds the activations [N, T, d] of the latest forward pass.

    They are there once the pass has reached the place, in the graph of autograd if it records one.

    place: as in `activations`
    Raises UserError as `activations`.
    """
    site = as_site(place)
    point = find(lm, site)
    seen: list[Tensor] = []
    shape: list[tuple[int, ...] | None] = [None]

    def keep(value: Any) -> None:
        seen[:] = [_read(lm, site, point, value, shape[0]).hidden.clone()]  # later modules may write into it

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.clear()
        shape[0] = _shape(args, kwargs)

    with ExitStack() as stack:
        stack.callback(lm.model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.enter_context(_hook(point, keep))
        yield seen


@contextmanager
def replacing(lm: LanguageModel, place: int | Site, replace: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """Within the block every forward pass of the model has the activations at a place replaced, generation included.

    place: as in `activations`
    replace: the activations [N, T, d], on ``lm.device``, and the column of their first token, above 0 where the pass
        continues a key-value cache -> their replacement of the same shape, which is cast to their dtype
    Nested blocks replace from the outermost to the innermost.
    Raises UserError if there is no such place. In a forward pass: for a padded batch, whose columns are not positions,
        a cache that does not say how many tokens it has, or a value without activations; ValueError if `replace`
        changes the shape.
    """
    site = as_site(place)
    check_layer_of(lm, site)
    point = find(lm, site)
    seen: list[tuple[tuple[int, ...], int]] = []  # the shape [N, T] of the pass that runs, and the column of the first
    change: list[tuple[tuple[int, ...], Tensor]] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            raise UserError("The batch is padded, and its activations are to be changed; pass its texts one by one.")
        seen[:] = [(_shape(args, kwargs), _cached_tokens(kwargs))]

    def substitute(value: Any) -> Any:
        if not seen:
            raise UserError(f"Only a part of {lm.name} was run, and its activations are to be changed; run all of it.")
        shape, start = seen.pop()
        read = _read(lm, site, point, value, shape)
        new = replace(read.hidden.to(lm.device), start)
        if new.shape != read.hidden.shape:
            raise ValueError(f"replace must keep the shape {tuple(read.hidden.shape)}, but gave {tuple(new.shape)}")
        new = new.to(read.hidden)
        change[:] = [(shape, new.float() - read.hidden.float())]
        return read.replaced(new)

    def carry(value: Any) -> Any:  # the residual stream that passed by the module
        shape, added = change.pop()
        read = Activations(lm, value, shape, f"block {site.layer} of {lm.name}")
        return read.replaced((read.hidden.float() + added.to(read.hidden.device)).to(read.hidden.dtype))

    with ExitStack() as stack:
        stack.callback(lm.model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.enter_context(_hook(point, substitute))
        if point.block is not None:
            stack.enter_context(_hook(HookPoint(point.block, "", False), carry))
        yield


def _shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """N and T of a forward pass of the model."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    return tuple((kwargs["inputs_embeds"][..., 0] if tokens is None else tokens).shape)


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


def check_layer_of(lm: LanguageModel, site: Site) -> None:
    """Raise UserError unless the model has the block of a place."""
    if site.layer is not None:
        check_layer(lm, site.layer)


def _check(lm: LanguageModel, tokens: Tensor, places: tuple[int | Site, ...]) -> tuple[list[Site], list[HookPoint]]:
    sites = [as_site(place) for place in places]
    for site in sites:
        check_layer_of(lm, site)
    check_context(lm, tokens.shape[1])
    check_tokens(lm, tokens)
    return sites, [find(lm, site) for site in sites]


def _read(lm: LanguageModel, site: Site, point: HookPoint, value: Any, shape: tuple[int, ...] | None) -> Activations:
    """The activations in a value of the point's module; without `shape`, of any number of sequences and tokens."""
    of_block = point.module is lm.blocks[site.number]
    what = f"Block {site.layer}" if of_block else f"Module {point.path}"
    what = f"{what} of {lm.name} ({type(point.module).__name__})"
    return Activations(lm, value, shape, what, of_input=point.of_input, flat=not of_block)


@contextmanager
def _hook(point: HookPoint, use: Callable[[Any], Any]) -> Iterator[None]:
    """A hook that gives `use` the value at a point: an output, or `(args, kwargs)`. What it returns, if anything,
    takes the value's place."""
    if point.of_input:
        handle = point.module.register_forward_pre_hook(
            lambda module, args, kwargs: use((args, kwargs)), with_kwargs=True
        )
    else:
        handle = point.module.register_forward_hook(lambda module, args, output: use(output))
    try:
        yield
    finally:
        handle.remove()
