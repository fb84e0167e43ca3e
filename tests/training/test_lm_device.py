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


def test_a_divided_model_has_no_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"lm_device_map is 'auto'.* and lm_device is 'cpu'; leave one of them out"):
        resolve_lm_device(TrainConfig(lm_device="cpu", lm_device_map="auto"))
    assert resolve_lm_device(TrainConfig(device="cpu", lm_device_map="auto")) == torch.device("cpu")
    monkeypatch.setattr(assemble, "world_size", lambda: 2)
    with pytest.raises(UserError, match="and there are 2 processes; leave one of them out"):
        resolve_lm_device(TrainConfig(lm_device_map="balanced"))


def test_the_options_of_the_model_reach_it(
    argv_of: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tsae.train import main

    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Any:
        asked.update(options)
        raise UserError("no model today")

    monkeypatch.setattr(assemble, "load_language_model", load)
    more = "--lm-device-map sequential --lm-quantization 4bit --trust-remote-code --revision abc".split()  # noqa: SIM905
    assert main(argv_of(tmp_path / "run", "--device", "cpu", *more)) == 2
    wanted = {"device_map": "sequential", "quantization": "4bit", "trust_remote_code": True, "revision": "abc"}
    assert asked == asked | wanted


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
