"""Tiny models with random weights of many transformers classes, saved with a tokenizer, for reading activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny import make_tokenizer
from torch import Tensor

from tsae.errors import UserError
from tsae.lm.hooks import activations, logits_with
from tsae.lm.loading import load_language_model
from tsae.lm.trial_run import check_site

TOKENS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 160,
}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 160}
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 160,
    "word_embed_proj_dim": 32,
}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "is_decoder": True,
}
_GEMMA = _LLAMA | {"head_dim": 16, "sliding_window": 64}
# Model classes by name, with the options of their configurations.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt1": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT2),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 8}),
    "neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"},
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 2,
            "attention_types": [[["global", "local", "global"], 1]],
            "max_position_embeddings": 160,
            "window_size": 64,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _LLAMA | {"residual_multiplier": 0.22}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _LLAMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA | {"query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA | {"query_pre_attn_scalar": 16}),
    "gemma3n": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        _GEMMA
        | {
            "vocab_size_per_layer_input": 400,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 4,
            "altup_active_idx": 1,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0] * 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
    "opt_projected": (
        "OPTForCausalLM",
        "OPTConfig",
        _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _LLAMA | {"num_key_value_heads": 2}),
    "falcon": ("FalconForCausalLM", "FalconConfig", _LLAMA | {"ffn_hidden_size": 64}),
    "electra": ("ElectraForCausalLM", "ElectraConfig", _BERT | {"embedding_size": 16, "max_position_embeddings": 160}),
    "roberta": ("RobertaForCausalLM", "RobertaConfig", _BERT | {"max_position_embeddings": 162}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 2}),
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": 32, "n_layers": 3, "n_heads": 2, "max_seq_len": 160}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}),
}


def save_family(folder: Path, name: str, **changes: Any) -> Path:
    """A model of `FAMILIES[name]` with other options; its config.json also gets those that its class does not know."""
    import transformers

    model_class, config_class, options = FAMILIES[name]
    tokenizer = make_tokenizer()
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    config = getattr(transformers, config_class)(vocab_size=len(tokenizer), **ids, **(options | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)  # so that blocks change what passes through them
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change the model's config.json; a value of `...` drops the field."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def outcome(folder: Path) -> str | tuple[Tensor, Tensor]:
    """Activations after block 1 [2, 20, d] and logits [2, 20, vocabulary] of `TOKENS`, or the error's sentence."""
    try:
        lm = load_language_model(str(folder), dtype="float32")
        check_site(lm, 1, 129, predictions=True)
        return activations(lm, TOKENS, 1), logits_with(lm, TOKENS, 1)
    except UserError as error:
        return str(error)
