"""The key of an activation cache: everything that determines a run's activations and their order."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from tsae.config import TextConfig, TrainConfig
from tsae.data.mixtures import parse_mixture
from tsae.data.text import PYTHON_DOCS, holds_chats, is_local
from tsae.data.text_files import source_files
from tsae.lm.loading import LanguageModel
from tsae.lm.placement import parameters_of
from tsae.lm.tokenizer import prefix_token
from tsae.lm.trial_run import width
from tsae.utils.paths import expanded

_SAMPLES = 64  # values hashed per weight
_ENDS = 1 << 16  # bytes hashed at each end of a file


def cache_key(cfg: TrainConfig, lm: LanguageModel, storage: torch.dtype, group: int) -> dict[str, Any]:
    """Plain values by name; two runs with equal keys have the same activations in the same order.

    cfg: with the split (`text.threshold`) decided
    storage: storage dtype of the activations
    group: sequences per forward pass
    """
    return {
        "model": cfg.model,
        "revision": cfg.revision,
        "weights": _fingerprint_weights(lm),
        "layer": cfg.layer,
        **({} if cfg.place.kind == "resid_post" else {"site": cfg.site}),  # caches of the first versions have none
        **({} if cfg.target is None else {"target": cfg.target}),
        "d_model": width(lm, cfg.place, cfg.target_place),
        "lm_dtype": str(lm.dtype).removeprefix("torch."),
        **({} if cfg.lm_quantization == "none" else {"lm_quantization": cfg.lm_quantization}),
        "tokenizer": _fingerprint_tokenizer(lm.tokenizer),
        # Without this entry: the tokenizer's own prefix, if it has one.
        **({} if lm.prepend_bos or prefix_token(lm.tokenizer) is None else {"prepend_bos": False}),
        "special_tokens_in_text": "plain text",  # without this entry: special tokens in text were read as such
        "data": cfg.data,
        "data_files": _fingerprint_text(cfg.data, cfg.text),
        **{f"text.{name}": getattr(cfg.text, name) for name in ("column", "split", "subset", "shuffle_buffer")},
        "text.threshold": cfg.text.threshold,
        **_newer_options(cfg.text),
        **({"chat_template": _fingerprint_template(lm.tokenizer)} if holds_chats(cfg.data, cfg.text) else {}),
        "data_seed": cfg.stream_seed,
        "length": cfg.length,
        "dtype": str(storage).removeprefix("torch."),
        "harvest_batch": group,
    }


def provenance(lm: LanguageModel) -> dict[str, str]:
    """Versions and device: recorded in the cache, not part of its key."""
    return {
        "tsae": version("tsae"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": lm.device.type,
    }


def _fingerprint_weights(lm: LanguageModel) -> str:
    """Hash of some values of every weight; the same on every device."""
    digest = hashlib.sha256(str(lm.model.config.model_type).encode())
    for name, weight in parameters_of(lm.model):
        step = max(1, weight.numel() // _SAMPLES)
        values = weight.detach().flatten()[::step].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def _fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{number} {token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def _newer_options(text: TextConfig) -> dict[str, Any]:
    """Options that older caches do not have, where they differ from what those caches hold."""
    names = ("roles", "min_characters", "max_characters")
    return {f"text.{name}": getattr(text, name) for name in names if getattr(text, name) != getattr(TextConfig, name)}


def _fingerprint_template(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(repr(tokenizer.chat_template).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _fingerprint_text(source: str, text: TextConfig) -> Any:
    """Hash of the names, sizes and ends of local files; None for a hub dataset; of a mixture a list of these."""
    if (mixture := parse_mixture(source)) is not None:
        return [_fingerprint_text(each.data, each.config(text, hub=False)) for each in mixture]
    if source == PYTHON_DOCS:
        return f"Python {platform.python_version()}"
    if not is_local(source):
        return None
    root = expanded(source)
    digest = hashlib.sha256()
    for path in source_files(root, text.split):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root)} {size}\n".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(_ENDS, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()[:16]
