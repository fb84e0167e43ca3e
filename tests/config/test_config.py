"""Configuration: presets have the papers' values, JSON round trips, bad values are one sentence."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tsae.config import OptimizerConfig, SAEConfig, TrainConfig
from tsae.errors import UserError
from tsae.presets import PRESETS, preset
from tsae.train import command
from tsae.utils.config_json import from_dict, to_dict


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_valid_and_round_trip_through_json(name: str) -> None:
    cfg = preset(name)
    cfg.check()
    assert cfg.preset == name
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(cfg)))) == cfg


def test_tsae_preset_is_the_papers() -> None:
    cfg = preset("tsae-gemma-2-2b")
    assert (cfg.model, cfg.layer, cfg.sae.d_sae) == ("google/gemma-2-2b", 12, 2304)
    assert cfg.batch * 128 == 2048
    objective = cfg.objective
    assert objective.temporal == "multiscale"
    assert objective.bands == ((1, 3), (4, 15), (16, 127))
    assert objective.weights == (0.01, 0.005, 0.001)
    assert (objective.l1, objective.min_variance, objective.adaptive) == (0.04, 0.01, True)
    assert (objective.boost, objective.hold_steps, objective.ramp_steps) == (2.0, 1000, 1000)
    assert (objective.buffer_std, objective.buffer_mixing) == (0.1, 0.25)
    optimizer = cfg.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.clip_norm) == ("adamw", 3e-4, 2.0)
    assert optimizer.noise_eta > 0
    assert optimizer.noise_steps == 2000


def test_tcsae_preset_is_the_papers() -> None:
    cfg = preset("tcsae-pythia-70m")
    assert (cfg.model, cfg.layer, cfg.batch) == ("EleutherAI/pythia-70m", 4, 32)
    assert (cfg.sae.activation, cfg.sae.init, cfg.sae.unit_norm_decoder) == ("gelu", "xavier", True)
    assert (cfg.objective.temporal, cfg.objective.window) == ("window", 3)
    assert (cfg.objective.l1, cfg.objective.window_weight) == (0.1, 0.01)
    optimizer = cfg.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.warmup_steps, optimizer.schedule) == (
        "adam",
        3e-4,
        1000,
        "cosine",
    )
    assert cfg.buffer.sequences == 2048


def test_demo_is_rate_with_a_contrastive_and_a_window_term() -> None:
    cfg = preset("demo")
    assert (cfg.sae.activation, cfg.sae.gate_gradient, cfg.sae.k) == ("rate", 0.4, 36)
    assert (cfg.sae.release_ratio, cfg.sae.amplitude_bits) == (0.1, 6.0)
    assert cfg.objective.terms == ("window", "contrastive")
    assert (cfg.objective.contrastive_weight, cfg.objective.window_weight) == (1.5, 0.015)


def test_the_earlier_demo_is_hysteresis_with_a_contrastive_and_a_window_term() -> None:
    cfg = preset("demo-hysteresis")
    assert (cfg.model, cfg.layer, cfg.data) == ("gemma-3-270m", 9, "python-docs")
    assert (cfg.sae.activation, cfg.sae.release_ratio) == ("schmitt", 0.4)
    assert cfg.objective.terms == ("window", "contrastive")
    assert (cfg.objective.contrastive_weight, cfg.objective.window_weight) == (2.0, 0.02)


def test_demo_on_another_model_has_the_same_recipe() -> None:
    cfg, demo = preset("demo-smollm2"), preset("demo")
    assert (cfg.model, cfg.layer, cfg.text.prepend_bos) == ("smollm2-135m-instruct", 15, "yes")
    same = {"preset": "demo", "model": demo.model, "layer": demo.layer, "sae": demo.sae, "text": demo.text}
    assert replace(cfg, **same) == demo
    assert replace(cfg.sae, d_sae=demo.sae.d_sae) == demo.sae


def test_help_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(["--help"])
    assert f"start from: {', '.join(PRESETS)}." in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_command_line_overrides_file_overrides_preset(tmp_path: Path) -> None:
    cfg, asked = command([])
    assert cfg == preset("demo")
    assert asked.out is None
    cfg, _ = command(["tcsae-pythia-70m", "--steps", "7", "--sae.d-sae", "64", "--objective.window", "4"])
    assert (cfg.preset, cfg.steps, cfg.sae.d_sae, cfg.objective.window) == ("tcsae-pythia-70m", 7, 64, 4)
    assert cfg.optimizer == preset("tcsae-pythia-70m").optimizer
    assert command(["--objective", "slow"])[0].objective.temporal == "slow"
    assert command(["--objective.temporal", "slow"])[0].objective.temporal == "slow"
    both = command(["--objective", "window+contrastive"])[0].objective
    assert (both.temporal, both.terms) == ("window+contrastive", ("window", "contrastive"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(cfg)))
    again, _ = command(["--config", str(path), "--seed", "5", "--objective.bands", "1", "2", "5", "9"])
    assert (again.preset, again.steps, again.seed, again.sae.d_sae) == ("tcsae-pythia-70m", 7, 5, 64)
    assert again.objective.bands == ((1, 2), (5, 9))
    cfg.text = dataclasses.replace(cfg.text, threshold=0.3)  # belongs to that run's text
    path.write_text(json.dumps(to_dict(cfg)))
    assert command(["--config", str(path)])[0].text.threshold is None


def test_a_configuration_without_newer_fields_takes_their_defaults() -> None:
    new = ("contrastive_weight", "slow_weight", "hysteresis", "steering")
    for cfg in (
        TrainConfig(),
        preset("tsae-gemma-2-2b"),
        preset("tcsae-pythia-70m"),
    ):  # whose newer fields have default values
        values = {
            key: {k: v for k, v in part.items() if k not in new} if isinstance(part, dict) else part
            for key, part in to_dict(cfg).items()
        }
        assert from_dict(TrainConfig, values) == cfg


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["nonsense"],
            "no preset 'nonsense'; choose one of demo, demo-hysteresis, demo-smollm2, tsae-gemma-2-2b, tcsae-",
        ),
        (["--stepz", "3"], "--stepz"),
        (["--steps", "many"], "--steps"),
        (["--sae.activation", "tanh"], "tanh"),
        (["--config", "/no/such/file.json"], "no file /no/such/file.json"),
    ],
)
def test_bad_command_lines_are_one_sentence(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        command(argv)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro draws boxes with characters that stdout can encode
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--stepz", "3"], "Unrecognized options: --stepz, 3"),
        (["--steps", "many"], "Error parsing --steps: invalid literal for int() with base 10: 'many'"),
        (
            ["--out", "a---b", "--seed", "-- - ─│"],
            "Error parsing --seed: invalid literal for int() with base 10: '-- - ─│'",
        ),
        (["--steps"], "Missing value for argument '--steps'; expected 1 values"),
        (
            ["--optimizer.name", "sgd"],
            "Invalid choice 'sgd' for argument '--optimizer.name'; expected one of ('adam', 'adamw')",
        ),
    ],
)
def test_tyros_boxed_errors_become_one_sentence(
    encoding: str, argv: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UserError) as caught:
        command(argv)
    assert str(caught.value) == f"{sentence}; see python -m tsae.train --help."


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_help_shows_the_presets_own_defaults(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([name, "--help"], ["-h", name]):
        with pytest.raises(SystemExit) as stop:
            command(argv)
        assert stop.value.code == 0
        out = " ".join(capsys.readouterr().out.replace("│", " ").split())
        cfg = preset(name)
        assert "--text.evaluation-share" in out
        assert "{none,multiscale,window,contrastive,slow}[+...]" in out
        assert "--text.threshold" not in out  # set by the run
        assert f"(default: {name})" in out
        assert f"(default: {cfg.model})" in out
        assert f"Optimizer steps. (default: {cfg.steps})" in out


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepz": 3}, "unknown field 'stepz'"),
        ({"sae": {"d_sea": 3}}, "unknown field 'sae.d_sea'"),
        ({"steps": "3"}, "'steps' is '3'; it must be of type int"),
        ({"steps": True}, "'steps' is True"),
        ({"sae": {"activation": "tanh"}}, "'sae.activation' is 'tanh'"),
        ({"objective": {"temporal": None}}, "'objective.temporal' is None; it must be of type str"),
        ({"sae": []}, "'sae' is []; it must be an object"),
        ({"objective": {"bands": [[1, 2, 3]]}}, "must have 2 entries"),
    ],
)
def test_bad_configuration_files_are_named(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(TrainConfig, values)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sae.d-sae", "0"], "sae.d_sae is 0"),
        (["--sae.k", "0"], "sae.k is 0"),
        (["--sae.k", "5000"], "sae.k is 5000; it must be from 1 to sae.d_sae, which is 2560"),
        (["--sae.release-ratio", "1.5"], "sae.release_ratio is 1.5"),
        (
            ["--objective", "multiscale", "--objective.bands", "1", "3", "3", "9", "--objective.weights", "1", "1"],
            "objective.bands",
        ),
        (["--objective", "multiscale", "--objective.bands", "5", "3", "--objective.weights", "1"], "objective.bands"),
        (["--objective", "multiscale", "--objective.weights", "1", "1"], "objective.weights has 2 values for 3 bands"),
        (["--objective.window", "1"], "objective.window is 1"),
        (["--steps", "0"], "steps is 0"),
        (["--batch", "0"], "batch is 0"),
        (["demo-hysteresis", "--objective.window", "129"], "objective.window is 129"),
        (["--objective", "multiscale", "--objective.weights", "1", "-1", "1"], "objective.weights is (1.0, -1.0, 1.0)"),
        (["--objective.boost", "0"], "objective.boost is 0"),
        (["--optimizer.lr", "0"], "optimizer.lr is 0"),
        (["--sae.bandwidth", "0"], "sae.bandwidth is 0"),
        (["--sae.groups", "100", "2000"], "sae.groups is (100, 2000)"),
        (["--sae.groups", "0", "2560"], "sae.groups is (0, 2560)"),
        (["--sae.groups", "300", "100", "2560"], "sae.groups is (300, 100, 2560)"),
        (["--sae.activation", "jumprelu", "--sae.layer-norm", "post"], "sae.layer_norm is 'post' with sae.activation"),
        (
            ["--sae.activation", "jumprelu_schmitt", "--sae.hysteresis", "two-sided"],
            "sae.hysteresis is 'two-sided' with sae.activation 'jumprelu_schmitt'; only 'schmitt' and 'rate' have ",
        ),
        (
            ["--sae.activation", "batchtopk", "--sae.steering", "exact"],
            "sae.steering is 'exact' with sae.activation 'batchtopk'",
        ),
        (["--objective.l0", "1"], "objective.l0 is 1.0; sae.activation 'rate' has no learned threshold"),
        (["--objective.weight", "-1"], "objective.weight is -1"),
        (["--objective.group", "2561"], "objective.group is 2561; the autoencoder has 2560 features"),
        (["--objective", "fast"], "objective.temporal is 'fast'; it must be none, or any of multiscale, window,"),
        (["--objective", "slow+none"], "objective.temporal is 'slow+none'"),
        (["--objective", "slow+window+slow"], "objective.temporal is 'slow+window+slow'"),
        (["--objective", ""], "objective.temporal is ''; it must be none, or any of multiscale, window, contrastive"),
        (["--objective", "slow+multiscale", "--objective.bands", "5", "3"], "objective.bands"),
        (["--objective.contrastive-weight", "-1"], "objective.contrastive_weight is -1"),
        (["--objective.slow-weight", "-1"], "objective.slow_weight is -1"),
        (["--objective.offset", "0"], "objective.offset is 0"),
        (["--objective.pairs", "1"], "objective.pairs is 1"),
        (["--objective.temperature", "0"], "objective.temperature is 0"),
        (["--optimizer.betas", "1.5", "0.9"], "optimizer.betas is (1.5, 0.9)"),
        (["--optimizer.betas", "0.9", "1"], "optimizer.betas is (0.9, 1.0)"),
        (["--seed", "-1"], "seed is -1"),
        (["--seed", str(2**63)], f"seed is {2**63}"),
        (["--buffer.sequences", "4"], "buffer.sequences is 4"),
        (["--checkpoint.keep", "0"], "checkpoint.keep is 0"),
    ],
)
def test_invalid_values_are_one_sentence(argv: list[str], words: str) -> None:
    cfg, _ = command(argv)
    with pytest.raises(UserError) as caught:
        cfg.check()
    assert words in str(caught.value)


def float_options(config: object, prefix: str = "--") -> list[tuple[str, int]]:
    """Every option that takes floats, with how many it takes."""
    found: list[tuple[str, int]] = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += float_options(value, name + ".")
        elif isinstance(value, float) or (isinstance(value, tuple) and value and isinstance(value[0], float)):
            found.append((name, len(value) if isinstance(value, tuple) else 1))
    return found


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("option", "count"), float_options(TrainConfig()))
def test_a_number_that_is_not_finite_is_one_sentence(option: str, count: int, bad: str) -> None:
    cfg, _ = command([f"{option}", *["0.5"] * (count - 1), bad])
    with pytest.raises(UserError) as caught:
        cfg.check()
    assert str(caught.value) == f"{option[2:].replace('-', '_')} is {bad}; it must be a finite number."


def test_saeconfig_needs_a_width_only_for_a_model() -> None:
    SAEConfig().check()
    with pytest.raises(UserError, match=r"sae\.d_in is -1"):
        SAEConfig(d_in=-1).check()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TrainConfig(sae=SAEConfig(activation="foo")), "sae.activation is 'foo'; use relu"),  # type: ignore[arg-type]
        (TrainConfig(seed=10**400), "it must be from 0 to"),
        (TrainConfig(steps=np.int64(0)), "steps is 0; it must be at least 1"),  # type: ignore[arg-type]
        (TrainConfig(optimizer=OptimizerConfig(betas=[0.9, 2.0])), "optimizer.betas is"),  # type: ignore[arg-type]
    ],
)
def test_values_that_only_python_can_give_are_checked_too(config: TrainConfig, words: str) -> None:
    with pytest.raises(UserError) as caught:
        config.check()
    assert words in str(caught.value)
