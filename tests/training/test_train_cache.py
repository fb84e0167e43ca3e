"""Runs with a cache: the same bits as without one, whoever wrote it and wherever it stopped; faults, signals."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Killed, die, lines, options, run_options, same

import tsae.data.cache
import tsae.data.harvest
from tsae.data.harvest import Harvester
from tsae.sae.model import SparseAutoencoder
from tsae.train import main
from tsae.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("blank_report")
Argv = Callable[..., list[str]]  # the fixture `argv_of`


@pytest.fixture
def harvested(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of sequences that the language model ran on."""
    numbers: list[int] = []
    real = Harvester.batches

    def counting(self: Harvester, tokens: Any, *args: Any) -> Any:
        numbers.append(tokens.segments.shape[0])
        return real(self, tokens, *args)

    monkeypatch.setattr(Harvester, "batches", counting)
    return numbers


@pytest.fixture(scope="module")
def cache(tiny_gemma2: Path, text_file: Path, uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a run with `run_options`, which equals the run without a cache."""
    folder = tmp_path_factory.mktemp("cached")
    assert main([*run_options(tiny_gemma2, text_file, folder / "run"), "--cache", str(folder / "cache")]) == 0
    same(uninterrupted, folder / "run")
    return folder / "cache"


def manifest(cache: Path) -> dict[str, Any]:
    return json.loads((cache / "manifest.json").read_text())


def test_a_second_run_reads_it_all_and_is_the_same(
    cache: Path, argv_of: Argv, uninterrupted: Path, tmp_path: Path, harvested: list[int]
) -> None:
    before = {path: path.read_bytes() for path in cache.iterdir()}
    assert main(argv_of(tmp_path / "run", "--cache", cache)) == 0
    same(uninterrupted, tmp_path / "run")
    assert sum(harvested) == 0
    assert before == {path: path.read_bytes() for path in cache.iterdir()}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["cache"] == str(cache)


def test_another_buffer_and_other_batches_see_the_same_bits(
    cache: Path, argv_of: Argv, tmp_path: Path, harvested: list[int]
) -> None:
    other = ["--batch", 5, "--steps", 9, "--layer", 1]
    other += ["--buffer.sequences", 19, "--buffer.estimate-sequences", 3]
    assert main(argv_of(tmp_path / "with", *other, "--cache", cache)) == 0
    assert sum(harvested) == 0
    assert main(argv_of(tmp_path / "without", *other)) == 0
    same(tmp_path / "with", tmp_path / "without")


def test_a_shorter_cache_is_extended(argv_of: Argv, uninterrupted: Path, tmp_path: Path, harvested: list[int]) -> None:
    own = tmp_path / "cache"
    assert main(argv_of(tmp_path / "short", "--steps", 9, "--cache", own)) == 0
    assert sum(harvested) == 40  # 9 * 4, in groups of 8
    assert main(argv_of(tmp_path / "run", "--cache", own)) == 0
    assert sum(harvested) == 24 * 4
    same(uninterrupted, tmp_path / "run")
    assert sum(shard["sequences"] for shard in manifest(own)["shards"]) == 96


@pytest.mark.parametrize("stop_at", [1, 6, 13])
def test_a_killed_run_goes_on_with_its_cache(
    stop_at: int, argv_of: Argv, at_step: Callable[..., None], uninterrupted: Path, tmp_path: Path
) -> None:
    at_step(stop_at, die)
    with pytest.raises(Killed):
        main(argv_of(tmp_path / "run", "--cache", tmp_path / "cache"))
    at_step()
    if stop_at == 13:  # removing the cache meanwhile costs time only
        for path in (tmp_path / "cache").iterdir():
            path.unlink()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    same(uninterrupted, tmp_path / "run")


@pytest.fixture(scope="module")
def short_cache(tiny_gemma2: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a run of 12 steps."""
    folder = tmp_path_factory.mktemp("short")
    more = ["--steps", "12", "--cache", str(folder / "cache")]
    assert main([*run_options(tiny_gemma2, text_file, folder / "run"), *more]) == 0
    return folder / "cache"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "last two"])
def test_damaged_shards_are_harvested_again(
    damage: str, argv_of: Argv, short_cache: Path, uninterrupted: Path, tmp_path: Path, harvested: list[int]
) -> None:
    own = shutil.copytree(short_cache, tmp_path / "cache")
    whole = manifest(own)
    shards = sorted(own.glob("shard-*"))
    assert len(shards) > 2
    hit = shards[-2:] if damage == "last two" else [shards[1]]
    for path in hit:
        data = bytearray(path.read_bytes())
        if damage == "truncate":
            path.write_bytes(data[:-100])
        elif damage == "remove":
            path.unlink()
        else:
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
    assert main(argv_of(tmp_path / "run", "--cache", own)) == 0
    same(uninterrupted, tmp_path / "run")
    lost = sum(whole["shards"][shards.index(path)]["sequences"] for path in hit)
    assert sum(harvested) == lost + 48
    assert manifest(own)["shards"][: len(shards)] == whole["shards"]  # bit for bit as they were


def test_one_that_does_not_match_is_refused_with_the_difference(
    cache: Path, argv_of: Argv, tiny_neox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = argv_of(tmp_path / "run", "--cache", cache)
    for more, words in (
        (["--layer", "2"], "layer is 1 there and 2 here"),
        (["--data-seed", "5"], "data_seed is 0 there and 5 here"),
        (["--buffer.dtype", "float16"], "and 'float16' here"),
        (["--buffer.harvest-batch", "4"], "harvest_batch is 8 there and 4 here"),
        (["--text.shuffle-buffer", "7"], "text.shuffle_buffer is 10000 there and 7 here"),
        (["--model", str(tiny_neox)], f"and '{tiny_neox}' here"),
    ):
        assert main([*command, *more]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("error:") == 1
    assert not (tmp_path / "run").exists()


def test_text_that_changed_under_its_name_is_refused(
    tiny_neox: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes())
    command = [*options(tiny_neox, text, tmp_path / "run"), "--overwrite", "--evaluation.no-final"]
    command += ["--steps", "2", "--cache", str(tmp_path / "cache")]
    assert main(command) == 0
    text.write_bytes(text_file.read_bytes() + b"One more passage.")
    capsys.readouterr()
    assert main(command) == 2
    assert "data_files is" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["checkpoint", "sae/activations"])
def test_one_in_the_place_of_files_of_the_run_is_refused(
    place: str, argv_of: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run would remove it."""
    run = tmp_path / "run"
    assert main(argv_of(run, f"--cache={run / place}")) == 2
    said = capsys.readouterr().err
    assert f"error: {run / place} is in the place of a file of the run in {run}; name another directory." in said
    assert not run.exists()


def test_a_sweep_and_a_run_share_one(cache: Path, uninterrupted: Path, tmp_path: Path, harvested: list[int]) -> None:
    config = json.loads((uninterrupted / "config.json").read_text()) | {"cache": str(cache)}
    config["text"].pop("threshold")
    file = tmp_path / "two.yaml"
    file.write_text(json.dumps({"base": config, "runs": {"same": {}, "other": {"seed": 3, "sae": {"k": 2}}}}))
    assert main(["--sweep", str(file), "--out", str(tmp_path / "out")]) == 0
    same(uninterrupted, tmp_path / "out" / "same")
    assert sum(harvested) == 0


def test_a_second_writer_is_told_and_the_first_is_not_harmed(
    tiny_neox: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    own = tmp_path / "cache"
    command = [*options(tiny_neox, text_file, tmp_path / "run"), "--evaluation.no-final", "--cache", str(own)]
    own.mkdir()
    with FileLock(own / "lock"):
        assert main(command) == 2
        assert "is being written by another process" in capsys.readouterr().err
        assert [path.name for path in own.iterdir()] == ["lock"]
    assert not (tmp_path / "run").exists()
    assert main(command) == 0
    with FileLock(own / "lock"):  # a reader needs no lock
        assert main([*command, "--overwrite"]) == 0


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on a full disk: a tiny file system if one can be mounted, else a patched write that fails alike."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(disk)]
    if os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
        return
    real = tsae.data.cache.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path, **kwargs: Any) -> None:
        if len(list(path.parent.glob("shard-*"))) == 1:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path, **kwargs)

    monkeypatch.setattr(tsae.data.cache, "save_file", full)
    yield disk


def test_a_full_disk_stops_with_a_sentence_and_keeps_what_is_complete(
    small_disk: Path,
    argv_of: Argv,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own, out = small_disk / "cache", tmp_path / "run"
    assert main(argv_of(out, "--cache", own)) == 2
    message = capsys.readouterr().err
    assert f"The cache {own} cannot be written to (" in message
    assert "No space left on device" in message
    kept = manifest(own)["shards"]
    assert 1 <= len(kept) < 4
    assert sorted(path.name for path in own.iterdir()) == [
        "lock",
        "manifest.json",
        *(f"shard-{i:06d}.safetensors" for i in range(len(kept))),
    ]
    shutil.copytree(own, tmp_path / "larger")  # with room again, the run continues
    monkeypatch.undo()
    assert main(argv_of(out, "--overwrite", "--cache", tmp_path / "larger")) == 0
    same(uninterrupted, out)
    assert manifest(tmp_path / "larger")["shards"][: len(kept)] == kept


# Real signals.


@pytest.fixture
def in_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """`in_pass(number, act)` calls `act()` in that forward pass; the list it returns has an entry per pass."""
    real = tsae.data.harvest.activations

    def in_pass(number: int, act: Callable[[], None]) -> list[int]:
        passes: list[int] = []

        def counted(*args: Any) -> torch.Tensor:
            passes.append(1)
            if len(passes) == number:
                act()
            return real(*args)

        monkeypatch.setattr(tsae.data.harvest, "activations", counted)
        return passes

    return in_pass


def sending(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("number", "status", "step"), [(signal.SIGINT, 130, 5), (signal.SIGTERM, 143, 8), (signal.SIGTERM, 143, 24)]
)
def test_a_signal_in_training_ends_it_after_the_step_in_hand(
    number: signal.Signals,
    status: int,
    step: int,
    cached: bool,
    argv_of: Argv,
    at_step: Callable[..., None],
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    at_step(step - 1, sending(number))
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    assert main(argv_of(out, *(["--cache", tmp_path / "cache"] if cached else []))) == status
    message = capsys.readouterr().err.replace("\n", "")
    assert f"interrupted after step {step}, which is saved" in message
    assert f"python -m tsae.train --resume {out}" in message
    assert (out / "checkpoint" / f"step-{step:08d}" / "state.pt").exists()
    assert not list(tmp_path.rglob(".*tmp*"))
    assert before == {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    at_step()
    assert main(["--resume", str(out)]) == 0
    same(uninterrupted, out)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("after", [1, 4, 6])  # forward passes: in the first harvest of 3, and in later ones
def test_a_signal_in_the_harvest_ends_it_after_the_forward_pass_in_hand(
    after: int,
    cached: bool,
    argv_of: Argv,
    in_pass: Callable[..., list[int]],
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    passes = in_pass(after, sending(signal.SIGTERM))
    assert main(argv_of(out, *(["--cache", tmp_path / "cache"] if cached else []))) == 143
    assert len(passes) == after
    message = capsys.readouterr().err.replace("\n", "")
    assert ("before the first step" if after == 1 else "which is saved") in message
    assert f"python -m tsae.train --resume {out}" in message
    assert main(["--resume", str(out)]) == 0
    same(uninterrupted, out)
    # The cache keeps every pass; without one, the interrupted refill starts again.
    assert (len(passes) == 24 * 4 / 8) == cached


@pytest.mark.parametrize("after", [2, 5, 6, 8])
def test_a_signal_in_a_harvest_ahead_of_training(
    after: int, argv_of: Argv, in_pass: Callable[..., list[int]], uninterrupted: Path, tmp_path: Path
) -> None:
    """Training sees the signal while it waits for that pass, with part of the refill already used."""

    def signalled() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.8)

    out = tmp_path / "run"
    in_pass(after, signalled)
    arguments = ("--buffer.ahead", 8, "--checkpoint.every", 5)  # 5: saved in the middle of a refill
    assert main(argv_of(out, *arguments)) == 143
    assert main(["--resume", str(out)]) == 0
    same(uninterrupted, out)


def test_a_signal_before_the_first_step_leaves_the_run_that_was_to_be_replaced(
    argv_of: Argv,
    in_pass: Callable[..., list[int]],
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    in_pass(1, sending(signal.SIGINT))
    assert main(argv_of(out, "--overwrite", "--seed", 4)) == 130
    assert "the run in the directory was left as it was" in capsys.readouterr().err
    same(uninterrupted, out)


@pytest.mark.parametrize(("owner", "method"), [(Trainer, "finished"), (SparseAutoencoder, "encode")])
def test_a_signal_after_training_ends_it_at_once(
    owner: type,
    method: str,
    tiny_neox: Path,
    text_file: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the weights are written, and in the evaluation; resuming writes what is missing."""
    out = tmp_path / "run"

    def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    real, sent = getattr(owner, method), []
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, signalled)
        assert main(options(tiny_neox, text_file, out)) == 143
    assert len(sent) == 1
    assert time.monotonic() - sent[0] < 10
    message = capsys.readouterr().err
    assert f"continue with python -m tsae.train --resume {out}" in message
    assert "Traceback" not in message
    assert not (out / "eval.json").exists()
    assert main(["--resume", str(out)]) == 0
    same(finished, out)
    assert (out / "eval.json").read_bytes() == (finished / "eval.json").read_bytes()


# In subprocesses.


def started(argv: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tsae.train", *argv], env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and not condition():
        time.sleep(0.002)


@pytest.mark.slow
def test_a_writer_killed_in_the_harvest_leaves_a_cache_that_goes_on(
    argv_of: Argv, uninterrupted: Path, tmp_path: Path
) -> None:
    own, out = tmp_path / "cache", tmp_path / "run"
    command = argv_of(out, "--cache", own)
    process = started(command)
    wait_for(lambda: len(list(own.glob("shard-*"))) > 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert manifest(own)["shards"]
    assert main([*command, "--overwrite"]) == 0
    same(uninterrupted, out)
    assert not list(own.glob(".*"))


@pytest.mark.slow
def test_sigterm_ends_a_process_within_ten_seconds(argv_of: Argv, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = started(argv_of(out))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(lines(out / "metrics.jsonl")) >= 3, process)
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143
    assert time.monotonic() - before < 10
    steps = [int(path.name[5:]) for path in (out / "checkpoint").glob("step-*")]
    assert f"interrupted after step {max(steps)}, which is saved" in errors
    assert "Traceback" not in errors
    assert main(["--resume", str(out)]) == 0
    same(uninterrupted, out)
