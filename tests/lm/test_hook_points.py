"""Places within a block, in models of many classes, against hooks on the modules that each class has there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, save_family
from torch import Tensor, nn

from tsae.errors import UserError
from tsae.lm.hook_points import find
from tsae.lm.hooks import activations, activations_at, logits_with, replacing
from tsae.lm.loading import LanguageModel, load_language_model
from tsae.lm.site import KINDS, Site, from_hook_name, from_option
from tsae.lm.trial_run import check_site, site_width

LAYER = 1
SEQUENTIAL = {
    "attn_out": "self_attn.output",
    "mlp_out": "mlp.output",
    "resid_mid": "post_attention_layernorm.input",
    "mlp_in": "mlp.input",
    "hook_z": "self_attn.o_proj.input",
}
GPT2 = {
    "attn_out": "attn.output",
    "mlp_out": "mlp.output",
    "resid_mid": "ln_2.input",
    "mlp_in": "mlp.input",
}
SANDWICH = SEQUENTIAL | {
    "attn_out": "post_attention_layernorm.output",
    "mlp_out": "post_feedforward_layernorm.output",
    "resid_mid": "pre_feedforward_layernorm.input",
}
NO_SUM = dict.fromkeys(("attn_out", "mlp_out", "resid_mid"), "does not put out its input plus")
PARALLEL = "computes attention and MLP in parallel, so there is no residual stream between them (resid_mid)"
# The module of every place in block 1, or what the refusal says.
EXPECTED: dict[str, dict[str, str]] = {
    "gpt2": GPT2 | {"hook_z": "attn.c_proj.input"},
    "gpt_neo": GPT2 | {"hook_z": "attn.attention.out_proj.input"},
    "gpt1": NO_SUM | {"mlp_in": "mlp.input", "hook_z": "attn.c_proj.input"},
    "gptj": {
        "attn_out": "attn.output",
        "mlp_out": "mlp.output",
        "resid_mid": PARALLEL,
        "mlp_in": "mlp.input",
        "hook_z": "attn.out_proj.input",
    },
    "neox": {
        "attn_out": "attention.output",
        "mlp_out": "mlp.output",
        "resid_mid": PARALLEL,
        "mlp_in": "mlp.input",
        "hook_z": "attention.dense.input",
    },
    "neox_sequential": {
        "attn_out": "attention.output",
        "mlp_out": "mlp.output",
        "resid_mid": "post_attention_layernorm.input",
        "mlp_in": "mlp.input",
        "hook_z": "attention.dense.input",
    },
    "llama": SEQUENTIAL,
    "qwen2": SEQUENTIAL,
    "mistral": SEQUENTIAL,
    "olmo2": SEQUENTIAL
    | {
        "attn_out": "post_attention_layernorm.output",
        "mlp_out": "post_feedforward_layernorm.output",
        "resid_mid": "mlp.input",  # its norms follow attention and MLP
    },
    "gemma2": SANDWICH,
    "gemma3": SANDWICH,
    "gemma3n": NO_SUM | {"mlp_in": "mlp.input", "hook_z": "self_attn.o_proj.input"},
    "opt": {
        "attn_out": "self_attn.output",
        "mlp_out": "fc2.output",
        "resid_mid": "final_layer_norm.input",
        "mlp_in": "fc1.input",
        "hook_z": "self_attn.out_proj.input",
    },
    "opt_projected": NO_SUM | {"mlp_in": "fc1.input", "hook_z": "self_attn.out_proj.input"},
    "phi": {
        "attn_out": "self_attn.output",
        "mlp_out": "mlp.output",
        "resid_mid": PARALLEL,
        "mlp_in": "mlp.input",
        "hook_z": "self_attn.dense.input",
    },
    "falcon": {
        "attn_out": "self_attention.output",
        "mlp_out": "mlp.output",
        "resid_mid": PARALLEL,
        "mlp_in": "mlp.input",
        "hook_z": "self_attention.dense.input",
    },
    "electra": NO_SUM | {"mlp_in": "has no MLP", "hook_z": "has no output projection of attention"},
    "roberta": NO_SUM | {"mlp_in": "has no MLP", "hook_z": "has no output projection of attention"},
    "bloom": {
        "attn_out": "self_attention.dense.output",
        "mlp_out": "mlp.dense_4h_to_h.output",
        "resid_mid": "post_attention_layernorm.input",
        "mlp_in": "mlp.input",
        "hook_z": "attention in block 1 of .* puts out something else",
    },
    "mpt": {
        "attn_out": "attn.output",
        "mlp_out": "ffn.down_proj.output",
        "resid_mid": "norm_2.input",
        "mlp_in": "ffn.input",
        "hook_z": "attn.out_proj.input",
    },
    "mamba": dict.fromkeys(("attn_out", "mlp_out", "resid_mid"), "has no attention")
    | {"mlp_in": "has no MLP", "hook_z": "has no output projection of attention"},
    "granite": NO_SUM | {"mlp_in": "mlp.input", "hook_z": "self_attn.o_proj.input"},
}
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {"neox_sequential": ("neox", {"use_parallel_residual": False})}


def tokens() -> Tensor:
    return torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def site(kind: str, layer: int = LAYER) -> Site:
    return from_hook_name(f"blocks.{layer}.attn.hook_z" if kind == "hook_z" else f"blocks.{layer}.hook_{kind}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    loaded: dict[str, LanguageModel] = {}

    def load(family: str) -> LanguageModel:
        if family not in loaded:
            base, changes = CHANGED.get(family, (family, {}))
            folder = save_family(tmp_path_factory.mktemp(family), base, **changes)
            loaded[family] = load_language_model(str(folder), dtype="float32")
        return loaded[family]

    return load


def by_hand(lm: LanguageModel, path: str) -> Tensor:
    """What a module of block 1 is given or puts out in the model's own forward pass, [2, 20, d]."""
    name, _, end = path.rpartition(".")
    module, seen = lm.blocks[LAYER].get_submodule(name), []

    def read(value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        seen.append(value.clone().view(2, 20, -1))

    if end == "input":
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs: read(args or kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(lambda _, args, output: read(output))
    with torch.no_grad():
        lm.model(tokens(), use_cache=False) if type(lm.model).__name__ != "OpenAIGPTLMHeadModel" else lm.model(tokens())
    handle.remove()
    (x,) = seen
    return x


def test_every_class_is_expected() -> None:
    assert EXPECTED.keys() >= FAMILIES.keys()


@pytest.mark.parametrize("family", EXPECTED)
def test_the_places_of_every_class(family: str, model: Any) -> None:
    lm = model(family)
    before = activations(lm, tokens(), LAYER - 1)
    torch.testing.assert_close(activations(lm, tokens(), site("resid_pre")), before, rtol=0, atol=0)
    untouched = logits_with(lm, tokens(), LAYER)
    found = {}
    for kind, path in EXPECTED[family].items():
        if not path.endswith((".input", ".output")):
            with pytest.raises(UserError, match=path.replace("(", r"\(").replace(")", r"\)")) as info:
                activations(lm, tokens(), site(kind))
            assert "\n" not in str(info.value)
            continue
        check_site(lm, site(kind), 21, predictions=True)
        x = found[kind] = activations(lm, tokens(), site(kind))
        torch.testing.assert_close(x, by_hand(lm, path), rtol=0, atol=0)
        assert x.shape == (2, 20, site_width(lm, site(kind)))
        assert find(lm, site(kind)).hf_name.endswith(f".{LAYER}.{path}")
        same = logits_with(lm, tokens(), site(kind), lambda x: x)
        assert torch.equal(same, untouched), kind
        assert not torch.allclose(logits_with(lm, tokens(), site(kind), lambda x: x.flip(0)), untouched, atol=1e-3)
    if "attn_out" in found:
        after = activations(lm, tokens(), LAYER)
        torch.testing.assert_close(before + found["attn_out"] + found["mlp_out"], after, rtol=1e-5, atol=1e-4)
    if "resid_mid" in found:
        torch.testing.assert_close(before + found["attn_out"], found["resid_mid"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", EXPECTED)
def test_resid_pre_is_what_enters_the_block(family: str, model: Any) -> None:
    lm = model(family)
    seen: list[Tensor] = []
    handle = lm.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    first = activations(lm, tokens(), site("resid_pre", 0))
    handle.remove()
    entered = seen[-1][1] if family == "gemma3n" else seen[-1]
    torch.testing.assert_close(first, entered, rtol=0, atol=0)
    assert torch.equal(logits_with(lm, tokens(), site("resid_pre"), lambda x: x), logits_with(lm, tokens(), 0))
    replaced = logits_with(lm, tokens(), site("resid_pre"), lambda x: 2 * x)
    torch.testing.assert_close(replaced, logits_with(lm, tokens(), LAYER - 1, lambda x: 2 * x), rtol=0, atol=0)


@pytest.mark.parametrize("family", [f for f, places in EXPECTED.items() if places["resid_mid"].endswith("input")])
def test_a_replaced_residual_stream_is_what_the_rest_of_the_model_sees(family: str, model: Any) -> None:
    """Both the MLP and the sum after it: all that later modules know of the tokens passes through `resid_mid`."""
    lm = model(family)
    swapped = logits_with(lm, tokens(), site("resid_mid"), lambda x: x.flip(0))
    torch.testing.assert_close(swapped, logits_with(lm, tokens().flip(0), LAYER), rtol=1e-4, atol=1e-3)
    shift = torch.randn(activations(lm, tokens(), 0).shape[-1], generator=torch.Generator().manual_seed(1))
    one = logits_with(lm, tokens(), site("resid_mid"), lambda x: x + shift)
    other = logits_with(lm, tokens(), site("attn_out"), lambda x: x + shift)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_the_forward_pass_stops_at_the_place(model: Any) -> None:
    lm = model("llama")
    ran: list[str] = []
    block = lm.blocks[LAYER]
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    handles = [
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name)) for name in names
    ]
    for kind, wanted in (
        ("resid_pre", 0),
        ("hook_z", 1),
        ("attn_out", 2),
        ("resid_mid", 2),
        ("mlp_in", 3),
        ("mlp_out", 4),
    ):
        find(lm, site(kind))
        ran.clear()
        activations(lm, tokens(), site(kind))
        assert ran == list(names[:wanted]), kind
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_two_places_in_one_pass(model: Any) -> None:
    lm = model("gemma3")
    calls = []
    handle = lm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    places = (site("mlp_out"), site("mlp_in"), 0)
    for place in places:
        site_width(lm, place)
    calls.clear()
    together = activations_at(lm, tokens(), *places)
    assert len(calls) == 1
    handle.remove()
    for x, place in zip(together, places, strict=True):
        torch.testing.assert_close(x, activations(lm, tokens(), place), rtol=0, atol=0)


def test_the_path_of_a_module(model: Any) -> None:
    lm = model("gemma3")
    for path, wanted in (
        ("model.layers.1.mlp.down_proj", "mlp.down_proj.output"),
        ("model.layers.1.mlp.down_proj.input", "mlp.down_proj.input"),
        ("model.language_model.layers.1.mlp", "mlp.output"),  # as in a multimodal model
        ("layers.1.self_attn.output", "self_attn.output"),
    ):
        place = from_option(path, 1)
        x = activations(lm, tokens(), place)
        torch.testing.assert_close(x, by_hand(lm, wanted), rtol=0, atol=0)
        assert torch.equal(logits_with(lm, tokens(), place, lambda x: x), logits_with(lm, tokens(), 1))
    assert site_width(lm, from_option("model.layers.1.mlp.down_proj.input", 1)) == 64
    assert from_option("model.layers.1", 1).block == 1
    # In Gemma the MLP's module and what it adds to the stream are two tensors.
    mlp = activations(lm, tokens(), from_option("model.layers.1.mlp", 1))
    assert not torch.allclose(mlp, activations(lm, tokens(), site("mlp_out")), atol=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlp", "the site 'mlp' is unknown; use resid_pre, resid_mid"),
        ("model.norm", "the site 'model.norm' is unknown"),
        ("blocks.1.attn.hook_q", "is unknown"),
        ("encoder.layers.1.mlp", "is unknown"),
        ("model.layers.2.mlp", "the site model.layers.2.mlp is in block 2, but the layer is 1; give --layer 2"),
        ("blocks.0.hook_mlp_out", "is in block 0, but the layer is 1"),
    ],
)
def test_options_that_name_no_place(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_option(text, 1)


def test_options_that_name_one() -> None:
    for kind in KINDS:
        assert from_option(kind, 3) == from_hook_name(f"blocks.3.hook_{kind}") == Site(kind, 3, f"blocks.3.hook_{kind}")


def test_a_module_that_is_not_there(model: Any) -> None:
    with pytest.raises(UserError, match=r"no module model.layers.1.mlp.no; block 1 is model.layers.1, with the mod"):
        activations(model("llama"), tokens(), from_option("model.layers.1.mlp.no", 1))
    with pytest.raises(UserError, match="layer 7 does not exist"):
        activations(model("llama"), tokens(), site("mlp_out", 7))


def test_a_module_that_is_called_twice_or_never(model: Any) -> None:
    with pytest.raises(UserError, match=r"resid_dropout of .* is called 2 times"):
        activations(model("phi"), tokens(), from_option("model.layers.1.resid_dropout", 1))
    lm = model("llama")
    lm.blocks[1].unused = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"unused of .* is not called"):
        activations(lm, tokens(), from_option("model.layers.1.unused", 1))


def test_a_module_without_activations_is_refused(model: Any) -> None:
    place = from_option("model.layers.1.self_attn.q_norm", 1)
    with pytest.raises(UserError, match=r"q_norm of .* puts out a tensor \[2, 3, 2, 16\]|puts out a tensor \[2, 2, 3"):
        site_width(model("gemma3"), place)


class ScaledBlock(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attn, self.mlp, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), scale

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.attn(self.ln1(x))
        return x + self.scale * self.mlp(self.ln2(x))


class ScaledModel(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(50, 4), nn.ModuleList([ScaledBlock(scale) for _ in range(2)])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=x)


@pytest.mark.parametrize(
    ("scale", "holds", "dtype"),
    [
        (1.0, True, torch.float32),
        (0.97, False, torch.float32),
        (1.0, True, torch.bfloat16),
        (1.0, True, torch.float16),
        (0.7, False, torch.bfloat16),
    ],
)
def test_a_scaled_residual_is_noticed(scale: float, holds: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lm = LanguageModel(ScaledModel(scale).to(dtype), None, "scaled", dtype, torch.device("cpu"))  # type: ignore[arg-type]
    ids = torch.arange(6).view(2, 3)
    if holds:
        assert activations(lm, ids, site("attn_out")).shape == (2, 3, 4)
        return
    with pytest.raises(UserError, match="does not put out its input plus what its attention and its MLP put out"):
        activations(lm, ids, site("attn_out"))


def test_replacing_during_generation(model: Any) -> None:
    """A pass per token: the first sees the prompt, the others one token each; OPT flattens them within a block."""
    for family in ("llama", "opt"):
        lm, shapes = model(family), []

        def note(x: Tensor, start: int, shapes: list[Any] = shapes) -> Tensor:
            shapes.append(tuple(x.shape[:2]))
            return 0 * x

        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        plain = lm.model.generate(tokens(), **options)
        for kind in ("resid_mid", "mlp_out"):
            shapes.clear()
            with replacing(lm, site(kind), note):
                changed = lm.model.generate(tokens(), **options)
            assert shapes == [(2, 20), (2, 1), (2, 1)]
            assert not torch.equal(changed, plain)
        assert torch.equal(lm.model.generate(tokens(), **options), plain)


def test_gradients_pass_through_a_replacement(model: Any) -> None:
    lm = model("llama")
    shift = torch.zeros(32, requires_grad=True)
    with replacing(lm, site("resid_mid"), lambda x, start: x + shift):
        lm.model(tokens()).logits.square().sum().backward()
    assert shift.grad.abs().sum() > 0
