"""Where in a language model an autoencoder's activations are: the kind of place and its block.

One function per library reads that library's name of a place. What none of them knows keeps its name, so that it can be
refused by that name and is never written under another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tsae.errors import UserError

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out")
"""The places of a block that have a name in SAELens, `blocks.N.hook_KIND`, and in `Site.kind`."""
MEASURABLE = f"blocks.N.hook_KIND with KIND one of {', '.join(KINDS)}, blocks.N.attn.hook_z, and modules within a block"
"""What `Site.locatable` is true for, in words."""

_HOOK = re.compile(rf"blocks\.(\d+)\.(?:hook_({'|'.join(KINDS)})|attn\.(hook_z))")
_ANY_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)(?:\.|$)")
_MODULE = re.compile(r"(?:[a-zA-Z_]\w*\.)*(?:layers|h|block|blocks)[._](\d+)(?:\.([\w.]+))?")
_SUBMODULE = re.compile(
    r"(resid_post|resid_out|resid_pre|resid_mid|resid|mlp_in|mlp_out|attn_out|attention_out)_layer_?(\d+)"
)
# Modules that have blocks of their own beside the decoder's.
_OTHER_STACK = re.compile(r"(^|[._])(encoder|vision|visual|image|audio|speech)|mtp|draft", re.IGNORECASE)
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")


@dataclass(frozen=True)
class Site:
    """A place in a language model.

    kind: one of `KINDS`; `hook_z`, the input of attention's output projection; `module`, any other module of a decoder
        block; or `other`, which this version knows no tensor for
    layer: the block it belongs to, counted from 0; None if the name does not tell
    name: how the file that names it spells it
    """

    kind: str
    layer: int | None
    name: str

    @property
    def locatable(self) -> bool:
        """Whether the name says which tensor of a decoder block it is (`tsae.lm.hook_points` finds it in a model)."""
        return self.kind != "other" and self.layer is not None

    @property
    def number(self) -> int:
        """`layer` of a place that has one."""
        assert self.layer is not None
        return self.layer

    @property
    def module(self) -> str | None:
        """The path of the module that the name is, without `.input` or `.output`; None for SAELens's names."""
        if self.kind == "other" or _HOOK.fullmatch(self.name) or _MODULE.fullmatch(self.name) is None:
            return None
        return self.name.removesuffix(".input").removesuffix(".output")

    @property
    def of_input(self) -> bool:
        """Whether a module's path means its input."""
        return self.name.endswith(".input")

    @property
    def written(self) -> str:
        """The name in our files: SAELens's, or the path of a module, which says more than a name."""
        return self.hook_name if self.module is None or self.kind == "resid_post" else self.name

    @property
    def option(self) -> str:
        """What `--site` calls it."""
        return self.kind if self.kind in KINDS and self.module is None else self.name

    @property
    def key(self) -> tuple[str, int | None, str]:
        """Equal for names of one tensor, as far as names tell."""
        if self.block is not None:
            return "resid_post", self.block, ""
        part = self.name.split(f".{self.layer}.", 1)[-1].removesuffix(".output") if self.kind == "module" else ""
        return self.kind, self.layer, part

    @property
    def described(self) -> str:
        """The place in words for a line of output, such as `layer 9` or `layer 9, mlp_out`."""
        if self.kind == "resid_post":
            return f"layer {self.layer}"
        return f"layer {self.layer}, {self.option}" if self.module is None else self.name

    @property
    def block(self) -> int | None:
        """The block whose output these activations are; None if they are no block's output."""
        if self.kind == "resid_post":
            return self.layer
        if self.kind == "resid_pre" and self.layer:  # the input of block 0 is the embedding's output
            return self.layer - 1
        return None

    @property
    def hook_name(self) -> str:
        """SAELens's name, or the file's own where SAELens has none."""
        return f"blocks.{self.layer}.hook_{self.kind}" if self.kind in KINDS else self.name


def as_site(place: int | Site) -> Site:
    """A block's number as the place of its output; a `Site` as it is."""
    return place if isinstance(place, Site) else Site("resid_post", place, f"blocks.{place}.hook_resid_post")


def from_option(text: str, layer: int, *, any_layer: bool = False) -> Site:
    """The place that `--site` names: one of `KINDS` in block ``layer``, SAELens's name, or the path of a module.

    any_layer: whether the latter two may name another block

    Raises:
        UserError: it is none of these, or it names another block than ``layer``.
    """
    if text in KINDS:
        return Site(text, layer, f"blocks.{layer}.hook_{text}")
    site = from_hook_name(text)
    if not site.locatable:
        raise UserError(
            f"the site {text!r} is unknown; use {', '.join(KINDS)}, or the path of a module in a decoder block, such "
            f"as model.layers.{layer}.mlp.down_proj (its output) or model.layers.{layer}.mlp.down_proj.input."
        )
    if site.layer != layer and not any_layer:
        raise UserError(
            f"the site {text} is in block {site.layer}, but the layer is {layer}; give --layer {site.layer}."
        )
    return site


def from_hook_name(name: str) -> Site:
    """SAELens: `hook_name`, of TransformerLens (`blocks.3.hook_mlp_out`) or a module's path (`model.layers.3.mlp`)."""
    match = _HOOK.fullmatch(name)
    if match:
        return Site(match[2] or match[3], int(match[1]), name)
    site, block = from_module(name), _ANY_BLOCK.search(name)
    return Site("other", int(block[1]), name) if block and site.layer is None else site


def from_module(path: str) -> Site:
    """The path of a module in transformers, whose output is meant unless it ends in `.input`.

    sparsify's folders are named so (`layers.3`, `layers.3.mlp`), and Gemma Scope 2's `hf_hook_point_in`. Blocks of an
    encoder or a vision tower are no blocks of the decoder.
    """
    match = _MODULE.fullmatch(path)
    if match is None:
        return Site("other", None, path)
    if _OTHER_STACK.search(path[: match.start(1)]) or path.rpartition(".")[2].startswith("hook_"):  # TransformerLens's
        return Site("other", int(match[1]), path)
    layer, part = int(match[1]), match[2] or ""
    kind = {"": "resid_post", "output": "resid_post", "input": "resid_pre"}.get(part)
    if kind is None:
        part = part.removesuffix(".output")
        kind = "mlp_out" if part in ("mlp", "post_feedforward_layernorm") else "module"
        kind = "attn_out" if part in _ATTENTION else kind
    return Site(kind, layer, path)


def from_submodule(name: str) -> Site:
    """dictionary_learning: `submodule_name`, such as `resid_post_layer_3`, or a module's path."""
    match = _SUBMODULE.fullmatch(name)
    if match is None:
        return from_module(name)
    kind = {"resid": "resid_post", "resid_out": "resid_post", "attention_out": "attn_out"}.get(match[1], match[1])
    return Site(kind, int(match[2]), name)


def submodule_name(site: Site) -> str:
    """What dictionary_learning calls a place: the inverse of `from_submodule`, for a module's input with `io` `in`."""
    if site.kind == "module":
        return site.module or site.name
    return f"{site.kind}_layer_{site.layer}" if site.kind in KINDS else site.name


def contradict(one: Site, other: Site) -> bool:
    """Whether two names, which should be of one place, are of different places; False if that cannot be told."""
    if one.block is not None and other.block is not None:
        return one.block != other.block
    if {"other", "module", "hook_z"} & {one.kind, other.kind}:
        return None not in (one.layer, other.layer) and one.block is other.block is None and one.layer != other.layer
    return (one.kind, one.layer) != (other.kind, other.layer)


def from_sparsify_folder(folder: Path) -> Site | None:
    """sparsify: a folder named after its module, with one per seed in it if there are several; None for other names.

    A link is read as the folder that it points to, unless its own name tells.
    """
    for path in (folder.absolute(), folder.resolve()):
        name = path.parent.name if re.fullmatch(r"seed\d+", path.name) else path.name
        site = from_module(name)
        if site.layer is not None or "embed" in name:
            return site
    return None


_GEMMA_SCOPE_KINDS = {"res": "resid_post", "mlp": "mlp_out", "att": "hook_z", "transcoders": "transcoder"}
TRANSCODERS = ("transcoder", "clt", "crosscoder")
"""What Gemma Scope calls dictionaries that are no autoencoders; only the first is of one layer."""


def from_gemma_scope_folder(folder: Path) -> tuple[Site | None, str | None]:
    """Gemma Scope: the place and the model, from the path of a folder, each None if the path does not tell.

    Gemma Scope has a repository per place, `gemma-scope-2b-pt-res/layer_12/width_16k/...`; Gemma Scope 2 a folder,
    `gemma-scope-2-1b-pt/resid_post/layer_12_width_16k_l0_big`. A link is read as the folder that it points to, unless
    its own path tells.
    """
    site, model = _from_gemma_scope_path(folder.absolute().as_posix())
    return (site, model) if site is not None else _from_gemma_scope_path(folder.resolve().as_posix())


def _from_gemma_scope_path(path: str) -> tuple[Site | None, str | None]:
    kinds = "|".join(_GEMMA_SCOPE_KINDS)
    repository = re.search(rf"gemma-scope-(2-)?(\d+\w)-(pt|it)(?:-({kinds})(?:-canonical|-all)?)?(?![\w-])", path)
    layer = re.search(r"(?:^|/)layer_(\d+)(?:_|/|$)", path)
    named = re.search(r"(?:^|/)(resid_post|mlp_out|attn_out|transcoder|clt|crosscoder)(?:_all)?(?:/|$)", path)
    kind = named[1] if named else None
    model = None
    if repository:
        kind = kind or _GEMMA_SCOPE_KINDS.get(repository[4] or "")
        generation = "3" if repository[1] else "2"
        base = repository[3] == "pt" and not repository[1]  # Gemma 2's base models have no suffix
        model = f"google/gemma-{generation}-{repository[2]}{'' if base else '-' + repository[3]}"
    if kind == "resid_post" and layer is None and re.search(r"/embedding(?:/|$)", path):
        return Site("other", None, "hook_embed"), model
    if kind is None or layer is None:
        return None, model
    number = int(layer[1])
    if kind in ("hook_z", "attn_out"):  # both are trained on the input of the attention's output projection
        return Site("hook_z", number, f"blocks.{number}.attn.hook_z"), model
    name = f"blocks.{number}.hook_{kind}" if kind in KINDS else kind
    return Site(kind if kind in KINDS else "other", number, name), model
