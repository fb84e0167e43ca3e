"""Transcoders: from one place to another, through the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import options, weights

import tsae
from tsae import evaluate
from tsae.config import SAEConfig
from tsae.evaluation.held_out import evaluation_batches
from tsae.evaluation.subject import open_run
from tsae.lm.hooks import activations, logits_with
from tsae.lm.loading import load_language_model
from tsae.lm.site import from_hook_name
from tsae.sae.model import SparseAutoencoder
from tsae.train import main

pytestmark = pytest.mark.usefixtures("blank_report")


@pytest.mark.parametrize(
    ("site", "target", "widths"),
    [("mlp_in", "mlp_out", (32, 32)), ("mlp_in", "model.layers.1.mlp.down_proj.input", (32, 64))],
)
def test_trained_and_measured(
    site: str, target: str, widths: tuple[int, int], tiny_gemma3: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = options(tiny_gemma3, text_file, run, "--site", site, "--target", target, "--cache", str(tmp_path / "cache"))
    argv += ["--lm-dtype", "float32"]  # as below, so that only the order of sums differs
    assert main([*argv, "--dry-run"]) == 0
    assert main(argv) == 0
    tensors = weights(run)
    assert (tensors["W_enc"].shape, tensors["W_dec"].shape) == ((widths[0], 48), (48, widths[1]))
    request = json.loads((tmp_path / "cache" / "manifest.json").read_text())["request"]
    assert (request["site"], request["target"], request["d_model"]) == (site, target, sum(widths))
    sae = tsae.load(run)
    named = "blocks.1.hook_mlp_out" if target == "mlp_out" else target
    assert (sae.metadata["hook_name"], sae.metadata["hook_name_out"]) == ("blocks.1.hook_mlp_in", named)
    assert sae.metadata["hook_layer_out"] == 1

    # Explained variance and cross-entropy, with hooks written by hand.
    subject = open_run(run)
    lm = load_language_model(str(tiny_gemma3), dtype="float32")
    batches = evaluation_batches(subject.config, lm, 8)
    tokens = torch.cat([batch.tokens for batch in batches])
    segments = torch.cat([batch.segments for batch in batches])
    x = activations(lm, tokens, from_hook_name("blocks.1.hook_mlp_in"))[:, 1:]
    y = activations(lm, tokens, from_hook_name(named))[:, 1:]
    with torch.no_grad():
        yhat = subject.sae(x, segments)
    counted = segments >= 0
    error = (yhat - y)[counted].double().square().sum()
    spread = (y[counted].double() - y[counted].double().mean(0)).square().sum()
    metrics = json.loads((run / "eval.json").read_text())
    assert metrics["explained_variance"] == pytest.approx(1 - float(error / spread), abs=1e-3)

    def spliced(was: torch.Tensor) -> torch.Tensor:
        new = was.clone()
        new[:, 1:] = torch.where(counted[:4, :, None], yhat[:4], was[:, 1:])
        return new

    logits = logits_with(lm, tokens[:4], from_hook_name(named), spliced)
    predicts = (segments[:4, 1:] == segments[:4, :-1]) & counted[:4, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, 1:-1][predicts], tokens[:4, 2:][predicts])
    assert metrics["ce_loss_with_sae"] == pytest.approx(float(loss), abs=1e-4)

    assert evaluate.main([str(run)]) == 0
    after = json.loads((run / "eval.json").read_text())
    assert after["explained_variance"] == pytest.approx(metrics["explained_variance"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--target", "mlp_in"), "target and site are both blocks.1.hook_mlp_in; leave the target out"),
        (("--target", "resid_pre"), "is computed before the site"),
        (("--target", "blocks.0.hook_mlp_out"), "comes before the site"),
        (("--target", "mlp"), "the site 'mlp' is unknown"),
        (("--target", "mlp_out", "--buffer.max-norm-ratio", "4"), "a token then has two norms"),
        (
            ("--target", "mlp_out", "--sparse-step", "on", "--sae.gate-gradient", "0"),
            "encoder and decoder have other widths",
        ),
        (("--sae.d-out", "32", "--sae.no-apply-b-dec-to-input"), "but there is no target; name one with --target"),
    ],
)
def test_what_is_no_transcoder(
    more: tuple[str, ...], said: str, tiny_gemma3: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(options(tiny_gemma3, text_file, tmp_path / "run", "--site", "mlp_in", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("activation", ["topk", "schmitt", "jumprelu", "gelu", "relu"])
@pytest.mark.parametrize("offset", [0.0, 6000.0])
def test_folding(activation: str, offset: float) -> None:
    """On raw activations as on normalized ones, to float32's rounding also of a mean thousands of times the spread."""
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(
        SAEConfig(d_in=8, d_out=5, d_sae=20, k=4, activation=activation, apply_b_dec_to_input=False),
        generator=generator,
    )
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        sae.threshold.fill_(0.3)
        sae.release.fill_(0.1)
        sae.update_threshold_parameters()
    sae.eval()
    mean = torch.randn(8, generator=generator)
    mean[3] += offset
    target_mean = torch.randn(5, generator=generator)
    x = torch.randn(2, 30, 8, generator=generator)
    folded = sae.folded(mean, 25.0, target_mean, 3.0)
    assert folded.cfg.d_out == 5
    torch.testing.assert_close(
        folded(x * 25 + mean), sae(x) * 3.0 + target_mean, rtol=1e-4, atol=1e-4 if offset == 0 else 2e-2
    )
    torch.testing.assert_close(folded.W_dec.norm(dim=1), folded.W_dec.new_ones(20) * folded.W_dec.norm(dim=1).mean())
