"""The command line of evaluation, on the run of a tiny autoencoder."""

import json

import pytest
import torch
from evaluated_run import write_run
from test_evaluate import KEYS
from tiny import sample_text

from tsae.config import SAEConfig
from tsae.data.split import Split
from tsae.data.text import open_text
from tsae.evaluate import main
from tsae.evaluation import command as module
from tsae.rundir.directory import remove_run
from tsae.sae.model import SparseAutoencoder
from tsae.sae.rates import decision_rates, switch_costs
from tsae.utils.config_json import to_dict


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
