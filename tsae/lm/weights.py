"""Whether a model got all of its weights from its file, and the file's weights all went into the model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from tsae.errors import UserError
from tsae.lm.blocks import find_blocks

log = logging.getLogger(__name__)

# What old checkpoints hold besides weights: rotary frequencies, position numbers, causal masks.
_COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|causal_mask|(attn|attention)\.bias)$")


def check_weights(model: nn.Module, found: dict[str, Any], source: str, *, quantized: bool = False) -> None:
    """Raise UserError unless the weights belong to the model.

    A warning names unused tensors that belong to another part, such as a vision tower.

    found:  transformers' loading info: missing tensors (tied ones are not counted), which it initialized at random,
            tensors of other shapes, and unexpected ones, which it ignored.
    source: the folder or hub id
    quantized: whether its config.json says that integers stand for weights
    """
    for key, what in (
        ("missing_keys", "lacks {} of the model's tensors"),
        ("mismatched_keys", "has {} of other shapes"),
    ):
        names = [name if isinstance(name, str) else name[0] for name in found.get(key) or ()]
        if names:
            raise _not_its_own(source, what.format(len(names)), names)
    left = [name for name in found.get("unexpected_keys") or () if not _COMPUTED.search(name)]
    if homeless := _without_place(model, left):
        raise _not_its_own(source, f"has {len(homeless)} tensors for which its config.json has no place", homeless)
    if left:
        log.warning("%s has %d tensors that %s does not use (%s)", source, len(left), type(model).__name__, _some(left))
    if not quantized and (integers := [name for name in _integers(model, source) if name not in left]):
        what = f"holds integers in the place of {len(integers)} weights, and its config.json has no quantization_config"
        raise _not_its_own(source, what, integers)


def _not_its_own(source: str, what: str, names: Iterable[str]) -> UserError:
    return UserError(
        f"cannot load the model {source!r}: its weights file {what} ({_some(names)}): use the weights that belong to "
        "its config.json"
    )


def _some(names: Iterable[str]) -> str:
    first, *more = sorted(names)
    return ", ".join([first, *more[:2]]) + (", ..." if len(more) > 2 else "")


def _without_place(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the unused tensors that would change what the model computes.

    They are those of a further block, or of a module that the model has (a bias that its config.json switches off).
    Others belong to another part, such as a vision tower.
    """
    blocks = find_blocks(model)
    path = next(name for name, module in model.named_modules() if module is blocks)
    modules = {name for name, _ in model.named_modules() if name}
    base = getattr(model, "base_model_prefix", "")

    def belongs(name: str) -> bool:
        owner = name.rpartition(".")[0]
        full = {owner, f"{base}.{owner}"} - {"", f"{base}."}
        return any(each in modules or f"{each}.".startswith(f"{path}.") for each in full)

    return [name for name in names if belongs(name)]


def _integers(model: nn.Module, source: str) -> list[str]:
    """Tensors that a local safetensors file stores as integers and the model does not.

    The integers would be taken for the values of weights. Those that bitsandbytes makes of weights when it loads them
    (`--lm-quantization`) are no integers of the model's own.
    """
    if not Path(source).is_dir():
        return []
    made = {
        name
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "quant_state") or hasattr(parameter, "CB")
    }
    own = {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()} - made
    base = getattr(model, "base_model_prefix", "")
    found = []
    for path in sorted(Path(source).glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                stored = file.get_slice(name).get_dtype()
                if stored[0] in "IU" and not own & {name, f"{base}.{name}"} and not _COMPUTED.search(name):
                    found.append(name)
    return found
