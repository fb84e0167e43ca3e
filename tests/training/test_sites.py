"""Runs on other places than the residual stream, through the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import options, weights

import tsae
from tsae import evaluate
from tsae.config import SAEConfig, TrainConfig
from tsae.data.cache_key import cache_key
from tsae.evaluation.held_out import evaluation_batches
from tsae.evaluation.subject import open_run
from tsae.export import main as export
from tsae.hub.card import model_card
from tsae.lm.loading import load_language_model
from tsae.sae.model import SparseAutoencoder
from tsae.train import main
from tsae.utils.config_json import to_dict
from tsae.view.command import collect

pytestmark = pytest.mark.usefixtures("blank_report")


@pytest.mark.parametrize(
    ("site", "width", "hook", "module"),
    [
        ("mlp_out", 32, "blocks.1.hook_mlp_out", "model.layers.1.post_feedforward_layernorm.output"),
        ("model.layers.1.mlp.down_proj.input", 64, None, "model.layers.1.mlp.down_proj.input"),
        ("model.layers.1.mlp.gate_proj", 64, None, "model.layers.1.mlp.gate_proj.output"),
    ],
)
def test_trained_and_measured_at_another_place(
    site: str, width: int, hook: str | None, module: str, tiny_gemma3: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = options(tiny_gemma3, text_file, run, "--site", site, "--cache", str(tmp_path / "cache"))
    assert main([*argv, "--dry-run"]) == 0
    assert main(argv) == 0
    assert weights(run)["W_enc"].shape == (width, 48)
    assert json.loads((run / "config.json").read_text())["site"] == site
    request = json.loads((tmp_path / "cache" / "manifest.json").read_text())["request"]
    assert (request["site"], request["d_model"]) == (site, width)
    said = tsae.load(run).metadata
    assert (said["hook_name"], said["hf_hook_name"], said["hook_layer"]) == (hook or site, module, 1)

    # The autoencoder was trained on these activations, not on the residual stream.
    cfg, lm = open_run(run).config, load_language_model(str(tiny_gemma3), dtype="float32")
    seen: list[torch.Tensor] = []
    name, _, end = module.rpartition(".")
    watched = lm.model.get_submodule(name)
    if end == "input":
        handle = watched.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = watched.register_forward_hook(lambda _, args, output: seen.append(output))
    batches = evaluation_batches(cfg, lm, 8)
    with torch.no_grad():
        for batch in batches:
            lm.model(batch.tokens)
    handle.remove()
    x = torch.cat(seen)[:, 1:]
    segments = torch.cat([batch.segments for batch in batches])
    x = x[segments >= 0].double()
    expected = (x.mean(0), x)
    before = json.loads((run / "eval.json").read_text())
    with torch.no_grad():
        xhat = torch.cat(
            [open_run(run).sae(s[:, 1:], b.segments)[b.segments >= 0] for s, b in zip(seen, batches, strict=True)]
        )
    ev = 1 - (xhat.double() - x).square().sum() / (expected[1] - expected[0]).square().sum()
    assert before["explained_variance"] == pytest.approx(float(ev), abs=1e-3)

    assert evaluate.main([str(run)]) == 0
    after = json.loads((run / "eval.json").read_text())
    assert after["explained_variance"] == pytest.approx(before["explained_variance"], rel=1e-4)
    data = ["--model", str(tiny_gemma3), "--data", str(text_file), "--tokens", "256", "--ce-sequences", "1"]
    for asked, status in (([], 0), (["--layer", "1", "--site", site], 0), (["--layer", "1", "--site", "resid_pre"], 2)):
        assert evaluate.main([str(run / "sae"), *data, *asked]) == status
    assert site in dict(collect(run, 256)["run"]["facts"])["model"]
    assert export([str(run), "--to", "dictionary_learning", "--out", str(tmp_path / "dl"), "--drop-hysteresis"]) == 0
    trainer = json.loads((tmp_path / "dl" / "trainer_0" / "config.json").read_text())
    if hook is None:
        assert (trainer["trainer"]["submodule_name"], trainer["buffer"]["io"]) == (name, end.removesuffix("put"))
    else:
        assert (trainer["trainer"]["submodule_name"], trainer["buffer"]["io"]) == ("mlp_out_layer_1", "out")
    assert tsae.load(tmp_path / "dl").metadata["hook_name"] == (hook or site)


def test_a_source_of_another_tensor_of_the_same_name_is_refused(
    tiny_gemma3: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Gemma the MLP's module is not what the MLP adds to the residual stream."""
    source = tmp_path / "sae"
    sae = SparseAutoencoder(SAEConfig(d_in=32, d_sae=48, k=6, activation="topk")).eval()
    sae.save(source, hook_name="model.layers.1.mlp", hook_layer=1)
    more = ("--init-from", str(source), "--dry-run", "--site")
    assert main(options(tiny_gemma3, text_file, tmp_path / "run", *more, "mlp_out")) == 2
    said = "another tensor than blocks.1.hook_mlp_out; name that place with --site model.layers.1.mlp"
    assert said in capsys.readouterr().err
    assert main(options(tiny_gemma3, text_file, tmp_path / "run", *more, "model.layers.1.mlp")) == 0


def test_the_layer_of_a_path_must_be_the_runs(
    tiny_gemma3: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for site, said in (
        ("model.layers.2.mlp", "is in block 2, but the layer is 1; give --layer 2"),
        ("model.layers.1.mlp.gone", "has no module model.layers.1.mlp.gone"),
        ("mlp_post", "the site 'mlp_post' is unknown"),
    ):
        assert main(options(tiny_gemma3, text_file, tmp_path / "run", "--site", site)) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_key_of_a_cache_tells_places_apart(tiny_gemma3: Path) -> None:
    """A cache of the residual stream keeps the key it had before there were other places."""
    lm = load_language_model(str(tiny_gemma3), dtype="float32")
    cfg = TrainConfig(model=str(tiny_gemma3), layer=1)
    keys = [
        cache_key(replace(cfg, site=site), lm, torch.float32, 4)
        for site in ("resid_post", "resid_pre", "mlp_out", "attn_out", "model.layers.1.mlp")
    ]
    assert "site" not in keys[0]
    assert len({str(key) for key in keys}) == len(keys)


def test_the_card_names_the_place() -> None:
    for site, said in (
        ("resid_post", "the output of block 9:"),
        ("mlp_out", "`blocks.9.hook_mlp_out`:"),
        ("model.layers.9.mlp.down_proj", "`model.layers.9.mlp.down_proj`:"),
    ):
        cfg = TrainConfig(site=site)
        assert said in model_card(cfg.sae, "a/b", training=to_dict(cfg))
    earlier = {name: value for name, value in to_dict(TrainConfig()).items() if name != "site"}
    assert "the output of block 9:" in model_card(TrainConfig().sae, "a/b", training=earlier)
