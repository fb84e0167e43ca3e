"""Where a language model's weights are and in how many bits: devices by accelerate, 8 and 4 bits by bitsandbytes."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tsae.errors import UserError

DeviceMap = Literal["none", "auto", "balanced", "balanced_low_0", "sequential"]
"""How accelerate divides a model among the GPUs; `none`: on one device."""
Quantization = Literal["none", "8bit", "4bit"]
"""Bits of a language model's linear layers; `none`: as its files hold them."""


def placement_options(
    source: str, given: dict[str, Any], device: torch.device, dtype: torch.dtype, device_map: str, quantization: str
) -> dict[str, Any]:
    """Options for `from_pretrained`; empty for a model that is loaded on the CPU and then moved to ``device``.

    source, given: the model, and the content of its config.json
    dtype: of the products of a model in 4 bits, and of all that is not quantized

    Raises:
        UserError: a value is none of the known ones, a package or a GPU is missing, or the model is already quantized.
    """
    for name, value, known in (
        ("device map", device_map, get_args(DeviceMap)),
        ("quantization", quantization, get_args(Quantization)),
    ):
        if value not in known:
            raise UserError(f"the {name} of a language model must be {', '.join(known)}, not {value!r}")
    method = own_quantization(given)
    if quantization != "none" and method is not None:
        raise UserError(
            f"the model {source!r} is already quantized ({method}, in its config.json), so it cannot be loaded in "
            f"{quantization}: leave out --lm-quantization"
        )
    options: dict[str, Any] = {}
    if device_map != "none":
        _require("accelerate", f"--lm-device-map {device_map}")
        if not torch.cuda.is_available():
            raise UserError(
                f"--lm-device-map {device_map} divides the language model among GPUs, and PyTorch sees none: leave it "
                "out"
            )
        options["device_map"] = device_map
    elif quantization != "none" or method == "bitsandbytes":
        options["device_map"] = {"": device}  # quantized while they are loaded, and cannot be moved afterwards
    if quantization != "none" or method == "bitsandbytes":
        why = (
            "a model in its config.json's quantization"
            if quantization == "none"
            else f"--lm-quantization {quantization}"
        )
        _require("bitsandbytes", why)
        _require("accelerate", why)
        # It says in every product that 8-bit ones are computed in float16, which docs/howto/own-model.md says once.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantization != "none":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if quantization == "8bit"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        )
    return options


def own_quantization(given: dict[str, Any]) -> str | None:
    """The quantization method that a config.json names, for the model or for its text part; None if there is none."""
    for values in (given, given.get("text_config")):
        found = values.get("quantization_config") if isinstance(values, dict) else None
        if isinstance(found, dict) and found:
            bits = found.get("load_in_8bit") or found.get("load_in_4bit")
            return str(found.get("quant_method") or ("bitsandbytes" if bits else "of an unknown method"))
    return None


def _require(package: str, why: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{why} needs the package {package}: run pip install {package}")


def input_device(model: nn.Module) -> torch.device:
    """Where a model that accelerate has divided takes its tokens and gives its logits: its first GPU, or the CPU."""
    places: Any = model.hf_device_map
    for place in places.values():
        if place not in ("cpu", "disk"):
            return torch.device(f"cuda:{place}" if isinstance(place, int) else place)
    return torch.device("cpu")


def parameters_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters`, and of a model that accelerate keeps partly on disk the values instead of placeholders."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        yield from model.named_parameters()
        return
    from accelerate.utils import align_module_device

    seen: set[str] = set()
    for prefix, module in model.named_modules():
        with align_module_device(module):
            for name, parameter in module.named_parameters(recurse=False):
                full = f"{prefix}.{name}" if prefix else name
                if full not in seen:
                    seen.add(full)
                    yield full, parameter
