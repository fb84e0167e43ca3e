"""Models as users have them: shards, divided and quantized weights, wrappers, code of their own, other tokenizers."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import TOKENS, edit_config, outcome, save_family
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer
from tiny_runs import options
from torch import Tensor

from tsae.data.cache_key import _fingerprint_weights
from tsae.errors import UserError
from tsae.evaluate import main as evaluate
from tsae.lm import placement
from tsae.lm.hooks import activations, logits_with
from tsae.lm.loading import LanguageModel, load_language_model
from tsae.train import main

ID = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
TEXT = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 160,
    **ID,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,  # more than the decoder's
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
needs_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None or importlib.util.find_spec("accelerate") is None,
    reason="needs bitsandbytes and accelerate",
)


def refused(folder: Path, **more: Any) -> str:
    with pytest.raises(UserError) as info:
        load_language_model(str(folder), dtype="float32", **more)
    assert "\n" not in str(info.value)
    return str(info.value)


def train_and_evaluate(model: Path, text: Path, out: Path, *more: str) -> dict[str, Any]:
    """The metrics of a short run, after it was evaluated again with the same result."""
    assert main(options(model, text, out, "--steps", "4", "--lm-dtype", "float32", *more)) == 0
    first = json.loads((out / "eval.json").read_text())
    assert evaluate([str(out)]) == 0
    again = json.loads((out / "eval.json").read_text())
    assert again["explained_variance"] == pytest.approx(first["explained_variance"], abs=1e-5)
    assert 0 < again["l0"] < 48
    return again


# Weights in several files


def sharded(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A family's model in shards of at most 20 kB."""
    save_family(folder, family, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {})])
def test_a_sharded_model_is_the_model(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    expected = outcome(save_family(tmp_path / "whole", family, **changes))
    found = outcome(sharded(tmp_path / "shards", family, **changes))
    assert not isinstance(expected, str)
    assert all(map(torch.equal, found, expected))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    others = len(list(folder.glob("model-*.safetensors"))) + 1
    assert f"lacks {shard.name} (1 of {others} files of weights): expected" in refused(folder)
    shard.write_bytes(content[:100])
    assert "cannot load the model" in refused(folder)
    shard.write_bytes(content)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    index.unlink()
    assert "model.safetensors.index.json" in refused(folder)
    kept = {name: file for name, file in values["weight_map"].items() if file != shard.name}
    index.write_text(json.dumps(values | {"weight_map": kept}))
    assert "of the model's tensors" in refused(folder)


def test_integers_in_a_shard_are_not_taken_for_weights(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    shard = next(p for p in sorted(folder.glob("model-*.safetensors")) if any("mlp" in key for key in load_file(p)))
    save_file(
        {key: (9 * value).to(torch.int8) for key, value in load_file(shard).items()}, shard, metadata={"format": "pt"}
    )
    assert "holds integers in the place of" in refused(folder)


# Divided by accelerate


def divided(folder: Path, offload: Path) -> LanguageModel:
    """The model with its second block and its head on disk, read when they run."""
    from accelerate import dispatch_model

    lm = load_language_model(str(folder), dtype="float32")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    lm.model = dispatch_model(lm.model, places, main_device="cpu", offload_dir=offload)
    return lm


@needs_accelerate
def test_a_divided_model_is_the_model(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "m", "llama")
    whole, lm = load_language_model(str(folder), dtype="float32"), divided(folder, tmp_path / "offload")
    assert any(parameter.is_meta for parameter in lm.model.parameters())
    for layer in range(3):
        torch.testing.assert_close(activations(lm, TOKENS, layer), activations(whole, TOKENS, layer))
        expected = logits_with(whole, TOKENS, layer, lambda x: 2 * x)
        torch.testing.assert_close(logits_with(lm, TOKENS, layer, lambda x: 2 * x), expected)
    assert _fingerprint_weights(lm) == _fingerprint_weights(whole)  # one cache for both
    assert placement.input_device(lm.model) == torch.device("cpu")


def test_activations_of_a_block_elsewhere_come_to_the_models_device(tmp_path: Path) -> None:
    """What a hook gets and gives if the block is on another device than the model's first: here both are stand-ins."""
    lm = load_language_model(str(save_family(tmp_path / "m", "llama")), dtype="float32")
    asked: list[Any] = []

    class Elsewhere(torch.Tensor):
        """A tensor that notes where it is sent."""

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__name__", "") == "to":
                asked.append(args[1:])
            return super().__torch_function__(function, types, args, kwargs or {})

    lm.blocks[1].register_forward_hook(lambda module, inputs, output: output.as_subclass(Elsewhere))
    activations(lm, TOKENS, 1)
    assert (lm.device,) in asked
    asked.clear()
    logits_with(lm, TOKENS, 1, lambda x: x)
    assert (lm.device,) in asked


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device_map": "auto"}, "--lm-device-map auto needs the package accelerate: run pip install accelerate"),
        (
            {"quantization": "8bit"},
            "--lm-quantization 8bit needs the package bitsandbytes: run pip install bitsandbytes",
        ),
    ],
)
def test_a_missing_package_is_named(
    options: dict[str, str], sentence: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    assert refused(tiny_llama, **options) == sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_device_map_needs_a_gpu(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: name)
    assert "PyTorch sees none" in refused(tiny_llama, device_map="balanced")
    assert "must be none, auto, balanced" in refused(tiny_llama, device_map="spread")
    assert "must be none, 8bit, 4bit" in refused(tiny_llama, quantization="2bit")


# Quantized


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_training_on_a_quantized_model(
    bits: str, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_family(tmp_path / "m", "llama", hidden_size=64, intermediate_size=128)
    found = load_language_model(str(folder), dtype="float32", quantization=bits)
    exact = load_language_model(str(folder), dtype="float32")
    x, y = activations(found, TOKENS, 1), activations(exact, TOKENS, 1)
    error = ((x - y).norm() / y.norm()).item()
    assert 1e-4 < error < (0.05 if bits == "8bit" else 0.5)
    assert _fingerprint_weights(found) != _fingerprint_weights(exact)
    out = tmp_path / "run"
    train_and_evaluate(folder, text_file, out, "--lm-quantization", bits)
    assert "MatMul8bitLt" not in caplog.text  # bitsandbytes says it in every product
    assert json.loads((out / "config.json").read_text())["lm_quantization"] == bits
    sae, layer = str(out / "sae"), ["--layer", "1", "--device", "cpu"]
    assert evaluate([sae, "--model", str(folder), *layer, "--data", str(text_file), "--lm-quantization", bits]) == 0


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_model_that_was_saved_quantized(bits: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "m", "llama", hidden_size=64, intermediate_size=128)
    lm = load_language_model(str(folder), dtype="float32", quantization=bits)
    lm.model.save_pretrained(tmp_path / "saved")
    lm.tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = load_language_model(str(tmp_path / "saved"), dtype="float32")
    torch.testing.assert_close(activations(again, TOKENS, 1), activations(lm, TOKENS, 1))
    message = refused(tmp_path / "saved", quantization=bits)
    assert message.endswith("so it cannot be loaded in " + bits + ": leave out --lm-quantization")


@needs_bitsandbytes
def test_integers_are_not_taken_for_weights_by_quantizing_them(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "m", "llama")
    path = folder / "model.safetensors"
    name = "model.layers.0.mlp.down_proj.weight"
    weights = load_file(path)
    save_file(weights | {name: (100 * weights[name]).to(torch.int8)}, path, metadata={"format": "pt"})
    assert (
        f"holds integers in the place of 1 weights, and its config.json has no quantization_config ({name})"
        in refused(folder, quantization="8bit")
    )


def test_a_quantized_folder_without_its_package(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    assert "needs the package bitsandbytes: run pip install bitsandbytes" in refused(folder)
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "cannot load the model" in refused(folder)


def test_options_of_evaluation_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate([str(tmp_path), "--lm-quantization", "8bit"]) == 2
    assert "a run's metrics are of its own model" in capsys.readouterr().err
    assert evaluate([str(tmp_path), "--lm-device-map", "auto", "--device", "cpu"]) == 2
    assert "without --device; leave one out" in capsys.readouterr().err


# Models that also take images


def save_multimodal(folder: Path, name: str) -> Path:
    """A tiny model that takes images too, of one of three classes."""
    if name == "gemma3":
        text = TEXT | {"head_dim": 16, "sliding_window": 64}
        config = transformers.Gemma3Config(
            text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=5
        )
        model_class = transformers.Gemma3ForConditionalGeneration
    elif name == "llava":
        vision = VISION | {"model_type": "clip_vision_model", "projection_dim": 16}
        config = transformers.LlavaConfig(
            text_config=TEXT | {"model_type": "llama"}, vision_config=vision, image_token_index=5
        )
        model_class = transformers.LlavaForConditionalGeneration
    else:
        vision = {"depth": 4, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
        text = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        numbers = dict(zip(("image", "video", "vision_start", "vision_end"), range(5, 9), strict=True))
        config = transformers.Qwen2VLConfig(
            text_config=text, vision_config=vision, **{f"{key}_token_id": i for key, i in numbers.items()}
        )
        model_class = transformers.Qwen2VLForConditionalGeneration
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_vl"])
def test_text_alone_through_a_model_that_takes_images(name: str, text_file: Path, tmp_path: Path) -> None:
    folder = save_multimodal(tmp_path / "m", name)
    lm = load_language_model(str(folder), dtype="float32")
    assert lm.n_layers == 3
    with torch.no_grad():
        whole = lm.model(TOKENS, output_hidden_states=True)
    torch.testing.assert_close(activations(lm, TOKENS, 1), whole.hidden_states[2])
    torch.testing.assert_close(logits_with(lm, TOKENS, 1), whole.logits)
    metrics = train_and_evaluate(folder, text_file, tmp_path / "run")
    assert metrics["ce_loss_without_sae"] > 0


# Code of their own

MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PretrainedConfig):
    model_type = "own_model"

    def __init__(self, vocab_size=400, width=32, **more):
        self.vocab_size, self.width = vocab_size, width
        super().__init__(**more)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, width)

    def forward(self, x):
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[None, :, None]
        return x + torch.tanh(self.up(x.cumsum(1) / count))


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.stack = nn.ModuleList([Block(config.width) for _ in range(3)])
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):  # no cache, and no argument for one
        x = self.embed(input_ids)
        for block in self.stack:
            x = block(x)
        return CausalLMOutput(logits=self.head(x))
"""


def save_own(folder: Path, **config: Any) -> Path:
    """A model whose class is in the folder."""
    folder.mkdir()
    (folder / "modeling_own.py").write_text(MODELING)
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (400, 32), "head.weight": (400, 32)}
    shapes |= {f"stack.{i}.up.weight": (32, 32) for i in range(3)} | {f"stack.{i}.up.bias": (32,) for i in range(3)}
    weights = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    values = {"model_type": "own_model", "architectures": ["OwnForCausalLM"], "auto_map": auto_map, **ID, **config}
    (folder / "config.json").write_text(json.dumps(values))
    make_tokenizer().save_pretrained(folder)
    return folder


def test_code_of_a_model_runs_only_if_asked_for(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_own(tmp_path / "own"), tmp_path / "run"
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + MODELING)
    assert main(options(folder, text_file, out)) == 2
    message = capsys.readouterr().err
    assert "modeling_own.py: OwnConfig, modeling_own.py: OwnForCausalLM" in message
    assert "allow it with --trust-remote-code" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "ran").exists()
    train_and_evaluate(folder, text_file, out, "--trust-remote-code")
    assert (tmp_path / "ran").exists()
    shutil.copytree(out / "sae", tmp_path / "sae")
    foreign = [
        str(tmp_path / "sae"),
        "--model",
        str(folder),
        "--layer",
        "1",
        "--data",
        str(text_file),
        "--device",
        "cpu",
    ]
    assert evaluate(foreign) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert evaluate([*foreign, "--trust-remote-code"]) == 0


def test_trust_in_a_runs_model_is_none_in_another(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """A run that trusts its model, measured on another one whose code nobody allowed."""
    out, other = tmp_path / "run", save_own(tmp_path / "other")
    argv = options(tiny_llama, text_file, out, "--trust-remote-code", "--steps", "2", "--evaluation.no-final")
    assert main(argv) == 0
    assert evaluate([str(out), "--model", str(other), "--device", "cpu"]) == 2


def test_code_of_a_tokenizer_is_refused_as_well(tiny_llama: Path, tmp_path: Path) -> None:
    auto_map = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    folder = with_tokenizer(tmp_path / "m", tiny_llama, tokenizer_class="OwnTokenizer", auto_map=auto_map)
    (folder / "tokenization_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "comes with code of its own (tokenization_own.py: OwnTokenizer)" in refused(folder)
    assert not (tmp_path / "ran").exists()


def test_a_model_without_a_cache(tmp_path: Path) -> None:
    lm = load_language_model(str(save_own(tmp_path / "own")), dtype="float32", trust_remote_code=True)
    x = lm.model.embed(TOKENS)
    for block in lm.model.stack[:2]:
        x = block(x)
    torch.testing.assert_close(activations(lm, TOKENS, 1), x)


def test_code_that_transformers_does_not_need_is_named(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "owner/other--modeling_own.OwnForCausalLM"})
    with caplog.at_level(logging.WARNING):
        load_language_model(str(folder), dtype="float32")
    assert "code of its own (owner/other/modeling_own.py: OwnForCausalLM), not run" in caplog.text
    assert "transformers' LlamaForCausalLM is used" in caplog.text


# Tokenizers


def with_tokenizer(folder: Path, source: Path, **changes: Any) -> Path:
    """The model in `source` with other values in its tokenizer_config.json; `...` drops one."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    return folder


def prefix_and_metrics(folder: Path, text: Path, out: Path) -> tuple[int | None, dict[str, Any]]:
    prefix = load_language_model(str(folder), dtype="float32").prefix_id
    return prefix, train_and_evaluate(folder, text, out)


def test_the_side_of_padding_does_not_matter(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    runs = []
    for side in ("left", "right"):
        folder = with_tokenizer(tmp_path / side, tiny_llama, padding_side=side)
        assert load_language_model(str(folder), dtype="float32").tokenizer.padding_side == side
        runs.append(train_and_evaluate(folder, text_file, tmp_path / f"run-{side}"))
    assert runs[0] == runs[1]


def test_bos_with_id_0(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """0 is a token like any other; `if prefix` would drop it."""
    folder = with_tokenizer(tmp_path / "m", tiny_llama, bos_token="<pad>", pad_token="<eos>")
    edit_config(folder, bos_token_id=0, pad_token_id=1)
    prefix, _ = prefix_and_metrics(folder, text_file, tmp_path / "run")
    assert prefix == 0
    said = json.loads((tmp_path / "run" / "sae" / "cfg.json").read_text())["metadata"]
    assert said["prepend_bos"] is True


def test_no_bos(tiny_llama: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = with_tokenizer(tmp_path / "m", tiny_llama, bos_token=..., eos_token=...)
    prefix, _ = prefix_and_metrics(folder, text_file, tmp_path / "run")
    assert prefix is None
    said = json.loads((tmp_path / "run" / "sae" / "cfg.json").read_text())["metadata"]
    assert said["prepend_bos"] is False
    assert "has no BOS token" in caplog.text


def test_tied_embeddings_are_one_table_that_the_file_has_once(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "m", "llama", tie_word_embeddings=True)
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    lm = load_language_model(str(folder), dtype="float32")
    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
