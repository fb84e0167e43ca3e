"""Packing documents into token sequences: segments, special tokens, epochs, resuming."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import make_tokenizer, sample_text
from transformers import AddedToken

from tsae.data.documents import Document
from tsae.data.sequences import SequenceStream, TokenBatch
from tsae.errors import UserError
from tsae.lm.tokenizer import padding_token, prefix_token

T = 16


def documents(epoch: int) -> Iterator[Document]:
    """150 documents of 1 to 60 words, different in every epoch."""
    for i in range(150):
        yield Document(f"{epoch}.{i}", sample_text(1 + 37 * i % 60, seed=1000 * epoch + i))


def fixed(*texts: str) -> Any:
    return lambda epoch: iter([Document(str(i), text) for i, text in enumerate(texts)])


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def batches(stream: SequenceStream, sizes: list[int]) -> list[TokenBatch]:
    return [stream.next_batch(n) for n in sizes]


def test_shapes_dtypes_and_prefix(tokenizer: Any) -> None:
    batch = SequenceStream(documents, tokenizer, T).next_batch(5)
    assert batch.tokens.shape == (5, T + 1)
    assert batch.tokens.dtype == torch.int64
    assert batch.segments.shape == (5, T)
    assert batch.segments.dtype == torch.int32
    assert (batch.tokens[:, 0] == tokenizer.bos_token_id).all()


def test_tokens_and_segments_against_plain_packing(tokenizer: Any) -> None:
    flat, owner = [], []
    for i, document in enumerate(documents(0)):
        tokens = ids(tokenizer, document.text)
        flat += tokens
        owner += [i] * len(tokens)
    rows = len(flat) // T
    stream = SequenceStream(documents, tokenizer, T)
    got = batches(stream, [3, 1, rows - 4])
    tokens = torch.cat([batch.tokens for batch in got])[:, 1:]
    segments = torch.cat([batch.segments for batch in got])
    assert tokens.flatten().tolist() == flat[: rows * T]
    for row in range(rows):
        seen: list[int] = []
        for t in range(T):
            document = owner[row * T + t]
            if document not in seen:
                seen.append(document)
            assert segments[row, t] == seen.index(document)
    assert stream.tokens_read == rows * T


def test_special_tokens_spelled_in_the_text_are_text(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """No BOS, EOS or padding in the middle of a sequence because a document writes "<bos>"."""
    text = "ba<bos>be bi<eos>bo<pad>" + " du" * 60
    with caplog.at_level(logging.WARNING):
        batch = SequenceStream(fixed(text), tokenizer, 48, repeat=False).next_batch(1)
    assert not torch.isin(batch.tokens[:, 1:], torch.tensor(tokenizer.all_special_ids)).any()
    assert (batch.segments == 0).all()
    assert tokenizer.decode(batch.tokens[0, 1:]) == text[: len(tokenizer.decode(batch.tokens[0, 1:]))]
    assert [f"spells the special token '<{name}>'" in caplog.text for name in ("bos", "eos", "pad")] == [True] * 3
    # The tokenizer itself still reads them, as for a chat template.
    assert tokenizer.bos_token_id in tokenizer(text)["input_ids"]


def test_special_tokens_without_a_role_are_text() -> None:
    """Gemma's <start_of_turn> and <unused5>, for example, are marked special but not in `all_special_ids`."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<turn>", special=True), AddedToken("<word>", special=False)])
    turn, word = tokenizer.convert_tokens_to_ids(["<turn>", "<word>"])
    assert turn not in tokenizer.all_special_ids
    batch = SequenceStream(fixed("ba<turn>be<word>bo<turn>" + " du" * 60), tokenizer, 48, repeat=False).next_batch(1)
    assert (batch.tokens[:, 1:] == turn).sum() == 0
    assert (batch.tokens[:, 1:] == word).sum() == 1
    assert (batch.segments == 0).all()


def test_bos_of_id_0_is_a_prefix() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token, tokenizer.pad_token = "<pad>", None
    assert tokenizer.bos_token_id == prefix_token(tokenizer) == padding_token(tokenizer) == 0
    batch = SequenceStream(documents, tokenizer, T).next_batch(2)
    assert batch.tokens.shape == (2, T + 1)
    assert (batch.tokens[:, 0] == 0).all()


@pytest.mark.parametrize("options", [{"padding_side": "left"}, {"add_bos_token": False}, {"add_bos_token": True}])
def test_options_of_the_tokenizer_change_nothing(tokenizer: Any, options: dict[str, Any]) -> None:
    """BOS stands first once, whether or not the tokenizer adds its own; the last row is padded on its right."""
    other = make_tokenizer()
    for name, value in options.items():
        setattr(other, name, value)
    text = fixed(" du" * (T + T // 2))
    batch, expected = (SequenceStream(text, t, T, repeat=False).next_batch(4) for t in (other, tokenizer))
    assert batch.equals(expected)
    assert batch.tokens[1, 0] == tokenizer.bos_token_id
    assert batch.segments[1].tolist() == [0] * (T // 2) + [-1] * (T // 2)


def test_eos_is_the_prefix_without_bos() -> None:
    tokenizer = make_tokenizer(bos=False)
    batch = SequenceStream(documents, tokenizer, T).next_batch(2)
    assert (batch.tokens[:, 0] == tokenizer.eos_token_id).all()


def test_first_token_of_content_is_the_prefix_without_bos_and_eos() -> None:
    tokenizer = make_tokenizer(bos=False, eos=False)
    flat = [t for document in documents(0) for t in ids(tokenizer, document.text)]
    batch = SequenceStream(documents, tokenizer, T).next_batch(3)
    assert batch.tokens.flatten().tolist() == flat[: 3 * (T + 1)]
    assert batch.segments.shape == (3, T)
    assert (batch.segments[:, 0] == 0).all()


@pytest.mark.parametrize("before", [[], [1], [3, 2], [40], [40] * 4, [41] * 8])
def test_resumed_stream_continues_with_the_same_batches(tokenizer: Any, before: list[int]) -> None:
    stream = SequenceStream(documents, tokenizer, T)
    batches(stream, before)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = batches(stream, [7, 1, 50, 60, 60])

    resumed = SequenceStream(documents, tokenizer, T)
    resumed.load_state_dict(state)
    assert all(a.equals(b) for a, b in zip(batches(resumed, [7, 1, 50, 60, 60]), expected, strict=True))
    assert resumed.tokens_read == stream.tokens_read
    assert resumed.state_dict() == stream.state_dict()
    assert stream.epoch == (sum(before) > 300)


def test_resuming_does_not_tokenize_earlier_documents(tokenizer: Any) -> None:
    class Counting:
        def __init__(self) -> None:
            self.texts: list[str] = []

        def __call__(self, texts: list[str], **options: Any) -> Any:
            self.texts += texts
            return tokenizer(texts, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    stream = SequenceStream(documents, tokenizer, T)
    stream.next_batch(80)
    resumed = SequenceStream(documents, counting := Counting(), T)
    resumed.load_state_dict(stream.state_dict())
    resumed.next_batch(1)
    read = stream.state_dict()["documents"]
    assert read > 10
    assert counting.texts[0] == list(documents(0))[read].text


def test_epochs_follow_each_other_with_one_warning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    flat = [t for epoch in range(3) for d in documents(epoch) for t in ids(tokenizer, d.text)]
    stream = SequenceStream(documents, tokenizer, T)
    with caplog.at_level(logging.WARNING):
        got = batches(stream, [50] * (len(flat) // T // 50))
    assert torch.cat([b.tokens for b in got])[:, 1:].flatten().tolist() == flat[: len(got) * 50 * T]
    assert stream.epoch == 2
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("extra", "rows"), [(0, 2), (T // 4 - 1, 2), (T // 4, 3), (T - 1, 3)])
def test_end_of_the_text_without_repeat(tokenizer: Any, extra: int, rows: int) -> None:
    tokens = ids(tokenizer, " du" * 100)
    assert len(set(tokens)) == 1  # one token a word, so lengths are known
    stream = SequenceStream(fixed(" du" * (2 * T + extra)), tokenizer, T, repeat=False)
    batch = stream.next_batch(10)
    assert batch.tokens.shape == (rows, T + 1)
    assert (batch.segments[:2] == 0).all()
    if rows == 3:
        assert (batch.segments[2, :extra] == 0).all()
        assert (batch.segments[2, extra:] == -1).all()
        assert (batch.tokens[2, 1 + extra :] == tokenizer.pad_token_id).all()
    assert stream.tokens_read == 2 * T + (extra if rows == 3 else 0)
    after = stream.next_batch(10)
    assert after.tokens.shape == (0, T + 1)
    assert after.segments.shape == (0, T)


@pytest.mark.parametrize("repeat", [True, False])
def test_too_short_text_names_its_number_of_tokens(tokenizer: Any, repeat: bool) -> None:
    words = 20 if repeat else 3
    stream = SequenceStream(fixed(" du" * words), tokenizer, T, repeat=repeat)
    with pytest.raises(UserError, match=f"has {words} tokens"):
        stream.next_batch(2)


def test_empty_source(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="has 0 tokens"):
        SequenceStream(fixed(), tokenizer, T).next_batch(1)


def test_text_that_shrank_is_refused(tokenizer: Any) -> None:
    stream = SequenceStream(documents, tokenizer, T)
    stream.next_batch(80)
    resumed = SequenceStream(fixed("ba be"), tokenizer, T)
    resumed.load_state_dict(stream.state_dict())
    with pytest.raises(UserError, match="text has changed"):
        resumed.next_batch(80)


def test_document_of_many_rows(tokenizer: Any) -> None:
    text = sample_text(3000)
    stream = SequenceStream(fixed(text), tokenizer, T)
    first = stream.next_batch(2)
    resumed = SequenceStream(fixed(text), tokenizer, T)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    rest = resumed.next_batch(100)
    got = torch.cat([first.tokens, rest.tokens])[:, 1:].flatten().tolist()
    assert got == ids(tokenizer, text)[: len(got)]
    assert (rest.segments == 0).all()


@pytest.mark.parametrize(("length", "n"), [(0, 1), (T, 0)])
def test_sizes_must_be_positive(tokenizer: Any, length: int, n: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SequenceStream(documents, tokenizer, length).next_batch(n)
