"""The device of the language model, beside that of the autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.training import assemble
from tsae.training.assemble import resolve_lm_device


def test_it_is_the_autoencoders_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_lm_device(TrainConfig(device="cuda:1")) == torch.device("cuda:1")
    assert resolve_lm_device(TrainConfig(device="cuda:0", lm_device="cuda:1")) == torch.device("cuda:1")
    with pytest.raises(UserError, match="there are 2 GPUs"):
        resolve_lm_device(TrainConfig(device="cuda:0", lm_device="cuda:2"))


def test_several_processes_have_one_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "world_size", lambda: 2)
    with pytest.raises(UserError, match="lm_device is 'cpu', but there are 2 processes"):
        resolve_lm_device(TrainConfig(lm_device="cpu"))


def test_the_model_is_loaded_there(
    argv_of: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tsae.train import main

    asked: list[Any] = []

    def load(name: str, **options: Any) -> Any:
        asked.append(options["device"])
        raise UserError("no model today")

    monkeypatch.setattr(assemble, "load_language_model", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(argv_of(tmp_path / "run", "--device", "cpu", "--lm-device", "cuda:1")) == 2
    assert asked == [torch.device("cuda:1")]
