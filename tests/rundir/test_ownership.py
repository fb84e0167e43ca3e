"""One process owns a run directory: every other command is refused while it works, and nothing is changed."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluated_run import write_run
from launch import fork, run_jobs
from tiny_runs import lines, options, run_options, same

from tsae.errors import UserError
from tsae.rundir import layout
from tsae.rundir.directory import read_config
from tsae.rundir.ownership import check_output, owning, owning_runs
from tsae.train import main
from tsae.training.run import run as train
from tsae.utils.lock import Lock

pytestmark = pytest.mark.usefixtures("blank_report")

# Commands that are given a run, with what else they need.
COMMANDS = {
    "tsae.evaluate": [],
    "tsae.export": ["--to", "saelens", "--out", "{tmp}/exported", "--drop-hysteresis"],
    "tsae.hub.__main__": ["name", "--folder", "{tmp}/folder"],
    "tsae.probe.__main__": [],
    "tsae.view.__main__": ["--out", "{tmp}/page.html"],
}


def in_thread(work: Callable[[], int]) -> int:
    """The result of ``work``, called as another process would be: nothing is owned by its caller."""
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("way", ["resume", "overwrite", "again"])
def test_a_run_that_is_going_is_left_alone(
    way: str,
    argv_of: Callable[..., list[str]],
    at_step: Callable[..., None],
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    second = {"resume": ["--resume", str(out)], "overwrite": argv_of(out, "--overwrite"), "again": argv_of(out)}[way]
    statuses = []
    at_step(13, lambda: statuses.append(in_thread(lambda: main(second))))
    assert main(argv_of(out)) == 0
    assert statuses == [2]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if way == "again":
        assert "already has a run" in said[0]
    else:
        (sentence,) = said
        assert sentence.startswith(f"error: The run {out} is in use by another process ({os.getpid()}, since 20")
        assert sentence.endswith("); wait until that has ended, or name another directory.")
    same(uninterrupted, out)
    assert not (out / layout.LOCK).exists()


def test_two_starts_into_one_new_directory(
    argv_of: Callable[..., list[str]],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second comes while the first loads its model: there is no config.json yet."""
    import tsae.training.run as module

    out, real, statuses = tmp_path / "new" / "run", module.prepare, []

    def prepare(job: object, **options: object) -> object:
        if not statuses:
            statuses.append(0)
            statuses.append(in_thread(lambda: main(argv_of(out))))
        return real(job, **options)

    monkeypatch.setattr(module, "prepare", prepare)
    assert main(argv_of(out)) == 0
    assert statuses == [0, 2]
    assert "is in use by" in capsys.readouterr().err
    same(uninterrupted, out)


def test_a_directory_that_became_a_run_is_not_replaced(
    argv_of: Callable[..., list[str]],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another process trains between the check of the command line and the lock."""
    import tsae.training.command as module

    out, real, first = tmp_path / "run", module.owning_on_rank0, []

    def late(directory: Path) -> object:
        if not first:
            first.append(True)
            assert in_thread(lambda: main(argv_of(out))) == 0
        return real(directory)

    monkeypatch.setattr(module, "owning_on_rank0", late)
    assert main(argv_of(out)) == 2
    assert "already has a run" in capsys.readouterr().err
    same(uninterrupted, out)


def test_what_was_changed_between_reading_and_the_lock_is_noticed(
    argv_of: Callable[..., list[str]],
    at_step: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tsae.training.command as module

    out, real = tmp_path / "run", module.owning_on_rank0
    assert main(argv_of(out, "--steps", "2")) == 0

    def late(directory: Path) -> object:
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"steps": 3}))
        return real(directory)

    monkeypatch.setattr(module, "owning_on_rank0", late)
    assert main(["--resume", str(out)]) == 2
    assert f"Another process has just changed the run {out}; start again." in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_are_given_a_run(
    command: str, tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", tiny_gemma3, activation="schmitt")
    before = content(tmp_path)
    argv = [str(run), *(word.format(tmp=tmp_path) for word in COMMANDS[command])]
    call = importlib.import_module(command).main
    with Lock(run / layout.LOCK):
        assert call(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: The run {run} is in use by another process ({os.getpid()}, since ")
    assert said.endswith("; wait until that has ended, or end it first.\n")
    assert content(tmp_path) == before


@pytest.mark.parametrize("command", ["tsae.evaluate", "tsae.view.__main__"])
def test_files_for_another_run(
    command: str, tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--out` in the directory of a run that is going, and in the place of a run's own file."""
    run, other = (write_run(tmp_path / name, tiny_gemma3) for name in ("run", "other"))
    before, call = content(tmp_path), importlib.import_module(command).main
    with Lock(other / layout.LOCK):
        assert call([str(run), "--out", str(other / "mine.json")]) == 2
    assert f"The run {other} is in use by" in capsys.readouterr().err
    own = (
        "config.json",
        "metrics.jsonl",
        "eval.json",
        "eval-release-0.5.json",
        ".lock",
        "sae/cfg.json",
        "sae/new.json",
    )
    for name in own:
        assert call([str(run), "--out", str(other / name)]) == 2
        assert f"{other / name} is a file of the run in {other}; name another file." in capsys.readouterr().err
    assert content(tmp_path) == before


def test_training_waits_for_an_evaluation(
    uninterrupted: Path, argv_of: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(uninterrupted)
    with owning_runs(uninterrupted):
        for argv in (["--resume", str(uninterrupted)], argv_of(uninterrupted, "--overwrite")):
            assert in_thread(lambda argv=argv: main(argv)) == 2
            assert "is in use by" in capsys.readouterr().err
    assert content(uninterrupted) == before


@pytest.fixture
def sweep(tmp_path: Path, tiny_gemma3: Path) -> Path:
    """A sweep's directory with two runs."""
    directory = tmp_path / "sweep"
    directory.mkdir()
    for name in ("a", "b"):
        write_run(directory / name, tiny_gemma3)
    runs = {name: {"config": json.loads((directory / name / "config.json").read_text())} for name in ("a", "b")}
    (directory / layout.SWEEP).write_text(json.dumps({"runs": runs}))
    return directory


def test_a_sweep_owns_its_runs(sweep: Path) -> None:
    with owning(sweep), owning_runs(sweep / "a"):  # by the same command
        pass
    with (
        Lock(sweep / layout.LOCK),
        pytest.raises(UserError, match=r"The run .*/sweep/a is in use by"),
        owning_runs(sweep / "a"),
    ):
        pass
    with owning_runs(sweep / "a"), owning_runs(sweep / "b"):  # two evaluations
        pass
    with Lock(sweep / "a" / layout.LOCK), pytest.raises(UserError, match=r"/sweep/a is in use by"), owning(sweep):
        pass
    assert not list(sweep.rglob(f"{layout.LOCK}*"))


def test_resuming_a_sweep_and_part_of_it(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Lock(sweep / "b" / layout.LOCK):
        assert main(["--resume", str(sweep)]) == 2
    assert f"The run {sweep / 'b'} is in use by" in capsys.readouterr().err


def test_a_link_to_the_directory_is_the_directory(uninterrupted: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(uninterrupted)
    with owning(uninterrupted), owning(link):
        pass
    with Lock(uninterrupted / layout.LOCK), pytest.raises(UserError, match="is in use by"), owning(link):
        pass


def test_a_new_directory_goes_again_if_nothing_came_of_it(tmp_path: Path) -> None:
    with owning(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / layout.LOCK).is_file()
    assert not list(tmp_path.iterdir())
    (tmp_path / "c").mkdir()
    with owning(tmp_path / "c"):
        pass
    with owning(tmp_path / "d"):
        (tmp_path / "d" / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"]


def test_other_directories_get_no_lock(tmp_path: Path) -> None:
    with owning_runs(tmp_path, tmp_path / "none"):
        assert not list(tmp_path.iterdir())


def test_where_results_may_go(tmp_path: Path) -> None:
    check_output(tmp_path / "eval.json")
    with pytest.raises(UserError, match="is a directory; name a file"):
        check_output(tmp_path)
    with pytest.raises(UserError, match="There is no directory"):
        check_output(tmp_path / "none" / "eval.json")


@pytest.mark.parametrize("name", ["cfg.json", "model.safetensors", "ae.pt", "params.npz"])
def test_results_do_not_replace_an_autoencoder_or_a_model(tmp_path: Path, name: str) -> None:
    check_output(tmp_path / name)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="is part of an autoencoder or a model; name another file"):
        check_output(tmp_path / name)


@pytest.mark.parametrize("place", ["sae/x", "checkpoint", "eval-release-1.json", "view.html/deep/er"])
@pytest.mark.parametrize("command", ["tsae.train", "tsae.export", "tsae.hub.__main__"])
def test_directories_in_the_place_of_files_of_a_run(
    command: str, place: str, tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next `--overwrite` would remove them."""
    run, folder = write_run(tmp_path / "run", tiny_gemma3), tmp_path / "run" / place
    before = content(run)
    argv = {
        "tsae.train": ["--model", str(tiny_gemma3), "--layer", "1", "--out", str(folder)],
        "tsae.export": [str(run), "--to", "saelens", "--out", str(folder)],
        "tsae.hub.__main__": [str(run), "name", "--folder", str(folder)],
    }[command]
    assert importlib.import_module(command).main(argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder} is in the place of a file of the run in {run};")
    assert content(run) == before


def test_several_processes_of_one_run(
    tiny_gemma2: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 owns the directory for all, and all end if another job does."""
    out, other = tmp_path / "run", tmp_path / "other"
    short = ["--steps", "2", "--evaluation.no-final"]
    other.mkdir()
    jobs = [(0, options(tiny_gemma2, text_file, out, *short)), (2, options(tiny_gemma2, text_file, other, *short))]
    with Lock(other / layout.LOCK):
        said = fork(2, run_jobs, jobs, folder=tmp_path)
    assert said.count(f"error: The run {other} is in use by another process ({os.getpid()}, since ") == 1
    assert [path.name for path in other.iterdir()] == []
    assert lines(out / "metrics.jsonl")[-1]["step"] == 2
    assert not (out / layout.LOCK).exists()


def test_from_python(uninterrupted: Path) -> None:
    cfg = read_config(uninterrupted)
    with Lock(uninterrupted / layout.LOCK), pytest.raises(UserError, match="is in use by"):
        train(cfg, uninterrupted, resume=True)


@pytest.mark.slow
def test_a_killed_run_can_be_resumed_at_once_and_a_living_one_not(
    tiny_gemma2: Path, text_file: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Real processes."""
    out = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tsae.train"]
    first = subprocess.Popen([*command, *run_options(tiny_gemma2, text_file, out)], env=environment)
    deadline = time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = subprocess.run([*command, "--resume", str(out)], env=environment, capture_output=True, text=True)
    assert second.returncode == 2
    assert f"error: The run {out} is in use by another process ({first.pid}, since " in second.stderr
    first.kill()
    first.wait()
    assert (out / layout.LOCK).exists()
    assert subprocess.run([*command, "--resume", str(out)], env=environment, check=False).returncode == 0
    same(uninterrupted, out)
    assert not (out / layout.LOCK).exists()
