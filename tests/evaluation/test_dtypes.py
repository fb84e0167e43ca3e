"""Every pair of dtypes of language model and autoencoder: evaluation, encoding its activations, and splicing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from evaluated_run import write_run, write_saelens
from safetensors.torch import load_file, save_file
from tiny import sample_text

import tsae
from tsae.data.documents import Document
from tsae.data.sequences import SequenceStream
from tsae.evaluation.evaluator import evaluate, evaluate_all
from tsae.lm.hooks import activations, logits_with
from tsae.lm.loading import LanguageModel, load_language_model
from tsae.sae.model import SparseAutoencoder

DTYPES = ["float32", "bfloat16", "float16"]
LAYER = 1


@pytest.fixture(scope="module", params=DTYPES)
def lm(request: pytest.FixtureRequest, tiny_gemma3: Path) -> LanguageModel:
    return load_language_model(str(tiny_gemma3), dtype=request.param)


@pytest.fixture(scope="module")
def right(tiny_gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The figures in float32."""
    model = load_language_model(str(tiny_gemma3), dtype="float32")
    sae = autoencoder(tiny_gemma3, tmp_path_factory.mktemp("right"))
    return evaluate(sae, model, [batch(model)], layer=LAYER, ce_sequences=2).metrics


def autoencoder(model: Path, folder: Path, activation: str = "schmitt") -> SparseAutoencoder:
    return tsae.load(write_run(folder / "run", model, activation=activation))


def batch(model: LanguageModel) -> object:
    documents = lambda epoch: iter([Document("text", sample_text(500))])  # noqa: E731
    return SequenceStream(documents, model.tokenizer, 32).next_batch(4)


@pytest.mark.parametrize("own", [*DTYPES, "float64"])
def test_every_pair(own: str, lm, right, tiny_gemma3, tmp_path) -> None:
    sae, tokens = autoencoder(tiny_gemma3, tmp_path).to(getattr(torch, own)), batch(lm).tokens
    found = evaluate(sae, lm, [batch(lm)], layer=LAYER, ce_sequences=2).metrics
    exact = {own, str(lm.dtype).removeprefix("torch.")} <= {"float32", "float64"}
    for name in ("explained_variance", "l0", "ce_loss_with_sae", "ce_loss_without_sae"):
        assert found[name] == pytest.approx(right[name], rel=1e-4 if exact else 0.1), name
    x = activations(lm, tokens, LAYER)
    h = sae.encode(x)
    assert h.dtype == getattr(torch, own)
    assert h.isfinite().all()
    logits = logits_with(lm, tokens, LAYER, sae)
    assert logits.dtype == lm.dtype
    assert logits.isfinite().all()


@pytest.mark.parametrize("stored", [*DTYPES, "float64"])
def test_a_file_of_any_dtype(stored: str, tmp_path) -> None:
    """Loaded as float32, with the values of the file."""
    directory = write_saelens(tmp_path / "sae")
    file = directory / "sae_weights.safetensors"
    tensors = {name: tensor.to(getattr(torch, stored)) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    sae = tsae.load(directory)
    assert sae.W_enc.dtype == torch.float32
    assert torch.equal(sae.W_enc, tensors["W_enc"].float())


def test_weights_that_are_not_finite_are_named_though_the_metrics_are(lm, tiny_gemma3, tmp_path) -> None:
    sae = autoencoder(tiny_gemma3, tmp_path, "jumprelu")
    good = tsae.load(tmp_path / "run")
    sae.threshold[3] = math.nan  # the kernel takes the ReLU's 0 instead
    results = evaluate_all({"bad": sae, "good": good}, lm, [batch(lm)], layer=LAYER, ce_sequences=1)
    assert results["good"].not_finite() is None
    assert results["bad"].not_finite() == (
        "threshold has 1 values that are not finite, so the metrics mean nothing; its training diverged, or the file "
        "is damaged."
    )
    with pytest.raises(tsae.UserError, match="threshold has 1 values that are not finite"):
        evaluate(sae, lm, [batch(lm)], layer=LAYER, ce_sequences=1)
    sae.save(tmp_path / "bad")
    with pytest.raises(tsae.UserError, match="bad: threshold has 1 values that are not finite; its training diverged"):
        tsae.load(tmp_path / "bad")
