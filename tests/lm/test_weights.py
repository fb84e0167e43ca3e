"""Weights changed tensor by tensor: the model computes what it did, or one sentence refuses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import edit_config, outcome, save_family
from safetensors.torch import load_file, save_file
from torch import Tensor

FAMILIES = ("gpt2", "neox", "gemma3", "qwen2", "opt", "bloom", "falcon")


def mutations(whole: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Of every tensor outside of the later blocks: dropped, one row, one more axis, integers."""
    for name in whole:
        if ".1." in name or ".2." in name:
            continue
        tensor = whole[name]
        yield f"{name} dropped", {key: value for key, value in whole.items() if key != name}
        yield f"{name} cut", whole | {name: tensor[:1].clone()}
        yield f"{name} in int8", whole | {name: (100 * tensor).to(torch.int8)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_needed_as_it_is(family: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path, family)
    path = folder / "model.safetensors"
    expected, whole = outcome(folder), load_file(path)
    assert not isinstance(expected, str)
    for what, tensors in mutations(whole):
        save_file(tensors, path, metadata={"format": "pt"})
        found = outcome(folder)
        if isinstance(found, str):
            assert "\n" not in found
            assert len(found) < 700
        else:
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), what


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str | tuple[Tensor, Tensor]:
    path = folder / "model.safetensors"
    whole = load_file(path)
    save_file(whole | change(whole), path, metadata={"format": "pt"})
    return outcome(folder)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.3.self_attn.q_proj.weight"),  # a fourth block; its config.json has three
        ("llama", "model.layers.0.self_attn.q_proj.bias"),  # its config.json switches it off
        ("llama", "model.layers.1.another.weight"),
        ("llama", "model.norm.bias"),
        ("gpt2", "lm_head.bias"),
    ],
)
def test_tensors_that_would_change_the_model_are_not_passed_over(family: str, name: str, tmp_path: Path) -> None:
    found = rewrite(save_family(tmp_path, family), lambda whole: {name: torch.ones(32)})
    assert isinstance(found, str)
    assert f"has 1 tensors for which its config.json has no place ({name})" in found


def test_tensors_of_another_part_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_family(tmp_path, "llama")
    expected = outcome(folder)
    assert not caplog.records
    found = rewrite(folder, lambda whole: {f"vision.{i}.weight": torch.ones(3) for i in range(5)})
    assert all(map(torch.equal, found, expected))
    assert (
        "has 5 tensors that LlamaForCausalLM does not use (vision.0.weight, vision.1.weight, vision.2.weight, ...)"
        in (caplog.text)
    )


def test_what_old_checkpoints_hold_besides_weights_is_fine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_family(tmp_path, "neox")
    expected = outcome(folder)
    mask = torch.ones(1, 1, 160, 160, dtype=torch.uint8).tril()
    attention = "gpt_neox.layers.0.attention"
    more = {
        f"{attention}.bias": mask,
        f"{attention}.masked_bias": torch.tensor(-1e9),
        f"{attention}.rotary_emb.inv_freq": torch.ones(4),
    }
    assert all(map(torch.equal, rewrite(folder, lambda whole: more), expected))
    assert not caplog.records


def test_fewer_blocks_than_the_weights_have(tmp_path: Path) -> None:
    folder = save_family(tmp_path, "gemma3")
    edit_config(folder, num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    found = outcome(folder)
    assert isinstance(found, str)
    assert "for which its config.json has no place (model.layers.2." in found


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    found = rewrite(
        save_family(tmp_path / "a", "llama"), lambda whole: {"lm_head.weight": whole["lm_head.weight"] * torch.nan}
    )
    assert isinstance(found, str)
    assert "are not finite" in found
    name = "model.layers.0.mlp.down_proj.weight"
    found = rewrite(save_family(tmp_path / "b", "llama"), lambda whole: {name: whole[name] * torch.inf})
    assert isinstance(found, str)
    assert "are not finite" in found


@pytest.mark.parametrize(
    ("family", "field", "value"), [("bloom", "n_head", 8), ("gemma2", "query_pre_attn_scalar", 256)]
)
def test_a_number_that_the_weights_do_not_tell_is_named_if_it_is_a_default(
    family: str, field: str, value: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_family(tmp_path, family)
    outcome(folder)
    assert not caplog.records
    edit_config(folder, **{field: ...})
    assert not isinstance(outcome(folder), str)
    name = "num_attention_heads" if field == "n_head" else field
    assert f"its config.json gives no {name}; taken as {value}" in caplog.text
