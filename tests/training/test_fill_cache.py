"""`--harvest-only`: fills what a run reads, goes on after a kill or a signal, repairs, and refuses."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Killed, die, run_options, same

import tsae
from tsae.data.cache import ActivationCache
from tsae.data.harvest import Harvester
from tsae.train import main
from tsae.training import fill_cache

pytestmark = pytest.mark.usefixtures("blank_report")


def harvest_argv(model: Path, text: Path, cache: Path, *more: str) -> list[str]:
    """`run_options` without a run's directory."""
    argv = run_options(model, text, cache.parent / "unused")
    at = argv.index("--out")
    return [*argv[:at], *argv[at + 2 :], "--cache", str(cache), "--harvest-only", *more]


@pytest.fixture
def harvested(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of sequences that the language model ran on."""
    numbers: list[int] = []
    real = Harvester.batches

    def counting(self: Harvester, tokens: Any) -> Any:
        numbers.append(tokens.segments.shape[0])
        return real(self, tokens)

    monkeypatch.setattr(Harvester, "batches", counting)
    return numbers


def test_a_run_reads_what_was_harvested_for_it(
    tiny_gemma2: Path,
    text_file: Path,
    uninterrupted: Path,
    tmp_path: Path,
    harvested: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    assert main(harvest_argv(tiny_gemma2, text_file, cache)) == 0
    said = capsys.readouterr().err
    assert f"Harvesting {96 * 128:,} tokens into {cache}, which has 0: " in said
    assert f"{96 * 128:,} of {96 * 128:,} tokens" in said
    assert f"Written: {cache}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert sum(harvested) == 3 * 8 + 96  # timed, kept
    harvested.clear()
    assert main([*run_options(tiny_gemma2, text_file, tmp_path / "run"), "--cache", str(cache)]) == 0
    assert sum(harvested) == 0
    same(uninterrupted, tmp_path / "run")
    assert main(harvest_argv(tiny_gemma2, text_file, cache)) == 0
    assert "all of them there before" in capsys.readouterr().err
    assert sum(harvested) == 0


def test_a_killed_harvest_goes_on_after_its_last_shard(
    tiny_gemma2: Path, text_file: Path, tmp_path: Path, harvested: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsae.data.cache.SHARD_BYTES", 100_000)  # a few groups
    monkeypatch.setattr(fill_cache, "SHARD_BYTES", 100_000)
    cache, appended = tmp_path / "cache", []
    real = ActivationCache.append

    def dying(self: ActivationCache, *args: Any) -> None:
        appended.append(self.groups)
        if len(appended) == 8:
            die()
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationCache, "append", dying)
        with pytest.raises(Killed):
            main(harvest_argv(tiny_gemma2, text_file, cache))
    kept = appended[-1]
    assert 0 < kept < 8
    harvested.clear()
    assert main(harvest_argv(tiny_gemma2, text_file, cache)) == 0
    assert sum(harvested) == 3 * 8 + 96 - 8 * kept

    whole = tmp_path / "whole"
    assert main(harvest_argv(tiny_gemma2, text_file, whole)) == 0
    names = sorted(path.name for path in whole.glob("shard-*"))
    assert names == sorted(path.name for path in cache.glob("shard-*"))
    assert all((whole / name).read_bytes() == (cache / name).read_bytes() for name in names)

    (cache / names[1]).write_bytes(b"damaged")
    harvested.clear()
    assert main(harvest_argv(tiny_gemma2, text_file, cache)) == 0
    assert 0 < sum(harvested) < 96
    assert (whole / names[1]).read_bytes() == (cache / names[1]).read_bytes()


def test_a_signal_keeps_every_forward_pass(
    tiny_gemma2: Path,
    text_file: Path,
    tmp_path: Path,
    harvested: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    real = ActivationCache.append
    appended = []

    def signalled(self: ActivationCache, *args: Any) -> None:
        real(self, *args)
        appended.append(1)
        if len(appended) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationCache, "append", signalled)
        assert main(harvest_argv(tiny_gemma2, text_file, cache)) == 143
    assert f"interrupted with 40 sequences in {cache}; the same command goes on" in capsys.readouterr().err
    harvested.clear()
    assert main(harvest_argv(tiny_gemma2, text_file, cache)) == 0
    assert sum(harvested) == 3 * 8 + 96 - 40


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--out", "somewhere"], "--harvest-only writes the cache and no run; leave --out out."),
        (["--dry-run"], "--harvest-only writes the cache and no run; leave --dry-run out."),
        (["--cache", "None"], "--harvest-only fills a cache; name its directory with --cache."),
    ],
)
def test_what_does_not_go_together_is_refused(
    more: list[str],
    sentence: str,
    tiny_gemma2: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*harvest_argv(tiny_gemma2, text_file, tmp_path / "cache"), *more]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_the_harvest(
    tiny_gemma2: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = fill_cache.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fill_cache.shutil, "disk_usage", lambda _: usage)
    assert main(harvest_argv(tiny_gemma2, text_file, tmp_path / "cache")) == 2
    assert "its disk has 0.00 GiB free; make room, or take fewer --steps." in capsys.readouterr().err


def test_of_a_sweep_and_from_python(tiny_gemma2: Path, text_file: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    base = f"model: {tiny_gemma2}, data: {text_file}, layer: 1, steps: 12, batch: 4, device: cpu"
    base += f", cache: {tmp_path / 'cache'}"
    nested = "buffer.harvest_batch: 8, buffer.reuse: 1, buffer.sequences: 24, text.evaluation_share: 0.2, sae.k: 6"
    sweep.write_text(f"base: {{{base}, {nested}}}\nruns: {{a: {{seed: 0}}, b: {{seed: 1, data_seed: 0}}}}\n")
    filled: Any = tsae.train(sweep=sweep, harvest_only=True)
    assert (filled.tokens, filled.harvested) == (48 * 128, 48 * 128)
    again: Any = tsae.train(sweep=sweep, harvest_only=True)
    assert (again.tokens, again.harvested) == (48 * 128, 0)
