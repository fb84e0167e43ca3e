"""Whether autoencoders are measured where, and with what, their files say they were trained.

A place that cannot be measured, or another one than was asked for, is refused. A model under another name, and text
that begins otherwise, are measured with a warning: names are compared loosely, since one model has several.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tsae.config import MAX_LENGTH, TrainConfig
from tsae.errors import UserError
from tsae.lm.site import MEASURABLE, Site, as_site
from tsae.sae.metadata import site_of
from tsae.sae.model import SparseAutoencoder

# Options of TransformerLens and transformers that leave a block's output as it is.
_WITHOUT_EFFECT = frozenset(
    """
    fold_ln center_unembed fold_value_biases refactor_factored_attn_matrices device device_map n_devices move_to_device
    dtype torch_dtype trust_remote_code token cache_dir local_files_only low_cpu_mem_usage attn_implementation
    default_padding_side default_prepend_bos
    """.split()  # noqa: SIM905
)
_ALIASES = {"gpt2-small": "gpt2"}  # TransformerLens's name, and the hub's


def stated_site(name: str, sae: SparseAutoencoder) -> tuple[Site | None, list[str]]:
    """The place that an autoencoder says it encodes, None if it says nothing, and warnings.

    name: of the autoencoder, for messages

    Raises:
        UserError: it encodes something that is no place of a decoder block.
    """
    site, layer = site_of(sae.metadata), sae.metadata.get("hook_layer")
    if site is None:
        if layer is None:
            return None, []
        said = f"{name} names layer {layer}, but not which of its activations; taken as the block's output"
        return as_site(layer), [said]
    if not site.locatable:
        raise UserError(
            f"{called(name)} encodes {_spelt(sae.metadata, site)}, which this version cannot measure; it measures "
            f"{MEASURABLE}."
        )
    if site.kind == "mlp_in" and sae.metadata.get("hf_hook_name") is None:
        return site, [f"{name} encodes {site.name}, taken as what the MLP is given, after the norm before it"]
    return site, []


def common_site(
    sites: Mapping[str, Site | None],
    saes: Mapping[str, SparseAutoencoder],
    asked: Site | None = None,
    layer: int | None = None,
) -> Site:
    """The place to measure at.

    sites: what each autoencoder says, None for nothing; without `asked` and `layer` at least one is not None
    asked: the place that they must agree with; None takes what they say
    layer: `--layer` without `--site`: the block of what they say, or if they say nothing, the one whose output it is

    Raises:
        UserError: they say different places, or another than was asked for.
    """
    said = {name: site for name, site in sites.items() if site is not None}
    if asked is None and len({site.key for site in said.values()}) > 1:
        each = ", ".join(
            f"{name}: {(as_site(site.block) if site.block is not None else site).described}"
            for name, site in said.items()
        )
        raise UserError(f"The autoencoders encode different layers ({each}); measure those of one layer at a time.")
    if asked is None and layer is None:
        return _canonical(next(iter(said.values())))  # the caller has made sure that there is one
    for name, site in said.items():
        wrong = site.key != asked.key if asked is not None else _layer(site) != layer
        if wrong:
            raise UserError(_another_place(name, saes[name].metadata, site, asked, layer))
    if asked is None:
        assert layer is not None
        return _canonical(next(iter(said.values()), as_site(layer)))
    return asked


def _canonical(site: Site) -> Site:
    """The input of a block as the output of the one before."""
    return site if site.block is None else as_site(site.block)


def _layer(site: Site) -> int | None:
    return site.layer if site.block is None else site.block


def _another_place(name: str, metadata: dict[str, Any], site: Site, asked: Site | None, layer: int | None) -> str:
    """The sentence for an autoencoder of another place than was asked for."""
    spelt, block = _spelt(metadata, site), layer if asked is None else asked.block
    if site.block is not None and block is not None:
        what = f"{spelt}, " if site_of(metadata) else ""
        what = f"{what}the output of block {site.block}, not of block {block}"
        return f"{called(name)} encodes {what} (--layer); leave out --layer to measure it there."
    what = f"not block {layer} (--layer)" if asked is None else f"not {asked.name}"
    return f"{called(name)} encodes {spelt}, {what}; leave out --site and --layer to measure it there."


def called(name: str) -> str:
    """An autoencoder in a sentence; its name may be empty."""
    return name or "The autoencoder"


def _spelt(metadata: dict[str, Any], site: Site) -> str:
    """A place as its file spells it, and in SAELens's spelling if that is another."""
    own = metadata.get("hf_hook_name") or site.name
    return own if own == site.hook_name else f"{own} ({site.hook_name})"


def warnings_about(name: str, metadata: dict[str, Any], model: str, done: str = "measured") -> list[str]:
    """What is different when ``model`` is measured instead of the model that the metadata names.

    done: what is done with the autoencoder on ``model``

    Raises:
        UserError: the activations are those of a model whose weights were changed so that they are centred.
    """
    found, trained = [], metadata.get("model_name")
    if trained is not None and not same_model(trained, model):
        found.append(f"{name} says that it was trained on {trained}, and is {done} on {model}")
    if any(metadata.get("seqpos_slice") or ()):
        found.append(f"{name} was trained on the positions {metadata['seqpos_slice']} alone, and is {done} on all")
    options = metadata.get("model_from_pretrained_kwargs") or {}
    if options.get("center_writing_weights"):
        raise UserError(
            f"{name} encodes the activations of a model with center_writing_weights (model_from_pretrained_kwargs), "
            "whose mean over dimensions is 0; this version measures models as they are."
        )
    options = {
        key: value for key, value in options.items() if key not in _WITHOUT_EFFECT and value not in (None, False)
    }
    if options:
        each = ", ".join(f"{key}={value!r}" for key, value in options.items())
        found.append(f"{name} was trained on a model loaded with {each}, which is not done here")
    return found


def same_model(one: str, other: str) -> bool:
    """Whether two names, of the hub, of TransformerLens or of folders, may be those of one model."""
    return _key(one) == _key(other)


def _key(name: str) -> str:
    cached = re.search(r"models--(?:.*--)?([^/]+)/snapshots/", Path(name).as_posix())  # in the hub's cache
    last = (cached[1] if cached else Path(name).name).lower()
    last = _ALIASES.get(last, last).replace("gemma-v3", "gemma-3").removesuffix("-hf")
    return last.removesuffix("-pt")  # Gemma 3's smallest base model has no suffix on the hub


def use_bos(saes: Mapping[str, SparseAutoencoder]) -> bool | None:
    """Whether sequences begin with BOS, for `load_language_model`: if any autoencoder was trained so; not if none was.

    None if they do not say.
    """
    said = {sae.metadata.get("prepend_bos") for sae in saes.values()}
    if True in said:
        return True
    return False if said == {False} else None


def bos_warnings(saes: Mapping[str, SparseAutoencoder], prefix: int | None, model: str) -> list[str]:
    """Warnings about autoencoders that were trained with BOS and are measured without, or the other way round.

    prefix: the token that begins sequences; None if they begin with text
    """
    if prefix is not None:
        without = [name for name, sae in saes.items() if sae.metadata.get("prepend_bos") is False]
        return [f"{name} was trained without BOS, and is measured with BOS, as the others were" for name in without]
    wanted = [name for name, sae in saes.items() if sae.metadata.get("prepend_bos")]
    why = f"the tokenizer of {model} has none; the first token's activation is left out"
    return [f"{name} was trained with BOS, but {why}" for name in wanted]


def common_length(runs: Mapping[str, TrainConfig]) -> int | None:
    """The length of the sequences that runs were trained on; None for no run.

    Raises:
        UserError: they differ.
    """
    lengths = {name: config.length for name, config in runs.items()}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise UserError(f"The runs differ in their length ({each}); name the one to measure at, with --length.")
    return next(iter(lengths.values()), None)


def check_one_model(runs: Mapping[str, TrainConfig], options: Iterable[str]) -> None:
    """Raise `UserError` unless runs agree in ``options``, which decide what model the named one is loaded as."""
    for option in options:
        values = {name: getattr(config, option) for name, config in runs.items()}
        if len(set(values.values())) > 1:
            each = ", ".join(f"{name}: {value}" for name, value in values.items())
            flag = f"--{option.replace('_', '-')}"
            raise UserError(f"The runs differ in {option} ({each}); name the one to measure with, with {flag}.")


def length_warnings(saes: Mapping[str, SparseAutoencoder], length: int) -> list[str]:
    """Warnings about autoencoders that were trained on sequences of another length.

    length: of the sequences they are measured on, without the first token; `context_size` counts it, if it is BOS
    """
    found = []
    for name, sae in saes.items():
        size = sae.metadata.get("context_size")
        if size is not None and size not in (length, 1 + length):
            hint = f"; --length {size - 1} measures it there" if 2 <= size - 1 <= MAX_LENGTH else ""
            found.append(
                f"{name} was trained on sequences of {size} tokens, and is measured on 1 + {length}, the first left "
                f"out{hint}"
            )
    return found
