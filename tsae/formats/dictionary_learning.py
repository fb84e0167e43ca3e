"""dictionary_learning directories: `ae.pt`, a state dict, and `config.json`, which names its class.

T-SAE's code (arXiv 2511.05541) descends from it and writes the same. `ae.pt` is a pickle; it is read with
``weights_only=True`` and never executed.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.formats.build import build, ungated
from tsae.formats.fields import read as field
from tsae.formats.fields import require_no_others
from tsae.formats.forms import common_architecture
from tsae.lm.site import Site, from_hook_name, from_module, from_submodule, submodule_name
from tsae.sae import metadata
from tsae.sae.model import SparseAutoencoder
from tsae.utils.atomic import atomic_write, save_pickle, write_json
from tsae.utils.config_json import load_json
from tsae.utils.tensor_files import (
    Tensors,
    matrix_shape,
    positive_integer,
    read_pickle,
    require_tensors,
)

WEIGHTS, CONFIG, TRAINER = "ae.pt", "config.json", "trainer_0"

MATRYOSHKA = ("MatryoshkaBatchTopKSAE", "TemporalMatryoshkaBatchTopKSAE")
BATCHTOPK = ("BatchTopKSAE", "TemporalBatchTopKSAE")
# Classes made of two linear layers, and the name of each one's `b_dec`.
LINEAR = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "AutoEncoderTopK": "b_dec",
    "GatedAutoEncoder": "decoder_bias",
    **dict.fromkeys(BATCHTOPK, "b_dec"),
}
CLASSES = (*LINEAR, "JumpReluAutoEncoder", *MATRYOSHKA)


def read(path: Path) -> SparseAutoencoder:
    """The autoencoder of an `ae.pt`, in ``eval()`` mode; its class is in the `config.json` beside it.

    Raises:
        UserError: the file is damaged or holds more than tensors, a field has the wrong type, a tensor has the wrong
            shape or belongs to another class, the class is unknown or ambiguous, or the threshold of a BatchTopK class
            was never set.
    """
    tensors = read_pickle(path)
    config = path.with_name(CONFIG)
    values = load_json(config) if config.is_file() else {}
    trainer = field(config, values, "trainer", dict, {}) or {}
    kind = field(config, trainer, "dict_class", str) or _infer_class(path, tensors)
    if kind not in CLASSES:
        raise UserError(f"{config} names the class {kind!r}; this version reads {', '.join(CLASSES)}.")
    said = _metadata(config, values, trainer)
    sae = _read_linear(path, tensors, kind, trainer) if kind in LINEAR else _read_matrices(path, tensors, kind, trainer)
    for name, size in (("activation_dim", sae.cfg.d_in), ("dict_size", sae.cfg.d_sae)):
        if field(config, trainer, name, int, size) != size:
            raise UserError(f"{config} has {name} = {trainer[name]}, but the tensors of {path.name} have {size}.")
    sae.metadata = said
    return sae


def _metadata(config: Path, values: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    """Place, model and text. What we wrote ourselves is in `metadata`; else `trainer` and `buffer` say it."""
    buffer = field(config, values, "buffer", dict) or {}
    own = field(config, values, "metadata", dict) or {}
    said: dict[str, Any] = {
        "model_name": field(config, trainer, "lm_name", str),
        "context_size": field(config, buffer, "ctx_len", int),
        "hook_layer": field(config, trainer, "layer", int),
    }
    name, io = field(config, trainer, "submodule_name", str), field(config, buffer, "io", str) or "out"
    if io not in ("in", "out"):
        raise UserError(f"{config} has buffer.io = {io!r}; this version reads 'out' and 'in', of autoencoders.")
    if name is not None:
        site = from_submodule(name)
        site = site if io == "out" else _input_of(site, said["hook_layer"])
        said["hook_name"] = site.hook_name
    elif io == "in" and said["hook_layer"] is not None:
        said["hook_name"] = Site("resid_pre", said["hook_layer"], "").hook_name
    own = metadata.checked(config, own)
    for name, value in said.items():
        here, there = value, own.get(name)
        if name == "hook_name" and None not in (here, there):  # `own` may have a module's path
            here, there = from_hook_name(value).hook_name, from_hook_name(str(there)).hook_name
        if None not in (here, there) and here != there:
            raise UserError(
                f"{config} says twice what {name} is, {value!r} and in metadata {own[name]!r}; correct one of them."
            )
    return metadata.checked(config, {name: value for name, value in said.items() if value is not None} | own)


def _input_of(site: Site, layer: int | None) -> Site:
    """What the module whose output is ``site`` is given."""
    if site.module is not None and not site.of_input:
        return from_module(f"{site.module}.input")
    kind = {"resid_post": "resid_pre", "mlp_out": "mlp_in"}.get(site.kind)
    if kind is None or site.layer is None:
        return Site("other", layer, f"the input of {site.name}")
    return Site(kind, site.layer, f"blocks.{site.layer}.hook_{kind}")


def _infer_class(path: Path, tensors: Tensors) -> str:
    """The class, from the names of the tensors."""
    names = set(tensors)
    if "group_sizes" in names:
        return "MatryoshkaBatchTopKSAE"
    if {"W_enc", "threshold"} <= names:
        return "JumpReluAutoEncoder"
    if "r_mag" in names:
        return "GatedAutoEncoder"
    if {"encoder.weight", "bias"} <= names:
        return "AutoEncoder"
    if {"encoder.weight", "decoder.bias"} <= names:
        return "AutoEncoderNew"
    if "k" in names and "threshold" not in names and "encoder.weight" in names:
        return "AutoEncoderTopK"
    if {"k", "encoder.weight"} <= names:
        raise UserError(
            f"{path} may be an AutoEncoderTopK or a BatchTopKSAE, which have the same tensors; put its {CONFIG} beside "
            "it, which names the class (trainer.dict_class)."
        )
    raise UserError(f"{path} matches no class that this version reads; it has the tensors {sorted(tensors)}.")


def _read_matrices(path: Path, tensors: Tensors, kind: str, trainer: dict[str, Any]) -> SparseAutoencoder:
    """The classes with tensors W_enc, b_enc, W_dec, b_dec."""
    d_in, d_sae = matrix_shape(path, tensors, "W_enc")
    jumprelu = kind == "JumpReluAutoEncoder"
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in)}
    shapes |= {"b_dec": (d_in,), "threshold": (d_sae,) if jumprelu else ()}
    weights: dict[str, Any] = _weights(path, tensors, shapes, kind, () if jumprelu else ("k", "group_sizes"))
    if jumprelu:
        return build("jumprelu", **weights, subtract_b_dec=False)
    groups = _groups(path, tensors, d_sae)
    _check_threshold(path, weights["threshold"])
    k = _k(path, tensors, trainer, d_sae)
    return build("batchtopk", **weights, k=k, groups=groups if len(groups) > 1 else ())


def _read_linear(path: Path, tensors: Tensors, kind: str, trainer: dict[str, Any]) -> SparseAutoencoder:
    """The classes made of two linear layers, whose weights are the transposes of ours."""
    d_sae, d_in = matrix_shape(path, tensors, "encoder.weight")
    gated = kind == "GatedAutoEncoder"
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae)}
    shapes |= {LINEAR[kind]: (d_in,)}
    shapes |= dict.fromkeys(("r_mag", "gate_bias", "mag_bias") if gated else ("encoder.bias",), (d_sae,))
    if kind in BATCHTOPK:
        shapes["threshold"] = ()
    # AutoEncoderTopK has a threshold too, for an encoding that is not its default.
    others = ("k", "threshold") if kind == "AutoEncoderTopK" or kind in BATCHTOPK else ()
    weights: dict[str, Any] = _weights(path, tensors, shapes, kind, others)
    ours: dict[str, Any] = {
        "W_enc": weights["encoder.weight"].T,
        "W_dec": weights["decoder.weight"].T,
        "b_dec": weights[LINEAR[kind]],
    }
    if gated:  # derived in `tsae.formats.saelens`
        gate = (weights[name] for name in ("r_mag", "gate_bias", "mag_bias"))
        ours["W_enc"], b_enc, threshold = ungated(path, ours["W_enc"], *gate)
        return build("jumprelu", **ours, b_enc=b_enc, threshold=threshold)
    ours["b_enc"] = weights["encoder.bias"]
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return build("relu", **ours, subtract_b_dec=kind == "AutoEncoder")
    k = _k(path, tensors, trainer, d_sae)
    if kind == "AutoEncoderTopK":
        return build("topk", **ours, k=k)
    _check_threshold(path, weights["threshold"])
    return build("batchtopk", **ours, threshold=weights["threshold"], k=k)


def _weights(
    path: Path, tensors: Tensors, shapes: dict[str, tuple[int, ...]], kind: str, others: tuple[str, ...]
) -> Tensors:
    """The tensors of a class, float32, after a check that there are no more than these and ``others``."""
    weights = require_tensors(path, tensors, shapes)
    require_no_others(path, tensors, (*shapes, *others), f"the class {kind}")
    return weights


def _k(path: Path, tensors: Tensors, trainer: dict[str, Any], d_sae: int) -> int:
    """Features per token, from the tensors and the configuration, which must agree."""
    sources = ((path, tensors), (path.with_name(CONFIG), trainer))
    found = [positive_integer(file, "k", values["k"], d_sae) for file, values in sources if values.get("k") is not None]
    if not found:
        raise UserError(f"{path} has no k, and neither has its {CONFIG} (trainer.k); add it.")
    if found[0] != found[-1]:
        raise UserError(f"{path} has k = {found[0]}, but its {CONFIG} has {found[-1]}; correct one of them.")
    return found[0]


def _groups(path: Path, tensors: Tensors, d_sae: int) -> tuple[int, ...]:
    """The ends of the Matryoshka groups."""
    if "group_sizes" not in tensors:
        return ()
    sizes = tensors["group_sizes"].flatten().tolist()
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise UserError(f"{path}: group_sizes is {sizes}; expected positive integers.")
    if sum(sizes) != d_sae:
        raise UserError(f"{path}: group_sizes sums to {sum(sizes)}; expected the number of features, {d_sae}.")
    return tuple(itertools.accumulate(sizes))


def _check_threshold(path: Path, threshold: Tensor) -> None:
    if not threshold.isfinite():
        raise UserError(f"{path}: threshold is {threshold.item()}; the training diverged, or the file is damaged.")
    if threshold < 0:
        raise UserError(
            f"{path}: threshold is {threshold.item()}: training ended before it was set, so which features are active "
            "depends on the batch; train longer."
        )


@torch.no_grad()
def write(sae: SparseAutoencoder, directory: Path, extra: dict[str, Any]) -> None:
    """Write ``sae`` as `trainer_0/ae.pt` and `trainer_0/config.json` under ``directory``.

    relu becomes AutoEncoder and topk AutoEncoderTopK. If all features share one threshold, the others become
    BatchTopKSAE, or MatryoshkaBatchTopKSAE with groups; else JumpReluAutoEncoder, which does not subtract `b_dec` from
    its input, so its effect goes into the encoder bias.

    Place and model come from ``sae.metadata``, under dictionary_learning's names; all of it is written as `metadata`
    too, which dictionary_learning ignores and `read` reads.

    extra: more values for `metadata`

    Raises:
        UserError: dictionary_learning has no equivalent class.
    """
    kind = _class_of(sae)
    out = directory / TRAINER
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / WEIGHTS) as temporary:
        save_pickle(_state(sae, kind), temporary)
    cfg, said = sae.cfg, sae.metadata | extra
    site = metadata.site_of(said)
    io = "in" if site is not None and site.kind == "module" and site.of_input else "out"
    trainer = {
        "trainer_class": "tsae",
        "dict_class": kind,
        "activation_dim": cfg.d_in,
        "dict_size": cfg.d_sae,
        "k": cfg.k,
        "device": "cpu",
        "layer": said.get("hook_layer") if site is None else site.layer,
        "lm_name": said.get("model_name"),
        "submodule_name": None if site is None else submodule_name(site),
    }
    buffer = {"d_submodule": cfg.d_in, "io": io, "ctx_len": said.get("context_size"), "device": "cpu"}
    write_json(out / CONFIG, {"trainer": trainer, "buffer": buffer, "metadata": said})


def _class_of(sae: SparseAutoencoder) -> str:
    architecture = common_architecture(sae, "dictionary_learning")
    if architecture != "jumprelu":
        return {"standard": "AutoEncoder", "topk": "AutoEncoderTopK"}[architecture]
    if not (sae.threshold == sae.threshold[0]).all():
        return "JumpReluAutoEncoder"
    return "MatryoshkaBatchTopKSAE" if len(sae.cfg.groups) > 1 else "BatchTopKSAE"


def _state(sae: SparseAutoencoder, kind: str) -> Tensors:
    """The state dict of a class."""
    cfg, subtracts = sae.cfg, kind != "JumpReluAutoEncoder"
    b_enc = sae.b_enc.double()
    if subtracts != cfg.apply_b_dec_to_input:
        shift = sae.b_dec.double() @ sae.W_enc.double()
        b_enc = b_enc + shift if subtracts else b_enc - shift
    if kind in LINEAR:
        state: Tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": b_enc, "decoder.weight": sae.W_dec.T}
        state[LINEAR[kind]] = sae.b_dec
    else:
        state = {"W_enc": sae.W_enc, "b_enc": b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if kind == "JumpReluAutoEncoder":
        state["threshold"] = sae.threshold
    elif kind != "AutoEncoder":
        state["threshold"] = torch.tensor(-1.0) if kind == "AutoEncoderTopK" else sae.threshold[0]
    state = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in state.items()}
    if kind not in ("AutoEncoder", "JumpReluAutoEncoder"):
        state["k"] = torch.tensor(cfg.k, dtype=torch.int32)
    if kind == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = torch.tensor([b - a for a, b in itertools.pairwise((0, *cfg.groups))])
    return state
