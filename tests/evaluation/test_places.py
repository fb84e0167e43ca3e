"""Autoencoders of other libraries are measured where their files say, or refused; export keeps what they say."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluated_run import D_IN, D_SAE, write_dictionary_learning, write_run, write_saelens
from safetensors.torch import load_file, save_file
from tiny import sample_text

import tsae
from tsae.config import SAEConfig
from tsae.data.documents import Document
from tsae.data.sequences import SequenceStream
from tsae.evaluate import main
from tsae.evaluation import command
from tsae.evaluation.evaluator import evaluate
from tsae.evaluation.places import same_model
from tsae.evaluation.subject import open_autoencoders
from tsae.export import main as export
from tsae.lm.hooks import activations
from tsae.lm.loading import load_language_model
from tsae.lm.site import (
    Site,
    contradict,
    from_gemma_scope_folder,
    from_hook_name,
    from_module,
    from_submodule,
    submodule_name,
)
from tsae.sae.model import SparseAutoencoder


@pytest.fixture
def options(tiny_gemma3: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text(sample_text(20000))
    sizes = ["--tokens", "256", "--ce-sequences", "1", "--device", "cpu"]
    return ["--model", str(tiny_gemma3), "--data", str(text), *sizes]


def saelens(directory: Path, legacy: bool = False, **said: Any) -> Path:
    """An autoencoder of SAELens whose files say ``said`` of its place."""
    write_saelens(directory)
    cfg = json.loads((directory / "cfg.json").read_text())
    cfg |= said if legacy else {"metadata": {"sae_lens_version": "6.54.0", **said}}
    (directory / "cfg.json").write_text(json.dumps(cfg))
    return directory


def sparsify(directory: Path) -> Path:
    directory.mkdir(parents=True)
    weight = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(4))
    state = {"encoder.weight": weight, "encoder.bias": torch.zeros(D_SAE), "W_dec": weight.clone()}
    save_file(state | {"b_dec": torch.zeros(D_IN)}, directory / "sae.safetensors")
    (directory / "cfg.json").write_text(json.dumps({"d_in": D_IN, "num_latents": D_SAE, "k": 4}))
    return directory


def dictionary(directory: Path, io: str = "out", **trainer: Any) -> Path:
    write_dictionary_learning(directory)
    config = {"trainer": {"dict_class": "BatchTopKSAE", **trainer}, "buffer": {"io": io, "ctx_len": 128}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def gemma_scope(directory: Path, **config: Any) -> Path:
    directory.mkdir(parents=True)
    weights = {name: tensor.numpy() for name, tensor in load_file(write_saelens(directory / "x") / WEIGHTS).items()}
    weights["threshold"] = np.zeros(D_SAE, dtype=np.float32)
    if not config:
        np.savez(directory / "params.npz", **weights)
        return directory
    tensors = {name.replace("W_", "w_"): torch.from_numpy(value).contiguous() for name, value in weights.items()}
    save_file(tensors, directory / "params.safetensors")
    (directory / "config.json").write_text(json.dumps({"architecture": "jump_relu", **config}))
    return directory


WEIGHTS = "sae_weights.safetensors"


def one_of_each(kind: str, layer: int, folder: Path) -> dict[str, Path]:
    """Autoencoders of one place in every format that names it."""
    folder.mkdir()
    module = {"mlp_out": ".mlp", "attn_out": ".self_attn", "resid_post": ""}.get(kind)
    hook = f"blocks.{layer}.hook_{kind}"
    found = {
        "saelens": saelens(folder / "v6", hook_name=hook),
        "saelens flat": saelens(folder / "v4", legacy=True, hook_name=hook, hook_layer=layer),
        "saelens hook_point": saelens(folder / "v2", legacy=True, hook_point=hook, hook_point_layer=layer),
        "dictionary_learning": dictionary(folder / "dl", layer=layer, submodule_name=f"{kind}_layer_{layer}"),
    }
    if module is not None:
        found["saelens, a module's path"] = saelens(folder / "path", hook_name=f"model.layers.{layer}{module}")
        found["sparsify"] = sparsify(folder / f"layers.{layer}{module}")
        found["sparsify, a seed"] = sparsify(folder / "seeds" / f"layers.{layer}{module}" / "seed0")
    scope = {"resid_post": "res", "mlp_out": "mlp"}.get(kind)
    if scope:
        path = f"gemma-scope-2b-pt-{scope}/layer_{layer}/width_16k/average_l0_7"
        found["Gemma Scope"] = gemma_scope(folder / path)
        module = {"res": "output", "mlp": "post_feedforward_layernorm.output"}[scope]
        found["Gemma Scope 2"] = gemma_scope(folder / "scope2", hf_hook_point_in=f"model.layers.{layer}.{module}")
    return found


@pytest.mark.parametrize("kind", ["mlp_out", "attn_out", "resid_mid", "mlp_in"])
def test_every_place_of_a_block_is_measured_where_the_file_says(kind, options, tmp_path, tiny_gemma3, capsys) -> None:
    """Without --layer, or with the same; with another layer or site it is refused."""
    lm = load_language_model(str(tiny_gemma3), dtype="float32")
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    for library, sae in one_of_each(kind, 1, tmp_path / "saes").items():
        for asked in ({}, {"layer": 1}, {"layer": 1, "site": kind}, {"site": kind}):
            subject = open_autoencoders([str(sae)], str(tiny_gemma3), **asked)
            assert (subject.config.layer, subject.config.place.kind) == (1, kind), library
        # Gemma normalizes what its modules put out; libraries that name the module mean what it puts out.
        path = library.startswith(("saelens, a module", "sparsify"))
        module = {"mlp_out": "model.layers.1.mlp", "attn_out": "model.layers.1.self_attn"}.get(kind) if path else None
        place = open_autoencoders([str(sae)], str(tiny_gemma3)).config.place
        torch.testing.assert_close(
            activations(lm, tokens, place),
            activations(lm, tokens, from_hook_name(module or f"blocks.1.hook_{kind}")),
            rtol=0,
            atol=0,
        )
        for other in (["--layer", "2"], ["--layer", "1", "--site", "resid_post"], ["--site", "resid_pre"]):
            assert main([str(sae), *options, *other]) == 2, library
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert f"blocks.1.hook_{kind}" in error
            assert "; leave out --site and --layer to measure it there" in error
    assert main([str(sae), *options, "--out", str(tmp_path / "out.json")]) == 0


def test_the_figures_of_another_place_than_the_residual_stream(options, tmp_path) -> None:
    """The same for a file that names the place, and for one that says nothing and --site."""
    named, silent = saelens(tmp_path / "named", hook_name="blocks.1.hook_mlp_out"), saelens(tmp_path / "silent")
    figures = []
    for sae, asked in ((named, []), (silent, ["--layer", "1", "--site", "mlp_out"]), (silent, ["--layer", "1"])):
        assert main([str(sae), *options, *asked, "--out", str(tmp_path / "out.json")]) == 0
        figures.append(json.loads((tmp_path / "out.json").read_text()))
    assert figures[0] == figures[1] != figures[2]
    assert main([str(silent), *options, "--site", "mlp_out"]) == 2


def test_names_that_mean_two_tensors_in_this_model_are_measured_apart(options, tmp_path, capsys) -> None:
    hook = saelens(tmp_path / "hook", hook_name="blocks.1.hook_mlp_out")
    module = saelens(tmp_path / "module", hook_name="model.layers.1.mlp")
    assert main([str(hook), str(module), *options]) == 2
    assert "module encodes model.layers.1.mlp, which in" in capsys.readouterr().err
    normed = saelens(tmp_path / "normed", hook_name="model.layers.1.post_feedforward_layernorm")
    assert main([str(hook), str(normed), *options]) == 0


def test_transcoders_to_two_tensors_of_one_name_are_measured_apart(options, tmp_path, capsys) -> None:
    architecture = SAEConfig(d_in=D_IN, d_out=D_IN, d_sae=D_SAE, activation="relu", apply_b_dec_to_input=False)
    for name, target in (("hook", "blocks.1.hook_mlp_out"), ("module", "model.layers.1.mlp")):
        SparseAutoencoder(architecture).eval().save(
            tmp_path / name, hook_name="blocks.1.hook_attn_out", hook_layer=1, hook_name_out=target, hook_layer_out=1
        )
    assert main([str(tmp_path / "hook"), str(tmp_path / "module"), *options]) == 2
    assert "module predicts model.layers.1.mlp, which in" in capsys.readouterr().err
    assert main([str(tmp_path / "module"), *options]) == 0


def test_attention_heads_are_measured_at_the_output_projection(options, tmp_path, tiny_gemma3, capsys) -> None:
    """SAELens's hook_z, of all heads: [heads, d_head] side by side, as the projection is given them."""
    lm = load_language_model(str(tiny_gemma3), dtype="float32")
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    seen = []
    handle = lm.blocks[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    x = activations(lm, tokens, from_hook_name("blocks.1.attn.hook_z"))
    handle.remove()
    torch.testing.assert_close(x, seen[-1], rtol=0, atol=0)
    for number, said in enumerate(({}, {"reshape_activations": "hook_z"})):
        sae = saelens(tmp_path / str(number), hook_name="blocks.1.attn.hook_z")
        cfg = json.loads((sae / "cfg.json").read_text()) | said
        (sae / "cfg.json").write_text(json.dumps(cfg))
        status = main([str(sae), *options])
        if x.shape[-1] == D_IN:
            assert status == 0
        else:
            assert f"blocks.1.attn.hook_z of {tiny_gemma3} has {x.shape[-1]}" in capsys.readouterr().err


def test_the_mlps_input_by_saelens_name_is_said(options, tmp_path, caplog) -> None:
    """TransformerLens's hook of that name comes before the norm."""
    with caplog.at_level(logging.WARNING):
        assert main([str(saelens(tmp_path / "sae", hook_name="blocks.1.hook_mlp_in")), *options]) == 0
    assert any("sae encodes blocks.1.hook_mlp_in, taken as what the MLP is given, after" in m for m in caplog.messages)
    caplog.clear()
    module = {"hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output"}
    with caplog.at_level(logging.WARNING):
        assert main([str(saelens(tmp_path / "b", hook_name="blocks.1.hook_mlp_in", **module)), *options]) == 0
    assert not caplog.messages


@pytest.mark.parametrize(("kind", "layer"), [("resid_post", 1), ("resid_pre", 2)])
def test_a_blocks_output_is_measured_where_the_file_says(kind, layer, options, tmp_path, capsys) -> None:
    """Without --layer, or with the same; with another it is refused."""
    for library, sae in one_of_each(kind, layer, tmp_path / "saes").items():
        for asked in (None, 1):
            assert open_autoencoders([str(sae)], "any/model", asked).config.layer == 1, library
        for other in ("0", "2"):
            assert main([str(sae), *options, "--layer", other]) == 2, library
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert f"the output of block 1, not of block {other} (--layer); leave out --layer to measure" in error


def test_the_figures_are_of_the_place_that_the_file_names(options, tmp_path) -> None:
    """The same weights under the names of two places, against the layer named on the command line."""
    figures = {}
    for name, asked in (("blocks.2.hook_resid_post", []), ("blocks.3.hook_resid_pre", []), (None, ["--layer", "2"])):
        sae = saelens(tmp_path / str(name), **({"hook_name": name} if name else {}))
        assert main([str(sae), *options, *asked, "--out", str(tmp_path / "out.json")]) == 0
        figures[name] = json.loads((tmp_path / "out.json").read_text())
    assert len({str(figure) for figure in figures.values()}) == 1
    sae = saelens(tmp_path / "other", hook_name="blocks.1.hook_resid_post")
    assert main([str(sae), *options, "--out", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) != figures[None]


@pytest.mark.parametrize(
    "name",
    [
        "hook_embed",
        "blocks.1.ln1.hook_normalized",
        "blocks.1.attn.hook_q",
        "ln_final",
        "",
        "x",
    ],
)
def test_places_that_are_no_blocks_output(name, options, tmp_path, capsys) -> None:
    sae = saelens(tmp_path / "sae", hook_name=name)
    assert main([str(sae), *options, "--layer", "0"]) == 2
    assert f"encodes {name}, which this version cannot measure" in capsys.readouterr().err


def test_several_must_be_of_one_layer(options, tmp_path, tiny_gemma3, capsys) -> None:
    first = saelens(tmp_path / "first", hook_name="blocks.1.hook_resid_post")
    second = saelens(tmp_path / "second", hook_name="blocks.2.hook_resid_post")
    assert main([str(first), str(second), *options]) == 2
    assert (
        "encode different layers (first: layer 1, second: layer 2); measure those of one layer at a time"
        in capsys.readouterr().err
    )
    run = write_run(tmp_path / "run", tiny_gemma3)  # of layer 1
    assert main([str(run), str(second), *options]) == 2
    assert "(run: layer 1, second: layer 2)" in capsys.readouterr().err
    assert main([str(run), *options, "--layer", "2"]) == 2
    assert "run encodes blocks.1.hook_resid_post, the output of block 1, not of block 2" in capsys.readouterr().err
    same = saelens(tmp_path / "same", hook_name="blocks.2.hook_resid_pre")
    assert main([str(run), str(same), str(first), *options]) == 0


def test_a_layer_without_a_place_is_a_guess_and_said(options, tmp_path, caplog, capsys) -> None:
    silent, half = saelens(tmp_path / "silent"), dictionary(tmp_path / "half", layer=1)
    assert main([str(silent), *options]) == 2
    assert "silent does not say which layer it encodes; name it with --layer" in capsys.readouterr().err
    with caplog.at_level(logging.WARNING):
        assert main([str(half), str(silent), *options]) == 0
    assert "half names layer 1, but not which of its activations; taken as the block's output." in caplog.messages
    assert "silent does not say which layer it encodes; taken as 1, as the others." in caplog.messages
    assert main([str(half), *options, "--layer", "2"]) == 2


def test_evaluate_in_python_makes_the_same_check(tiny_gemma3, tmp_path) -> None:
    lm = load_language_model(str(tiny_gemma3), dtype="float32")
    documents = lambda epoch: iter([Document("text", sample_text(200))])  # noqa: E731
    for name in ("blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"):
        sae = tsae.load(saelens(tmp_path / name, hook_name=name))
        with pytest.raises(tsae.UserError, match=f"The autoencoder encodes {name}"):
            evaluate(sae, lm, [SequenceStream(documents, lm.tokenizer, 16).next_batch(1)], layer=1)


def test_another_model_is_a_warning(tmp_path, tiny_gemma3, caplog, capsys) -> None:
    hook = {"hook_name": "blocks.1.hook_resid_post"}
    same = saelens(tmp_path / "same", model_name=f"someone/{tiny_gemma3.name}", **hook)
    with caplog.at_level(logging.WARNING):
        open_autoencoders([str(same)], str(tiny_gemma3))
        assert not caplog.messages
        others = {
            "saelens": saelens(tmp_path / "a", model_name="gpt2-small", **hook),
            "flat": saelens(tmp_path / "b", legacy=True, model_name="gpt2-small", **hook),
            "dictionary": dictionary(
                tmp_path / "c", lm_name="gpt2-small", layer=1, submodule_name="resid_post_layer_1"
            ),
        }
        for sae in others.values():
            open_autoencoders([str(sae)], str(tiny_gemma3))
            said = f"{sae.name} says that it was trained on gpt2-small, and is measured on {tiny_gemma3}."
            assert caplog.messages == [said]
            caplog.clear()
    assert main([str(same)]) == 2
    capsys.readouterr()
    assert main([str(same), "--layer", "1"]) == 2
    assert f"name it with --model (its file says someone/{tiny_gemma3.name})" in capsys.readouterr().err


def test_what_the_model_was_loaded_with(tmp_path, caplog) -> None:
    hook = {"hook_name": "blocks.1.hook_resid_post"}
    harmless = {"fold_ln": True, "center_writing_weights": False, "torch_dtype": "float32", "revision": None}
    with caplog.at_level(logging.WARNING):
        sae = saelens(tmp_path / "a", model_from_pretrained_kwargs=harmless, **hook)
        open_autoencoders([str(sae)], "any")
        assert not caplog.messages
        sae = saelens(tmp_path / "b", model_from_pretrained_kwargs={"revision": "step1000"}, **hook)
        open_autoencoders([str(sae)], "any")
        assert caplog.messages == ["b was trained on a model loaded with revision='step1000', which is not done here."]
    sae = saelens(tmp_path / "c", model_from_pretrained_kwargs={"center_writing_weights": True}, **hook)
    with pytest.raises(tsae.UserError, match="c encodes the activations of a model with center_writing_weights"):
        open_autoencoders([str(sae)], "any")


def test_sequences_begin_with_bos_as_in_training(options, tmp_path, tiny_gemma3, caplog, monkeypatch) -> None:
    lm = load_language_model(str(tiny_gemma3), dtype="float32")
    bos, seen = lm.tokenizer.bos_token_id, []
    real = command.evaluate_all
    monkeypatch.setattr(command, "evaluate_all", lambda s, m, b, **k: seen.append(b[0].tokens) or real(s, m, b, **k))
    hook = {"hook_name": "blocks.1.hook_resid_post"}
    for said in (True, False, None):
        sae = saelens(tmp_path / str(said), prepend_bos=said, **hook)
        with caplog.at_level(logging.WARNING):
            assert main([str(sae), *options]) == 0
        assert not caplog.messages
        assert seen[-1].shape[1] == 129
        assert bool((seen[-1] == bos).any()) == (said is not False)
        assert bool((seen[-1][:, 0] == bos).all()) == (said is not False)
    with caplog.at_level(logging.WARNING):
        assert main([str(tmp_path / "True"), str(tmp_path / "False"), *options]) == 0
    assert caplog.messages == ["False was trained without BOS, and is measured with BOS, as the others were."]
    assert (seen[-1][:, 0] == bos).all()


def test_a_tokenizer_without_the_bos_of_training(options, tmp_path, tiny_gemma3, caplog, monkeypatch) -> None:
    monkeypatch.setattr("tsae.lm.loading.prefix_token", lambda tokenizer: None)
    sae = saelens(tmp_path / "sae", hook_name="blocks.1.hook_resid_post", prepend_bos=True)
    with caplog.at_level(logging.WARNING):
        assert main([str(sae), *options]) == 0
    why = f"the tokenizer of {tiny_gemma3} has none; the first token's activation is left out."
    assert caplog.messages == [f"sae was trained with BOS, but {why}"]


def test_the_length_of_training_is_compared(options, tmp_path, caplog) -> None:
    """A file's context_size counts BOS; ours are measured at 128 unless --length says otherwise."""
    for said in (129, 128, 1024, 65):
        saelens(tmp_path / str(said), hook_name="blocks.1.hook_resid_post", context_size=said)
    for said in (129, 128):
        with caplog.at_level(logging.WARNING):
            assert main([str(tmp_path / str(said)), *options]) == 0
        assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        assert main([str(tmp_path / "1024"), *options]) == 0
    assert caplog.messages == [
        "1024 was trained on sequences of 1024 tokens, and is measured on 1 + 128, the first left out; --length 1023 "
        "measures it there."
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert main([str(tmp_path / "65"), *options, "--length", "64"]) == 0
    assert caplog.messages == []


SAID = {
    "model_name": "someone/model",
    "hook_name": "blocks.1.hook_mlp_out",
    "prepend_bos": False,
    "context_size": 77,
    "model_from_pretrained_kwargs": {"revision": "step1000"},
    "seqpos_slice": [1, None],
    "neuronpedia_id": "model/1-mlp",
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("to", ["saelens", "dictionary_learning"])
def test_export_keeps_what_the_file_says(to, legacy, tmp_path) -> None:
    """Also from one format to the other and back."""
    source = saelens(tmp_path / "source", legacy, **SAID)
    assert tsae.load(source).metadata == SAID
    there, back = tmp_path / "there", tmp_path / "back"
    assert export([str(source), "--to", to, "--out", str(there)]) == 0
    assert tsae.load(there).metadata.items() >= SAID.items()
    assert export([str(there), "--to", "saelens", "--out", str(back)]) == 0
    assert tsae.load(back).metadata.items() >= SAID.items()
    assert json.loads((back / "cfg.json").read_text())["metadata"].items() >= SAID.items()
    if to == "dictionary_learning":
        trainer = json.loads((there / "trainer_0" / "config.json").read_text())["trainer"]
        assert (trainer["submodule_name"], trainer["layer"]) == ("mlp_out_layer_1", 1)
        assert trainer["lm_name"] == "someone/model"


@pytest.mark.parametrize("kind", ["mlp_out", "resid_post"])
@pytest.mark.parametrize("to", ["saelens", "dictionary_learning"])
def test_export_never_relabels(to, kind, tmp_path) -> None:
    for library, source in one_of_each(kind, 1, tmp_path / "saes").items():
        out = tmp_path / f"{library} {to}"
        assert export([str(source), "--to", to, "--out", str(out)]) == 0
        site = from_hook_name(tsae.load(out).metadata["hook_name"])
        assert (site.kind, site.layer) == (kind, 1), library
        if to == "dictionary_learning":
            trainer = json.loads((out / "trainer_0" / "config.json").read_text())["trainer"]
            assert (trainer["submodule_name"], trainer["layer"]) == (f"{kind}_layer_1", 1)


@pytest.mark.parametrize("to", ["saelens", "dictionary_learning"])
def test_what_says_nothing_is_not_given_a_place(to, tmp_path) -> None:
    out = tmp_path / "out"
    assert export([str(write_saelens(tmp_path / "a")), "--to", to, "--out", str(out)]) == 0
    assert tsae.load(out).metadata == {}
    text = "".join(path.read_text() for path in out.rglob("*.json"))
    assert "resid_post" not in text
    assert "None" not in text


def test_a_layer_alone_is_not_given_a_place(tmp_path) -> None:
    sae = tsae.load(write_saelens(tmp_path / "a"))
    sae.metadata = {"hook_layer": 1}
    sae.save(tmp_path / "b")
    assert tsae.load(tmp_path / "b").metadata == {"hook_layer": 1}


def test_metadata_survives_folding_and_a_dropped_hysteresis(tmp_path, tiny_gemma3) -> None:
    run = write_run(tmp_path / "run", tiny_gemma3, activation="schmitt")
    sae = tsae.load(run)
    assert sae.metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert sae.folded(torch.zeros(D_IN), 2.0).metadata == sae.metadata
    assert export([str(run), "--to", "saelens", "--out", str(tmp_path / "out"), "--drop-hysteresis"]) == 0
    said = tsae.load(tmp_path / "out").metadata
    assert said.items() >= sae.metadata.items()
    assert "hysteresis_dropped" in said


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"hook_name": 3}, "has hook_name = 3; expected str or null"),
        ({"prepend_bos": "yes"}, "has prepend_bos = 'yes'; expected bool or null"),
        ({"prepend_bos": 1}, "has prepend_bos = 1; expected bool or null"),
        ({"hook_layer": True}, "has hook_layer = True; expected int or null"),
        ({"model_from_pretrained_kwargs": "x"}, "has model_from_pretrained_kwargs = 'x'; expected dict or null"),
        ({"hook_head_index": 3}, "encodes head 3 of an attention layer"),
        ({"hook_name": "blocks.1.hook_resid_post", "hook_layer": 2}, "contradict each other"),
        ({"hook_name": "a", "hook_name_out": "b"}, "predicts b from a (hook_name_out), as a transcoder"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_place_that_is_not_understood_is_refused(said, message, legacy, tmp_path) -> None:
    with pytest.raises(tsae.UserError) as caught:
        tsae.load(saelens(tmp_path / "sae", legacy, **said))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_names_of_places() -> None:
    assert from_hook_name("blocks.12.hook_resid_pre") == Site("resid_pre", 12, "blocks.12.hook_resid_pre")
    assert from_hook_name("blocks.12.attn.hook_z").layer == 12
    for path in ("model.layers.3", "gpt_neox.layers.3", "transformer.h.3", "layers.3", "h.3", "model.layers.3.output"):
        assert from_module(path).block == 3, path
    assert from_module("model.language_model.layers.3.mlp").kind == "mlp_out"
    assert from_module("transformer.h.3.attn").kind == "attn_out"
    assert from_module("model.layers.3.input").block == 2
    for path in ("model.layers.3.mlp.down_proj", "model.layers.3.mlp.input", "layers.3.input_layernorm", "model.norm"):
        assert from_module(path).block is None, path
        assert from_module(path).hook_name == path
    for name, kind in (("resid_out_layer3", "resid_post"), ("attention_out_layer_3", "attn_out")):
        assert from_submodule(name) == Site(kind, 3, name)
        assert submodule_name(from_submodule(name)) == f"{kind}_layer_3"
    assert submodule_name(from_hook_name("hook_embed")) == "hook_embed"
    for path, site, model in (
        ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", ("resid_post", 12), "google/gemma-2-2b"),
        ("models--google--gemma-scope-9b-it-res/snapshots/1f/layer_9/w", ("resid_post", 9), "google/gemma-2-9b-it"),
        ("gemma-scope-9b-pt-att/layer_9/width_16k/x", ("hook_z", 9), "google/gemma-2-9b"),
        ("gemma-scope-2-1b-pt/mlp_out_all/layer_7_width_16k_l0_big", ("mlp_out", 7), "google/gemma-3-1b-pt"),
        ("gemma-scope-2-1b-it/transcoder/layer_7_width_16k", ("other", 7), "google/gemma-3-1b-it"),
    ):
        found, named = from_gemma_scope_folder(Path("/data") / path)
        assert found is not None
        assert ((found.kind, found.layer), named) == (site, model)
    assert from_gemma_scope_folder(Path("/data/layer_12/x")) == (None, None)


@pytest.mark.parametrize(
    "name", ["encoder.layers.1", "encoder.block.1", "vision_tower.encoder.layers.1", "model.visual.blocks.1"]
)
def test_blocks_of_another_stack_are_not_the_decoders(name, options, tmp_path, capsys) -> None:
    for sae in (saelens(tmp_path / "a", hook_name=name), sparsify(tmp_path / name)):
        assert main([str(sae), *options, "--layer", "1"]) == 2
        assert f"encodes {name}, which this version cannot measure" in capsys.readouterr().err
    for path in ("model.decoder.layers.1", "decoder.block.1", "transformer.blocks.1"):
        assert from_hook_name(path).block == 1


def test_older_names_of_the_place_within_metadata(tmp_path) -> None:
    sae = tsae.load(saelens(tmp_path / "sae", hook_point="blocks.2.hook_mlp_out", hook_point_layer=2))
    assert sae.metadata == {"hook_name": "blocks.2.hook_mlp_out", "hook_layer": 2}


def test_a_module_path_alone_names_the_place(options, tmp_path, capsys) -> None:
    sae = saelens(tmp_path / "mlp", hf_hook_name="model.layers.2.mlp")
    assert main([str(sae), *options, "--layer", "1"]) == 2
    assert "encodes model.layers.2.mlp (blocks.2.hook_mlp_out), not block 1 (--layer); leave" in capsys.readouterr().err
    sae = saelens(tmp_path / "block", hf_hook_name="model.layers.2")
    assert open_autoencoders([str(sae)], "any").config.layer == 2


def test_a_module_and_its_output_are_one_place(options, tmp_path) -> None:
    """Our runs at a module write its path and, as `hf_hook_name`, the same with `.output`."""
    path = "model.layers.1.mlp.down_proj"
    sae = saelens(tmp_path / "sae", hook_name=path, hf_hook_name=f"{path}.output", hook_layer=1)
    for site in (path, f"{path}.output"):
        assert open_autoencoders([str(sae)], options[1], site=site).config.site == site
        assert from_module(site).key == from_module(f"{path}.output").key != from_module(f"{path}.input").key


def test_two_names_of_one_place_must_agree(tmp_path) -> None:
    for number, (name, module) in enumerate(
        [
            ("blocks.1.hook_resid_post", "model.layers.2"),
            ("blocks.1.hook_resid_post", "model.layers.1.mlp"),
            ("blocks.1.hook_mlp_out", "model.layers.2.mlp"),
            ("blocks.1.attn.hook_z", "model.layers.2.self_attn.o_proj.input"),
            ("blocks.1.hook_resid_pre", "model.layers.1"),
        ]
    ):
        contradicts = contradict(from_hook_name(name), from_module(module))
        assert contradicts, (name, module)
        if "hook_z" not in name:
            with pytest.raises(tsae.UserError, match=f"the hf_hook_name {module}, which contradict each other"):
                tsae.load(saelens(tmp_path / str(number), hook_name=name, hf_hook_name=module))
    for name, module in (
        ("blocks.1.hook_resid_post", "model.layers.1.output"),
        ("blocks.1.hook_resid_pre", "model.layers.0"),
        ("blocks.1.hook_resid_pre", "model.layers.1.input"),
        ("blocks.1.hook_mlp_out", "model.layers.1.post_feedforward_layernorm.output"),
        ("blocks.1.hook_mlp_in", "model.layers.1.pre_feedforward_layernorm.output"),
        ("blocks.1.hook_resid_post", "transformer.something"),
    ):
        assert not contradict(from_hook_name(name), from_module(module)), (name, module)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"hook_layer_out": 3}, "hook_layer_out = 3 and hook_layer = None, as a transcoder"),
        ({"hf_hook_name_out": "layers.1.mlp"}, "hf_hook_name_out = 'layers.1.mlp' and hf_hook_name = None, as a"),
        ({"cfg": {"hook_name": "blocks.1.hook_mlp_out"}}, "hook_name = 'blocks.1.hook_mlp_out' inside metadata.cfg"),
        ({"cfg": {"hook_point": "x"}}, "hook_name = 'x' inside metadata.cfg, where it is not read; move it into"),
        ({"architecture": "transcoder"}, "architecture = 'transcoder' inside metadata, where it is not read"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm' inside metadata, where"),
    ],
)
def test_what_is_told_elsewhere_is_not_passed_over(said, message, tmp_path) -> None:
    sae = saelens(tmp_path / "sae", hook_name="blocks.1.hook_resid_post", **said)
    with pytest.raises(tsae.UserError, match=re.escape(message)):
        tsae.load(sae)
    assert tsae.load(saelens(tmp_path / "same", hook_name="a", cfg={"hook_name": "a", "lr": 1}, d_in=D_IN))


def test_positions_that_training_left_out_are_named(tmp_path, caplog) -> None:
    hook = {"hook_name": "blocks.1.hook_resid_post"}
    with caplog.at_level(logging.WARNING):
        open_autoencoders([str(saelens(tmp_path / "all", seqpos_slice=[None], **hook))], "any")
        assert not caplog.messages
        open_autoencoders([str(saelens(tmp_path / "a", seqpos_slice=[5, 10], **hook))], "any")
    assert caplog.messages == ["a was trained on the positions [5, 10] alone, and is measured on all."]


def test_a_link_names_the_place_of_its_folder(tmp_path) -> None:
    for number, folder in enumerate(
        (
            sparsify(tmp_path / "layers.1.mlp"),
            sparsify(tmp_path / "seeds" / "layers.1.mlp" / "seed0"),
            gemma_scope(tmp_path / "gemma-scope-2b-pt-mlp/layer_1/width_16k/average_l0_7"),
        )
    ):
        link = tmp_path / f"link{number}"
        link.symlink_to(folder)
        assert tsae.load(link).metadata["hook_name"] == "blocks.1.hook_mlp_out"


def test_gemma_scopes_other_folders(tmp_path) -> None:
    for folder in ("gemma-scope-2-1b-pt/crosscoder/layer_1_w", "gemma-scope-2-1b-pt/clt/layer_1_w"):
        with pytest.raises(tsae.UserError, match="by the name of its folder; only autoencoders and transcoders can"):
            tsae.load(gemma_scope(tmp_path / folder))
    embedding = gemma_scope(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_7")
    assert tsae.load(embedding).metadata["hook_name"] == "hook_embed"
    canonical = gemma_scope(tmp_path / "gemma-scope-2b-pt-mlp-canonical/layer_1/width_16k/canonical")
    said = {"model_name": "google/gemma-2-2b", "hook_name": "blocks.1.hook_mlp_out"}
    assert tsae.load(canonical).metadata == said


def test_names_of_one_model() -> None:
    for one, other in (
        ("EleutherAI/pythia-70m-deduped", "pythia-70m-deduped"),
        ("gpt2-small", "openai-community/gpt2"),
        ("/models/gemma-2-2b", "google/gemma-2-2b"),
        ("/c/models--google--gemma-2-2b/snapshots/c5eb", "gemma-2-2b"),
        ("gemma-v3-270m-pt", "google/gemma-3-270m"),
        ("meta-llama/Llama-2-7b-hf", "Llama-2-7b"),
    ):
        assert same_model(one, other)
        assert same_model(other, one)
    assert not same_model("gpt2", "gpt2-medium")
    assert not same_model("gemma-2-2b", "gemma-2-2b-it")
