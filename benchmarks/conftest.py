"""Shared by the benchmarks: smoke mode, the model, interleaved timing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SMOKE = bool(os.environ.get("TSAE_BENCH_SMOKE"))
"""Small sizes and one round: checks that the suite runs, measures nothing worth quoting."""


@pytest.fixture(scope="session")
def smoke() -> bool:
    return SMOKE


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight Gemma 2 decoder: the demo model's width and depth, a small vocabulary; tiny in smoke mode."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4} if SMOKE else {}
    size = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18} | size
    config = Gemma2Config(
        vocab_size=1000, num_attention_heads=4, num_key_value_heads=1, head_dim=size["hidden_size"] // 4, **size
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the variants taking turns, so that a noisy neighbour hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times
