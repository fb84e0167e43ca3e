"""Fixtures: a tokenizer, and folders with a tiny model of each supported class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tiny import make_tokenizer, save_model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gemma2"
    return save_model(
        folder,
        "Gemma2ForCausalLM",
        "Gemma2Config",
        head_dim=16,
        num_key_value_heads=1,
        query_pre_attn_scalar=16,
    )


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gemma3"
    return save_model(
        folder,
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        head_dim=16,
        num_key_value_heads=1,
        query_pre_attn_scalar=16,
        sliding_window=64,
    )


@pytest.fixture(scope="session")
def tiny_neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "neox", "GPTNeoXForCausalLM", "GPTNeoXConfig")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return save_model(folder, "LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1)
