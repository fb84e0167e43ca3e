"""A model's list of decoder blocks."""

from __future__ import annotations

from torch import nn

from tsae.errors import UserError

# Where transformers classes keep their decoder blocks; the second is the text part of a multimodal model.
_BLOCK_PATHS = (
    "model.layers",
    "model.language_model.layers",
    "gpt_neox.layers",
    "transformer.h",
    "model.decoder.layers",
)


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's list of decoder blocks: where common classes keep it, or else its longest list of modules.

    Lists within the modules of a list are left out: experts may be more than blocks.

    Raises UserError if the model has no list of modules.
    """
    for path in _BLOCK_PATHS:
        try:
            blocks = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return blocks
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module}
    outermost = [module for name, module in lists.items() if not any(name.startswith(f"{outer}.") for outer in lists)]
    if not outermost:
        raise UserError(f"{type(model).__name__} has no list of blocks: only models with one can be hooked")
    return max(outermost, key=len)
