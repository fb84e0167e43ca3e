"""The module at which a place of a model is read and replaced.

The output and the input of a block are its own (`resid_post`, `resid_pre`). What attention and the MLP add to the
residual stream is put out by modules whose names differ between classes, and some classes normalize it first (Gemma 2
and 3) or add the residual stream within the module (Bloom). So the modules are found by what they compute: a forward
pass of a few made-up tokens records what the block's modules with the usual names put out, and the two are taken with

    resid_pre + attn_out + mlp_out = resid_post

up to rounding. `resid_mid` is the input of a norm, or of the MLP, that equals `resid_pre + attn_out`; where attention
and MLP are parallel there is none. A block that is no such sum (layer norm after the residual sum, scaled residuals,
several streams) has these places under no name, and its modules are named by their paths. `mlp_in` is what the MLP is
given: the output of the norm before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsae.errors import UserError, reason
from tsae.lm.loading import LanguageModel
from tsae.lm.readout import Activations, forward, made_up
from tsae.lm.site import Site

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "self_attention_layer")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "feedforward", "mlp_block")
PROJECTIONS = {  # the last linear map of attention and of the MLP; OPT has the MLP's in the block itself
    "attention": ("o_proj", "out_proj", "c_proj", "dense", "wo", "attention.out_proj", "attention.o_proj"),
    "mlp": ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2", "wo"),
}
_PROBE = (2, 3)  # sequences and tokens


class _Enough(Exception):  # noqa: N818  (not an error: the block has run)
    pass


@dataclass(frozen=True, eq=False)
class HookPoint:
    """A module whose output, or input, is the activation.

    path: of the module in the model
    of_input: whether the activation is its input
    block: for `resid_mid`, the block to whose output the change of a replacement is added too, because the residual
        stream passes by the module
    """

    module: nn.Module
    path: str
    of_input: bool
    block: nn.Module | None = None

    @property
    def hf_name(self) -> str:
        """The path with `.input` or `.output`, as in `hf_hook_name`."""
        return f"{self.path}.{'input' if self.of_input else 'output'}"

    def same(self, other: HookPoint) -> bool:
        """Whether both are one tensor, replaced in one way."""
        return (self.module, self.of_input, self.block) == (other.module, other.of_input, other.block)


def check_layer(lm: LanguageModel, layer: int) -> None:
    """Raise UserError unless the model has block `layer`, counted from 0."""
    if not 0 <= layer < lm.n_layers:
        raise UserError(f"layer {layer} does not exist: {lm.name} has {lm.n_layers} layers, 0 to {lm.n_layers - 1}")


def find(lm: LanguageModel, site: Site) -> HookPoint:
    """The module of a place, found once.

    Raises UserError if the model has no such block or module, or the block does not add up to what the place means.
    """
    if site not in lm.points:
        if not site.locatable:
            raise UserError(f"{site.name} is no place that can be read in {lm.name}.")
        check_layer(lm, site.number)
        lm.points[site] = _find(lm, site)
    return lm.points[site]


def _find(lm: LanguageModel, site: Site) -> HookPoint:
    block, path = lm.blocks[site.number], _path(lm, lm.blocks[site.number])
    if site.kind in ("resid_post", "resid_pre"):
        return HookPoint(block, path, site.kind == "resid_pre")
    if site.module is not None:
        return _by_path(lm, site, block, path)
    attention, mlp = _child(block, ATTENTION), _child(block, MLP)
    if site.kind == "hook_z":
        return _head_outputs(lm, site, block, attention)
    if site.kind == "mlp_in":
        module = mlp or _child(block, ("fc1",))
        if module is None:
            raise UserError(_without("MLP", lm, site, block))
        return HookPoint(module, _path(lm, module), True)
    if attention is None:
        raise UserError(_without("attention", lm, site, block))
    return _by_sum(lm, site, block, attention, mlp)


def _by_path(lm: LanguageModel, site: Site, block: nn.Module, path: str) -> HookPoint:
    """The module that a path names: in the model, or in the block of its number, whatever the path before that is."""
    asked = site.module or ""
    within = asked.partition(f".{site.layer}.")[2]  # "" is the block itself
    for root, name in ((lm.model, asked), (block, within)):
        try:
            module = root.get_submodule(name)
        except AttributeError:
            continue
        calls = _record(lm, site.number, {"": (module, site.of_input)})[""]
        if len(calls) != 1:
            times = f"is called {len(calls)} times" if calls else "is not called"
            raise UserError(
                f"{site.name} of {lm.name} {times} in a forward pass up to block {site.layer}; only a module that is "
                "called once can be read and replaced."
            )
        if module is block:
            return HookPoint(block, path, site.of_input)
        return HookPoint(module, _path(lm, module), site.of_input)
    names = ", ".join(name for name, _ in block.named_children())
    raise UserError(f"{lm.name} has no module {site.module}; block {site.layer} is {path}, with the modules {names}.")


def _head_outputs(lm: LanguageModel, site: Site, block: nn.Module, attention: nn.Module | None) -> HookPoint:
    """The input of attention's output projection, which puts out what attention does (SAELens's `attn.hook_z`)."""
    projection = None if attention is None else _child(attention, PROJECTIONS["attention"])
    if projection is None:
        raise UserError(_without("output projection of attention", lm, site, block))
    assert attention is not None
    watch: dict[Any, tuple[nn.Module, bool]] = {"attention": (attention, False), "projection": (projection, False)}
    found = _record(lm, site.number, watch)
    values = [value for calls in found.values() for value in calls if value is not None]
    if len(values) != 2 or not torch.equal(*values):
        raise UserError(
            f"attention in block {site.layer} of {lm.name} puts out something else than its module "
            f"{_path(lm, projection)}; name the module whose input is meant, {_path(lm, projection)}.input."
        )
    return HookPoint(projection, _path(lm, projection), True)


def _by_sum(lm: LanguageModel, site: Site, block: nn.Module, attention: nn.Module, mlp: nn.Module | None) -> HookPoint:
    """`attn_out`, `mlp_out` or `resid_mid`, from what the block's modules put out on made-up tokens."""
    norms = [child for name, child in block.named_children() if _is_norm(name)]
    adds = {
        "attn_out": _candidates(attention, PROJECTIONS["attention"], norms),
        "mlp_out": _candidates(mlp or block, PROJECTIONS["mlp"], norms) if mlp else _own(block),
    }
    watch: dict[Any, tuple[nn.Module, bool]] = {"pre": (block, True), "post": (block, False)}
    watch |= {module: (module, False) for modules in adds.values() for module in modules}
    before_mlp = [*norms, *([] if mlp is None else [mlp])]  # OLMo 2 has no norm before its MLP
    watch |= {("input", module): (module, True) for module in before_mlp}
    recorded = _record(lm, site.number, watch)
    found = {key: calls[0] for key, calls in recorded.items() if len(calls) == 1 and calls[0] is not None}
    if not {"pre", "post"} <= found.keys():
        raise UserError(_no_sum(lm, site, block, attention))
    pre, post = found["pre"], found["post"]
    pairs = []
    for first in adds["attn_out"]:
        for second in adds["mlp_out"]:
            a, m = found.get(first), found.get(second)
            if first is not second and a is not None and m is not None and a.shape == m.shape == pre.shape:
                pairs.append((_error(pre + a + m, post, (a, m), (pre, post), lm.dtype), first, second))
    least = min((error for error, *_ in pairs), default=float("inf"))
    if not least <= 1.0:
        raise UserError(_no_sum(lm, site, block, attention))
    _, first, second = next(pair for pair in pairs if pair[0] <= max(1.5 * least, 1e-3))
    if site.kind != "resid_mid":
        module = first if site.kind == "attn_out" else second
        return HookPoint(module, _path(lm, module), False)
    a = found[first]
    for module in before_mlp:
        mid = found.get(("input", module))
        if mid is not None and mid.shape == pre.shape and _error(pre + a, mid, (a,), (pre, mid), lm.dtype) <= 1.0:
            return HookPoint(module, _path(lm, module), True, block)
    raise UserError(
        f"block {site.layer} of {lm.name} ({type(block).__name__}) computes attention and MLP in parallel, so there is "
        "no residual stream between them (resid_mid); name resid_pre, resid_post, attn_out or mlp_out."
    )


def _error(total: Tensor, expected: Tensor, parts: tuple[Tensor, ...], large: tuple[Tensor, ...], dtype: Any) -> float:
    """How far a sum is from what it should be: 1 is 0.2 % of the norm of its parts, and the rounding of `dtype`.

    The median over tokens: a few have activations thousands of times larger than the others.
    """
    scale = 0.002 * sum(part.norm(dim=-1) for part in parts)
    scale = scale + 0.5 * torch.finfo(dtype).eps * sum(each.norm(dim=-1) for each in large)
    return float(((total - expected).norm(dim=-1) / scale.clamp(min=1e-30)).median())


def _candidates(module: nn.Module, projections: tuple[str, ...], norms: list[nn.Module]) -> list[nn.Module]:
    """What may put out the module's contribution to the residual stream, the likeliest first."""
    projection = _child(module, projections)
    return [module, *norms, *([] if projection is None else [projection])]


def _own(block: nn.Module) -> list[nn.Module]:
    """The MLP's last linear map in a block that has no module for its MLP (OPT)."""
    projection = _child(block, PROJECTIONS["mlp"])
    return [] if projection is None else [projection]


def _record(lm: LanguageModel, layer: int, watch: dict[Any, tuple[nn.Module, bool]]) -> dict[Any, list[Tensor | None]]:
    """What modules put out, or are given with True, in a pass of made-up tokens up to block `layer`: float32 per call.

    Values that are no activations [N, T, d] are None, and count as calls.
    """
    tokens = made_up(lm, *_PROBE, varied=True)
    found: dict[Any, list[Any]] = {key: [] for key in watch}

    def keep(key: Any, value: Any, of_input: bool) -> None:
        module = watch[key][0]
        try:
            read = Activations(lm, value, tokens.shape, "", of_input=of_input, flat=module is not lm.blocks[layer])
        except UserError:
            found[key].append(None)
        else:
            found[key].append(read.hidden.float().clone())  # Falcon adds to the MLP's output in place

    def end(*_: Any) -> None:
        raise _Enough

    with ExitStack() as stack:
        for key, (module, of_input) in watch.items():
            if of_input:
                hook = lambda _, args, kwargs, key=key: keep(key, (args, kwargs), True)  # noqa: E731
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = module.register_forward_hook(lambda _, args, output, key=key: keep(key, output, False))
            stack.callback(handle.remove)
        stack.callback(lm.blocks[layer].register_forward_hook(end).remove)
        try:
            with torch.inference_mode():
                forward(lm, tokens)
        except _Enough:
            pass
        except UserError:
            raise
        except Exception as error:  # any module of the model may fail
            raise UserError(
                f"{lm.name} cannot be run up to layer {layer}: {type(error).__name__}: {reason(error)}; check its "
                "config.json and weights, and that it takes nothing but tokens."
            ) from error
    return found


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first module of these names in a module; None if there is none."""
    for name in names:
        try:
            return module.get_submodule(name)
        except AttributeError:
            continue
    return None


def _is_norm(name: str) -> bool:
    return "norm" in name or name.startswith("ln") or name.endswith("_ln")


def _path(lm: LanguageModel, module: nn.Module) -> str:
    return next(path for path, each in lm.model.named_modules() if each is module)


def _modules_of(block: nn.Module) -> Iterator[str]:
    return (name for name, _ in block.named_children())


def _without(what: str, lm: LanguageModel, site: Site, block: nn.Module) -> str:
    return (
        f"block {site.layer} of {lm.name} ({type(block).__name__}, with {', '.join(_modules_of(block))}) has no {what} "
        f"of a known name, so it has no {site.kind}; name a module by its path, such as "
        f"{_path(lm, block)}.{next(_modules_of(block), 'MODULE')}."
    )


def _no_sum(lm: LanguageModel, site: Site, block: nn.Module, attention: nn.Module) -> str:
    return (
        f"block {site.layer} of {lm.name} ({type(block).__name__}) does not put out its input plus what its attention "
        f"and its MLP put out, so {site.kind} is undefined there; name a module by its path, such as "
        f"{_path(lm, attention)}."
    )
