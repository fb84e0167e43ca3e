"""Harvesting activations takes at most 10 % longer than the bare forward pass to the hooked layer."""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.measure import interleaved
from tsae.data.harvest import Harvester
from tsae.data.sequences import TokenBatch
from tsae.lm.loading import LanguageModel

LENGTH = 128


class FixedStream:
    """Random tokens instead of text, so that tokenization is not timed."""

    length = LENGTH

    def next_batch(self, n: int) -> TokenBatch:
        tokens = torch.randint(0, 1000, (n, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        return TokenBatch(tokens, torch.zeros(n, LENGTH, dtype=torch.int32))


def test_harvest_over_bare_forward(benchmark: Any, model_folder: Path, smoke: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder).eval().to(device)
    layer = 1 if smoke else 9
    batch = 4 if smoke else 16
    tokenizer: Any = None  # the stream has tokens already
    lm = LanguageModel(model=model, tokenizer=tokenizer, name="random", dtype=torch.float32, device=device)
    stream: Any = FixedStream()
    harvester = Harvester(lm, layer, stream, batch=batch)
    truncated = copy.deepcopy(model.model)  # a decoder that ends at the hooked layer
    truncated.layers = truncated.layers[: layer + 1]
    tokens = stream.next_batch(batch).tokens.to(device)

    def bare() -> None:
        with torch.inference_mode():
            truncated(tokens, use_cache=False).last_hidden_state.cpu()

    times = interleaved({"bare": bare, "harvest": lambda: harvester.take(batch)}, rounds=2 if smoke else 9)
    pairs = zip(times["harvest"], times["bare"], strict=True)
    ratio = statistics.median(h / b for h, b in pairs)
    benchmark.extra_info["harvest_over_bare"] = ratio
    benchmark.extra_info["tokens_per_second"] = batch * LENGTH / statistics.median(times["harvest"])
    benchmark.pedantic(lambda: harvester.take(batch), rounds=1 if smoke else 3)
    if not smoke:
        assert ratio <= 1.10, f"harvesting takes {ratio:.3f} x the bare forward pass"
