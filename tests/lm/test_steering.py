"""Steering and ablation: what they add and take out, with and without a key-value cache, and that no hook stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tsae.config import SAEConfig
from tsae.errors import UserError
from tsae.lm.generation import prompt_tokens
from tsae.lm.hooks import activations, logits_with, replacing
from tsae.lm.loading import LanguageModel, load_language_model
from tsae.lm.steering import ablation, steering
from tsae.sae.model import SparseAutoencoder

LAYER, D_IN, D_SAE = 1, 32, 48
PROMPT = "the river ran under a stone bridge"


@pytest.fixture(scope="module", params=["tiny_gemma2", "tiny_gemma3", "tiny_neox", "tiny_llama"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return load_language_model(str(request.getfixturevalue(request.param)), dtype="float32")


@pytest.fixture(scope="module")
def llama(tiny_llama: Any) -> LanguageModel:
    return load_language_model(str(tiny_llama), dtype="float32")


def autoencoder(lm: LanguageModel, **options: Any) -> SparseAutoencoder:
    """With thresholds that leave about half of the features on."""
    cfg = SAEConfig(**({"d_in": D_IN, "d_sae": D_SAE, "activation": "schmitt", "k": 4} | options))
    sae = SparseAutoencoder(cfg, generator=torch.Generator().manual_seed(0)).eval()
    x = activations(lm, prompt_tokens(lm, PROMPT), LAYER)[:, 1:].float()
    pre = sae.pre_activation(x).detach()
    sae.threshold.fill_(float(pre.quantile(0.7)))
    sae.release.fill_(max(float(pre.quantile(0.5)), 0.0))
    return sae


def hooks(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


def seen(lm: LanguageModel) -> Tensor:
    return activations(lm, prompt_tokens(lm, PROMPT), LAYER)[0].float()  # [1 + T, d_in]


def test_steering_adds_decoder_rows_everywhere_but_at_the_prefix(lm: LanguageModel) -> None:
    sae, before, count = autoencoder(lm), seen(lm), hooks(lm)
    with steering(lm, sae, LAYER, {3: 4.0, 7: -2.0}):
        after = seen(lm)
    added = (4.0 * sae.W_dec[3] - 2.0 * sae.W_dec[7]).detach().expand(len(before) - 1, -1)
    torch.testing.assert_close(after[1:] - before[1:], added, atol=1e-4, rtol=1e-4)
    assert torch.equal(after[0], before[0])
    assert torch.equal(seen(lm), before)
    assert hooks(lm) == count


@pytest.mark.parametrize("activation", ["schmitt", "topk", "relu", "gelu"])
def test_steering_a_feature_raises_its_activation_and_ablating_it_removes_it(
    llama: LanguageModel, activation: str
) -> None:
    """Encoder and decoder of the autoencoder are transposes of each other, as at the start of training."""
    options = {"input_scale": 3.0} if activation == "gelu" else {}
    sae = autoencoder(llama, activation=activation, **options)
    h = sae.encode(seen(llama)[1:])
    feature = int(h.sum(0).argmax())
    with steering(llama, sae, LAYER, {feature: 30.0}):
        raised = sae.encode(seen(llama)[1:])[:, feature]
    assert bool((raised > h[:, feature]).all())
    before = seen(llama)
    with ablation(llama, sae, LAYER, [feature]):
        after = seen(llama)
    without = h.clone()
    without[:, feature] = 0
    torch.testing.assert_close(after[1:], (before[1:] + sae.decode(without) - sae.decode(h)).detach())
    assert torch.equal(after[0], before[0])
    if activation != "gelu":
        assert float(sae.encode(after[1:]).detach()[:, feature].max()) < 1e-4


def generated(lm: LanguageModel, **options: Any) -> Tensor:
    """[T, vocabulary] scores of a greedy continuation of 12 tokens."""
    tokens = prompt_tokens(lm, PROMPT)
    out = lm.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.cat(out.logits)


def test_steered_generation_is_the_same_with_a_cache(lm: LanguageModel) -> None:
    sae = autoencoder(lm)
    plain = generated(lm)
    for positions in (None, slice(4, None, 3), [2, 14, 15]):
        with steering(lm, sae, LAYER, {5: 6.0}, positions):
            cached, uncached = generated(lm, use_cache=True), generated(lm, use_cache=False)
        torch.testing.assert_close(cached, uncached, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(cached, plain, atol=1e-2)
    with steering(lm, sae, LAYER, {5: 6.0}, [10**6]):
        assert torch.equal(generated(lm), plain)


def test_ablated_generation_is_the_same_with_a_cache_where_features_have_no_memory(lm: LanguageModel) -> None:
    sae = autoencoder(lm, activation="topk")
    used = sae.encode(seen(lm)[1:]).sum(0).topk(8).indices.tolist()
    with ablation(lm, sae, LAYER, used):
        cached, uncached = generated(lm, use_cache=True), generated(lm, use_cache=False)
    torch.testing.assert_close(cached, uncached, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(cached, generated(lm), atol=1e-2)


@pytest.mark.parametrize("hysteresis", ["causal", "two-sided"])
def test_features_with_hysteresis_are_ablated_without_a_cache(lm: LanguageModel, hysteresis: str) -> None:
    """Each step of generation gives the logits of a complete forward pass with the hysteresis along all tokens."""
    sae = autoencoder(lm, hysteresis=hysteresis)
    used = sae.encode(seen(lm)[1:]).sum(0).topk(8).indices.tolist()
    setting = lm.model.generation_config.use_cache
    with ablation(lm, sae, LAYER, used):
        scores = generated(lm)
        with pytest.raises(UserError, match=r"continues a key-value cache; generate with use_cache=False\.$"):
            generated(lm, use_cache=True)
    assert lm.model.generation_config.use_cache is setting
    tokens = torch.cat([prompt_tokens(lm, PROMPT), scores[:-1].argmax(-1)[None]], 1)

    def without(x: Tensor) -> Tensor:
        h = sae.encode(x[:, 1:])
        kept = h.clone()
        kept[..., used] = 0
        return torch.cat([x[:, :1], x[:, 1:] + sae.decode(kept) - sae.decode(h)], 1)

    for last in range(tokens.shape[1] - len(scores) + 1, tokens.shape[1] + 1):
        whole = logits_with(lm, tokens[:, :last], LAYER, without)[0, -1]
        step = last - (tokens.shape[1] - len(scores) + 1)
        torch.testing.assert_close(scores[step], whole, atol=1e-4, rtol=1e-4)


def test_the_outer_block_acts_first(llama: LanguageModel) -> None:
    sae, before = autoencoder(llama, activation="topk"), seen(llama)
    with steering(llama, sae, LAYER, {5: 9.0}):
        steered = seen(llama)
        with ablation(llama, sae, LAYER, [5]):
            inside = seen(llama)
        assert torch.equal(seen(llama), steered)
    with ablation(llama, sae, LAYER, [5]):
        ablated = seen(llama)
        with steering(llama, sae, LAYER, {5: 9.0}):
            outside = seen(llama)
    h = sae.encode(steered[1:])[:, 5:6].detach()  # what the inner block sees
    torch.testing.assert_close(inside[1:], steered[1:] - h * sae.W_dec[5].detach())
    torch.testing.assert_close(outside[1:], ablated[1:] + 9.0 * sae.W_dec[5].detach())
    with steering(llama, sae, LAYER, {5: 1.0}), steering(llama, sae, LAYER, {5: 2.0}):
        twice = seen(llama)
    torch.testing.assert_close(twice[1:], before[1:] + 3.0 * sae.W_dec[5].detach())


def test_an_exception_leaves_no_hook(llama: LanguageModel) -> None:
    sae, before, count = autoencoder(llama), seen(llama), hooks(llama)
    for block in (lambda: steering(llama, sae, LAYER, {1: 9.0}), lambda: ablation(llama, sae, LAYER, [1])):
        with pytest.raises(ZeroDivisionError), block():
            _ = 1 / 0
        assert hooks(llama) == count
        assert torch.equal(seen(llama), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lm, sae: steering(lm, sae, LAYER, {48: 1.0}),
            "There is no feature 48; the autoencoder has 48, 0 to 47.",
        ),
        (lambda lm, sae: ablation(lm, sae, LAYER, [-1]), "There is no feature -1"),
        (lambda lm, sae: steering(lm, sae, LAYER, {"a": 1.0}), "There is no feature 'a'"),
        (lambda lm, sae: steering(lm, sae, LAYER, {1: float("nan")}), "A feature is steered by nan; name a finite"),
        (lambda lm, sae: steering(lm, sae, LAYER, {1: 1.0}, [-1]), "A position is negative"),
        (lambda lm, sae: steering(lm, sae, LAYER, {1: 1.0}, slice(-3, None)), "A position is negative"),
        (lambda lm, sae: steering(lm, sae, 9, {1: 1.0}), "layer 9 does not exist"),
    ],
)
def test_what_cannot_be_steered_is_one_sentence(call: Any, message: str, llama: LanguageModel) -> None:
    with pytest.raises(UserError) as error, call(llama, autoencoder(llama)):
        pass
    assert message in str(error.value)
    assert hooks(llama) == 0


def test_passes_whose_positions_are_unknown_are_refused(llama: LanguageModel) -> None:
    sae, tokens = autoencoder(llama), torch.tensor([[2, 5, 6], [0, 2, 5]])
    with steering(llama, sae, LAYER, {1: 1.0}):
        with pytest.raises(UserError, match="The batch is padded"):
            llama.model(tokens, attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]))
        with pytest.raises(UserError, match=r"Only a part of .* was run"):
            llama.model.model(tokens)


def test_generation(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    text = llama.generate(PROMPT, max_new_tokens=6)
    tokens = prompt_tokens(llama, PROMPT)
    for _ in range(6):
        best = logits_with(llama, tokens, LAYER)[0, -1].argmax()
        tokens = torch.cat([tokens, best.view(1, 1)], 1)
    expected = tokens[0, prompt_tokens(llama, PROMPT).shape[1] :]
    assert text == llama.tokenizer.decode(expected, skip_special_tokens=True)
    torch.manual_seed(0)
    sampled = {llama.generate(PROMPT, 6, do_sample=True, temperature=3.0) for _ in range(3)}
    assert len(sampled) > 1
    with pytest.raises(UserError, match=r"takes at most 512 tokens; the prompt has \d+ and 600 are to follow"):
        llama.generate(PROMPT, 600)
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        llama.generate(PROMPT, 0)
    with pytest.raises(UserError, match="too few tokens"):
        llama.generate("")


def test_the_hook_says_where_a_pass_begins(llama: LanguageModel) -> None:
    starts: list[tuple[int, int]] = []

    def record(x: Tensor, start: int) -> Tensor:
        starts.append((start, x.shape[1]))
        return x

    with replacing(llama, LAYER, record):
        llama.generate(PROMPT, 3, min_new_tokens=3)
    length = prompt_tokens(llama, PROMPT).shape[1]
    assert starts == [(0, length), (length, 1), (length + 1, 1)]
