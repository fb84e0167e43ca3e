"""Every command: its files are complete, or one sentence says that they cannot be written, whatever becomes of what it
prints; and metrics that cannot be written are still printed."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluated_run import write_run
from full_disk import files_of_at_most
from read_only import read_only
from tiny import sample_text
from tiny_runs import options

import tsae.reproduce.papers
from tsae.config import EvaluationConfig
from tsae.rundir import layout
from tsae.utils.config_json import load_json

pytestmark = pytest.mark.usefixtures("blank_report")


class Unread(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Place:
    """Two runs, a longer text, and where results go."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model, self.out = root, model, root / "out"
        self.out.mkdir()
        self.run, self.other = (write_run(root / name, model, activation="topk") for name in ("run", "other"))
        self.text = root / "long.txt"
        self.text.write_text("".join(f" = Title {i} = \n\n{sample_text(6000, seed=i)}\n\n" for i in range(2)))

    def sweep(self) -> Path:
        base = {"model": str(self.model), "data": str(self.run.parent / "text.txt"), "layer": 1, "steps": 2, "batch": 4}
        base |= {"device": "cpu", "sae": {"d_sae": 48, "k": 6}, "evaluation": {"sequences": 4, "ce_sequences": 2}}
        base |= {"buffer": {"sequences": 24, "harvest_batch": 8, "reuse": 1, "estimate_sequences": 16}}
        (self.root / "sweep.yaml").write_text(yaml.safe_dump({"base": base, "runs": {"a": {}, "b": {"seed": 1}}}))
        return self.root / "sweep.yaml"

    def train(self, *more: str) -> list[str]:
        return options(self.model, self.root / "text.txt", self.out / "new", "--steps=2", "--checkpoint.every=0", *more)


# The module, its arguments, the files it writes, and a phrase of the figures on stdout, if it prints any.
Command = tuple[str, Callable[[Place], list[str]], Callable[[Place], list[Path]], str | None]
COMMANDS: dict[str, Command] = {
    "evaluate": (
        "tsae.evaluate",
        lambda p: [str(p.run), "--out", str(p.out / "F.json")],
        lambda p: [p.run / "eval.json", p.run / "report.png", p.out / "F.json"],
        "explained variance",
    ),
    "evaluate-release": (
        "tsae.evaluate",
        lambda p: [str(write_run(p.root / "trigger", p.model, activation="schmitt")), "--release-ratio", "0.5"],
        lambda p: [p.root / "trigger" / "eval-release-0.5.json"],
        "explained variance",
    ),
    "evaluate-saebench": (
        "tsae.evaluate",
        lambda p: [str(p.run), "--format", "saebench"],
        lambda p: [p.run / "eval.json", p.run / "saebench_core.json"],
        "explained variance",
    ),
    "compare": (
        "tsae.evaluate",
        lambda p: [str(p.run), str(p.other), "--out", str(p.out / "F.json")],
        lambda p: [p.out / "F.json"],
        "autoencoder",
    ),
    "probe": (
        "tsae.probe.__main__",
        lambda p: [str(p.run), str(p.other), "--data", str(p.text), "--tokens", "5120"],
        lambda p: [p.run / "probes.json", p.other / "probes.json"],
        "ROC",
    ),
    "view": ("tsae.view.__main__", lambda p: [str(p.run)], lambda p: [p.run / "view.html"], None),
    "export": (
        "tsae.export",
        lambda p: [str(p.run), "--to", "saelens", "--out", str(p.out / "exported")],
        lambda p: [p.out / "exported" / "cfg.json", p.out / "exported" / "sae_weights.safetensors"],
        None,
    ),
    "hub": (
        "tsae.hub.__main__",
        lambda p: [str(p.run), "name", "--folder", str(p.out / "folder")],
        lambda p: [p.out / "folder" / "README.md", p.out / "folder" / "config.json"],
        None,
    ),
    "train": (
        "tsae.train",
        lambda p: p.train(),
        lambda p: [p.out / "new" / "eval.json", p.out / "new" / "report.png", p.out / "new" / "sae" / "cfg.json"],
        "explained variance",
    ),
    "sweep": (
        "tsae.train",
        lambda p: ["--sweep", str(p.sweep()), "--out", str(p.out / "new")],
        lambda p: [p.out / "new" / "sweep.json", p.out / "new" / "a" / "eval.json"],
        "Sweep",
    ),
    "reproduce": (
        "tsae.reproduce.__main__",
        lambda p: (
            f"tsae --model {p.model} --layer 1 --data {p.root / 'text.txt'} --steps 2 --d-sae 24 --device cpu "
            f"--out {p.out / 'new'}"
        ).split(),
        lambda p: [p.out / "new" / name for name in ("results.json", "results.md", "figure1.png")],
        "paper",
    ),
}
PRINTING = [name for name, (*_, phrase) in COMMANDS.items() if phrase is not None and name != "reproduce"]


@pytest.fixture
def place(tmp_path: Path, tiny_gemma3: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    small = EvaluationConfig(sequences=4, ce_sequences=2)
    monkeypatch.setattr(tsae.reproduce.papers, "EvaluationConfig", lambda **_: small)
    return Place(tmp_path, tiny_gemma3)


def call(name: str, place: Place) -> int:
    module, arguments, *_ = COMMANDS[name]
    return importlib.import_module(module).main(arguments(place))


def check_complete(name: str, place: Place) -> None:
    for path in COMMANDS[name][2](place):
        assert path.stat().st_size > 0
        if path.suffix == ".json":
            assert load_json(path)
    left = [path for path in place.root.rglob(".*") if path.name.endswith(".tmp") or path.name.startswith(layout.LOCK)]
    assert not left


ALL = [pytest.param(name, marks=[pytest.mark.slow] * (name == "reproduce")) for name in COMMANDS]


@pytest.mark.parametrize("name", ALL)
def test_nobody_reads_what_is_printed(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """`2>&1 | true`: stdout and stderr fail from the first character on."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Unread())
        patch.setattr(sys, "stderr", Unread())
        assert call(name, place) == 0
    check_complete(name, place)


@pytest.mark.parametrize("name", ALL)
def test_the_files_are_there_before_anything_is_printed(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed, or its terminal closed, when the first character of a result appears."""

    class Killed(BaseException):
        pass

    class Fatal(io.StringIO):
        def write(self, text: str) -> int:
            raise Killed

    phrase = COMMANDS[name][3]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Fatal())
        if phrase is None:
            assert call(name, place) == 0
        else:
            with pytest.raises(Killed):
                call(name, place)
    for path in COMMANDS[name][2](place):
        assert path.stat().st_size > 0


@pytest.mark.parametrize("encoding", ["ascii", "cp932"])
@pytest.mark.parametrize("name", ["evaluate", "compare", "probe", "train"])
def test_an_encoding_that_lacks_characters(
    name: str, encoding: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
        patch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert call(name, place) == 0
        sys.stdout.flush()
        text = printed.getvalue().decode(encoding)
    assert str(COMMANDS[name][3]) in text
    check_complete(name, place)


@pytest.fixture
def sentence(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], tuple[str, str]]]:
    """What was printed on stdout, and the one sentence on stderr."""

    def read() -> tuple[str, str]:
        found = capsys.readouterr()
        (error,) = (line for line in found.err.splitlines() if line.startswith("error: "))
        assert "Traceback" not in found.err
        return found.out, error

    return read


@pytest.mark.parametrize("name", ["evaluate", "evaluate-release", "evaluate-saebench", "probe"])
def test_a_run_that_is_read_only(name: str, place: Place, sentence: Callable[[], tuple[str, str]]) -> None:
    module, arguments, files, phrase = COMMANDS[name]
    argv, first = arguments(place), files(place)[0]
    before = sorted(first.parent.rglob("*"))
    with read_only(first.parent):
        assert importlib.import_module(module).main(argv) == 2
    printed, said = sentence()
    assert phrase in printed
    assert f"{first} cannot be written (Permission denied); what was complete is kept" in said or (
        f"{first.parent / layout.SPARSITY} cannot be written (Permission denied); what was complete is kept" in said
    )
    assert "see that it can be written to" in said
    assert sorted(first.parent.rglob("*")) == before
    for path in files(place):  # the others
        assert path.is_file() == (first.parent not in path.parents)


def test_a_page_for_a_read_only_run_is_refused_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, sentence: Callable[[], tuple[str, str]]
) -> None:
    monkeypatch.setattr("tsae.view.command.collect", lambda *_: pytest.fail("computed"))
    with read_only(place.run):
        assert call("view", place) == 2
    page = place.run / "view.html"
    assert sentence()[1] == (
        f"error: The page cannot be written to {page} (Permission denied); name another file with --out."
    )


@pytest.mark.parametrize("name", ["train", "sweep", "export", "hub", "reproduce"])
def test_a_new_directory_in_a_read_only_place(name: str, place: Place, sentence: Callable[[], tuple[str, str]]) -> None:
    with read_only(place.out):
        assert call(name, place) == 2
    printed, said = sentence()
    assert printed == ""
    assert f"{place.out}" in said
    assert "(Permission denied); name another directory." in said
    assert not list(place.out.iterdir())


@pytest.mark.parametrize("name", PRINTING)
def test_figures_are_printed_if_the_disk_is_full_at_the_end(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch, sentence: Callable[[], tuple[str, str]]
) -> None:
    """No file can be written once the last autoencoder has been measured."""
    from tsae.evaluation.evaluator import EvaluationResult
    from tsae.probe import command as probe

    full: list[Any] = []

    def fill(real: Callable[..., Any]) -> Callable[..., Any]:
        def filled(*args: Any, **kwargs: Any) -> Any:
            if not full:
                full.append(files_of_at_most(10))
                full[0].__enter__()
            return real(*args, **kwargs)

        return filled

    monkeypatch.setattr(EvaluationResult, "not_finite", fill(EvaluationResult.not_finite))
    monkeypatch.setattr(probe, "as_json", fill(probe.as_json))
    if name == "compare":  # of which only the table asks that
        import tsae.api.evaluation as module

        monkeypatch.setattr(module, "write_out", fill(module.write_out))
    try:
        status = call(name, place)
    finally:
        if full:
            full[0].__exit__(None, None, None)
    assert full
    assert status == 2
    printed, said = sentence()
    assert str(COMMANDS[name][3]) in printed
    assert "cannot be written (File too large)" in said


def test_results_go_through_links_and_into_devices(place: Place, tmp_path: Path) -> None:
    """A device is not replaced by a file, nor a link."""
    from tsae.evaluate import main

    (place.out / "real.json").write_text("old")
    (place.out / "link.json").symlink_to("real.json")
    os.mkfifo(place.out / "pipe")
    reader = os.open(place.out / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link.json", "pipe"):
        assert main([str(place.run), str(place.other), "--out", str(place.out / name)]) == 0
    assert (place.out / "link.json").is_symlink()
    for text in ((place.out / "real.json").read_text(), os.read(reader, 1 << 20).decode()):
        assert set(json.loads(text)) == {"run", "other"}
    os.close(reader)
    assert (place.out / "pipe").is_fifo()
