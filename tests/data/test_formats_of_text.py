"""Chats, .csv, saved datasets, columns in objects, and documents left out or cut by their length."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import sample_text

from tsae.data.chats import Chat, Message, parse_chat
from tsae.data.documents import Document
from tsae.data.text import TextConfig, holds_chats, open_text
from tsae.errors import UserError
from tsae.utils.notices import warn_once

PROSE = [f"the river ran under bridge {i}" for i in range(12)]
CHATS = [
    [{"role": "user", "content": f"How long is bridge {i}?"}, {"role": "assistant", "content": text}]
    for i, text in enumerate(PROSE)
]
SHARED = [
    [{"from": "human", "value": chat[0]["content"]}, {"from": "gpt", "value": chat[1]["content"]}] for chat in CHATS
]
TEXTS = sorted(f"user: {chat[0]['content']}\n\nassistant: {chat[1]['content']}" for chat in CHATS)


def documents(source: Path, **config: Any) -> list[Document]:
    config = TextConfig(evaluation_share=0.0, **config)
    return list(open_text(str(source), part="train", seed=0, config=config))


def read(source: Path, **config: Any) -> list[str]:
    return sorted(document.text for document in documents(source, **config))


def refusal(source: Path, **config: Any) -> str:
    with pytest.raises(UserError) as info:
        read(source, **config)
    assert "\n" not in str(info.value)
    return str(info.value)


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(autouse=True)
def _said_again() -> None:
    warn_once.cache_clear()


class TestChats:
    @pytest.mark.parametrize("kind", ["x.jsonl", "x.jsonl.gz", "x.json.gz", "x.parquet"])
    @pytest.mark.parametrize(("column", "chats"), [("messages", CHATS), ("conversations", SHARED)])
    def test_in_every_format(self, tmp_path: Path, kind: str, column: str, chats: list[Any]) -> None:
        path = write(tmp_path / kind, [{"id": f"chat {i}", column: chat} for i, chat in enumerate(chats)])
        assert read(path) == read(path, column=column) == TEXTS
        assert all(
            d.chat is not None and [m.role for m in d.chat.messages] == ["user", "assistant"] for d in documents(path)
        )
        assert holds_chats(str(path), TextConfig())
        assert not holds_chats(str(path), TextConfig(column="id"))

    def test_in_an_object(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.jsonl", [{"data": {"turns": chat}} for chat in CHATS])
        assert read(path, column="data.turns") == TEXTS

    def test_equal_chats_are_on_one_side(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "x.jsonl", [{"messages": chat} for chat in CHATS] + [{"messages": chat} for chat in SHARED]
        )
        parts = []
        for part in ("train", "evaluation"):
            config = TextConfig(evaluation_share=0.4)
            parts.append([document.text for document in open_text(str(path), part=part, seed=0, config=config)])
        assert sorted(sum(parts, [])) == sorted(TEXTS * 2)
        assert not set(parts[0]) & set(parts[1])

    def test_text_comes_first(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.jsonl", [{"text": t, "messages": c} for t, c in zip(PROSE, CHATS, strict=True)])
        assert read(path) == sorted(PROSE)
        assert read(path, column="messages") == TEXTS

    def test_roles_are_carried(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = write(tmp_path / "x.jsonl", [{"messages": chat} for chat in CHATS])
        assert {d.chat and d.chat.roles for d in documents(path, roles=("assistant",))} == {("assistant",)}
        assert {d.chat and d.chat.roles for d in documents(path)} == {()}
        assert "text.roles" not in caplog.text
        plain = write(tmp_path / "y.jsonl", [{"text": text} for text in PROSE])
        assert all(d.chat is None for d in documents(plain, roles=("assistant",)))
        assert "text.roles is not looked for" in caplog.text

    @pytest.mark.parametrize("at", [0, 1, 11])
    @pytest.mark.parametrize("value", [None, [], "", [{"role": "user", "content": " "}]], ids=repr)
    def test_a_row_that_says_nothing(self, tmp_path: Path, value: Any, at: int) -> None:
        rows = [{"messages": chat} for chat in CHATS]
        rows[at] = {"messages": value}
        path = write(tmp_path / "x.jsonl", rows)
        found = read(path, column="messages")
        assert len(found) == 11
        assert set(found) < set(TEXTS)

    @pytest.mark.parametrize(
        "value",
        [
            *("a b", 3, {}, {"role": "user", "content": "a"}, ["a"], [None], [{}], [[]], [{"role": "user"}]),
            *([{"content": "a"}], [{"role": None, "content": "a"}], [{"role": 3, "content": "a"}]),
            *(
                [{"role": "user", "content": None}],
                [{"role": "user", "content": ["a"]}],
                [{"role": "", "content": "a"}],
            ),
            *([{"role": "user", "content": {"text": "a"}}], [{"role": "a<|im_end|>", "content": "a"}]),
            *([{"from": "human", "content": "a"}], [*CHATS[0], {}], [*CHATS[0], "a"]),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("at", [1, 11])
    def test_a_bad_row_is_one_sentence(self, tmp_path: Path, value: Any, at: int) -> None:
        """It names file and row."""
        rows = [{"messages": chat} for chat in CHATS]
        rows[at] = {"messages": value}
        path = write(tmp_path / "x.jsonl", rows)
        assert f"line {at + 1} of {str(path)!r}" in refusal(path)

    def test_other_keys_are_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        chat = [CHATS[0][0] | {"name": None, "tool_calls": []}, CHATS[0][1]]
        path = write(tmp_path / "x.jsonl", [{"messages": chat}])
        with caplog.at_level(logging.WARNING):
            read(path, column="messages")
        assert not caplog.messages
        write(path, [{"messages": [CHATS[0][0] | {"name": "Ann"}, CHATS[0][1]]}] * 3)
        with caplog.at_level(logging.WARNING):
            read(path, column="messages")
        (message,) = caplog.messages
        assert f"the messages in {str(path)!r} only role and content are read" in message

    def test_surrogates_are_replaced(self) -> None:
        chat = parse_chat([{"role": "user", "content": "a\ud800"}], "line 1 of 'x'")
        assert chat == Chat((Message("user", "a?"),))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(value=json_values)
def test_any_value_is_a_chat_or_one_sentence(value: Any) -> None:
    try:
        chat = parse_chat(value, "line 3 of 'x.jsonl'")
    except UserError as error:
        message = str(error)
        assert "line 3 of 'x.jsonl'" in message
        assert "\n" not in message
    else:
        assert chat is None or all(isinstance(message.content, str) for message in chat.messages)


class TestCsv:
    def plant(self, folder: Path, content: str, name: str = "x.csv") -> Path:
        path = folder / name
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
        return path

    @pytest.mark.parametrize("name", ["x.csv", "X.CSV", "x.csv.gz"])
    def test_rows(self, tmp_path: Path, name: str) -> None:
        rows = "".join(f'{i},"{text}, ""quoted""\nand on"\n' for i, text in enumerate(PROSE))
        path = self.plant(tmp_path, f"id,text\n{rows}\n", name)
        assert read(path) == sorted(f'{text}, "quoted"\nand on' for text in PROSE)

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_line_ends_and_byte_order_mark(self, tmp_path: Path, end: str) -> None:
        assert read(self.plant(tmp_path, "\ufefftext" + end + end.join(PROSE))) == sorted(PROSE)

    def test_a_guess(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        rows = "".join(f"{i},{i / 7},true,,{text}\n" for i, text in enumerate(PROSE))
        path = self.plant(tmp_path, f"id,score,flag,nothing,body\n{rows}")
        assert read(path) == sorted(PROSE)
        assert f"reading the column 'body' of {str(path)!r}" in caplog.text
        assert "cannot tell which column" in refusal(self.plant(tmp_path, "url,body\nhttp://a,a b\n"))

    def test_a_long_field(self, tmp_path: Path) -> None:
        text = sample_text(40_000)
        assert len(text) > 131_072
        path = self.plant(tmp_path, f'text\n"{text}"\n')
        assert "".join(read(path)) != ""
        assert sum(map(len, read(path))) == len(text)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("id,text\n1,a,b\n", "line 2 of .* has 3 fields, but the header has 2: quote"),
            ("id,text\n1\n", "line 2 of .* has 1 fields"),
            ("text,text\na b,c d\n", "several columns 'text'"),
            ("id;text\n1;a b\n", "separated by ';'"),
            ("id\ttext\n1\ta b\n", r"separated by '\\t'"),
            ('text\n"a b\n', "line 2 of .* is not valid CSV"),
            ('text\n"a" b\n', "line 2 of .* is not valid CSV"),
            ("", "there is no text"),
            ("text\n", "there is no text"),
            ("text\n\n \n", "there is no text"),
            ("a\0b,text\n", "is NUL"),
            ("n\n1\n2\n", "no column of .* holds text"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, content: str, message: str) -> None:

        assert re.search(message, refusal(self.plant(tmp_path, content)))

    def test_latin_1(self, tmp_path: Path) -> None:
        (tmp_path / "x.csv").write_bytes(b"text\ncaf\xe9 au lait\n")
        assert "byte 8" in refusal(tmp_path / "x.csv")

    @settings(deadline=None, max_examples=60)
    @given(
        st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=9), min_size=1)
    )
    def test_any_text(self, tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
        path = tmp_path_factory.mktemp("csv") / "x.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["n", "text"], *([i, row] for i, row in enumerate(rows))])
        expected = sorted(row for row in rows if row and not row.isspace())
        if not expected or not any(set(row) - set("0123456789.+-eEa") for row in expected):
            return
        assert read(path, column="text") == expected

    def test_beside_other_text_of_a_folder(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """There it is left out and named, as before it could be read; a folder of .csv alone is read."""
        self.plant(tmp_path, "text\nthe river\n", "a.csv")
        self.plant(tmp_path, "text\nthe bridge\n", "b.csv.gz")
        assert read(tmp_path) == ["the bridge", "the river"]
        assert not caplog.messages
        (tmp_path / "c.txt").write_text("the sun")
        assert read(tmp_path) == ["the sun"]
        assert "1 .csv, 1 .gz" in caplog.text


class TestJson:
    def test_a_named_file_of_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE))
        assert read(path) == sorted(PROSE)
        path.write_text(json.dumps([{"text": text} for text in PROSE], indent=1))
        assert "line 1 of" in refusal(path)

    def test_a_folder_of_compressed_ones(self, tmp_path: Path) -> None:
        write(tmp_path / "c4.00000.json.gz", [{"text": text} for text in PROSE])
        (tmp_path / "config.json").write_text("{}")
        assert read(tmp_path) == sorted(PROSE)


class TestObjects:
    """Columns within columns."""

    @pytest.mark.parametrize("kind", ["x.jsonl", "x.parquet"])
    @pytest.mark.parametrize("column", ["a.b", "a.c.d", "e.f"])
    def test_a_path(self, tmp_path: Path, kind: str, column: str) -> None:
        rows = [{"a": {"b": text, "c": {"d": text, "n": 3}}, "n": 3, "e.f": text} for text in PROSE]
        path = write(tmp_path / kind, rows)
        assert read(path, column=column) == sorted(PROSE)

    @pytest.mark.parametrize("kind", ["x.jsonl", "x.parquet"])
    def test_a_column_of_that_name_comes_first(self, tmp_path: Path, kind: str) -> None:
        path = write(tmp_path / kind, [{"a": {"b": "other text"}, "a.b": text} for text in PROSE])
        assert read(path, column="a.b") == sorted(PROSE)

    @pytest.mark.parametrize("value", [None, {}, {"b": None}, {"b": " "}, {"c": "a b"}], ids=repr)
    @pytest.mark.parametrize("at", [0, 1, 11])
    def test_a_row_without_it(self, tmp_path: Path, value: Any, at: int) -> None:
        rows: list[dict[str, Any]] = [{"a": {"b": text}} for text in PROSE]
        rows[at] = {"a": value}
        assert read(write(tmp_path / "x.jsonl", rows), column="a.b") == sorted(PROSE[:at] + PROSE[at + 1 :])

    @pytest.mark.parametrize("value", [{"b": 3}, {"b": ["a b"]}, {"b": {"c": "a b"}}], ids=repr)
    @pytest.mark.parametrize("at", [1, 11])
    def test_a_row_of_another_type(self, tmp_path: Path, value: Any, at: int) -> None:
        rows: list[dict[str, Any]] = [{"a": {"b": text}} for text in PROSE]
        rows[at] = {"a": value}
        path = write(tmp_path / "x.jsonl", rows)
        assert f"line {at + 1} of {str(path)!r}" in refusal(path, column="a.b")

    @pytest.mark.parametrize("kind", ["x.jsonl", "x.parquet"])
    def test_what_is_refused(self, tmp_path: Path, kind: str) -> None:
        path = write(tmp_path / kind, [{"a": {"b": text, "n": 3}} for text in PROSE])
        assert "no column 'a.x'" in refusal(path, column="a.x")
        assert "'a' of" in refusal(path, column="a")
        assert "'a.n' of" in refusal(path, column="a.n")
        assert "no column 'a.b.c'" in refusal(path, column="a.b.c")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A DatasetDict of the splits train, in three files, and test."""
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list(
        [{"id": i, "text": text, "meta": {"body": text}} for i, text in enumerate(PROSE)]
    )
    test = datasets.Dataset.from_list([{"id": 0, "text": "of the test", "meta": {"body": "b"}}])
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved", num_shards={"train": 3, "test": 1})
    return tmp_path / "saved"


class TestSavedDatasets:
    def test_splits(self, saved: Path) -> None:
        assert read(saved) == sorted(PROSE)
        assert len(list((saved / "train").glob("*.arrow"))) == 3
        assert read(saved, split="test") == ["of the test"]
        assert read(saved / "train") == read(saved, column="meta.body") == sorted(PROSE)
        assert "has no split 'validation', only train, test" in refusal(saved, split="validation")
        assert "no column 'body'" in refusal(saved, column="body")

    def test_one_split_alone(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_list([{"text": text} for text in PROSE], split="validation")
        rows.filter(lambda row: row["text"] != PROSE[0], keep_in_memory=True).save_to_disk(tmp_path / "saved")
        assert read(tmp_path / "saved") == sorted(PROSE[1:])
        assert "which is the split 'validation'" in caplog.text
        assert read(tmp_path / "saved", split="validation") == sorted(PROSE[1:])
        assert "is the split 'validation', not 'test'" in refusal(tmp_path / "saved", split="test")

    def test_chats(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list([{"messages": chat} for chat in CHATS]).save_to_disk(tmp_path / "saved")
        assert read(tmp_path / "saved") == TEXTS

    def test_a_folder_of_arrow_files_alone_is_none(self, saved: Path) -> None:
        (saved / "train" / "state.json").unlink()
        assert "no text files in the folder" in refusal(saved / "train")
        assert "the split 'train' of the dataset in" in refusal(saved)

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"[]", b"3", b"{}", b'{"splits": 3}', b'{"splits": [3]}', b'{"splits": ["../x"]}', b"\xff\xfe"],
    )
    def test_damaged_splits(self, saved: Path, content: bytes) -> None:
        (saved / "dataset_dict.json").write_bytes(content)
        assert str(saved) in refusal(saved, split="../x" if b".." in content else "train")

    MUTATIONS: tuple[Callable[[dict[str, Any]], Any], ...] = (
        lambda state: [],
        lambda state: state | {"_data_files": None},
        lambda state: state | {"_data_files": []},
        lambda state: state | {"_data_files": 3},
        lambda state: state | {"_data_files": ["a.arrow"]},
        lambda state: state | {"_data_files": [{"filename": 3}]},
        lambda state: state | {"_data_files": [{"filename": "../../a.arrow"}]},
        lambda state: state | {"_data_files": [{"filename": "gone.arrow"}]},
        lambda state: state | {"_data_files": [*state["_data_files"], {"filename": "state.json"}]},
        lambda state: state | {"_indices_data_files": [{"filename": "indices.arrow"}]},
        lambda state: {key: value for key, value in state.items() if key != "_data_files"},
    )

    @pytest.mark.parametrize("mutate", MUTATIONS)
    def test_damaged_state(self, saved: Path, mutate: Callable[[dict[str, Any]], Any]) -> None:
        path = saved / "train" / "state.json"
        path.write_text(json.dumps(mutate(json.loads(path.read_text()))))
        assert str(saved / "train") in refusal(saved)

    @pytest.mark.parametrize("field", ["_fingerprint", "_format_columns", "_format_kwargs", "_format_type", "_split"])
    def test_fields_that_say_nothing_of_the_text(self, saved: Path, field: str) -> None:
        path = saved / "train" / "state.json"
        state = json.loads(path.read_text())
        assert field in state
        path.write_text(json.dumps(state | {field: None}))
        assert read(saved) == sorted(PROSE)

    @pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"text" * 99])
    def test_damaged_rows(self, saved: Path, content: bytes) -> None:
        path = sorted((saved / "train").glob("*.arrow"))[1]
        path.write_bytes(content)
        assert f"{str(path)!r}" in refusal(saved)

    @pytest.mark.parametrize("kept", ["half", "schema", "all but the end"])
    def test_rows_cut_short(self, saved: Path, kept: str) -> None:
        """Also between two parts of the stream, which pyarrow takes for its end."""
        path = sorted((saved / "train").glob("*.arrow"))[1]
        content = path.read_bytes()
        with pa.ipc.open_stream(content) as batches:
            schema = batches.schema.serialize().to_pybytes()
        assert content.startswith(schema)
        path.write_bytes({"half": content[:-200], "schema": schema, "all but the end": content[:-8]}[kept])
        assert f"{str(path)!r}" in refusal(saved)


class TestLengths:
    def test_short_documents_are_left_out(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.jsonl", [{"text": "a" * i} for i in range(1, 30)])
        assert sorted(map(len, read(path, min_characters=20))) == list(range(20, 30))

    def test_long_documents_are_cut_at_a_boundary(self, tmp_path: Path) -> None:
        texts = [sample_text(words, seed=words) for words in range(5, 60)]
        path = write(tmp_path / "x.jsonl", [{"text": text} for text in texts])
        found = read(path, max_characters=100)
        assert len(found) == len(texts)
        assert all(any(whole.startswith(text) for whole in texts) for text in found)
        assert max(map(len, found)) <= 100
        assert all(len(text) > 50 for text in found if text not in texts)
        assert all(text[-1].isspace() for text in found if text not in texts)

    def test_the_split_is_that_of_whole_documents(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.jsonl", [{"text": f"{i} {sample_text(50, seed=i)}"} for i in range(40)])
        sides = []
        for most in (0, 60):
            config = TextConfig(evaluation_share=0.3, max_characters=most)
            found = open_text(str(path), part="evaluation", seed=0, config=config)
            sides.append([document.text.split()[0] for document in found])
        assert sides[0] == sides[1]

    def test_chats_end_after_a_message(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.jsonl", [{"messages": CHATS[0] * 3}, {"messages": CHATS[1][1:] * 9}])
        one, two = len(CHATS[0][0]["content"]), len(CHATS[0][1]["content"])
        for most, count in ((one + two, 2), (one + two + 1, 2), (2 * one + two, 3), (3 * (one + two), 6), (one, 1)):
            found = {d.name: d.chat for d in documents(path, max_characters=most)}
            (chat,) = (chat for name, chat in found.items() if name.endswith("#1"))
            assert chat is not None
            assert len(chat.messages) == count
        assert len(documents(path, max_characters=one)) == 1  # the second begins with a longer message
        assert len(documents(path, min_characters=6 * two)) == 1

    @pytest.mark.parametrize("name", ["x.jsonl", "python-docs"])
    def test_none_of_this_length_is_one_sentence(
        self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "x.jsonl", [{"text": text} for text in PROSE])
        monkeypatch.chdir(tmp_path)
        message = refusal(Path(name), min_characters=10**6)
        assert f"no train text in {name!r} of the length that text.min_characters" in message
        assert "text.max_characters" in refusal(Path(name), max_characters=1)

    def test_passages_of_plain_text(self, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text(sample_text(3000))
        assert max(map(len, read(tmp_path / "x.txt", max_characters=500))) <= 500
        assert len(read(tmp_path / "x.txt", max_characters=500)) == len(read(tmp_path / "x.txt"))
