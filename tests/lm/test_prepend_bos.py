"""Whether sequences start with BOS: what the tokenizer's files say, and what is asked for."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer, sample_text

from tsae.data.documents import Document
from tsae.data.sequences import SequenceStream
from tsae.lm.loading import load_language_model


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def declare(folder: Path, **fields: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "fed"),
    [
        ({}, "<bos>"),
        ({"add_bos_token": True}, "<bos>"),
        ({"add_bos_token": None}, "<bos>"),
        ({"add_bos_token": False}, None),
        ({"add_bos_token": False, "bos_token": "<eos>"}, "<eos>"),  # GPT-2, Pythia: it separates documents
        ({"add_bos_token": False, "bos_token": None}, "<eos>"),
    ],
)
def test_bos_is_fed_unless_the_tokenizer_says_no_and_it_is_no_separator(
    fields: dict[str, Any], fed: str | None, folder: Path
) -> None:
    lm = load_language_model(str(declare(folder, **fields)))
    assert lm.prefix_id == (None if fed is None else lm.tokenizer.convert_tokens_to_ids(fed))


def test_asked_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    declare(folder, add_bos_token=False)
    with caplog.at_level(logging.WARNING):
        for asked in (True, False):
            lm = load_language_model(str(folder), prepend_bos=asked)
            assert lm.prefix_id == (lm.tokenizer.bos_token_id if asked else None)
        assert not caplog.messages
        load_language_model(str(folder))
    assert "adds no BOS (add_bos_token is false): every sequence starts with text" in caplog.text


def test_nothing_to_feed(folder: Path) -> None:
    make_tokenizer(bos=False, eos=False).save_pretrained(folder)
    assert load_language_model(str(folder), prepend_bos=True).prefix_id is None


def test_the_first_position_is_left_out_whichever_token_stands_there(folder: Path) -> None:
    tokenizer = load_language_model(str(folder)).tokenizer

    def rows(prefix: bool) -> Any:
        documents = lambda epoch: iter([Document("a", sample_text(300))])  # noqa: E731
        return SequenceStream(documents, tokenizer, 32, prefix=prefix).next_batch(3)

    with_bos, without = rows(True), rows(False)
    assert with_bos.tokens.shape == without.tokens.shape == (3, 33)
    assert with_bos.segments.shape == without.segments.shape == (3, 32)
    assert (with_bos.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert without.tokens[0, :32].tolist() == with_bos.tokens[0, 1:].tolist()
