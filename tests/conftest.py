"""Fixtures: tiny models of each supported class, text, and runs of the main job on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A worker of pytest-xdist has one core; torch and the processes that its tests start read this on import.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from matplotlib.figure import Figure

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from stand_in import StandIn
from tiny import make_tokenizer, save_model
from tiny_runs import lines, options, run_options, write_text


def pytest_runtest_setup() -> None:
    """Random numbers do not depend on which tests ran before in the same worker."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gemma2"
    return save_model(
        folder, "Gemma2ForCausalLM", "Gemma2Config", head_dim=16, num_key_value_heads=1, query_pre_attn_scalar=16
    )


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gemma3"
    return save_model(
        folder,
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        head_dim=16,
        num_key_value_heads=1,
        query_pre_attn_scalar=16,
        sliding_window=64,
    )


@pytest.fixture(scope="session")
def tiny_neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "neox", "GPTNeoXForCausalLM", "GPTNeoXConfig")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return save_model(folder, "LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "river.txt")


@pytest.fixture(scope="session")
def uninterrupted(tiny_gemma2: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run with `run_options`."""
    from tsae.train import main

    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(run_options(tiny_gemma2, text_file, out)) == 0
    later = lines(out / "metrics.jsonl")[2:]
    for name in ("dead", "auxiliary", "temporal"):  # else a resumed run could lose their state unnoticed
        assert all(line[name] > 0 for line in later)
    return out


@pytest.fixture(scope="session")
def finished(tiny_neox: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run with `options`, its evaluation and report included."""
    from tsae.train import main

    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(options(tiny_neox, text_file, out)) == 0
    return out


@pytest.fixture
def blank_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write a report.png without its figure, which takes longer to draw than a tiny run to train.

    tests/reports draws it, and so do the tests of `tsae.train` and `tsae.evaluate` that look at it.
    """
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: Path(path).write_bytes(b"blank"))


@pytest.fixture
def argv_of(tiny_gemma2: Path, text_file: Path) -> Callable[..., list[str]]:
    """`argv_of(out, *more)`: the command line of a run with `run_options`, and more options."""
    return lambda out, *more: [*run_options(tiny_gemma2, text_file, out), *map(str, more)]


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`at_step(number, act)` has training call `act()` after step `number`; `at_step()` takes that back."""
    from tsae.training.trainer import Trainer

    real = Trainer.train_step

    def at_step(number: int | None = None, act: Callable[[], None] = lambda: None) -> None:
        def step(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
            if self.step == number:
                act()
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "train_step", real if number is None else step)

    return at_step


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A local server that the hub's client takes for the Hugging Face hub: no repositories, an empty cache."""
    from huggingface_hub import constants

    stand_in = StandIn()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, stand_in.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield stand_in
    stand_in.close()
