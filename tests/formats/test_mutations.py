"""A good directory of each format, changed field by field and tensor by tensor: the same features, or one sentence.

Never a traceback, and never other features unless the changed field says so: `DECIDING` lists the fields whose other
valid values mean another autoencoder, and `DEFAULTS` what they mean if they are absent.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import tsae
from tsae.config import SAEConfig
from tsae.sae.model import SparseAutoencoder

D_IN, D_SAE, K = 6, 16, 3
X = torch.randn(2, 7, D_IN, generator=torch.Generator().manual_seed(1))
Tensors = dict[str, Tensor]
Features = tuple[Tensor, Tensor]


@dataclass
class Directory:
    """A format's files: JSON by name, and the tensors with what writes them."""

    files: dict[str, dict[str, Any]]
    tensors: Tensors
    write_tensors: Callable[[Tensors, Path], None]
    folder: str = "sae"
    prepare: Callable[[Path], None] | None = None  # writes what is not mutated

    def write(self, root: Path) -> Path:
        directory = root / self.folder
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        if self.prepare:
            self.prepare(directory)
        for name, values in self.files.items():
            (directory / name).write_text(json.dumps(values))
        self.write_tensors(self.tensors, directory)
        return directory


def random(seed: int, **shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


WEIGHTS = random(0, W_enc=(D_IN, D_SAE), b_enc=(D_SAE,), W_dec=(D_SAE, D_IN), b_dec=(D_IN,))
THRESHOLD = {"threshold": torch.linspace(0.1, 1.5, D_SAE)}
LINEAR = {
    "encoder.weight": WEIGHTS["W_enc"].T.contiguous(),
    "encoder.bias": WEIGHTS["b_enc"],
    "decoder.weight": WEIGHTS["W_dec"].T.contiguous(),
}
FLAT = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": False,
    "normalize_activations": "none",
    "reshape_activations": "none",
}
SAID = {
    "sae_lens_version": "6.54.0",
    "model_name": "someone/model",
    "hook_name": "blocks.1.hook_resid_post",
    "hook_head_index": None,
    "prepend_bos": True,
    "context_size": 128,
    "model_from_pretrained_kwargs": {"center_writing_weights": False},
    "dataset_path": "text",
}


def to_safetensors(name: str) -> Callable[[Tensors, Path], None]:
    return lambda tensors, directory: save_file({k: v.contiguous() for k, v in tensors.items()}, directory / name)


def saelens(architecture: str, tensors: Tensors, scaler: bool = False, **values: Any) -> Directory:
    cfg = {"architecture": architecture, **FLAT, "metadata": SAID, **values}
    files = {"cfg.json": cfg} | (
        {"activation_scaler.json": {"scaling_factor": 0.5, "has_whitening": False}} if scaler else {}
    )
    return Directory(files, tensors, to_safetensors("sae_weights.safetensors"))


def saelens_flat(tensors: Tensors, **values: Any) -> Directory:
    said = {name: value for name, value in SAID.items() if name not in ("sae_lens_version", "hook_name")}
    said |= {"hook_point": "blocks.1.hook_resid_post", "hook_point_layer": 1, "l1_coefficient": 1e-3, "lr": 4e-4}
    cfg = {
        **FLAT,
        **said,
        "normalize_activations": False,
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        **values,
    }
    return Directory({"cfg.json": cfg}, tensors, to_safetensors("sae_weights.safetensors"))


def dictionary(kind: str, tensors: Tensors, config: bool = True) -> Directory:
    trainer = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "layer": 1, "lm_name": "a/b"}
    trainer |= {"submodule_name": "resid_post_layer_1", "lr": 1e-3}
    files = {"config.json": {"trainer": trainer, "buffer": {"io": "out", "ctx_len": 128}}}
    return Directory(files if config else {}, tensors, lambda found, directory: torch.save(found, directory / "ae.pt"))


def own(**options: Any) -> Directory:
    """Ours without the checksum, which finds any change, as another program would save it again."""
    sae = SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, **options)).eval()
    tensors = {**WEIGHTS, **THRESHOLD, "release": 0.3 * THRESHOLD["threshold"]}
    sae.load_state_dict(tensors, strict=False)
    sae.update_threshold_parameters()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        sae.save(directory, **{key: value for key, value in SAID.items() if key != "sae_lens_version"})
        cfg = json.loads((directory / "cfg.json").read_text())
        stored = load_file(directory / "sae_weights.safetensors")
    return Directory({"cfg.json": cfg}, stored, to_safetensors("sae_weights.safetensors"))


GATED = random(
    2, W_enc=(D_IN, D_SAE), W_dec=(D_SAE, D_IN), b_dec=(D_IN,), b_gate=(D_SAE,), b_mag=(D_SAE,), r_mag=(D_SAE,)
)
SCOPE = WEIGHTS | THRESHOLD
HOOK = {"hf_hook_point_in": "model.layers.1.output", "hf_hook_point_out": "model.layers.1.output"}
DIRECTORIES: dict[str, Directory] = {
    "saelens standard": saelens("standard", WEIGHTS),
    "saelens topk": saelens("topk", WEIGHTS, k=K, rescale_acts_by_decoder_norm=True),
    "saelens jumprelu": saelens("jumprelu", WEIGHTS | THRESHOLD),
    "saelens gated": saelens("gated", GATED),
    "saelens checkpoint": saelens(
        "batchtopk",
        WEIGHTS | {"topk_threshold": torch.tensor(0.4)},
        scaler=True,
        normalize_activations="expected_average_only_in",
        k=2.5,
        rescale_acts_by_decoder_norm=True,
        aux_loss_coefficient=1.0,
    ),
    "saelens flat": saelens_flat(WEIGHTS, architecture="standard"),
    "saelens flat topk": saelens_flat(WEIGHTS, activation_fn_str="topk", activation_fn_kwargs={"k": K}),
    "saelens flat factor": saelens_flat(
        WEIGHTS | {"scaling_factor": torch.linspace(0.5, 2, D_SAE)}, finetuning_scaling_factor=True
    ),
    "sparsify": Directory(
        {"cfg.json": {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE}}
        | {},
        {"encoder.weight": LINEAR["encoder.weight"], "encoder.bias": WEIGHTS["b_enc"], "W_dec": WEIGHTS["W_dec"]}
        | {"b_dec": WEIGHTS["b_dec"]},
        to_safetensors("sae.safetensors"),
        "layers.1",
    ),
    "dictionary AutoEncoder": dictionary("AutoEncoder", LINEAR | {"bias": WEIGHTS["b_dec"]}),
    "dictionary AutoEncoder alone": dictionary("", LINEAR | {"bias": WEIGHTS["b_dec"]}, config=False),
    "dictionary AutoEncoderTopK": dictionary(
        "AutoEncoderTopK", LINEAR | {"b_dec": WEIGHTS["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(-1.0)}
    ),
    "dictionary BatchTopKSAE": dictionary(
        "BatchTopKSAE", LINEAR | {"b_dec": WEIGHTS["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(0.4)}
    ),
    "dictionary MatryoshkaBatchTopKSAE": dictionary(
        "MatryoshkaBatchTopKSAE",
        WEIGHTS | {"k": torch.tensor(K), "threshold": torch.tensor(0.4), "group_sizes": torch.tensor([4, D_SAE - 4])},
    ),
    "dictionary JumpReluAutoEncoder": dictionary("JumpReluAutoEncoder", WEIGHTS | THRESHOLD),
    "dictionary GatedAutoEncoder": dictionary(
        "GatedAutoEncoder",
        {name: LINEAR[name] for name in ("encoder.weight", "decoder.weight")}
        | {"decoder_bias": WEIGHTS["b_dec"]}
        | random(3, r_mag=(D_SAE,), gate_bias=(D_SAE,), mag_bias=(D_SAE,)),
    ),
    "gemma scope": Directory(
        {},
        SCOPE,
        lambda tensors, directory: np.savez(
            directory / "params.npz",
            **{
                name: t.to(torch.float32).numpy() if t.dtype == torch.bfloat16 else t.numpy()
                for name, t in tensors.items()
            },
        ),
        "gemma-scope-2b-pt-res/layer_1/width_16/average_l0_3",
    ),
    "gemma scope 2": Directory(
        {"config.json": {"architecture": "jump_relu", "width": D_SAE, "l0": 3, "model_name": "gemma-v3-1b-pt", **HOOK}},
        {name.replace("W_", "w_"): tensor for name, tensor in SCOPE.items()},
        to_safetensors("params.safetensors"),
    ),
    "own topk": own(activation="topk"),
    "own batchtopk": own(activation="batchtopk", groups=(4, D_SAE)),
    "own schmitt": own(activation="schmitt"),
    "own jumprelu_schmitt": own(activation="jumprelu_schmitt", apply_b_dec_to_input=False),
    "own gelu": own(activation="gelu", input_scale=2.0),
    "own layer norm": own(activation="relu", layer_norm="pre"),
}
DIRECTORIES["sparsify"].files["cfg.json"] |= {
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D_IN,
}
DIRECTORIES["gemma scope 2"].files["config.json"] |= {"affine_connection": False, "type": "sae"}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# A field's other values of the right type mean another autoencoder.
DECIDING: dict[str, Callable[[Any], bool]] = {
    "k": lambda v: is_number(v) and v > 0,
    "apply_b_dec_to_input": lambda v: isinstance(v, bool),
    "rescale_acts_by_decoder_norm": lambda v: isinstance(v, bool),
    "scaling_factor": lambda v: is_number(v) and v > 0,
}
# Of ours, everything in metadata.tsae; the values of another type are refused all the same.
DEFAULTS: dict[str, Any] = {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False}
OWN = ("metadata", "tsae")

VALUES: list[Any] = [None, True, False, 0, 1, -1, 2, 2.5, 1e300, math.nan, math.inf, 10**30, "", "x", "none", [], [1]]
VALUES += [{}, {"a": 1}, {"k": "x"}]


def objects(values: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all objects in a JSON object."""
    yield at
    for name, value in values.items():
        if isinstance(value, dict):
            yield from objects(value, (*at, name))


def reach(values: dict[str, Any], at: tuple[str, ...]) -> dict[str, Any]:
    for name in at:
        values = values[name]
    return values


DROP = object()
Change = tuple[str, tuple[str, ...], str, Any]  # file, object, field, value


def field_changes(good: Directory) -> Iterator[Change]:
    for file, values in good.files.items():
        for at in objects(values):
            for name in reach(values, at):
                for value in (DROP, *VALUES):
                    yield file, at, name, value
            for name in ("use_noise", "W_skip", "activation", "scale", "subtract_mean", "d_out"):
                if name not in reach(values, at):
                    yield from ((file, at, name, value) for value in (None, True, 2.5, "x"))


def with_fields(good: Directory, *changes: Change) -> Directory:
    out = copy.deepcopy(good)
    for file, at, name, value in changes:
        try:
            target = reach(out.files[file], at)
            target.pop(name, None)
            if value is not DROP:
                target[name] = value
        except (KeyError, TypeError, AttributeError):  # an earlier change removed the object
            pass
    return out


def features(directory: Path) -> Features | str:
    """Features and reconstruction, or the sentence."""
    try:
        sae = tsae.load(directory)
    except tsae.UserError as error:
        sentence = str(error)
        assert "\n" not in sentence, sentence
        assert sentence.endswith("."), sentence
        return sentence
    with torch.no_grad():
        return sae.encode(X), sae(X)


def same(one: Features, other: Features) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(one, other, strict=True))


def means_another(name: str, file: str, at: tuple[str, ...], value: Any) -> bool:
    if at[:2] == OWN and value is not DROP:
        return True
    return name in DECIDING and value is not DROP and DECIDING[name](value)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_every_field(name: str, tmp_path: Path) -> None:
    good = DIRECTORIES[name]
    right = features(good.write(tmp_path))
    assert not isinstance(right, str), right
    wrong = []
    for change in field_changes(good):
        file, at, field, value = change
        found = features(with_fields(good, change).write(tmp_path))
        if isinstance(found, str) or same(found, right) or means_another(field, file, at, value):
            continue
        if value is DROP and field in DEFAULTS:
            expected = features(with_fields(good, (file, at, field, DEFAULTS[field])).write(tmp_path))
            assert not isinstance(expected, str)
            assert same(found, expected), change
            continue
        wrong.append(change)
    assert not wrong


def tensor_changes(good: Directory) -> Iterator[tuple[str, str, Tensor | None]]:
    """Name of the tensor, of the change, and the new tensor (None: dropped)."""
    for name, tensor in good.tensors.items():
        yield name, "dropped", None
        yield name, "transposed", tensor.T.contiguous() if tensor.dim() == 2 else tensor[None]
        yield name, "flat", tensor.flatten()
        yield name, "one more", torch.cat([tensor.flatten(), tensor.flatten()[:1]])
        yield name, "more rows", torch.cat([tensor, tensor]) if tensor.dim() else tensor.repeat(2)
        yield name, "empty", tensor.new_empty(0)
        for dtype in (torch.int64, torch.bool, torch.float64, torch.float16, torch.bfloat16, torch.complex64):
            yield name, str(dtype), tensor.to(dtype)
        if tensor.is_floating_point():
            for value in (math.nan, math.inf, -math.inf):
                broken = tensor.clone()
                broken.view(-1)[-1] = value
                yield name, str(value), broken
            yield name, "too large", torch.full_like(tensor, 1e300, dtype=torch.float64)
    for name in ("W_skip", "threshold", "b_gate", "bias", "scaling_factor", "k", "release", "log_threshold", "x"):
        if name not in good.tensors:
            yield name, "extra", torch.linspace(0.5, 2, D_SAE)


ROUNDED = ("torch.float16", "torch.bfloat16")


@pytest.mark.parametrize("name", DIRECTORIES)
def test_every_tensor(name: str, tmp_path: Path) -> None:
    good = DIRECTORIES[name]
    right = features(good.write(tmp_path))
    assert not isinstance(right, str), right
    wrong = []
    for tensor, change, value in tensor_changes(good):
        changed = copy.deepcopy(good)
        changed.tensors.pop(tensor, None)
        if value is not None:
            changed.tensors[tensor] = value
        try:
            directory = changed.write(tmp_path)
        except (TypeError, RuntimeError, KeyError):  # the format cannot hold it
            continue
        found = features(directory)
        if isinstance(found, str) or same(found, right):
            continue
        if change in ROUNDED and all(torch.isfinite(part).all() for part in found):
            continue
        if change in ("inf", "too large") and "threshold" in tensor:  # switches features off
            assert not (found[0][..., -1] > 0).any()
            continue
        wrong.append((tensor, change))
    assert not wrong


@pytest.mark.parametrize(
    "name", ["saelens topk", "saelens checkpoint", "saelens flat factor", "sparsify", "own schmitt"]
)
def test_several_fields_at_once(name: str, tmp_path: Path) -> None:
    good = DIRECTORIES[name]
    right = features(good.write(tmp_path))
    harmless = [
        change
        for change in field_changes(good)
        if not means_another(change[2], change[0], change[1], change[3]) and change[2] not in (*DEFAULTS, "metadata")
    ]

    @settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.sampled_from(harmless), min_size=2, max_size=3))
    def check(changes: list[Change]) -> None:
        found = features(with_fields(good, *changes).write(tmp_path))
        assert isinstance(found, str) or same(found, right)  # type: ignore[arg-type]

    check()


@pytest.mark.parametrize("kind", ["schmitt", "jumprelu_schmitt"])
def test_a_release_above_its_threshold(kind: str, tmp_path: Path) -> None:
    """Which the kernels refuse with an error of their own."""
    for release in (2.0, -0.1):
        changed = copy.deepcopy(DIRECTORIES[f"own {kind}"])
        changed.tensors["release"][3] = release
        assert "release must be from 0 to threshold for every feature" in features(changed.write(tmp_path))


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null", "", "{", '{"a": NaN', "\ufeff{}"])
@pytest.mark.parametrize("name", [name for name, good in DIRECTORIES.items() if good.files])
def test_files_that_are_no_object(name: str, content: str, tmp_path: Path) -> None:
    good = DIRECTORIES[name]
    for file in good.files:
        directory = good.write(tmp_path)
        (directory / file).write_text(content, encoding="utf-8")
        assert isinstance(features(directory), str)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_weights_of_eight_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Quantized weights are multiplied by a scale, which no format here has."""
    for name in ("saelens standard", "sparsify", "gemma scope 2"):
        changed = copy.deepcopy(DIRECTORIES[name])
        changed.tensors = {tensor: value.to(dtype) for tensor, value in changed.tensors.items()}
        found = features(changed.write(tmp_path))
        assert isinstance(found, str)
        assert "whose scale is not known; save it as float32" in found
