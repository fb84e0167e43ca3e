"""What a block puts out, in models of many classes: the width is measured, and what is no activation is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, edit_config, save_family
from torch import Tensor, nn

from tsae.errors import UserError
from tsae.lm.blocks import find_blocks
from tsae.lm.hooks import activations, logits_with
from tsae.lm.loading import LanguageModel, load_language_model
from tsae.lm.trial_run import check_site, site_width


def tokens() -> Tensor:
    return torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_activations_of_every_class_are_its_hidden_states(family: str, tmp_path: Path) -> None:
    lm = load_language_model(str(save_family(tmp_path, family)), dtype="float32")
    check_site(lm, 1, 129, predictions=True)
    with torch.no_grad():
        output = lm.model(tokens(), output_hidden_states=True, use_cache=False)
    x = activations(lm, tokens(), 1)
    state = output.hidden_states[1 if family == "mamba" else 2]  # Mamba's start after the first block
    if family == "gemma3n":  # [streams, N, T, d]
        state = state[1]
    torch.testing.assert_close(x, state)
    assert x.shape == (2, 20, site_width(lm, 1)) == (2, 20, 32)
    torch.testing.assert_close(logits_with(lm, tokens(), 1, lambda x: x), output.logits)
    replaced = logits_with(lm, tokens(), 1, lambda x: x.flip(0))
    assert not torch.allclose(replaced, output.logits, atol=1e-3)


def test_the_width_is_the_blocks_and_not_the_embeddings(tmp_path: Path) -> None:
    for family in ("opt_projected", "electra"):
        lm = load_language_model(str(save_family(tmp_path / family, family)), dtype="float32")
        assert lm.model.get_input_embeddings().weight.shape[1] == 16
        assert site_width(lm, 2) == 32


def test_the_width_is_measured_once_for_each_layer(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load_language_model(str(tiny_llama), dtype="float32")
    assert site_width(lm, 0) == 32
    monkeypatch.setattr(lm.model, "forward", lambda **_: pytest.fail("the model ran again"))
    assert site_width(lm, 0) == 32


def test_gemma3n_is_replaced_in_its_active_stream_alone(tmp_path: Path) -> None:
    lm = load_language_model(str(save_family(tmp_path, "gemma3n")), dtype="float32")
    seen: list[Tensor] = []
    handle = lm.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits_with(lm, tokens(), 1)
    logits_with(lm, tokens(), 1, lambda x: x + 1)
    handle.remove()
    before, after = seen
    torch.testing.assert_close(after[1], before[1] + 1)
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]])


class Blocks(nn.Module):
    """A model of two blocks whose outputs `wrap` makes of the activations [N, T, 4], and `unwrap` reads again."""

    def __init__(self, wrap: Any, unwrap: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        for layer in self.layers:
            layer.register_forward_hook(lambda module, args, output: wrap(output))
        self.unwrap = unwrap

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = self.unwrap(layer(x))
        return SimpleNamespace(logits=x)


def model_of(wrap: Any, unwrap: Any) -> LanguageModel:
    return LanguageModel(Blocks(wrap, unwrap), None, "odd", torch.float32, torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [tuple, list])
def test_tuples_and_lists_that_start_with_activations(kind: type) -> None:
    lm = model_of(lambda x: kind((x, "more")), lambda output: output[0])
    check_site(lm, 0, 5, predictions=True)
    plain = activations(lm, torch.ones(1, 3, dtype=torch.int64), 0)
    replaced = logits_with(lm, torch.ones(1, 3, dtype=torch.int64), 0, lambda x: 0 * x)
    torch.testing.assert_close(replaced, lm.model.layers[1](0 * plain)[0])


@pytest.mark.parametrize(
    ("wrap", "unwrap", "found"),
    [
        (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1), r"a tensor \[5, 2, 4\] of float32"),
        (lambda x: x.flatten(0, 1), lambda x: x.view(2, -1, 4), r"a tensor \[10, 4\] of float32"),
        (lambda x: x[None], lambda x: x[0], r"a tensor \[1, 2, 5, 4\] of float32"),
        (lambda x: x.to(torch.complex64), lambda x: x.real, r"a tensor \[2, 5, 4\] of complex64"),
        (lambda x: {"x": x}, lambda x: x["x"], "an object of type dict"),
        (lambda x: SimpleNamespace(x=x), lambda x: x.x, "an object of type SimpleNamespace"),
        (lambda x: ((x, 1), 2), lambda x: x[0][0], r"a tuple that starts with a tuple that starts with a tensor"),
        (lambda x: ("more", x), lambda x: x[1], "a tuple that starts with an object of type str"),
        (
            lambda x: [x.transpose(0, 1)],
            lambda x: x[0].transpose(0, 1),
            r"a list that starts with a tensor \[5, 2, 4\]",
        ),
    ],
)
def test_outputs_that_are_no_activations_are_refused(wrap: Any, unwrap: Any, found: str) -> None:
    with pytest.raises(UserError, match=rf"^Block 1 of odd \(Linear\) puts out {found}") as info:
        check_site(model_of(wrap, unwrap), 1, 5)
    assert "[2, 5, width]" in str(info.value)
    assert "\n" not in str(info.value)


def test_a_forward_pass_that_fails_is_one_sentence(tiny_llama: Path) -> None:
    lm = load_language_model(str(tiny_llama), dtype="float32")

    def fail(*_: Any) -> None:
        raise AttributeError("no such thing\nand a second line")

    handle = lm.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(UserError, match=r"cannot be run up to layer 1 .*: AttributeError: no such thing; ") as info:
        site_width(lm, 1)
    assert "\n" not in str(info.value)
    handle.remove()
    lm.blocks[3].register_forward_pre_hook(fail)
    check_site(lm, 1, 20)
    with pytest.raises(UserError, match="cannot be run to its predictions"):
        check_site(lm, 1, 20, predictions=True)


def test_a_model_that_sees_later_tokens_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for family in ("roberta", "gpt2"):
        check_site(load_language_model(str(save_family(tmp_path / family, family)), dtype="float32"), 1, 20)
    assert not caplog.records
    folder = save_family(tmp_path / "both", "roberta", is_decoder=False)
    lm = load_language_model(str(folder), dtype="float32")
    for _ in range(2):
        check_site(lm, 1, 20)
    assert caplog.text.count("is not causal: a token's activations depend on later tokens") == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma3", "gemma3n", "opt_projected", "bloom", "mamba", "electra"])
def test_every_dtype(family: str, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_family(tmp_path, family)
    full, lm = (load_language_model(str(folder), dtype=name) for name in ("float32", dtype))
    check_site(lm, 1, 129, predictions=True)
    x, expected = activations(lm, tokens(), 1), activations(full, tokens(), 1)
    assert lm.dtype == getattr(torch, dtype)
    assert x.dtype == (torch.float32 if family == "mamba" else lm.dtype)  # Mamba's residual stream is float32
    assert (x.float() - expected).norm() < 0.1 * expected.norm()
    torch.testing.assert_close(logits_with(lm, tokens(), 1, lambda x: x.float()), logits_with(lm, tokens(), 1))
    assert not [record for record in caplog.records if record.name.startswith("tsae")]


def test_experts_are_not_blocks() -> None:
    model = nn.Module()
    model.trunk = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)] * 5), nn.Linear(1, 1)])
    assert find_blocks(model) is model.trunk


@pytest.mark.parametrize(
    ("family", "changes", "limit"),
    [
        *((family, {}, 160) for family in FAMILIES if family not in ("roberta", "bloom", "mamba")),
        ("roberta", {}, 161),  # 162 rows, of which the first is its padding token's
        ("bloom", {"seq_length": 64}, None),
        ("mamba", {"max_position_embeddings": 64}, None),
        ("falcon", {"alibi": True, "max_position_embeddings": 64}, None),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 640),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, 640),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 160,
                }
            },
            640,
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 40,
                }
            },
            160,
        ),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 320),
        ("gpt2", {"n_ctx": 64}, 160),  # nothing reads it
    ],
)
def test_the_longest_context(family: str, changes: dict[str, Any], limit: int | None, tmp_path: Path) -> None:
    lm = load_language_model(str(save_family(tmp_path, family, **changes)), dtype="float32")
    assert lm.context == limit
    fed = limit or 300
    check_site(lm, 1, fed)
    if limit is None:
        return
    for call in (lambda: check_site(lm, 1, fed + 1), lambda: activations(lm, torch.ones(1, fed + 1).long(), 1)):
        with pytest.raises(UserError, match=rf"at most {limit} tokens at once, but {fed + 1} are fed \(1 \+ {fed}"):
            call()


def test_the_context_of_a_multimodal_models_text_part(tmp_path: Path) -> None:
    """A nested text_config has the number."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    folder = save_family(tmp_path, "gemma3")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = load_language_model(str(folder), dtype="float32").model.config.to_dict() | {"max_position_embeddings": 64}
    vision = small | {"image_size": 14, "patch_size": 14}
    Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).save_pretrained(folder)
    lm = load_language_model(str(folder), dtype="float32")
    assert (lm.context, lm.n_layers) == (64, 3)


def test_a_number_in_config_json_that_the_class_does_not_know_is_no_limit(tmp_path: Path) -> None:
    folder = save_family(tmp_path, "bloom")
    edit_config(folder, max_position_embeddings=8, n_positions=8)
    lm = load_language_model(str(folder), dtype="float32")
    check_site(lm, 0, 129)
