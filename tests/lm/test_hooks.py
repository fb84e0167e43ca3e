"""Activations and logits with module hooks, against transformers' own hidden states."""

from __future__ import annotations

from itertools import pairwise
from threading import Thread
from typing import Any

import pytest
import torch

from tsae.errors import UserError
from tsae.lm.hooks import activations, check_layer, logits_with
from tsae.lm.loading import LanguageModel, load_language_model
from tsae.lm.trial_run import site_width

N, LENGTH = 3, 17


@pytest.fixture(scope="module", params=["tiny_gemma2", "tiny_gemma3", "tiny_neox", "tiny_llama"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return load_language_model(str(request.getfixturevalue(request.param)), dtype="float32")


@pytest.fixture
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 300, (N, LENGTH), generator=generator)
    tokens[:, 0] = 2
    return tokens


def hook_count(lm: LanguageModel) -> int:
    return sum(len(module._forward_hooks) for module in lm.model.modules())


def block_outputs(lm: LanguageModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What every block puts out, recorded independently of the code under test."""
    seen: list[torch.Tensor] = []

    def record(module: Any, inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(record) for block in lm.blocks]
    try:
        with torch.no_grad():
            lm.model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_activations_are_the_hidden_states(lm: LanguageModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        states = lm.model(tokens, output_hidden_states=True).hidden_states
    assert len(states) == lm.n_layers + 1  # the embedding, then every block
    for layer in range(lm.n_layers - 1):
        torch.testing.assert_close(activations(lm, tokens, layer), states[layer + 1])
    # The last entry has the final norm applied, the last block's output has not.
    last = activations(lm, tokens, lm.n_layers - 1)
    torch.testing.assert_close(last, block_outputs(lm, tokens)[-1])
    assert not torch.allclose(last, states[-1], atol=1e-3)


def test_layers_differ(lm: LanguageModel, tokens: torch.Tensor) -> None:
    outputs = [activations(lm, tokens, layer) for layer in range(lm.n_layers)]
    for a, b in pairwise(outputs):
        assert not torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_nothing_after_the_layer_runs(lm: LanguageModel, tokens: torch.Tensor, layer: int) -> None:
    ran: list[str] = []
    watched = {f"block {i}": block for i, block in enumerate(lm.blocks)}
    watched["head"] = lm.model.get_output_embeddings()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, module in watched.items()
    ]
    try:
        activations(lm, tokens, layer)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [f"block {i}" for i in range(layer + 1)]


def test_activations_run_in_inference_mode(lm: LanguageModel, tokens: torch.Tensor) -> None:
    seen: list[bool] = []
    handle = lm.blocks[0].register_forward_pre_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
    try:
        x = activations(lm, tokens, 0)
    finally:
        handle.remove()
    assert seen == [True]
    assert not x.is_inference()


def test_activations_can_be_trained_on(lm: LanguageModel, tokens: torch.Tensor) -> None:
    x = activations(lm, tokens, 1)
    assert x.shape == (N, LENGTH, site_width(lm, 1))
    assert x.dtype == torch.float32
    assert not x.requires_grad
    weight = torch.ones(site_width(lm, 1), 4, requires_grad=True)
    (x @ weight).sum().backward()
    torch.testing.assert_close(weight.grad[:, 0], x.sum((0, 1)))


def test_logits_without_replacement_are_the_models(lm: LanguageModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        expected = lm.model(tokens).logits
    torch.testing.assert_close(logits_with(lm, tokens, 1), expected)
    torch.testing.assert_close(logits_with(lm, tokens, 1, lambda x: x), expected)
    assert expected.shape == (N, LENGTH, len(lm.tokenizer))


def test_replacement_is_what_later_blocks_see(lm: LanguageModel, tokens: torch.Tensor) -> None:
    other = tokens.flip(0)
    for layer in range(lm.n_layers):
        swapped = logits_with(lm, tokens, layer, lambda x: x.flip(0))
        torch.testing.assert_close(swapped, logits_with(lm, other, layer), msg=f"layer {layer}")
    assert not torch.allclose(swapped, logits_with(lm, tokens, 0), atol=1e-3)


def test_replacement_is_given_the_activations(lm: LanguageModel, tokens: torch.Tensor) -> None:
    seen: list[torch.Tensor] = []

    def replace(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return x.double()  # cast back

    logits = logits_with(lm, tokens, 2, replace)
    torch.testing.assert_close(seen, [activations(lm, tokens, 2)])
    torch.testing.assert_close(logits, logits_with(lm, tokens, 2))


def test_replacement_of_another_shape_is_refused(lm: LanguageModel, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 17, 32\).*\(3, 17, 31\)"):
        logits_with(lm, tokens, 1, lambda x: x[..., 1:])


def test_hooks_are_removed(lm: LanguageModel, tokens: torch.Tensor) -> None:
    before = hook_count(lm)

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    activations(lm, tokens, 1)
    logits_with(lm, tokens, 1, lambda x: 0 * x)
    with pytest.raises(ZeroDivisionError):
        logits_with(lm, tokens, 1, fail)
    with pytest.raises(RuntimeError):
        activations(lm, tokens.float(), 1)
    assert hook_count(lm) == before


@pytest.mark.parametrize("number", [-1, 400, 10_000])
def test_an_id_without_a_row_in_the_embedding_is_named(lm: LanguageModel, tokens: torch.Tensor, number: int) -> None:
    tokens = tokens.clone()
    tokens[1, 3] = number
    for use in (activations, logits_with):
        with pytest.raises(UserError, match=f"has id {number}, but the embedding of .* has 400 rows"):
            use(lm, tokens, 1)


class TupleBlock(torch.nn.Module):
    """A block of the kind that returns more than its hidden state."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return self.block(x), "attention"


class TupleModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.layers = torch.nn.ModuleList([TupleBlock(torch.nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        x = self.embed(input_ids)
        for layer in self.layers:
            x, attention = layer(x)
            assert attention == "attention"
        return type("Output", (), {"logits": x})


def test_blocks_that_return_tuples() -> None:
    model = TupleModel()
    lm = LanguageModel(model, None, "tuples", torch.float32, torch.device("cpu"))  # type: ignore[arg-type]
    tokens = torch.tensor([[1, 2, 3]])
    x = activations(lm, tokens, 0)
    torch.testing.assert_close(x, model.layers[0].block(model.embed(tokens)).detach())
    replaced = logits_with(lm, tokens, 0, lambda x: x + 1)
    torch.testing.assert_close(replaced, model.layers[1].block(x + 1).detach())


@pytest.mark.parametrize("layer", [-1, 4, 100])
def test_layer_that_does_not_exist(lm: LanguageModel, tokens: torch.Tensor, layer: int) -> None:
    for call in (check_layer, lambda lm, layer: activations(lm, tokens, layer)):
        with pytest.raises(UserError, match=f"layer {layer} does not exist: .* has 4 layers, 0 to 3"):
            call(lm, layer)


def test_two_threads_read_one_model(lm: LanguageModel, tokens: torch.Tensor) -> None:
    """One harvests while another is on its way to the same place: each has the activations of its own tokens."""
    others = tokens.flip(1)[:2]
    expected = [activations(lm, tokens, 1), activations(lm, others, 1)]
    found: list[torch.Tensor] = []

    def meanwhile(module: Any, inputs: Any) -> None:
        handle.remove()
        thread = Thread(target=lambda: found.append(activations(lm, others, 1)))
        thread.start()
        thread.join()

    handle = lm.blocks[0].register_forward_pre_hook(meanwhile)
    x = activations(lm, tokens, 1)
    torch.testing.assert_close(x, expected[0])
    torch.testing.assert_close(found[0], expected[1])
