"""dictionary_learning's directories: `ae.pt`, a state dict, and `config.json`, which names its class.

T-SAE's code (arXiv 2511.05541) is a descendant and writes the same. `ae.pt` is a pickle; it is read with
``weights_only=True`` and never executed.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.formats.tensors import Tensors, assemble, expect, matrix, read_pickle, whole_number
from tsae.sae.model import SparseAutoencoder
from tsae.utils.atomic import atomic_write, save_pickle, write_json
from tsae.utils.config_json import load_json

WEIGHTS, CONFIG, TRAINER = "ae.pt", "config.json", "trainer_0"

MATRYOSHKA = ("MatryoshkaBatchTopKSAE", "TemporalMatryoshkaBatchTopKSAE")
BATCHTOPK = ("BatchTopKSAE", "TemporalBatchTopKSAE")
GATED = ("GatedAutoEncoder",)
CLASSES = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "JumpReluAutoEncoder", *GATED, *BATCHTOPK, *MATRYOSHKA)


def read(path: Path) -> SparseAutoencoder:
    """The autoencoder of an `ae.pt`, in ``eval()`` mode; the `config.json` beside it says of what class it is.

    Raises:
        UserError: the file is broken or holds more than tensors, a tensor has the wrong shape, the class is not known
            or cannot be told, or a batch's threshold was never set.
    """
    tensors = read_pickle(path)
    config = path.with_name(CONFIG)
    trainer = load_json(config).get("trainer", {}) if config.is_file() else {}
    kind = trainer.get("dict_class") or _guess(path, tensors)
    if kind not in CLASSES:
        raise UserError(f"{config} is of the class {kind!r}; this version reads {', '.join(CLASSES)}.")
    if kind in (*MATRYOSHKA, "JumpReluAutoEncoder"):
        return _own_names(path, tensors, kind)
    return _linear_layers(path, tensors, kind, trainer)


def _guess(path: Path, tensors: Tensors) -> str:
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
    if "k" in names and "threshold" not in names:
        return "AutoEncoderTopK"
    if "k" in names:
        raise UserError(
            f"{path} may be of AutoEncoderTopK or of BatchTopKSAE, which hold the same tensors; put its {CONFIG} "
            "beside it, which says which (trainer.dict_class)."
        )
    raise UserError(f"{path} is of no class that this version knows; it has the tensors {sorted(tensors)}.")


def _own_names(path: Path, tensors: Tensors, kind: str) -> SparseAutoencoder:
    """The classes that name their tensors W_enc, b_enc, W_dec, b_dec."""
    d_in, d_sae = matrix(path, tensors, "W_enc")
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    if kind == "JumpReluAutoEncoder":
        weights = expect(path, tensors, shapes | {"threshold": (d_sae,)})
        return assemble("jumprelu", **weights, subtract=False)
    weights = expect(path, tensors, shapes | {"threshold": ()})
    ends: tuple[int, ...] = ()
    if "group_sizes" in tensors:
        ends = tuple(itertools.accumulate(tensors["group_sizes"].flatten().tolist()))
        if not ends or ends[-1] != d_sae:
            raise UserError(f"{path}: group_sizes sums to {ends[-1] if ends else 0}; {d_sae} is wanted, its features.")
    _check_threshold(path, weights["threshold"])
    k = whole_number(path, "k", tensors.get("k"), d_sae)
    return assemble("batchtopk", **weights, k=k, groups=ends if len(ends) > 1 else ())


def _linear_layers(path: Path, tensors: Tensors, kind: str, trainer: dict[str, Any]) -> SparseAutoencoder:
    """The classes made of two linear layers, whose weights are the transposes of ours."""
    d_sae, d_in = matrix(path, tensors, "encoder.weight")
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}.get(
        kind, "b_dec"
    )
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in),
        "decoder.weight": (d_in, d_sae),
        bias: (d_in,),
    }
    shapes |= dict.fromkeys(("r_mag", "gate_bias", "mag_bias") if kind in GATED else ("encoder.bias",), (d_sae,))
    if kind in BATCHTOPK:
        shapes["threshold"] = ()
    weights = expect(path, tensors, shapes)
    W_enc, W_dec, b_dec = weights["encoder.weight"].T, weights["decoder.weight"].T, weights[bias]
    if kind in GATED:  # see `tsae.formats.saelens`
        gain, b_enc = weights["r_mag"].exp(), weights["mag_bias"]
        threshold = b_enc - gain * weights["gate_bias"]
        return assemble("jumprelu", W_enc=W_enc * gain, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, threshold=threshold)
    b_enc = weights["encoder.bias"]
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        subtract = kind == "AutoEncoder"
        return assemble("relu", W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, subtract=subtract)
    k = whole_number(path, "k", tensors.get("k", trainer.get("k")), d_sae)
    if kind == "AutoEncoderTopK":
        return assemble("topk", W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, k=k)
    _check_threshold(path, weights["threshold"])
    return assemble(
        "batchtopk", W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, threshold=weights["threshold"], k=k
    )


def _check_threshold(path: Path, threshold: Tensor) -> None:
    if threshold < 0:
        raise UserError(
            f"{path}: threshold is {threshold.item()}, which means that training ended before it was set; without it "
            "which features are active depends on the batch."
        )


@torch.no_grad()
def write(sae: SparseAutoencoder, directory: Path, metadata: dict[str, Any]) -> None:
    """Write ``sae`` as `trainer_0/ae.pt` and `trainer_0/config.json` under ``directory``.

    relu becomes AutoEncoder, topk AutoEncoderTopK, batchtopk BatchTopKSAE or with groups MatryoshkaBatchTopKSAE, and
    jumprelu JumpReluAutoEncoder, or BatchTopKSAE where all features have one threshold. JumpReluAutoEncoder does not
    subtract `b_dec` from its input, so there its effect goes into the encoder's bias.

    metadata: `model_name`, `hook_layer`, `context_size` and others, for the configuration

    Raises:
        UserError: dictionary_learning has no form for the autoencoder.
    """
    from tsae.formats.forms import plain_form

    form = plain_form(sae, "dictionary_learning")
    cfg = sae.cfg
    kind, uniform = "AutoEncoder", bool((sae.threshold == sae.threshold[0]).all())
    subtract = True
    if form == "topk":
        kind = "AutoEncoderTopK"
    elif form == "jumprelu":
        kind = (
            ("MatryoshkaBatchTopKSAE" if len(cfg.groups) > 1 else "BatchTopKSAE") if uniform else "JumpReluAutoEncoder"
        )
        subtract = uniform
    b_enc = sae.b_enc.double()
    if subtract != cfg.apply_b_dec_to_input:
        shift = sae.b_dec.double() @ sae.W_enc.double()
        b_enc = b_enc + shift if subtract else b_enc - shift
    if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        state: Tensors = {"W_enc": sae.W_enc, "b_enc": b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    else:
        bias = "bias" if kind == "AutoEncoder" else "b_dec"
        state = {"encoder.weight": sae.W_enc.T, "encoder.bias": b_enc, "decoder.weight": sae.W_dec.T, bias: sae.b_dec}
    if kind == "JumpReluAutoEncoder":
        state["threshold"] = sae.threshold
    elif kind != "AutoEncoder":
        state["threshold"] = sae.threshold[0] if kind != "AutoEncoderTopK" else torch.tensor(-1.0)
    state = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in state.items()}
    if kind not in ("AutoEncoder", "JumpReluAutoEncoder"):
        state["k"] = torch.tensor(cfg.k, dtype=torch.int32)
    if kind == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = torch.tensor([b - a for a, b in itertools.pairwise((0, *cfg.groups))])
    out = directory / TRAINER
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / WEIGHTS) as temporary:
        save_pickle(state, temporary)
    write_json(
        out / CONFIG,
        {
            "trainer": {
                "trainer_class": "tsae",
                "dict_class": kind,
                "activation_dim": cfg.d_in,
                "dict_size": cfg.d_sae,
                "k": cfg.k,
                "device": "cpu",
                "layer": metadata.get("hook_layer"),
                "lm_name": metadata.get("model_name"),
                "submodule_name": f"resid_post_layer_{metadata.get('hook_layer')}",
            },
            "buffer": {
                "d_submodule": cfg.d_in,
                "io": "out",
                "ctx_len": metadata.get("context_size"),
                "device": "cpu",
            },
        },
    )
