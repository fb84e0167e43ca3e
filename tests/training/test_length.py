"""Runs at other lengths than 128: every step from the text to the page, and what they share with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tiny import save_model
from tiny_runs import lines, same
from tiny_runs import options as tiny_options

from tsae.config import TrainConfig
from tsae.data.cache import MANIFEST
from tsae.rundir.directory import read_config
from tsae.train import main

pytestmark = pytest.mark.usefixtures("blank_report")

LENGTHS = (2, 16, 300, 512, 1024, 4096)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a long context."""
    folder = tmp_path_factory.mktemp("models") / "long"
    return save_model(folder, "LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1, max_position_embeddings=8192)


@pytest.fixture
def argv(model: Path, text_file: Path) -> Any:
    """`argv(out, length, *more)`: a command line that gives no option that counts sequences but `--buffer.reuse`."""

    def argv(out: Path, length: int, *more: str) -> list[str]:
        base = f"""demo --model {model} --data {text_file} --out {out} --layer 1 --length {length} --steps 4
            --log-every 1 --device cpu --sae.d-sae 48 --sae.k 6 --buffer.reuse 4 --checkpoint.every 2
            --objective multiscale+window+contrastive+slow --objective.window 2 --objective.hold-steps 0
            --objective.ramp-steps 0 --evaluation.sequences 3 --evaluation.ce-sequences 1 --text.evaluation-share 0.2"""
        return [*base.split(), *more]

    return argv


@pytest.mark.parametrize("length", LENGTHS)
def test_a_run_of_any_length(argv: Any, length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(argv(out, length)) == 0, capsys.readouterr().err
    said = " ".join(capsys.readouterr().err.split())
    batch = max(1, round(8 * 128 / length))
    assert f"4 steps of {batch} x {length} tokens." in said
    assert f"Sequences of {length} tokens: batch {batch}, buffer.sequences" in said
    cfg = read_config(out)
    assert (cfg.length, cfg.batch) == (length, batch)
    assert cfg.objective.bands[-1] == (16, max(length, 128) - 1)
    log = lines(out / "metrics.jsonl")
    assert [line["tokens"] for line in log] == [step * batch * length for step in (1, 2, 3, 4)]
    assert all(line["temporal"] > 0 for line in log)
    assert json.loads((out / "sae" / "cfg.json").read_text())["metadata"]["context_size"] == length + 1
    assert (out / "eval.json").exists()


def test_a_resumed_run_of_another_length_is_the_same(argv: Any, tmp_path: Path, at_step: Any) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(argv(whole, 300)) == 0

    class Stop(BaseException):
        pass

    def stop() -> None:
        raise Stop

    at_step(3, stop)
    with pytest.raises(Stop):
        main(argv(cut, 300))
    at_step()
    assert main(["--resume", str(cut)]) == 0
    same(whole, cut)


def test_a_cache_is_for_one_length(argv: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    plain, cached, again = (tmp_path / name for name in ("plain", "cached", "again"))
    assert main(argv(plain, 300)) == 0
    assert main(argv(cached, 300, "--cache", str(cache))) == 0
    assert main(argv(again, 300, "--cache", str(cache))) == 0  # read
    same(plain, cached)
    same(plain, again)
    assert json.loads((cache / MANIFEST).read_text())["request"]["length"] == 300
    with safe_open(cache / "shard-000000.safetensors", framework="pt") as file:
        assert file.get_slice("x").get_shape()[1:] == [300, 32]
        assert file.get_slice("tokens").get_shape()[1:] == [301]
    capsys.readouterr()
    assert main(argv(tmp_path / "other", 512, "--cache", str(cache))) == 2
    assert "length is 300 there and 512 here" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_dry_run_counts_the_tokens_of_the_length(
    argv: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv(tmp_path / "run", 512, "--dry-run")) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{4 * 2 * 512:,} tokens" in out
    assert "Sequences of 512 tokens: batch 2, buffer.sequences 256" in out


def test_a_sequence_must_fit_the_models_context(
    tiny_neox: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model takes 512 tokens, one of which is the prefix."""
    out = tmp_path / "run"
    assert main(tiny_options(tiny_neox, text_file, out, "--length", "512", "--steps", "2")) == 2
    assert "takes at most 512 tokens at once, but 513 are fed (1 + 512" in capsys.readouterr().err
    assert not out.exists()
    assert main(tiny_options(tiny_neox, text_file, out, "--length", "511", "--steps", "2")) == 0


def test_the_default_length_says_nothing_of_counts(
    tiny_neox: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_options(tiny_neox, text_file, tmp_path / "run", "--steps", "1")) == 0
    assert TrainConfig.length == 128
    assert "Sequences of" not in capsys.readouterr().err
