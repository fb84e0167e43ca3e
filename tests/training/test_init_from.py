"""`--init-from`: a run starts with the features and reconstructions of an existing autoencoder, or refuses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import fork, run_jobs
from safetensors.torch import save_file
from tiny_runs import lines, options, weights
from tiny_sae import D_IN, D_SAE, make
from torch import Tensor

import tsae
from tsae.config import TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.errors import UserError
from tsae.rundir.directory import read_config
from tsae.sae.normalization import InputNormalizer
from tsae.sae.rates import decision_rates, switch_costs
from tsae.sae.release import with_release_ratio
from tsae.train import main
from tsae.training.init_from import adopted, differences, field_names, warm_start
from tsae.training.trainer import Trainer
from tsae.utils.cli import given_options

K = 5


def raw(seed: int = 1, scale: float = 3.0) -> Tensor:
    """Activations [3, 20, D_IN] with a mean many times their spread."""
    generator = torch.Generator().manual_seed(seed)
    mean = 20 * torch.randn(D_IN, generator=generator)
    return mean + scale * torch.randn(3, 20, D_IN, generator=generator)


def foreign(mean: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Weights of another library's autoencoder for such activations: decoder rows of all norms."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {"b_dec": mean + tensors["b_dec"]}


def saelens(directory: Path, tensors: dict[str, Tensor], **values: Any) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "sae_weights.safetensors")
    base = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "metadata": {"sae_lens_version": "6.54.0"}}
    (directory / "cfg.json").write_text(json.dumps(base | values))
    return directory


def linear(tensors: dict[str, Tensor], bias: str = "b_dec") -> dict[str, Tensor]:
    layers = {"encoder.weight": tensors["W_enc"].T.contiguous(), "encoder.bias": tensors["b_enc"]}
    return layers | {"decoder.weight": tensors["W_dec"].T.contiguous(), bias: tensors["b_dec"]}


def pickled(directory: Path, state: dict[str, Any], kind: str) -> Path:
    directory.mkdir()
    torch.save(state, directory / "ae.pt")
    (directory / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind}}))
    return directory


def gemma_scope(directory: Path, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir()
    np.savez(directory / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    return directory


def sparsify(directory: Path, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir()
    stored = linear(tensors) | {"W_dec": tensors["W_dec"]}
    del stored["decoder.weight"]
    save_file(stored, directory / "sae.safetensors")
    (directory / "cfg.json").write_text(json.dumps({"d_in": D_IN, "num_latents": D_SAE, "k": K}))
    return directory


def threshold(shared: bool = False) -> Tensor:
    return torch.full((D_SAE,), 1.5) if shared else torch.linspace(0.0, 4.0, D_SAE)


THETA = {"k": torch.tensor(K), "threshold": torch.tensor(1.5)}
OTHERS: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "SAELens standard": lambda path, w: saelens(path, w),
    "SAELens standard, b_dec kept": lambda path, w: saelens(path, w, apply_b_dec_to_input=False),
    "SAELens topk": lambda path, w: saelens(path, w, architecture="topk", k=K),
    "SAELens jumprelu": lambda path, w: saelens(path, w | {"threshold": threshold()}, architecture="jumprelu"),
    "dictionary_learning": lambda path, w: pickled(path, linear(w, "bias"), "AutoEncoder"),
    "dictionary_learning topk": lambda path, w: pickled(path, linear(w) | {"k": torch.tensor(K)}, "AutoEncoderTopK"),
    "dictionary_learning batchtopk": lambda path, w: pickled(path, linear(w) | THETA, "BatchTopKSAE"),
    "T-SAE": lambda path, w: pickled(path, linear(w) | THETA, "TemporalBatchTopKSAE"),
    "sparsify": sparsify,
    "Gemma Scope": lambda path, w: gemma_scope(path, w | {"threshold": threshold()}),
}


def config(source: Path | str, *given: str, **changes: Any) -> TrainConfig:
    """The configuration of a run that starts from `source`; `given` options have the values in `changes`."""
    cfg = TrainConfig(init_from=str(source), steps=4, batch=3)
    sae = replace(cfg.sae, **{name[4:]: value for name, value in changes.items() if name.startswith("sae_")})
    others = {name: value for name, value in changes.items() if not name.startswith("sae_")}
    return adopted(
        replace(cfg, sae=sae, **others), {f"sae.{name[4:]}" for name in changes if name[:4] == "sae_"} | set(given)
    )


def started(cfg: TrainConfig, x: Tensor) -> Trainer:
    source = tsae.load(cfg.init_from)
    normalizer = InputNormalizer.estimate(x) if cfg.normalize else InputNormalizer.identity(D_IN)
    start = warm_start(cfg, source, normalizer)
    trainer = Trainer(cfg, start.normalizer, torch.device("cpu"), autocast=False)
    trainer.start_from(start)
    return trainer


@torch.no_grad()
def check_equal(cfg: TrainConfig, x: Tensor, per_feature: Tensor | float = 1.0) -> None:
    """The finished autoencoder of step 0 is the source; features times `per_feature`."""
    source, sae = tsae.load(cfg.init_from), started(cfg, x).finished()
    segments = torch.zeros(x.shape[:2], dtype=torch.int32)
    segments[:, 9:] = 1
    expected, found = source.encode(x, segments), sae.encode(x, segments)
    assert 0 < (expected > 0).float().mean() < 0.9
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected * per_feature, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(sae.decode(found), source(x, segments), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_step_0_is_the_source_of_another_library(name: str, normalize: bool, tmp_path: Path) -> None:
    x = raw()
    path = OTHERS[name](tmp_path / "source", foreign(x.mean((0, 1))))
    given = ["sae.k"] if "jumprelu" in name or "Scope" in name else []
    cfg = config(path, *given, normalize=normalize)
    source = tsae.load(path)
    assert (cfg.sae.d_sae, cfg.sae.d_in, cfg.sae.activation) == (D_SAE, D_IN, source.cfg.activation)
    assert not cfg.sae.unit_norm_decoder
    assert differences(cfg, source) == []
    check_equal(cfg, x)


OURS: dict[str, dict[str, Any]] = {
    "schmitt": {},
    "rate": {"activation": "rate"},
    "rate path": {"activation": "rate", "hysteresis": "path"},
    "schmitt exact": {"steering": "exact"},
    "schmitt two-sided": {"hysteresis": "two-sided", "release_ratio": 0.5},
    "topk": {"activation": "topk"},
    "batchtopk": {"activation": "batchtopk"},
    "jumprelu": {"activation": "jumprelu"},
    "jumprelu_schmitt": {"activation": "jumprelu_schmitt"},
    "relu": {"activation": "relu"},
    "relu, b_dec kept": {"activation": "relu", "apply_b_dec_to_input": False},
    "gelu": {"activation": "gelu"},
    "layer norm pre": {"activation": "relu", "layer_norm": "pre"},
    "layer norm post": {"activation": "topk", "layer_norm": "post"},
    "matryoshka": {"activation": "batchtopk", "groups": (8, D_SAE)},
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", OURS)
def test_step_0_is_the_source_of_our_own(name: str, normalize: bool, tmp_path: Path) -> None:
    x = raw()
    sae = make(**OURS[name])
    sae.release.copy_(sae.threshold * sae.cfg.release_ratio)
    if sae.cfg.kind.rates:  # of a feature that lasts 2 tokens
        sae.rates.copy_(torch.tensor([[0.05], [0.5]]).expand(2, D_SAE))
        decisive = decision_rates(sae.rates, sae.cfg.amplitude_bits, sae.cfg.release_ratio)
        costs = switch_costs(decisive, sae.cfg.amplitude_bits)
        sae.bit_price.copy_(sae.threshold[0] ** 2 / costs.from_off[0])
        sae.threshold.copy_((sae.bit_price * costs.from_off).sqrt())
        sae.release.copy_((sae.bit_price * costs.from_on).sqrt())
    sae.folded(x.mean((0, 1)) + 1, 2.0).save(tmp_path, trained_with="x")
    cfg = config(tmp_path, normalize=normalize)
    own = tsae.load(tmp_path).cfg
    fields = ["activation", "release_ratio", "hysteresis", "steering", "layer_norm", "groups"]
    for field in fields + ["k"] * own.kind.k_sparse:  # to relu and gelu it means nothing
        assert getattr(cfg.sae, field) == getattr(own, field)
    assert cfg.sae.unit_norm_decoder
    if name == "gelu" or "norm" in name:
        assert started(cfg, x).normalizer.scale == (own.input_scale if normalize else 1.0)
        x = x.mean((0, 1)) + (x - x.mean((0, 1))) / 2  # gelu has no zeros, so that all features count
        torch.testing.assert_close(started(cfg, x).finished()(x), tsae.load(tmp_path)(x), rtol=1e-4, atol=1e-3)
    else:
        check_equal(cfg, x)


@pytest.mark.parametrize("name", OURS)
def test_training_goes_on_from_there(name: str, tmp_path: Path) -> None:
    """A step at a vanishing learning rate keeps the function, so nothing is started anew at the first batch."""
    x = raw()
    sae = make(**OURS[name])
    sae.release.copy_(sae.threshold * sae.cfg.release_ratio)
    if sae.cfg.kind.rates:  # of a feature that lasts 2 tokens
        sae.rates.copy_(torch.tensor([[0.05], [0.5]]).expand(2, D_SAE))
        decisive = decision_rates(sae.rates, sae.cfg.amplitude_bits, sae.cfg.release_ratio)
        costs = switch_costs(decisive, sae.cfg.amplitude_bits)
        sae.bit_price.copy_(sae.threshold[0] ** 2 / costs.from_off[0])
        sae.threshold.copy_((sae.bit_price * costs.from_off).sqrt())
        sae.release.copy_((sae.bit_price * costs.from_on).sqrt())
    sae.folded(x.mean((0, 1)), 3.0).save(tmp_path, trained_with="x")
    cfg = config(tmp_path)
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, lr=1e-12))
    trainer = started(cfg, x)
    before = trainer.sae.threshold.clone()
    trainer.train_step(ActivationBatch(x, torch.zeros(x.shape[:2], dtype=torch.int32)))
    for key, value in started(cfg, x).sae.named_parameters():
        if "threshold" not in key:
            torch.testing.assert_close(dict(trainer.sae.named_parameters())[key], value, rtol=1e-5, atol=1e-5)
    # The controller moves by at most exp(0.3) a step, a running mean by a twentieth of the way.
    if trainer.sae.cfg.kind.stores_threshold:
        assert before.min() > 0
        factor = trainer.sae.threshold / before
        assert factor.min() > 0.7
        assert factor.max() < 1.4


def test_unit_norm_rescales_features_where_that_changes_nothing(tmp_path: Path) -> None:
    x = raw()
    tensors = foreign(x.mean((0, 1)))
    norms = tensors["W_dec"].norm(dim=1)
    for name in ("SAELens standard", "Gemma Scope"):
        path = OTHERS[name](tmp_path / name, tensors)
        cfg = config(path, "sae.k", sae_unit_norm_decoder=True)
        assert cfg.sae.unit_norm_decoder
        torch.testing.assert_close(started(cfg, x).sae.W_dec.norm(dim=1), torch.ones(D_SAE))
        check_equal(cfg, x, norms)
    for name in ("SAELens topk", "T-SAE"):
        with pytest.raises(UserError, match="features cannot be rescaled one by one; use --sae"):
            config(OTHERS[name](tmp_path / name, tensors), sae_unit_norm_decoder=True)
    tensors["W_dec"][3] = 0
    with pytest.raises(UserError, match=r"1 decoder rows of .* are 0"):
        config(saelens(tmp_path / "zero", tensors), sae_unit_norm_decoder=True)


def test_another_activation_starts_as_near_as_it_can(tmp_path: Path) -> None:
    x = raw()
    w = foreign(x.mean((0, 1)))
    batch = OTHERS["dictionary_learning batchtopk"](tmp_path / "batch", w)
    cfg = config(batch, sae_activation="schmitt", sae_release_ratio=1.0)
    assert differences(cfg, tsae.load(batch)) == ["sae.activation is schmitt and was batchtopk"]
    check_equal(cfg, x)  # at a release ratio of 1 the same features
    cfg = config(batch, sae_activation="jumprelu_schmitt", sae_release_ratio=0.5)
    sae = started(cfg, x).finished()
    torch.testing.assert_close(sae.threshold, torch.full((D_SAE,), 1.5))
    torch.testing.assert_close(sae.release, torch.full((D_SAE,), 0.75))
    jump = OTHERS["SAELens jumprelu"](tmp_path / "jump", w)
    cfg = config(jump, sae_activation="batchtopk", sae_k=7)
    torch.testing.assert_close(started(cfg, x).finished().threshold, threshold())
    cfg = config(jump, sae_activation="schmitt", sae_k=7)  # one threshold for all: that of the first batch
    assert not started(cfg, x).controller.started
    cfg = config(OTHERS["sparsify"](tmp_path / "topk", w), sae_activation="schmitt")
    assert (cfg.sae.k, cfg.sae.activation) == (K, "schmitt")
    trainer = started(cfg, x)
    assert not trainer.controller.started
    trainer.train_step(ActivationBatch(x, torch.zeros(x.shape[:2], dtype=torch.int32)))
    assert trainer.controller.started


def test_options_that_do_not_fit_the_source(tmp_path: Path) -> None:
    w = foreign(raw().mean((0, 1)))
    topk = OTHERS["SAELens topk"](tmp_path / "topk", w)
    for changes, message in (
        ({"sae_d_sae": 64}, "sae.d_sae is 64, but .*topk has 40; leave sae.d_sae out"),
        ({"sae_d_in": 7}, "sae.d_in is 7, but .*topk has 12"),
        ({"sae_layer_norm": "pre"}, "sae.layer_norm is 'pre', but .* has 'none'"),
        ({"sae_activation": "gelu"}, "sae.activation is 'gelu', but .* has 'topk'"),
        ({"sae_input_scale": 2.0}, "sae.input_scale is 2, but .* needs 1"),
        ({"sae_init": "xavier"}, "sae.init is 'xavier' with init_from"),
        ({"sae_encoder_scale": 0.5}, "sae.encoder_scale is 0.5 with init_from"),
    ):
        with pytest.raises(UserError, match=message):
            config(topk, **changes)
    assert config(topk, sae_k=9).sae.k == 9
    jump = OTHERS["SAELens jumprelu"](tmp_path / "jump", w)
    with pytest.raises(UserError, match=r"does not say how many of its features are active per token.*give --sae.k"):
        config(jump)
    make(activation="relu").save(tmp_path / "relu", trained_with="x")
    with pytest.raises(UserError, match=r"and schmitt is trained to sae.k of them; give --sae.k"):
        config(tmp_path / "relu", sae_activation="schmitt")
    cfg = TrainConfig(init_from=str(jump))
    assert adopted(replace(cfg, objective=replace(cfg.objective, l0=1.0)), ()).sae.activation == "jumprelu"
    with pytest.raises(UserError, match="There is no /nowhere/at/all"):
        config("/nowhere/at/all")
    released = with_release_ratio(tsae.load(jump), 0.5, [(raw(), torch.zeros(3, 20, dtype=torch.int32))]).sae
    released.save(tmp_path / "released")
    with pytest.raises(UserError, match="has a threshold for each feature, and schmitt begins with one"):
        config(tmp_path / "released", "sae.k")
    check_equal(config(tmp_path / "released", "sae.k", sae_activation="jumprelu_schmitt"), raw())


def test_infinite_thresholds_can_be_trained(tmp_path: Path) -> None:
    """A feature that was switched off stays off."""
    x = raw()
    values = threshold()
    values[:4] = torch.inf
    path = saelens(tmp_path / "s", foreign(x.mean((0, 1))) | {"threshold": values}, architecture="jumprelu")
    cfg = config(path, "sae.k")
    trainer = started(cfg, x)
    trainer.check_finite()
    check_equal(cfg, x)


def test_names_of_options_on_a_command_line() -> None:
    argv = ["demo", "--sae.d-sae", "8", "--sae.no-unit-norm-decoder", "--sae.release-ratio=0.5", "--layer", "3"]
    assert field_names(given_options(argv)) == {"sae.d_sae", "sae.unit_norm_decoder", "sae.release_ratio", "layer"}


# Complete runs


@pytest.fixture(scope="module")
def run(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("source") / "run"
    assert main(options(tiny_llama, text_file, out, "--lm-dtype", "float32", "--autocast", "none")) == 0
    return out


def from_run(model: Path, text: Path, out: Path, source: Path | str, *more: str) -> list[str]:
    """A command line that leaves the autoencoder's options to the source."""
    argv = options(model, text, out, "--lm-dtype", "float32", "--autocast", "none", "--init-from", str(source), *more)
    for name in ("--sae.d-sae", "--sae.k"):
        at = argv.index(name)
        del argv[at : at + 2]
    return argv


def test_a_run_is_continued_as_it_was(
    run: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """With a vanishing learning rate: the same evaluation; the source's place is written down, and may then go away."""
    source, out = tmp_path / "source", tmp_path / "run"
    shutil.copytree(run, source)
    monkeypatch.chdir(tmp_path)
    more = ["--optimizer.lr", "1e-12", "--steps", "4"]
    assert main(from_run(tiny_llama, text_file, out, "source", *more)) == 0
    assert "with its features at step 0" in capfd.readouterr().err
    values = json.loads((out / "config.json").read_text())
    assert values["init_from"] == str(source)
    assert (values["sae"]["d_sae"], values["sae"]["k"], values["sae"]["d_in"]) == (48, 6, 32)
    assert json.loads((out / "sae" / "cfg.json").read_text())["metadata"]["init_from"] == str(source)
    for name, tensor in weights(run).items():
        if name not in ("threshold", "release", "rates", "bit_price"):  # which the controller and counts move
            torch.testing.assert_close(weights(out)[name], tensor, rtol=1e-4, atol=1e-4)
    shutil.rmtree(source)
    assert main(["--resume", str(out)]) == 0
    read_config(out)


def test_model_and_layer_are_compared(
    run: Path, tiny_llama: Path, tiny_gemma2: Path, text_file: Path, tmp_path: Path, capfd: Any, caplog: Any
) -> None:
    def fails(*argv: str) -> str:
        capfd.readouterr()
        assert main(list(argv)) == 2
        return capfd.readouterr().err

    out = tmp_path / "run"
    other = from_run(tiny_llama, text_file, out, run)
    other[other.index("--layer") + 1] = "2"
    assert "encodes the output of block 1, not of block 2; train with --layer 1." in fails(*other)
    other[other.index("--layer") + 1] = "1"  # whose input is another tensor
    said = fails(*other, "--site", "resid_pre")
    assert "encodes the output of block 1, not of block 0; train with --layer 1 --site resid_post." in said
    wide = saelens(tmp_path / "wide", foreign(torch.zeros(D_IN)))
    message = fails(*from_run(tiny_llama, text_file, out, wide))
    assert "takes activations of width 12, but the blocks of" in message
    assert "put out 32" in message
    assert "does not say which layer it encodes; taken as the output of block 1" in caplog.text
    assert "does not say which model it was trained on" in caplog.text
    assert not out.exists()
    assert main([*from_run(tiny_llama, text_file, out, run), "--dry-run"]) == 0
    assert not out.exists()
    argv = from_run(tiny_gemma2, text_file, out, run, "--steps", "1", "--evaluation.no-final")
    assert main(argv) == 0
    assert "and is fine-tuned on" in caplog.text
    replaced = ["--overwrite", "--init-from", str(out)]
    assert "would replace" in fails(*from_run(tiny_gemma2, text_file, out, out, *replaced[:1]))
    assert "leave out --init-from" in fails("--resume", str(out), "--init-from", str(run))


def test_a_run_that_was_interrupted_before_its_first_step_starts_from_its_source(
    run: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    argv = from_run(tiny_llama, text_file, out, run, "--optimizer.lr", "1e-12", "--steps", "2", "--evaluation.no-final")
    assert main(argv) == 0
    shutil.rmtree(next(path for path in out.iterdir() if path.is_dir() and "checkpoint" in path.name))
    shutil.rmtree(out / "sae")
    assert main(["--resume", str(out)]) == 0
    torch.testing.assert_close(weights(out)["W_dec"], weights(run)["W_dec"], rtol=1e-4, atol=1e-4)


def test_two_processes_that_share_a_dictionary_start_from_it(
    run: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    argv = ["--steps", "2", "--evaluation.no-final", "--log-every", "1", "--parallel.timeout", "120"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(from_run(tiny_llama, text_file, one, run, *argv)) == 0
    shared = from_run(tiny_llama, text_file, two, run, *argv, "--parallel.features", "2")
    fork(2, run_jobs, [(0, shared)], folder=tmp_path)
    for first, second in zip(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-4, atol=1e-4)


def test_the_runs_of_a_sweep_start_from_sources_of_their_own(
    run: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    base = f"""base:
  {{model: {tiny_llama}, data: {text_file}, layer: 1, steps: 2, batch: 4, device: cpu, lm_dtype: float32,
   autocast: none, buffer: {{sequences: 24, harvest_batch: 8, estimate_sequences: 16}}, evaluation: {{final: false}},
   text: {{evaluation_share: 0.2}}, optimizer: {{lr: 1.0e-12}}}}
"""
    sweep, out = tmp_path / "sweep.yaml", tmp_path / "sweep"
    sweep.write_text(base + f"runs:\n  warm: {{init_from: {run}}}\n  new: {{sae.d_sae: 64, sae.k: 4}}\n")
    assert main(["--sweep", str(sweep), "--out", str(out)]) in (0, 2)  # 2: nothing is evaluated
    torch.testing.assert_close(weights(out / "warm")["W_dec"], weights(run)["W_dec"], rtol=1e-4, atol=1e-4)
    assert len(weights(out / "new")["W_dec"]) == 64
    sweep.write_text(base + f"runs:\n  warm: {{init_from: {run}, sae: {{d_sae: 64}}}}\n")
    assert main(["--sweep", str(sweep), "--out", str(tmp_path / "other")]) == 2
