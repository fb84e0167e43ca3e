"""Models whose layers attend to a window: activations of longer sequences are those of the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_model

from tsae.lm.hooks import activations, logits_with
from tsae.lm.loading import LanguageModel, load_language_model

WINDOW, T = 16, 60
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = {"head_dim": 16, "num_key_value_heads": 1, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
MODELS = {
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", [SLIDING, FULL, SLIDING, FULL], GEMMA),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", [SLIDING, SLIDING, FULL, SLIDING], GEMMA),
    "Mistral": ("MistralForCausalLM", "MistralConfig", None, {"num_key_value_heads": 1, "sliding_window": WINDOW}),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_class, config_class, types, options = MODELS[request.param]
    options = options if types is None else options | {"layer_types": types}
    return save_model(tmp_path_factory.mktemp("models") / request.param, model_class, config_class, **options)


@pytest.fixture(scope="module")
def lm(folder: Path) -> LanguageModel:
    return load_language_model(str(folder), dtype="float32")


@pytest.fixture
def tokens() -> torch.Tensor:
    tokens = torch.randint(3, 300, (3, 1 + T), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 2
    return tokens


def test_activations_are_the_models_own(lm: LanguageModel, tokens: torch.Tensor) -> None:
    """With a mask of ones, as the model's users pass it; this library passes none."""
    with torch.no_grad():
        out = lm.model(tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=True, use_cache=False)
    for layer in range(lm.n_layers - 1):
        torch.testing.assert_close(activations(lm, tokens, layer), out.hidden_states[layer + 1])
    torch.testing.assert_close(logits_with(lm, tokens, 1, lambda x: x), out.logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_either_implementation_of_attention(folder: Path, lm: LanguageModel, implementation: str) -> None:
    from transformers import AutoModelForCausalLM

    if "Gemma2" in folder.name and implementation == "sdpa":
        pytest.skip("sdpa leaves out Gemma 2's soft cap, so it is never used for it")
    tokens = torch.randint(3, 300, (2, 1 + T), generator=torch.Generator().manual_seed(1))
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation).eval()
    assert other.config._attn_implementation == implementation
    with torch.no_grad():
        expected = other(tokens, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(lm.n_layers - 1):
        torch.testing.assert_close(activations(lm, tokens, layer), expected[layer + 1], atol=2e-5, rtol=1e-4)


def test_the_first_block_sees_its_window_and_no_further(lm: LanguageModel, tokens: torch.Tensor) -> None:
    at, last = 20, 20 + WINDOW - 1  # the last position whose window has token `at`
    changed = tokens.clone()
    changed[:, at] = (tokens[:, at] + 7) % 290 + 3
    x, y = (activations(lm, each, 0) for each in (tokens, changed))
    assert torch.equal(x[:, :at], y[:, :at])
    assert not torch.allclose(x[:, last], y[:, last], atol=1e-6)
    torch.testing.assert_close(x[:, last + 1 :], y[:, last + 1 :], atol=1e-6, rtol=1e-5)


def test_a_block_with_full_attention_sees_everything(lm: LanguageModel, tokens: torch.Tensor) -> None:
    types = MODELS[lm.name.rsplit("/", 1)[-1]][2]
    if types is None:
        pytest.skip("every layer of this model has a window")
    layer, changed = types.index(FULL), tokens.clone()
    changed[:, 1] = (tokens[:, 1] + 7) % 290 + 3
    x, y = (activations(lm, each, layer) for each in (tokens, changed))
    assert not torch.allclose(x[:, -1], y[:, -1], atol=1e-6)
