"""What an autoencoder says of the activations it was trained on, under SAELens's names of the fields.

Every format's reader puts what its files say into `SparseAutoencoder.metadata`, and every writer writes it, so that it
survives loading and export. Values of any other name are kept and not interpreted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsae.errors import UserError
from tsae.lm.site import Site, contradict, from_hook_name, from_module

TYPES: dict[str, tuple[type, ...]] = {
    "model_name": (str,),
    "hook_name": (str,),
    "hook_layer": (int,),
    "hook_head_index": (int,),
    "hook_name_out": (str,),
    "hf_hook_name_out": (str,),
    "hf_hook_name": (str,),
    "context_size": (int,),
    "prepend_bos": (bool,),
    "model_from_pretrained_kwargs": (dict,),
}
"""Fields that are interpreted, and their types; all may be null or absent."""
VERSIONS = ("sae_lens_version", "sae_lens_training_version")  # of the writer; not kept


def checked(path: Path, values: dict[str, Any], *, transcoder: bool = False) -> dict[str, Any]:
    """The metadata in ``values``, without those that are null.

    path: of the file, for messages
    transcoder: whether it may name another place that is predicted, `hook_name_out`

    Raises:
        UserError: a field of `TYPES` has another type, the place contradicts the layer, or it is one head of an
            attention layer, or it names a place that is predicted and is no transcoder.
    """
    out = {name: value for name, value in values.items() if value is not None and name not in VERSIONS}
    for name, types in TYPES.items():
        value = out.get(name)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise UserError(f"{path} has {name} = {value!r}; expected {types[0].__name__} or null.")
    if "hook_head_index" in out:
        raise UserError(
            f"{path} encodes head {out['hook_head_index']} of an attention layer (hook_head_index); only autoencoders "
            "of all of a place's activations can be read."
        )
    if not transcoder:
        _check_no_target(path, out)
    elif "hook_head_index_out" in out:
        raise UserError(
            f"{path} predicts head {out['hook_head_index_out']} of an attention layer (hook_head_index_out); only "
            "transcoders to all of a place's activations can be read."
        )
    site, module = site_of(out), out.get("hf_hook_name")
    if site is not None and module is not None and contradict(site, from_module(module)):
        raise UserError(
            f"{path} has the hook_name {site.name} and the hf_hook_name {module}, which contradict each other; correct "
            "one of them."
        )
    if site is not None and site.layer is not None and out.get("hook_layer", site.layer) != site.layer:
        raise UserError(
            f"{path} has the hook_name {site.name} and the hook_layer {out['hook_layer']}, which contradict each "
            "other; correct one of them."
        )
    return out


def _check_no_target(path: Path, said: dict[str, Any]) -> None:
    if said.get("hook_name_out", said.get("hook_name")) != said.get("hook_name"):
        raise UserError(
            f"{path} predicts {said['hook_name_out']} from {said.get('hook_name')} (hook_name_out), as a transcoder, "
            "but its architecture is an autoencoder's; correct one of them."
        )
    for name in ("hook_layer", "hook_head_index", "hf_hook_name"):
        here, there = said.get(name), said.get(f"{name}_out", said.get(name))
        if here != there:
            raise UserError(
                f"{path} has {name}_out = {there!r} and {name} = {here!r}, as a transcoder, but its architecture is an "
                "autoencoder's; correct one of them."
            )


def target_of(metadata: dict[str, Any]) -> Site | None:
    """The place that the ``metadata`` of a transcoder says it predicts; None if it names none."""
    names = {"hook_name": "hook_name_out", "hf_hook_name": "hf_hook_name_out"}
    return site_of({ours: metadata[theirs] for ours, theirs in names.items() if metadata.get(theirs) is not None})


def site_of(metadata: dict[str, Any]) -> Site | None:
    """The place that checked ``metadata`` names; None if it names none.

    By SAELens's name, or by its module's path if there is no other name, or the name is one made from the path, which
    says exactly which tensor it is: in Gemma `layers.3.mlp` is not what the MLP adds to the residual stream.
    """
    name, module = metadata.get("hook_name"), metadata.get("hf_hook_name")
    path = None if module is None else from_module(module)
    if name is None:
        return path
    site = from_hook_name(name)
    if path is None or not path.locatable or path.block is not None:
        return site
    return path if not site.locatable or (path.kind, path.layer) == (site.kind, site.layer) else site
