"""Harvested activations against the hidden states that transformers itself puts out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer, sample_text

from tsae.data.documents import Document
from tsae.data.harvest import Harvester
from tsae.data.sequences import SequenceStream
from tsae.lm.loading import load_language_model

T = 24


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("model", ["tiny_gemma2", "tiny_neox"])
def test_harvest_is_the_models_hidden_states_without_the_first_position(
    model: str, prefix: bool, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(model)
    lm = load_language_model(str(path), dtype="float32")
    tokenizer = lm.tokenizer if prefix else make_tokenizer(bos=False, eos=False)

    def stream() -> SequenceStream:
        return SequenceStream(lambda epoch: iter([Document("a", sample_text(2000))]), tokenizer, T)

    batch = stream().next_batch(5)
    assert batch.tokens.shape == (5, T + 1)
    with torch.no_grad():
        states = lm.model(batch.tokens, output_hidden_states=True).hidden_states
    for layer in (0, 2):
        harvester = Harvester(lm, layer, stream(), batch=2)
        parts = list(harvester.batches(harvester.tokenize(5)))
        assert [len(part.x) for part in parts] == [2, 2, 1]
        torch.testing.assert_close(torch.cat([part.x for part in parts]), states[layer + 1][:, 1:])
        assert torch.equal(torch.cat([part.segments for part in parts]), batch.segments)
        torch.testing.assert_close(Harvester(lm, layer, stream(), batch=2).take(5).x, states[layer + 1][:, 1:])


def test_storage_dtype(tiny_neox: Path) -> None:
    lm = load_language_model(str(tiny_neox), dtype="float32")

    def take(dtype: torch.dtype | None) -> torch.Tensor:
        stream = SequenceStream(lambda epoch: iter([Document("a", sample_text(2000))]), lm.tokenizer, T)
        return Harvester(lm, 1, stream, dtype=dtype).take(3).x

    assert take(None).dtype == torch.float32
    assert torch.equal(take(torch.bfloat16), take(None).bfloat16())
