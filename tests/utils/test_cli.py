"""How each command line exits on a signal."""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any

import pytest

RESUMABLE = ("tsae.train", "tsae.reproduce.__main__")
OTHERS = ("tsae.evaluate", "tsae.export", "tsae.hub.__main__", "tsae.probe.__main__", "tsae.view.__main__")


def ended(module: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of a command that gets the signal at its start."""
    found = importlib.import_module(module)
    monkeypatch.setattr(found, "parse", lambda *_: os.kill(os.getpid(), number))
    arguments: Any = ["tcsae"] if "reproduce" in module else []
    return found.main(arguments)


@pytest.mark.parametrize("module", OTHERS)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_cannot_go_on_later_does_not_say_that_it_can(
    module: str,
    number: signal.Signals,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(module, number, monkeypatch) == status
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("module", RESUMABLE)
def test_one_that_can_says_how(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(module, signal.SIGINT, monkeypatch) == 130
    said = capsys.readouterr().err
    assert said.startswith("interrupted; ")
    assert "--resume" in said
    assert said.count("\n") == 1
