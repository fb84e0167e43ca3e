"""Loading language models: dtypes, devices, and one sentence for models that are missing or damaged."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from tsae.errors import UserError
from tsae.lm import loading
from tsae.lm.blocks import find_blocks
from tsae.lm.loading import default_dtype, load_language_model
from tsae.lm.trial_run import site_width

TINY = ["tiny_gemma2", "tiny_gemma3", "tiny_neox", "tiny_llama"]


@pytest.mark.parametrize("name", TINY)
def test_loads_frozen_with_sizes(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    lm = load_language_model(str(folder), dtype="float32")
    assert (lm.n_layers, site_width(lm, 1)) == (4, 32)
    assert lm.blocks is find_blocks(lm.model)
    assert lm.prefix_id == lm.tokenizer.bos_token_id
    assert lm.tokenizer.pad_token_id is not None
    assert lm.name == str(folder)
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    # Soft-capped attention scores are only computed by the eager implementation.
    assert lm.model.config._attn_implementation == ("eager" if name == "tiny_gemma2" else "sdpa")
    assert {parameter.dtype for parameter in lm.model.parameters()} == {lm.dtype} == {torch.float32}
    assert lm.device == torch.device("cpu")


def test_capped_attention_scores_are_capped_whatever_transformers_prefers(
    tiny_gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.17 runs Gemma 2 with sdpa, whose code has no soft cap."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_gemma2, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": 0.5}))
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    tokens = torch.arange(3, 60)[None]  # [N, T]

    def logits(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens).logits

    def expected(**changes: float | None) -> torch.Tensor:
        options = {"dtype": "float32", "attn_implementation": "eager", **changes}
        return logits(AutoModelForCausalLM.from_pretrained(folder, **options).eval())

    capped = expected()
    assert (capped - expected(attn_logit_softcapping=None)).abs().max() > 0.01
    assert torch.equal(logits(load_language_model(str(folder), dtype="float32").model), capped)


def test_dtype_can_be_chosen(tiny_llama: Path) -> None:
    lm = load_language_model(str(tiny_llama), dtype="bfloat16")
    assert {parameter.dtype for parameter in lm.model.parameters()} == {lm.dtype} == {torch.bfloat16}
    assert load_language_model(str(tiny_llama)).dtype == default_dtype("cpu")


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "intel", "expected"),
    [
        (False, False, False, torch.float32),
        (True, False, False, torch.bfloat16),
        (True, False, True, torch.float32),
        (True, True, True, torch.bfloat16),
        (False, True, True, torch.bfloat16),
    ],
)
def test_default_dtype_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, avx512_bf16: bool, amx: bool, intel: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(loading, "_is_intel", lambda: intel)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert default_dtype("cpu") == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_default_dtype_of_a_gpu_asks_for_real_support(
    monkeypatch: pytest.MonkeyPatch, supported: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported or including_emulation
    )
    assert default_dtype("cuda:0") == expected
    assert default_dtype("mps") == torch.float32


def test_blocks_of_an_unknown_class_are_its_longest_list() -> None:
    model = nn.Module()
    model.heads = nn.ModuleList([nn.Linear(1, 1)])
    model.stack = nn.ModuleList([nn.Linear(1, 1)] * 3)
    assert find_blocks(model) is model.stack
    with pytest.raises(UserError, match="no list of blocks"):
        find_blocks(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        (["config.json"], "config.json"),
        (["model.safetensors"], "weights"),
        (["tokenizer.json"], "a tokenizer"),
        (["model.safetensors", "tokenizer.json"], "weights .* and a tokenizer"),
    ],
)
def test_folder_that_lacks_something(tiny_llama: Path, tmp_path: Path, removed: list[str], named: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    for name in removed:
        (folder / name).unlink()
    with pytest.raises(UserError, match=named):
        load_language_model(str(folder))


def test_folder_with_damaged_files(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = tmp_path / name
        shutil.copytree(tiny_llama, folder)
        (folder / name).write_bytes(b"{")
        with pytest.raises(UserError, match="cannot load the model") as info:
            load_language_model(str(folder))
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["tiny_gemma2", "tiny_neox"])  # one with its lm_head tied, one without
def test_folder_with_missing_or_mismatched_weights(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers would initialize them at random and only print a table."""
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(name), folder)
    whole = load_file(folder / "model.safetensors")
    assert (name == "tiny_gemma2") == (not any("lm_head" in key or "embed_out" in key for key in whole))

    def refused(weights: dict[str, torch.Tensor]) -> str:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError) as info:
            load_language_model(str(folder))
        assert "\n" not in str(info.value)
        captured = capfd.readouterr()
        assert "MISSING" not in captured.out + captured.err
        return str(info.value)

    few = [key for key in whole if "layers.1.mlp" in key]
    message = refused({key: value for key, value in whole.items() if key not in few})
    assert f"lacks {len(few)} of the model's tensors" in message
    assert few[0] in message
    message = refused({"other." + key: value for key, value in whole.items()})
    assert len(message) < 400
    embedding = next(key for key in whole if "embed" in key and "embed_out" not in key)
    assert embedding in refused(whole | {embedding: whole[embedding][:7].clone()})


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c", ""])
def test_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(UserError, match="no model at"):
        load_language_model(name)


def test_hub_without_network_fails_at_once() -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match="hub") as info:
        load_language_model("nobody-there/no-such-model")
    assert time.perf_counter() - start < 15
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be auto, float32, bfloat16, float16, not 'int8'"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    ],
)
def test_bad_options(tiny_llama: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_language_model(str(tiny_llama), **options)
