"""The sequence length: what a preset's counts and bands become at another one, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.presets import PRESETS, SEQUENCE_COUNTS, at_length, preset
from tsae.train import command
from tsae.training.announce import sequence_counts
from tsae.training.sweep_file import read_sweep
from tsae.utils.config_json import to_dict


def counts(cfg: TrainConfig) -> dict[str, int]:
    parts = {group: getattr(cfg, group) if group else cfg for group in SEQUENCE_COUNTS}
    return {
        f"{group}.{name}": getattr(parts[group], name) for group, names in SEQUENCE_COUNTS.items() for name in names
    }


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("length", [2, 16, 64, 127, 129, 300, 512, 1024, 4096])
def test_a_preset_keeps_its_tokens_at_another_length(name: str, length: int) -> None:
    base, cfg = preset(name), at_length(preset(name), length)
    assert cfg.length == length
    for option, count in counts(cfg).items():
        before = counts(base)[option]
        if before < 1:  # no count: off, or automatic
            assert count == before
        else:
            assert count == 1 or abs(count * length - before * 128) <= length / 2
            assert count >= 1
    if length > 2 or "window" not in cfg.objective.terms:  # whose window has three tokens
        cfg.check()
    assert cfg.objective.bands == ((1, 3), (4, 15), (16, max(length, 128) - 1))


def test_at_the_same_length_nothing_changes() -> None:
    assert at_length(preset("demo"), 128) == preset("demo")


def test_bands_that_do_not_end_with_the_sequence_stay() -> None:
    cfg = preset("tsae-gemma-2-2b")
    cfg.objective.bands, cfg.objective.weights = ((1, 3), (4, 15)), (1.0, 1.0)
    assert at_length(cfg, 512).objective.bands == ((1, 3), (4, 15))
    cfg.objective.bands, cfg.objective.weights = ((200, 300),), (1.0,)
    assert at_length(cfg, 150).objective.bands == ((200, 300),)  # (200, 149) would be none
    cfg.objective.bands, cfg.objective.weights = (), ()
    assert at_length(cfg, 512).objective.bands == ()


def test_from_a_longer_length_back(tmp_path: Path) -> None:
    there = at_length(preset("tsae-gemma-2-2b"), 512)
    assert at_length(there, 128) == preset("tsae-gemma-2-2b")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(there)))
    assert command(["--config", str(file)])[0] == there
    assert command(["--config", str(file), "--length", "1024"])[0] == at_length(there, 1024)


def test_what_is_given_on_the_command_line_stands() -> None:
    cfg, _ = command(["tsae-gemma-2-2b", "--length", "1024"])
    assert cfg == at_length(preset("tsae-gemma-2-2b"), 1024)
    given = ["--batch", "16", "--buffer.sequences", "2048", "--objective.bands", "1", "3", "4", "15", "16", "127"]
    cfg, _ = command(["tsae-gemma-2-2b", "--length", "1024", *given])
    assert (cfg.batch, cfg.buffer.sequences) == (16, 2048)
    assert cfg.objective.bands == ((1, 3), (4, 15), (16, 127))
    assert cfg.evaluation.sequences == 24


def test_a_sweep_is_at_the_length_of_its_base(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"base": {"length": 512, "evaluation.sequences": 5}, "grid": {"seed": [0, 1]}}))
    for cfg in read_sweep(file).values():
        assert (cfg.length, cfg.batch, cfg.evaluation.sequences) == (512, 2, 5)
        assert cfg.objective.bands[-1] == (16, 511)
    file.write_text(yaml.safe_dump({"base": {"length": 5000}, "grid": {"seed": [0, 1]}}))
    with pytest.raises(UserError, match="length is 5000; it must be from 2 to 4096"):
        read_sweep(file)


@pytest.mark.parametrize("length", ["0", "1", "-3", "4097"])
def test_lengths_out_of_range_are_refused(length: str) -> None:
    with pytest.raises(UserError, match=f"length is {length}; it must be from 2 to 4096"):
        command([f"--length={length}"])[0].check()


def test_a_term_may_not_reach_beyond_the_sequence() -> None:
    """Only terms that are used are looked at."""
    command(["--length", "2", "--objective", "none"])[0].check()
    command(["--length", "2", "--objective", "multiscale+contrastive+slow"])[0].check()
    with pytest.raises(UserError, match=r"objective\.window is 3; it must be at most 2, because sequences have 2 tok"):
        command(["--length", "2", "--objective", "window"])[0].check()
    for term in ("contrastive", "slow"):
        options = ["--length", "16", "--objective.offset", "16", "--objective"]
        with pytest.raises(UserError, match=r"objective\.offset is 16; it must be at most 15, because"):
            command([*options, term])[0].check()
        command([*options, "window"])[0].check()


def test_negatives_from_other_sequences_need_another_sequence() -> None:
    options = ["demo-hysteresis", "--objective.negatives", "other-sequences", "--length", "1024"]
    for alone in ([], ["--batch", "4", "--chunk", "1"]):
        with pytest.raises(UserError, match="with one sequence at a time"):
            command([*options, *alone])[0].check()
    command([*options, "--batch", "2"])[0].check()
    command([*options, "--objective", "window"])[0].check()


def test_the_counts_are_said() -> None:
    said = sequence_counts(command(["--length", "1024", "--buffer.ahead", "0", "--batch", "3"])[0])
    assert said.startswith("Sequences of 1024 tokens: batch 3, buffer.sequences 128, buffer.harvest_batch 2,")
    assert "evaluation.lm_batch 1;" in said
    assert "chunk" not in said
    assert "ahead" not in said
