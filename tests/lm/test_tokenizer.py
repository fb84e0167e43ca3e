"""Tokenizers: what AutoTokenizer accepts, ids that the model has no embedding for, and damaged files."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AddedToken,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tsae.data.documents import Document
from tsae.data.sequences import SequenceStream
from tsae.errors import UserError
from tsae.lm.hooks import activations, logits_with
from tsae.lm.loading import LanguageModel, load_language_model
from tsae.lm.tokenizer import encode, padding_token, prefix_token

TEXT = "the river ran\n\tunder 2 stone bridges; it's été 橋 🌉  ba be bi"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def retokenize(folder: Path, change: Callable[[Any], None]) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def words_alone(tokenizer: Any) -> None:
    """Every character that is not in the vocabulary becomes UNK."""
    vocabulary = tokenizer.get_vocab() | {"<unknown>": 400}
    tokenizer.backend_tokenizer.model = WordLevel(vocabulary, unk_token="<unknown>")
    tokenizer.add_special_tokens({"unk_token": "<unknown>"})


def padded_row(lm: LanguageModel) -> torch.Tensor:
    """[1, 33] a sequence of which a half is padding."""
    stream = SequenceStream(lambda epoch: iter([Document("a", " du" * 8)]), lm.tokenizer, 32, repeat=False)
    batch = stream.next_batch(1)
    assert (batch.segments == -1).any()
    return batch.tokens


def test_byt5(tmp_path: Path) -> None:
    """It has no file of a vocabulary: bytes are its tokens."""
    config = LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    lm = load_language_model(str(tmp_path), dtype="float32")
    assert encode(lm.tokenizer, ["hé</s>"]) == [[ord("h") + 3, 0xC3 + 3, 0xA9 + 3, *(ord(c) + 3 for c in "</s>")]]
    assert lm.prefix_id == lm.tokenizer.eos_token_id
    assert activations(lm, padded_row(lm), 0).shape == (1, 33, 16)


def test_a_vocabulary_that_lacks_words_and_has_no_unknown_token(folder: Path) -> None:
    vocabulary = Tokenizer(WordLevel({"river": 0, "ran": 1, "du": 2}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary)
    tokenizer.save_pretrained(folder)
    assert encode(tokenizer, ["river ran"]) == [[0, 1]]
    with pytest.raises(UserError, match=r"the tokenizer cannot read the text \(.*UNK"):
        encode(tokenizer, ["river ran", "river walked"])
    with pytest.raises(UserError, match=r"the tokenizer cannot read the text \(.*UNK"):
        load_language_model(str(folder))


class TestIdsBeyondTheEmbedding:
    def test_padding_token_added_without_resizing(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        retokenize(folder, lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}))
        with caplog.at_level(logging.WARNING):
            lm = load_language_model(str(folder), dtype="float32")
        assert "the padding token '[PAD]' of" in caplog.text
        assert "has id 400, beyond the 400 rows" in caplog.text
        tokens = padded_row(lm)
        assert tokens.max() < 400
        assert logits_with(lm, tokens, 1).shape[:2] == tokens.shape
        # The literal string is text like any other.
        assert max(encode(lm.tokenizer, ["[PAD] ba [PAD]"])[0]) < 400

    def test_padding_token_without_any_prefix(self, folder: Path) -> None:
        def change(tokenizer: Any) -> None:
            tokenizer.bos_token = tokenizer.eos_token = None
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})

        lm = load_language_model(str(retokenize(folder, change)), dtype="float32")
        assert prefix_token(lm.tokenizer) is None
        assert padding_token(lm.tokenizer) == 0

    def test_special_tokens_without_a_role_cannot_be_made(self, folder: Path) -> None:
        """As Gemma 3's <image_soft_token>, which its text models have no row for."""
        image = AddedToken("<image>", special=True)
        lm = load_language_model(str(retokenize(folder, lambda tokenizer: tokenizer.add_tokens([image]))))
        assert lm.tokenizer.convert_tokens_to_ids("<image>") == 400
        assert max(encode(lm.tokenizer, ["ba <image> be"])[0]) < 400

    @pytest.mark.parametrize(
        ("change", "token"),
        [
            (lambda tokenizer: tokenizer.add_tokens(["<word>", "<other>"]), r"'<word>' .* \(and 1 more such tokens\)"),
            (lambda tokenizer: tokenizer.add_special_tokens({"bos_token": "<start>"}), "'<start>'"),
            (words_alone, "'<unknown>'"),
        ],
    )
    def test_others_are_refused(self, folder: Path, change: Callable[[Any], None], token: str) -> None:
        name, _, others = token.partition(" .* ")
        message = (
            f"has the token {name} with id 400, but the model's embedding has only 400 rows{'.*' if others else ':'}"
        )
        with pytest.raises(UserError, match=message):
            load_language_model(str(retokenize(folder, change)))

    def test_an_unknown_token_that_no_text_makes_is_no_obstacle(self, folder: Path) -> None:
        """A tokenizer of bytes knows every character, and its class may name an UNK without a row (Qwen 2)."""
        retokenize(folder, lambda tokenizer: tokenizer.add_special_tokens({"unk_token": "<unknown>"}))
        lm = load_language_model(str(folder), dtype="float32")
        assert lm.tokenizer.unk_token_id == 400
        assert max(encode(lm.tokenizer, [TEXT])[0]) < 400


@pytest.mark.parametrize(("lost", "first"), [(["bos_token"], "<eos>"), (["bos_token", "eos_token"], "its first token")])
def test_a_prefix_other_than_bos_is_named(
    folder: Path, lost: list[str], first: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in lost}))
    with caplog.at_level(logging.WARNING):
        load_language_model(str(folder))
    assert "has no BOS token: every sequence starts with" in caplog.text
    assert first in caplog.text


def test_a_tokenizer_that_transformers_makes_of_nothing_is_missing(folder: Path) -> None:
    """Without its files GPT-2's class has one token, and drops all text."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(UserError, match="lacks a tokenizer"):
        load_language_model(str(folder))


def test_another_bos_than_the_models_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_language_model(str(folder))
        assert not caplog.messages
        load_language_model(str(retokenize(folder, lambda tokenizer: setattr(tokenizer, "bos_token", "<pad>"))))
    assert "is 2 in its config.json, but its tokenizer has '<pad>' with id 0" in caplog.text


def mutations(content: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Each field dropped, null, or of another type; also those of objects in it."""
    found = []
    for name, value in content.items():
        others = [3, "x", [], {}, True, ["x"], {"x": "y"}, None]
        where = ".".join((*path, name))
        found.append((f"{where} dropped", {k: v for k, v in content.items() if k != name}))
        found += [(f"{where} = {other!r}", content | {name: other}) for other in others if other != value]
        if isinstance(value, dict) and name != "vocab":
            found += [(what, content | {name: inner}) for what, inner in mutations(value, (*path, name))]
    return found


VALID = ("pre_tokenizer.add_prefix_space = True", "model.merges = []")
"""Mutations that leave a tokenizer as good as any: only its model could tell."""


class TestMutations:
    """The same tokens, one sentence, or a warning that says what is unlike."""

    @pytest.fixture
    def right(self, tiny_llama: Path) -> tuple[list[int], int | None]:
        lm = load_language_model(str(tiny_llama))
        return encode(lm.tokenizer, [TEXT])[0], lm.prefix_id

    def check(self, folder: Path, right: tuple[list[int], int | None], caplog: pytest.LogCaptureFixture) -> str | None:
        """None, or what is wrong with what the folder gives."""
        caplog.clear()
        try:
            with caplog.at_level(logging.WARNING):
                lm = load_language_model(str(folder))
                got = encode(lm.tokenizer, [TEXT])[0], lm.prefix_id
                padded_row(lm)
        except UserError as error:
            return None if "\n" not in str(error) else f"several lines: {error}"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        return None if got == right or str(folder) in caplog.text else f"other tokens: {got}"

    @pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
    def test_fields(
        self,
        tiny_llama: Path,
        tmp_path: Path,
        right: tuple[list[int], int | None],
        name: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        wrong = {}
        roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        content = roles if name == "special_tokens_map.json" else json.loads((tiny_llama / name).read_text())
        for i, (what, mutated) in enumerate(mutations(content)):
            if what in VALID:
                continue
            folder = tmp_path / str(i)
            folder.mkdir()
            for file in tiny_llama.iterdir():
                (folder / file.name).symlink_to(file)
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_text(json.dumps(mutated))
            if found := self.check(folder, right, caplog):
                wrong[what] = found
        assert not wrong, "\n".join(f"{what}: {why}" for what, why in wrong.items())

    @pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b'{"a": NaN}'])
    @pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
    def test_files(
        self,
        folder: Path,
        right: tuple[list[int], int | None],
        name: str,
        content: bytes | None,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
        assert self.check(folder, right, caplog) is None
