"""The class of a token from its own characters."""

import numpy as np
import pytest
from tiny import make_tokenizer

from tsae.probe.token_classes import CLASSES, token_class, token_classes

EXAMPLES = {
    "blank": ["\n", "\n\n", "    ", " ", "\t"],
    "number": ["1", "42", " 7", "3.", "(0", "²"],
    "operator": ["=", " ==", "->", " %", "--", ">>>", "*,"],
    "punctuation": [".", ",", " (", '("', "...", "#", "—", "«"],
    "identifier": ["_", " __", "_name", "a_b", "__init__", "._"],
    "function word": [" the", "The", "of", " is", " if", "for", "AND", "not"],
    "keyword": [" def", "return", "None", " class", "True", "lambda"],
    "capitalised": [" Error", "Path", "URL", " A1", "Éa"],
    "word": [" river", " self", " x", " utf8"],
    "continuation": ["ing", "self", "x2", "na", "ß"],
}


@pytest.mark.parametrize(("name", "token"), [(name, token) for name, tokens in EXAMPLES.items() for token in tokens])
def test_examples(name, token):
    assert token_class(token) == name


def test_every_class_has_examples_and_some_tokens_none():
    assert set(EXAMPLES) == set(CLASSES)
    assert token_class("\N{REPLACEMENT CHARACTER}") is None
    assert token_class(" \N{REPLACEMENT CHARACTER}") is None
    assert token_class("") is None


def test_tokens_of_a_text_keep_the_blank_before_them(tokenizer):
    ids = tokenizer("bed. kol\n\n7 Bo_", add_special_tokens=False)["input_ids"]
    found = [CLASSES[i] for i in token_classes(ids, tokenizer)]
    pieces = [tokenizer.decode([i]) for i in ids]
    assert [token_class(piece) for piece in pieces] == found
    assert {"blank", "punctuation", "number", "identifier"} <= set(found)
    assert any(piece.startswith(" ") and name in ("word", "blank") for piece, name in zip(pieces, found, strict=True))


def test_tokens_of_a_tokenizer_that_marks_blanks(tmp_path):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "x", "▁river", "ing", "▁", "▁the", "<0xC3>"]
    inner = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    # As Llama's: alone, a token loses the blank before it.
    strip = decoders.Strip(" ", 1, 0)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    marked = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert marked.decode([2]) == "river"
    found = token_classes(np.array([2, 3, 5, 6, 2]), marked)
    assert [CLASSES[i] if i >= 0 else None for i in found] == ["word", "continuation", "function word", None, "word"]


def test_bytes_of_a_split_character_have_no_class():
    tokenizer = make_tokenizer()
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    assert token_classes(ids, tokenizer).tolist() == [-1, -1]
