"""Evaluation of autoencoders whose scores are known, on a tiny language model, and its command line."""

import json
import math

import pytest
import torch
from evaluated_run import LAYER, write_run
from safetensors.torch import load_file
from tiny import sample_text
from torch import Tensor, nn

from tsae.config import SAEConfig
from tsae.data.sequences import TokenBatch
from tsae.data.split import Split
from tsae.data.text import open_text
from tsae.errors import UserError
from tsae.evaluate import evaluate, main, write_eval
from tsae.evaluation import command as module
from tsae.evaluation import evaluator as measure
from tsae.evaluation.catalogue import GROUPS
from tsae.evaluation.coding import Sample, coding_step
from tsae.evaluation.metrics import CodeLength
from tsae.lm.hooks import activations
from tsae.lm.loading import load_language_model
from tsae.reports.table import print_table
from tsae.rundir.directory import remove_run
from tsae.sae.model import SparseAutoencoder
from tsae.sae.rates import decision_rates, switch_costs
from tsae.utils.config_json import to_dict
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


@pytest.fixture
def run_dir(tmp_path, tiny_gemma3):
    return write_run(tmp_path / "run", tiny_gemma3)


def test_command_line(run_dir, capsys):
    assert main([str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "explained variance" in out
    first = json.loads((run_dir / "eval.json").read_text())
    assert set(first) == KEYS
    assert (run_dir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "sae" / "sparsity.safetensors").exists()
    assert main([str(run_dir), "--tokens", "300", "--ce-sequences", "1", "--seed", "3"]) == 0
    assert "384 tokens" in capsys.readouterr().out.replace("\n", " ")  # three sequences
    assert main([str(run_dir)]) == 0
    assert json.loads((run_dir / "eval.json").read_text()) == first


@pytest.fixture
def schmitt_run(run_dir):
    """The run with a Schmitt trigger."""
    set_config(run_dir, sae=to_dict(SAEConfig(d_in=32, d_sae=48, k=4, release_ratio=0.3)))
    sae = SparseAutoencoder(SAEConfig(d_in=32, d_sae=48, k=4, release_ratio=0.3))
    sae.threshold.fill_(2.0)
    sae.release.fill_(0.6)
    sae.save(run_dir / "sae")
    return run_dir


def test_command_line_with_another_release_ratio(schmitt_run, tmp_path, capsys):
    assert main([str(schmitt_run)]) == 0
    own = {path: path.read_bytes() for path in schmitt_run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([str(schmitt_run), "--release-ratio", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"Wrote {schmitt_run}/eval-release-1.json; the run's own eval.json and report.png are as they were." in out
    written = schmitt_run / "eval-release-1.json"
    assert {path: path.read_bytes() for path in schmitt_run.rglob("*") if path.is_file() and path != written} == own
    plain, hysteretic = json.loads(written.read_text()), json.loads((schmitt_run / "eval.json").read_text())
    assert set(plain) == KEYS | {"release", "source"}
    assert plain["source"] == {}
    assert plain["release"]["ratio"] == 1.0
    assert 0.3 < plain["release"]["threshold_factor"] < 0.99  # lower, as nothing is held on
    assert plain["l0"] == pytest.approx(hysteretic["l0"], rel=0.15)  # not the text that the factor was fitted on
    assert plain["release"]["training_l0"] == pytest.approx(hysteretic["l0"], rel=0.15)
    assert plain["temporal"]["persistence"] < hysteretic["temporal"]["persistence"] - 0.05

    assert main([str(schmitt_run), "--release-ratio", "0.3"]) == 0  # its own: nothing changes
    again = json.loads((schmitt_run / "eval-release-0.3.json").read_text())
    assert again["release"]["threshold_factor"] == pytest.approx(1.0, abs=1e-3)
    assert again["explained_variance"] == pytest.approx(hysteretic["explained_variance"], abs=1e-3)

    other = tmp_path / "other.txt"
    other.write_text(sample_text(200, seed=5))
    assert main([str(schmitt_run), "--release-ratio", "0.3", "--data", str(other)]) == 0
    assert "other.txt" in capsys.readouterr().out
    elsewhere = json.loads((schmitt_run / "eval-release-0.3.json").read_text())
    assert elsewhere["source"]["data"] == str(other)
    assert elsewhere["release"] == again["release"]  # fitted on the run's training text in both cases
    remove_run(schmitt_run)
    assert sorted(path.name for path in schmitt_run.iterdir()) == ["config.json"]


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ("1.5", "--release-ratio is 1.5; it must be from 0 to 1."),
        ("nan", "--release-ratio is nan"),
        (
            "0.3",
            "The autoencoder's activation is 'topk' (layer_norm 'none'); a release ratio needs one with thresholds",
        ),
    ],
)
def test_a_release_ratio_that_makes_no_sense_is_one_sentence(run_dir, capsys, ratio, message):
    before = sorted(run_dir.rglob("*"))
    assert main([str(run_dir), "--release-ratio", ratio]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert sorted(run_dir.rglob("*")) == before


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The decoded text of every segment of at least 30 tokens that reaches the metrics."""
    seen: list[str] = []
    real = module.evaluate_all

    def spy(saes, lm, batches, **options):
        seen.clear()
        for batch in batches:
            for row, ids in zip(batch.tokens[:, 1:], batch.segments, strict=True):
                segments = [row[ids == i] for i in ids.unique() if i >= 0]
                seen.extend(lm.tokenizer.decode(segment) for segment in segments if len(segment) >= 30)
        return real(saes, lm, batches, **options)

    monkeypatch.setattr(module, "evaluate_all", spy)
    return seen


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_command_line_at_another_length(schmitt_run, tmp_path, monkeypatch, capsys):
    """On the same tokens of the same documents, and without a change to the run's own evaluation."""
    fed, real = [], module.evaluate_all

    def spy(saes, lm, batches, **options):
        fed.append(torch.cat([batch.tokens[:, 1:].flatten() for batch in batches]))
        return real(saes, lm, batches, **options)

    monkeypatch.setattr(module, "evaluate_all", spy)
    assert main([str(schmitt_run)]) == 0
    own = json.loads((schmitt_run / "eval.json").read_text())
    assert own["length"] == 128
    files = {path: path.read_bytes() for path in schmitt_run.rglob("*") if path.is_file()}
    capsys.readouterr()
    out = tmp_path / "metrics.json"
    for length, lags in ((256, 8), (64, 6), (2, 1)):
        assert main([str(schmitt_run), "--length", str(length), "--out", str(out)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        written = schmitt_run / f"eval-length-{length}.json"
        assert f"Wrote {written}; the run's own eval.json and report.png are as they were." in said
        assert f"512 tokens, in sequences of {length}. Wrote" in said
        metrics = json.loads(written.read_text())
        assert metrics.pop("source") == {}
        assert metrics == json.loads(out.read_text())
        assert (metrics["length"], len(metrics["temporal"]["autocorrelation"])) == (length, lags)
        assert torch.equal(fed[-1], fed[0])
        written.unlink()
    assert {path: path.read_bytes() for path in schmitt_run.rglob("*") if path.is_file()} == files

    assert main([str(schmitt_run), "--length", "128"]) == 0  # the run's own
    assert json.loads((schmitt_run / "eval.json").read_text()) == own
    assert not list(schmitt_run.glob("eval-length-*"))


def test_another_length_and_another_release_ratio(schmitt_run, capsys):
    """The thresholds are fitted at the length of training, whatever is measured."""
    releases = []
    for options in ([], ["--length", "64"]):
        assert main([str(schmitt_run), "--release-ratio", "1", *options]) == 0
    for name in ("eval-release-1", "eval-release-1-length-64"):
        releases.append(json.loads((schmitt_run / f"{name}.json").read_text())["release"])
    assert releases[0] == releases[1]
    remove_run(schmitt_run)
    assert not list(schmitt_run.glob("eval-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "1"], "length is 1; it must be from 2 to 4096"),
        (["--length", "0"], "--length is 0; it must be at least 1"),
        (["--length", "4097"], "length is 4097; it must be from 2 to 4096"),
        (["--length", "512"], "takes at most 512 tokens at once, but 513 are fed"),
        (["--length", "64", "--format", "saebench"], "--format saebench with --length needs --out FILE"),
    ],
)
def test_a_length_that_cannot_be_measured(run_dir, capsys, options, message):
    assert main([str(run_dir), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(run_dir.glob("eval*"))


def test_runs_of_models_in_other_bits_need_one_to_be_named(run_dir, tmp_path, tiny_gemma3, capsys):
    other = write_run(tmp_path / "other", tiny_gemma3)
    set_config(other, lm_quantization="8bit")
    assert main([str(run_dir), str(other)]) == 2
    said = "The runs differ in lm_quantization (run: none, other: 8bit); name the one to measure with, with --lm-quant"
    assert said in capsys.readouterr().err
    out = tmp_path / "out.json"
    few = ["--tokens", "256", "--ce-sequences", "1"]
    assert main([str(run_dir), str(other), "--lm-quantization", "none", *few, "--out", str(out)]) == 0
    set_config(other, lm_quantization="none", revision="old")
    assert main([str(run_dir), str(other)]) == 2
    assert "The runs differ in revision (run: None, other: old)" in capsys.readouterr().err


def test_runs_of_different_lengths_need_one_to_be_named(run_dir, tmp_path, tiny_gemma3, capsys):
    other = write_run(tmp_path / "other", tiny_gemma3)
    set_config(other, length=64)
    assert main([str(run_dir), str(other)]) == 2
    assert "The runs differ in their length (run: 128, other: 64); name the one" in capsys.readouterr().err
    assert main([str(run_dir), str(other), "--length", "32", "--out", str(tmp_path / "out.json")]) == 0
    assert {each["length"] for each in json.loads((tmp_path / "out.json").read_text()).values()} == {32}


def set_config(run_dir, **values):
    path = run_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sides(data):
    """The training and held-out texts of a run on `data`."""
    return [[d.text for d in open_text(data, part=part, seed=0)] for part in ("train", "evaluation")]


def test_command_line_on_other_text(run_dir, tmp_path, measured, capsys):
    """One passage that is not in the run's training text is used completely, and the run records which text it was."""
    assert main([str(run_dir)]) == 0
    own, own_page = (run_dir / "eval.json").read_bytes(), (run_dir / "report.png").read_bytes()
    names = {path.name for path in run_dir.iterdir()}
    capsys.readouterr()
    other = tmp_path / "other.txt"
    other.write_text(sample_text(200, seed=5))
    assert main([str(run_dir), "--data", str(other)]) == 0
    assert measured
    assert all(text in other.read_text() for text in measured)
    assert set(json.loads((run_dir / "eval.json").read_text())) == KEYS
    source = json.loads((run_dir / "eval_source.json").read_text())
    assert source == {"data": str(other), "column": None, "part": "all but the run's training text"}
    assert "other.txt" in capsys.readouterr().out
    other_page = (run_dir / "report.png").read_bytes()
    assert main([str(run_dir)]) == 0
    assert (run_dir / "eval.json").read_bytes() == own
    assert (run_dir / "report.png").read_bytes() == own_page != other_page
    assert {path.name for path in run_dir.iterdir()} == names


def test_text_that_the_run_trained_on_is_never_measured(run_dir, tmp_path, measured, capsys):
    """A copy, an excerpt and a mixture of the run's text, even too short for an independent split."""
    data = write_rows(tmp_path / "rows.jsonl", [sample_text(60, seed) for seed in range(90)])
    set_config(run_dir, data=data)
    train, held_out = sides(data)
    assert len(held_out) > 1
    new = [sample_text(60, seed) for seed in range(100, 104)]
    new = [text for text in new if not Split("evaluation", 0.05).contains(text)]
    assert new
    for texts, allowed in ((train + held_out, held_out), (train[:3] + new, new), ([*train[:9], held_out[0]], held_out)):
        assert main([str(run_dir), "--data", write_rows(tmp_path / "x.jsonl", texts)]) == 0
        assert measured
        assert all(any(text in whole for whole in allowed) for text in measured)
    capsys.readouterr()
    for texts in (train[:1], train[:3]):
        assert main([str(run_dir), "--data", write_rows(tmp_path / "x.jsonl", texts)]) == 2
        assert "is training text of the run" in capsys.readouterr().err


def test_the_split_of_few_documents_holds_for_other_text(run_dir, tmp_path, measured):
    """No hash of the run's few documents is below the share, so its threshold moved; it must move for a copy too."""
    texts = [
        text for text in (sample_text(60, seed) for seed in range(40)) if not Split("evaluation", 0.3).contains(text)
    ]
    data = write_rows(tmp_path / "few.jsonl", texts[:4])
    set_config(run_dir, data=data)
    train, held_out = sides(data)
    assert main([str(run_dir), "--data", write_rows(tmp_path / "x.jsonl", texts)]) == 0
    assert measured
    assert not any(text in whole for text in measured for whole in train)
    assert any(text in held_out[0] for text in measured)


def test_a_small_text_cannot_be_told_from_training_text_that_is_not_here(run_dir, tmp_path, capsys):
    set_config(run_dir, data="someone/streamed")
    train, held_out = sides(write_rows(tmp_path / "x.jsonl", [sample_text(60, seed) for seed in range(80)]))
    assert main([str(run_dir), "--data", write_rows(tmp_path / "x.jsonl", train[:3])]) == 2
    assert "'someone/streamed' is not on this machine: name a larger text" in capsys.readouterr().err
    assert main([str(run_dir), "--data", write_rows(tmp_path / "x.jsonl", train + held_out)]) == 0


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda run: (run / "config.json").unlink(), [], "config.json"),
        (lambda run: (run / "sae" / "cfg.json").unlink(), [], "sae"),
        (lambda run: (run / "config.json").write_text("{"), [], "JSON"),
        (lambda run: None, ["--tokens", "0"], "--tokens is 0"),
        (lambda run: None, ["--data", "/no/such/file.txt"], "file"),
        (lambda run: None, ["--device", "quantum"], "quantum"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(run_dir, capsys, spoil, options, message):
    spoil(run_dir)
    before = sorted(run_dir.rglob("*"))
    assert main([str(run_dir), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert "Traceback" not in error
    assert sorted(run_dir.rglob("*")) == before


def test_no_such_run(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "no run directory" in capsys.readouterr().err


def test_command_line_with_another_hysteresis(run_dir, capsys):
    cfg = SAEConfig(d_in=32, d_sae=48, k=4, activation="rate", gate_gradient=0.2)
    set_config(run_dir, sae=to_dict(cfg))
    sae = SparseAutoencoder(cfg)
    sae.rates.copy_(torch.stack([torch.full((48,), 0.05), torch.full((48,), 0.5)]))
    sae.bit_price.fill_(0.6)
    costs = switch_costs(decision_rates(sae.rates, cfg.amplitude_bits, cfg.release_ratio), cfg.amplitude_bits)
    sae.threshold.copy_((sae.bit_price * costs.from_off).sqrt())
    sae.release.copy_((sae.bit_price * costs.from_on).sqrt())
    sae.save(run_dir / "sae")
    assert main([str(run_dir)]) == 0
    capsys.readouterr()
    for kind in ("two-sided", "path"):
        assert main([str(run_dir), "--hysteresis", kind]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"Wrote {run_dir}/eval-hysteresis-{kind}.json; the run's own eval.json and report.png are as" in out
    causal, sided, path = (
        json.loads((run_dir / f"eval{name}.json").read_text())
        for name in ("", "-hysteresis-two-sided", "-hysteresis-path")
    )
    assert set(path) == KEYS | {"source", "hysteresis"}
    assert path["hysteresis"] == "path"
    assert sided["l0"] > causal["l0"]
    assert path["temporal"]["support_bits"] != causal["temporal"]["support_bits"]
    remove_run(run_dir)
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hysteresis", "two-sided"], "activation is 'topk'; only schmitt and rate have hysteresis"),
        (["--hysteresis", "path", "--release-ratio", "1"], "--hysteresis and --release-ratio change"),
        (["--hysteresis", "path", "--format", "saebench"], "--hysteresis and --format saebench change"),
    ],
)
def test_a_hysteresis_that_makes_no_sense_is_one_sentence(run_dir, capsys, options, message):
    before = sorted(run_dir.rglob("*"))
    assert main([str(run_dir), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert sorted(run_dir.rglob("*")) == before
