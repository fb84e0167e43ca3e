"""Evaluation of autoencoders whose scores are known, on a tiny language model."""

import json
import math

import pytest
import torch
from evaluated_run import LAYER
from safetensors.torch import load_file
from torch import Tensor, nn

from tsae.config import SAEConfig
from tsae.data.sequences import TokenBatch
from tsae.errors import UserError
from tsae.evaluate import evaluate, write_eval
from tsae.evaluation import evaluator as measure
from tsae.evaluation.catalogue import GROUPS
from tsae.evaluation.coding import Sample, coding_step
from tsae.evaluation.metrics import CodeLength
from tsae.lm.hooks import activations
from tsae.lm.loading import load_language_model
from tsae.reports.table import print_table
from tsae.sae.model import SparseAutoencoder
from tsae.utils.nested import flatten

KEYS = {
    "explained_variance",
    "explained_variance_legacy",
    "explained_variance_saebench",
    "mse",
    "cossim",
    "l2_ratio",
    "relative_reconstruction_bias",
    "l0",
    "l1",
    "frac_alive",
    "ce_loss_without_sae",
    "ce_loss_with_sae",
    "ce_loss_with_ablation",
    "ce_loss_with_mean_ablation",
    "ce_loss_score",
    "ce_loss_score_mean_ablation",
    "kl_div_score",
    "length",
    "massive",
    "temporal",
}
MASSIVE_KEYS = {"explained_variance_without", "tokens", "norm_share", "norm_ratio"}
TEMPORAL_KEYS = {
    "relative_difference",
    "relative_difference_per_feature",
    "autocorrelation",
    "persistence",
    "persistence_excess",
    "persistence_excess_shuffled",
    "transitions",
    "smoothness",
    "support_bits",
    "support_bits_memoryless",
    "amplitude_bits",
    "total_bits",
    "support_bits_shuffled",
    "support_bits_memoryless_shuffled",
    "amplitude_bits_shuffled",
    "total_bits_shuffled",
}


class Fake(nn.Module):
    """h = (x - m)+ and (m - x)+; the reconstruction is `scale` of the way from m to x."""

    def __init__(self, mean: Tensor, scale: float) -> None:
        super().__init__()
        self.mean, self.scale = nn.Parameter(mean), scale

    def encode(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        assert x.dtype == torch.float32
        assert not self.training
        y = x - self.mean
        return torch.cat([y.relu(), (-y).relu()], dim=-1)

    def decode(self, h: Tensor) -> Tensor:
        plus, minus = h.chunk(2, dim=-1)
        return self.mean + self.scale * (plus - minus)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(x, segments))


@pytest.fixture(scope="module")
def lm(tiny_gemma3):
    return load_language_model(str(tiny_gemma3), dtype="float32")


@pytest.fixture
def batch(lm) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 300, (6, 33), generator=generator)
    tokens[:, 0] = lm.prefix_id
    segments = torch.zeros(6, 32, dtype=torch.int32)
    segments[1, 11:] = 1
    segments[2, 20:] = -1
    segments[3, 5] = -1
    return TokenBatch(tokens, segments)


def test_exact_keys_and_finite_values(lm, batch):
    result = evaluate(Fake(torch.zeros(32), 0.8), lm, [batch], layer=LAYER, lm_batch=2)
    assert set(result.metrics) == KEYS
    temporal = result.metrics["temporal"]
    assert set(temporal) == TEMPORAL_KEYS
    assert set(result.metrics["massive"]) == MASSIVE_KEYS
    for name in ("relative_difference", "relative_difference_per_feature"):
        assert list(temporal[name]) == ["1", "4", "16"]  # below the 32 tokens of a sequence
    assert list(temporal["transitions"]) == ["on_on", "on_off", "off_on", "off_off"]
    assert sum(temporal["transitions"].values()) == pytest.approx(1)
    assert json.loads(json.dumps(result.metrics, allow_nan=False)) == result.metrics
    assert result.tokens == int((batch.segments >= 0).sum())
    assert result.density.shape == (64,)
    assert set(result.autocorrelation_curve) == {1, 2, 4, 8, 16}
    assert result.metrics["length"] == 32


def test_the_catalogue_lists_every_metric():
    listed = [metric.key for group in GROUPS.values() for metric in group]
    assert sorted(listed) == sorted(
        [
            *KEYS - {"massive", "temporal"},
            *(f"massive.{key}" for key in MASSIVE_KEYS),
            *(f"temporal.{key}" for key in TEMPORAL_KEYS),
        ]
    )


def test_a_perfect_autoencoder(lm, batch):
    metrics = evaluate(Fake(torch.zeros(32), 1.0), lm, [batch], layer=LAYER).metrics
    for key in ("explained_variance", "cossim", "ce_loss_score", "kl_div_score", "l2_ratio"):
        assert metrics[key] == pytest.approx(1, abs=1e-5), key
    assert metrics["ce_loss_with_sae"] == pytest.approx(metrics["ce_loss_without_sae"], abs=1e-5)
    assert metrics["ce_loss_with_ablation"] != pytest.approx(metrics["ce_loss_without_sae"], abs=1e-2)


def test_autoencoders_that_are_the_ablations(lm, batch):
    zero = evaluate(Fake(torch.zeros(32), 0.0), lm, [batch], layer=LAYER, ce_sequences=6)
    assert zero.metrics["ce_loss_with_sae"] == pytest.approx(zero.metrics["ce_loss_with_ablation"], abs=1e-6)
    assert zero.metrics["ce_loss_score"] == pytest.approx(0, abs=1e-6)
    assert zero.metrics["kl_div_score"] == pytest.approx(0, abs=1e-6)
    x = activations(lm, batch.tokens, LAYER)[:, 1:][batch.segments >= 0]
    mean = evaluate(Fake(x.mean(0), 0.0), lm, [batch], layer=LAYER, ce_sequences=6).metrics
    assert mean["explained_variance"] == pytest.approx(0, abs=1e-5)
    assert mean["ce_loss_with_sae"] == pytest.approx(mean["ce_loss_with_mean_ablation"], abs=1e-5)
    reference = evaluate(Fake(torch.zeros(32), 0.0), lm, [batch], layer=LAYER, reference_mean=torch.zeros(32)).metrics
    assert reference["ce_loss_with_mean_ablation"] == pytest.approx(reference["ce_loss_with_ablation"])


def test_bos_and_excluded_positions_keep_their_activation(lm, batch, monkeypatch):
    seen = []

    def spy(lm, tokens, layer, replace):
        if replace is not None:
            x = torch.randn(*tokens.shape, 32)
            seen.append((x, replace(x)))
        return torch.zeros(*tokens.shape, 5)

    monkeypatch.setattr(measure, "logits_with", spy)
    batch = batch._replace(tokens=batch.tokens.clamp(max=4))
    evaluate(Fake(torch.zeros(32), 0.0), lm, [batch], layer=LAYER, lm_batch=6, reference_mean=torch.ones(32))
    kept = torch.cat([torch.ones(6, 1, dtype=torch.bool), batch.segments < 0], dim=1)
    assert len(seen) == 3
    for (x, out), value in zip(seen, (0.0, 0.0, 1.0), strict=True):
        assert torch.equal(out[kept], x[kept])
        assert torch.equal(out[~kept], torch.full_like(x[~kept], value))


def test_an_autoencoder_of_zeros(lm, batch):
    """The metrics of a run with only dead features: EV = -|mean|^2 / Var, and L0 and the ratio of norms 0."""
    sae = SparseAutoencoder(SAEConfig(d_in=32, d_sae=48, activation="relu"))
    for parameter in sae.parameters():
        parameter.data.zero_()
    x = activations(lm, batch.tokens, LAYER)[:, 1:][batch.segments >= 0].double()
    metrics = evaluate(sae, lm, [batch], layer=LAYER).metrics
    expected = -x.mean(0).square().sum() / x.var(0, correction=0).sum()
    assert metrics["explained_variance"] == pytest.approx(float(expected))
    assert expected < -0.01  # otherwise any score near 0 would pass
    for key in ("l0", "l1", "l2_ratio", "cossim", "frac_alive", "ce_loss_score", "kl_div_score"):
        assert metrics[key] == pytest.approx(0, abs=1e-6), key
    assert metrics["temporal"]["persistence_excess"] == metrics["temporal"]["persistence_excess_shuffled"] == 0


def test_batching_changes_nothing(lm, batch):
    whole = evaluate(Fake(torch.zeros(32), 0.7), lm, [batch], layer=LAYER, ce_sequences=5).metrics
    parts = [
        TokenBatch(batch.tokens[:4], batch.segments[:4]),
        TokenBatch(batch.tokens[4:], batch.segments[4:]),
    ]
    split = evaluate(
        Fake(torch.zeros(32), 0.7), lm, parts, layer=LAYER, ce_sequences=5, lm_batch=2, harvest_batch=3
    ).metrics
    for metrics in (whole, split):
        metrics.pop("explained_variance_legacy")  # about each batch's own mean, by definition
        for key in [key for key in metrics["temporal"] if key.endswith("_shuffled")]:
            metrics["temporal"].pop(key)  # random
    for (key, a), (_, b) in zip(flatten(whole).items(), flatten(split).items(), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6), key


def test_the_seed_decides_the_shuffled_control(lm, batch):
    def control(seed: int) -> float:
        sae = Fake(torch.zeros(32), 1.0)
        return evaluate(sae, lm, [batch], layer=LAYER, seed=seed).metrics["temporal"]["persistence_excess_shuffled"]

    assert control(0) == control(0)
    assert control(0) != control(1)


def test_bits_are_counted_in_one_half_of_the_text_and_charged_in_the_other(lm, batch):
    sae = Fake(torch.zeros(32), 0.7)
    x = activations(lm, batch.tokens, LAYER)[:, 1:]
    code, half = CodeLength(), (torch.arange(6) >= 3).int()[:, None].expand(6, 32)
    sae.eval()
    code.update(sae.encode(x), batch.segments, half)
    for size in (6, 4, 1):
        metrics = evaluate(sae, lm, [batch], layer=LAYER, harvest_batch=size).metrics
        norms = torch.full((64,), 0.7)
        step = coding_step(sae, Sample(x, x, batch.segments), math.sqrt(metrics["mse"]), norms)
        expected = code.compute(step, norms)
        found = {name: metrics["temporal"][name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-3)
        assert metrics["temporal"]["total_bits_shuffled"] > 0


def test_an_autoencoder_with_values_below_0_has_no_bits(lm, batch):
    sae = SparseAutoencoder(SAEConfig(d_in=32, d_sae=48, activation="gelu"))
    temporal = evaluate(sae, lm, [batch], layer=LAYER).metrics["temporal"]
    assert set(temporal) == {key for key in TEMPORAL_KEYS if "bits" not in key}


def test_bits_of_an_autoencoder_without_error_are_finite(lm, batch):
    temporal = evaluate(Fake(torch.zeros(32), 1.0), lm, [batch], layer=LAYER).metrics["temporal"]
    assert 10 < temporal["amplitude_bits"] / 32 < 40  # 32 values a token, as exact as float32


@pytest.mark.parametrize("input_scale", [1.0, 3.0])
def test_decoder_norms_of_any_affine_decoder(input_scale):
    sae = SparseAutoencoder(SAEConfig(d_in=32, d_sae=2000, activation="gelu", input_scale=input_scale))
    sae.W_dec.data.mul_(torch.rand(2000, 1))
    sae.b_dec.data.normal_()

    class Other(nn.Module):
        decode = staticmethod(sae.decode)
        parameters = staticmethod(sae.parameters)

    expected = input_scale * sae.W_dec.norm(dim=1)
    for one in (sae, Other()):
        torch.testing.assert_close(measure.decoder_norms(one, 2000), expected, check_dtype=False, atol=1e-5, rtol=1e-5)


def test_progress_starts_at_zero_and_ends_at_its_totals(lm, batch):
    calls = []
    evaluate(
        Fake(torch.zeros(32), 1.0),
        lm,
        [batch],
        layer=LAYER,
        ce_sequences=5,
        lm_batch=2,
        harvest_batch=4,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [
        ("features", 0, 192),
        ("features", 128, 192),
        ("features", 192, 192),
        ("predictions", 0, 160),
        ("predictions", 64, 160),
        ("predictions", 128, 160),
        ("predictions", 160, 160),
    ]


def test_training_mode_is_restored(lm, batch):
    sae = Fake(torch.zeros(32), 1.0).train()
    evaluate(sae, lm, [batch], layer=LAYER, ce_sequences=0)
    assert sae.training


def test_nothing_to_evaluate_and_broken_weights(lm, batch):
    excluded = batch._replace(segments=torch.full_like(batch.segments, -1))
    for empty in ([], [excluded]):
        with pytest.raises(UserError, match="no token"):
            evaluate(Fake(torch.zeros(32), 1.0), lm, empty, layer=LAYER)
    with pytest.raises(UserError, match=r"explained_variance is nan"):
        evaluate(Fake(torch.zeros(32), math.nan), lm, [batch], layer=LAYER)


def test_the_real_autoencoder_in_every_activation(lm, batch):
    for activation in ("relu", "topk", "batchtopk", "schmitt"):
        sae = SparseAutoencoder(SAEConfig(d_in=32, d_sae=48, k=4, activation=activation))
        sae.threshold.fill_(0.1)
        sae.release.fill_(0.03)
        metrics = evaluate(sae, lm, [batch], layer=LAYER).metrics
        assert metrics["l0"] > 0
        if activation == "topk":
            assert metrics["l0"] <= 4


def test_written_files(lm, batch, tmp_path):
    result = evaluate(Fake(torch.zeros(32), 1.0), lm, [batch], layer=LAYER)
    result.density[3] = 0
    write_eval(result, tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text()) == result.metrics
    sparsity = load_file(tmp_path / "sae" / "sparsity.safetensors")["sparsity"]
    assert sparsity.dtype == torch.float32
    assert sparsity[3] == -10
    torch.testing.assert_close(10.0 ** sparsity[:3].double(), result.density[:3], rtol=1e-5, atol=0)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["eval.json", "sae", "sparsity.safetensors"]

    before = (tmp_path / "eval.json").read_bytes()
    result.metrics["l0"] = math.nan
    with pytest.raises(ValueError):
        write_eval(result, tmp_path)
    assert (tmp_path / "eval.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["eval.json", "sae", "sparsity.safetensors"]


def test_table_names_groups_and_units(lm, batch, capsys):
    print_table(evaluate(Fake(torch.zeros(32), 1.0), lm, [batch], layer=LAYER).metrics)
    table = capsys.readouterr().out
    for word in (
        "Reconstruction",
        "Quality and code length",
        "total bits",
        "Sparsity",
        "Language model",
        "Temporal",
        "nats/token",
        "lag 16",
        "on to off",
    ):
        assert word in table
