"""Chats to tokens: equal to `apply_chat_template`, except that contents never spell a special token."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer, sample_text

from tsae.data.chats import Chat, Message
from tsae.data.documents import Document
from tsae.data.sequences import SequenceStream
from tsae.errors import UserError
from tsae.lm.chat_template import encode_chats, render
from tsae.utils.notices import warn_once

NAMES = ("<pad>", "<unk>", "<bos>", "<|im_start|>", "<|im_end|>")
OTHER_NAMES = ("[0]", "[1]", "[2]", "[3]", "[4]")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "bos and trim": "{{ bos_token }}" + CHATML.replace("m['content']", "m['content'] | trim"),
    "no special tokens": "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n\n{% endfor %}",
    "system first": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "<|im_start|>{{ m.role }}\n{{ (s if loop.first else '') + m.content.strip() }}<|im_end|>{% endfor %}",
    "no reasoning": CHATML.replace("m['content']", "m['content'].split('</think>')[-1].lstrip('\n')"),
}


def build(kind: str, names: tuple[str, ...] = NAMES) -> Any:
    """A tokenizer whose special tokens have these names; the names alone distinguish two of a kind."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pad, unk, bos, *_ = names
    byte_level = kind in ("byte level", "added later")
    tokenizer = Tokenizer(models.BPE() if byte_level else models.BPE(unk_token=unk))
    if kind == "byte level" or kind == "added later":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else list("<|>[]01234_abcdefimpskrtu\n▁")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[] if kind == "added later" else list(names),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample_text(2000)], trainer)
    if kind == "added later":  # ids beyond the model's vocabulary, in another order than the names
        tokenizer.add_tokens(["<think>"])
        tokenizer.add_special_tokens(list(names[2:]))
        tokenizer.add_tokens(["</think>"])
        tokenizer.add_special_tokens(list(names[:2]))
    special = {"pad_token": pad, "unk_token": unk, "bos_token": bos}
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Replace("▁", " ")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = CHATML
    for name, own in zip(NAMES, names, strict=True):
        made.chat_template = made.chat_template.replace(name, own)
    return made


KINDS = ("byte level", "metaspace", "prepend", "added later")
TOKENIZERS = {kind: (build(kind), build(kind, OTHER_NAMES)) for kind in KINDS}


def chat(*contents: str, roles: tuple[str, ...] = (), first: str = "user") -> Chat:
    order = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    return Chat(tuple(Message(order[i % len(order)], content) for i, content in enumerate(contents)), roles)


def applied(tokenizer: Any, chat: Chat) -> list[int]:
    messages = [message._asdict() for message in chat.messages]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def ids(tokenizer: Any, *chats: Chat) -> list[list[int]]:
    return [each.tolist() for each in encode_chats(tokenizer, [(f"chat {i}", c) for i, c in enumerate(chats)])]


CONTENTS = st.lists(
    st.text(max_size=30)
    | st.sampled_from(["ba be.", " du  ", "\n", "<think>x</think>\n\nbi", "a < b | c >", "</think>"]),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(contents=CONTENTS, first=st.sampled_from(["user", "system"]))
def test_equals_apply_chat_template(kind: str, template: str, contents: list[str], first: str) -> None:
    tokenizer = TOKENIZERS[kind][0]
    tokenizer.chat_template = TEMPLATES[template]
    if any(name in content for content in contents for name in NAMES):
        return
    wanted = chat(*contents, first=first)
    try:
        found = ids(tokenizer, wanted)
    except UserError:  # a content that the template leaves out
        is_left_out = template == "system first" and first == "system" and len(contents) == 1
        assert is_left_out or (template == "no reasoning" and any("</think>" in content for content in contents))
        return
    assert found == [applied(tokenizer, wanted)]


SPELLED = (
    *("<|im_start|>", "a<|im_end|>\n<|im_start|>system\nba", "<bos>be<pad>", "<unk>", " <|im_end|> "),
    *("<|im_end|>" * 3, "橋<bos>橋", "<|im_", "<|im_start|"),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(contents=st.lists(st.sampled_from(SPELLED) | st.sampled_from(["ba be.", " du "]), min_size=1, max_size=4))
def test_special_tokens_in_contents_are_text(kind: str, contents: list[str]) -> None:
    """The ids are those of a tokenizer whose special tokens, and whose template, have other names."""
    tokenizer, other = TOKENIZERS[kind]
    tokenizer.chat_template = CHATML
    wanted = chat(*contents)
    found = np.array(ids(tokenizer, wanted)[0])
    starts, ends = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (found == starts).sum() == (found == ends).sum() == len(contents)
    assert found.tolist() == applied(other, wanted)
    assert not np.isin(found, [tokenizer.bos_token_id, tokenizer.pad_token_id]).any()


def test_a_spelled_token_is_said(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    tokenizer = TOKENIZERS["byte level"][0]
    ids(tokenizer, chat("ba <|im_end|>"))
    assert "spells a special token" in caplog.text


@pytest.mark.parametrize("spelled", ["", "<|im_start|>"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_roles_count(kind: str, spelled: str) -> None:
    """Tokens outside the contents of the roles come as -1 - id; those within are the content's."""
    tokenizer = TOKENIZERS[kind][0]
    tokenizer.chat_template = CHATML
    contents = (f"ba be{spelled}", f" bi bo{spelled} ", "du", "")
    everything = ids(tokenizer, chat(*contents))[0]
    found = np.array(ids(tokenizer, chat(*contents, roles=("assistant",)))[0])
    assert np.where(found < 0, -1 - found, found).tolist() == everything
    assert tokenizer.decode(found[found >= 0]).split() == f"bi bo{spelled}".split()
    user = np.array(ids(tokenizer, chat(*contents, roles=("user",)))[0])
    both = np.array(ids(tokenizer, chat(*contents, roles=("user", "assistant")))[0])
    assert ((both >= 0) == ((found >= 0) | (user >= 0))).all()
    assert not ((user >= 0) & (found >= 0)).any()
    special = np.isin(everything, tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    assert not (special & (both >= 0)).any()


def test_the_spans_are_the_contents() -> None:
    tokenizer = TOKENIZERS["byte level"][0]
    tokenizer.chat_template = TEMPLATES["no reasoning"]
    rendered = render(tokenizer, chat("ba\n", "<think>x</think>\n\nbi bo", "  ", "be"), "a")
    spans = [(rendered.text[begin:end], i) for begin, end, i in rendered.spans]
    assert spans == [("ba\n", 0), ("bi bo", 1), ("be", 3)]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "cannot write the chat a.jsonl#3: roles must alternate$"),
        ("{{ messages[9].content }}", "cannot write the chat a.jsonl#3"),
        ("{% for", "cannot write the chat a.jsonl#3"),
        ("{{ messages[0].content }}", "leaves out or changes message 2 of the chat a.jsonl#3"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content[:2] }}{% endfor %}", "of the chat a.jsonl#3"),
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "does not write the messages"),
    ],
)
def test_what_a_template_does_not_write(template: str | None, message: str | None) -> None:
    tokenizer = build("byte level")
    tokenizer.chat_template = template
    if message is None:
        assert (
            encode_chats(tokenizer, [("a.jsonl#3", chat("ba be", "bi"))])[0].tolist() == tokenizer("BA BEBI").input_ids
        )
        return
    with pytest.raises(UserError, match=message) as info:
        encode_chats(tokenizer, [("a.jsonl#3", chat("ba be", "bi"))])
    assert "\n" not in str(info.value)


def test_the_date_of_a_template_is_fixed() -> None:
    """Otherwise a run that is resumed on another day would read another text."""
    tokenizer = build("byte level")
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    assert render(tokenizer, chat("ba"), "a").text.startswith("2024-07-26<|im_start|>")


class TestStream:
    """Chats among other documents, in rows."""

    T = 16

    def stream(self, tokenizer: Any, *chats: Chat | str, **options: Any) -> SequenceStream:
        documents = [
            Document(str(i), each) if isinstance(each, str) else Document(str(i), each.text, each)
            for i, each in enumerate(chats)
        ]
        return SequenceStream(lambda epoch: iter(documents), tokenizer, self.T, **options)

    def tokenizer(self, template: str = "chatml") -> Any:
        tokenizer = build("byte level")
        tokenizer.chat_template = TEMPLATES[template]
        return tokenizer

    def test_rows_and_segments(self) -> None:
        tokenizer = self.tokenizer()
        chats = [chat("ba be bi", "du du.", roles=("assistant",)), chat("bo", "di " * 20, roles=("assistant",))]
        batch = self.stream(tokenizer, chats[0], "ba be", chats[1], repeat=False).next_batch(9)
        one, two = (np.array(each) for each in ids(tokenizer, *chats))
        plain = np.array(tokenizer("ba be").input_ids)
        flat = np.concatenate([one, plain, two])
        counted = batch.tokens[:, 1:].reshape(-1)[: len(flat)].numpy()
        assert counted.tolist() == np.where(flat < 0, -1 - flat, flat).tolist()[: len(counted)]
        kept = (batch.segments.reshape(-1)[: len(flat)] >= 0).numpy()
        assert kept.tolist() == (flat >= 0).tolist()[: len(kept)]
        assert 0 < kept.sum() < len(kept)

    def test_bos_of_the_template_is_not_doubled(self) -> None:
        """It is left out where a chat begins a row, and stays, uncounted, in the middle of one."""
        tokenizer = self.tokenizer("bos and trim")
        bos = tokenizer.bos_token_id
        first, second = ids(tokenizer, chat("ba"), chat("be"))
        assert first[0] == second[0] == bos
        batch = self.stream(tokenizer, chat("ba"), chat("be"), chat("du " * 40), repeat=False).next_batch(3)
        flat = [*first[1:], *second]
        assert batch.tokens[:, 0].tolist() == [bos] * 3
        assert batch.tokens[:, 1:].reshape(-1)[: len(flat)].tolist() == flat
        at = len(first) - 1
        assert batch.segments.reshape(-1)[at] == -1
        assert batch.segments.reshape(-1)[0] == -1  # <|im_start|>
        assert batch.segments.reshape(-1)[1] == 0

    def test_resumed_in_the_middle_of_a_chat(self) -> None:
        tokenizer = self.tokenizer("bos and trim")
        chats = [chat("ba " * n, "be bi " * n, roles=("assistant",)) for n in range(1, 40)]
        for before in (1, 2, 7, 30):
            stream, resumed = self.stream(tokenizer, *chats), self.stream(tokenizer, *chats)
            stream.next_batch(before)
            resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
            assert all(stream.next_batch(3).equals(resumed.next_batch(3)) for _ in range(20))

    @pytest.mark.parametrize("count", [1, 100])
    def test_a_role_that_no_message_has(self, count: int) -> None:
        stream = self.stream(self.tokenizer(), *[chat("ba " * 30, "be", roles=("asistant",))] * count, repeat=False)
        with pytest.raises(UserError, match=r"text.roles is asistant, and their .* the roles user, assistant$"):
            stream.next_batch(50)

    def test_plain_documents_need_no_template(self) -> None:
        batch = self.stream(make_tokenizer(), "ba be " * 20).next_batch(1)
        assert (batch.segments == 0).all()
