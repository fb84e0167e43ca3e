"""Which column is read as text: named, called "text", or guessed and said so; never an id in the place of text."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsae.data.columns import Kind, choose_column, kind_of, kind_of_arrow
from tsae.data.text import TextConfig, open_text
from tsae.errors import UserError

PROSE = [f"the river ran under bridge {i}" for i in range(30)]
CHAT = [{"role": "user", "content": "How long is it?"}, {"role": "assistant", "content": "Long."}]


def read(source: Path | str, **config: Any) -> list[str]:
    found = []
    for part in ("train", "evaluation"):
        documents = open_text(str(source), part=part, seed=0, config=TextConfig(evaluation_share=0.2, **config))
        found += [document.text for document in documents]
    return sorted(found)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    return (write_parquet if path.suffix == ".parquet" else write_jsonl)(path, rows)


@pytest.fixture(params=["x.jsonl", "x.parquet"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


@pytest.mark.parametrize(
    ("columns", "requested", "chosen"),
    [
        ({"text": Kind.TEXT, "title": Kind.TEXT}, None, "text"),
        ({"text": Kind.EMPTY, "title": Kind.TEXT}, None, "text"),
        ({"text": Kind.WORD, "title": Kind.TEXT}, None, "text"),
        ({"text": Kind.TEXT, "messages": Kind.CHAT}, None, "text"),
        ({"n": Kind.OTHER, "body": Kind.TEXT}, None, "body"),
        ({"n": Kind.EMPTY, "body": Kind.TEXT}, None, "body"),
        ({"text": Kind.OTHER, "body": Kind.TEXT}, None, "body"),
        ({"text": Kind.TEXT, "title": Kind.TEXT}, "title", "title"),
        ({"text": Kind.TEXT, "id": Kind.WORD}, "id", "id"),
        ({"text": Kind.TEXT, "notes": Kind.EMPTY}, "notes", "notes"),
        ({"id": Kind.TEXT, "messages": Kind.CHAT}, None, "messages"),
        ({"id": Kind.TEXT, "messages": Kind.CHAT}, "messages", "messages"),
        ({"prompt": Kind.TEXT, "conversations": Kind.CHAT}, None, "conversations"),
        ({"body": Kind.TEXT, "turns": Kind.CHAT}, "turns", "turns"),
        ({"body": Kind.TEXT, "turns": Kind.CHAT}, "body", "body"),
    ],
)
def test_choose_column(columns: dict[str, Kind], requested: str | None, chosen: str) -> None:
    assert choose_column(columns, requested, "x") == chosen


@pytest.mark.parametrize(
    ("columns", "requested", "message"),
    [
        ({"n": Kind.OTHER, "body": Kind.TEXT}, "n", "'n' of x does not hold text: the columns are n, body"),
        ({"a": Kind.TEXT}, "b", "no column 'b' in x: the columns are a"),
        ({"a": Kind.TEXT, "b": Kind.WORD}, None, "cannot tell which column of x .* one of a, b"),
        ({"url": Kind.WORD, "n": Kind.OTHER}, None, "cannot tell which column of x .* one of url, n"),
        ({"id": Kind.TEXT, "turns": Kind.CHAT}, None, "'turns' of x holds chats: name it"),
        ({"messages": Kind.CHAT, "conversations": Kind.CHAT}, None, "'messages' of x holds chats: name it"),
        ({"text": Kind.CHAT, "body": Kind.TEXT}, None, "'text' of x holds chats"),
        ({"text": Kind.NESTED, "n": Kind.OTHER}, None, "no column of x holds text, .* are text, n"),
        ({"a\nb": Kind.OTHER}, None, r"are 'a\\nb'"),
        ({f"c{i}": Kind.OTHER for i in range(50)}, None, "c19 and 30 more"),
    ],
)
def test_no_column_of_text(columns: dict[str, Kind], requested: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as info:
        choose_column(columns, requested, "x")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, Kind.EMPTY),
        (" \n", Kind.EMPTY),
        ("https://example.org/a", Kind.WORD),
        ("two words", Kind.TEXT),
        ("橋の下を川が流れる", Kind.TEXT),  # no spaces
        (3, Kind.OTHER),
        (True, Kind.OTHER),
        ({"a": "b"}, Kind.NESTED),
        (["a b"], Kind.NESTED),
        ([], Kind.NESTED),
        (CHAT, Kind.CHAT),
        ([{"from": "human", "value": "Hi"}], Kind.CHAT),
    ],
)
def test_kind_of(value: Any, kind: Kind) -> None:
    assert kind_of(value) == kind


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array(["a"]), Kind.TEXT),
        (pa.array(["a"], pa.large_string()), Kind.TEXT),
        (pa.array(["a"], pa.string_view()), Kind.TEXT),
        (pa.array(["a"]).dictionary_encode(), Kind.TEXT),
        (pa.array(["a"], pa.large_string()).dictionary_encode(), Kind.TEXT),
        (pa.array([1]).dictionary_encode(), Kind.OTHER),
        (pa.array([b"a"]), Kind.OTHER),
        (pa.array([None]), Kind.EMPTY),
        (pa.array([["a"]]), Kind.NESTED),
        (pa.array([{"a": "b"}]), Kind.NESTED),
        (pa.array([CHAT]), Kind.CHAT),
        (pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), Kind.NESTED),
    ],
)
def test_kind_of_arrow(values: pa.Array, kind: Kind) -> None:
    assert kind_of_arrow(values.type) == kind


class TestRows:
    @pytest.mark.parametrize("column", [None, "text"])
    @pytest.mark.parametrize("first", [{"text": None, "url": "u"}, {"url": "u"}, {"text": "", "url": "u"}])
    def test_null_and_absent_say_nothing(self, path: Path, first: dict[str, Any], column: str | None) -> None:
        write(path, [{"text": None} | first, *({"text": text, "url": f"u{i}"} for i, text in enumerate(PROSE))])
        assert read(path, column=column) == sorted(PROSE)

    def test_many_rows_without_text_first(self, tmp_path: Path) -> None:
        rows: list[dict[str, Any]] = [{"text": None, "url": "https://example.org/a b"}] * 3000
        path = write_jsonl(tmp_path / "x.jsonl", rows + [{"text": text} for text in PROSE])
        assert read(path) == sorted(PROSE)

    @pytest.mark.parametrize("column", [None, "text"])
    @pytest.mark.parametrize("first", [{"url": "u"}, {"url": "https://example.org/a b"}, {}])
    def test_more_than_the_first_row_decides(self, tmp_path: Path, first: dict[str, Any], column: str | None) -> None:
        rows = [first] * 20 + [{"text": text, "url": "u"} for text in PROSE]
        assert read(write_jsonl(tmp_path / "x.jsonl", rows), column=column) == sorted(PROSE)

    def test_more_than_the_first_row_decides_a_guess(self, path: Path) -> None:
        rows: list[dict[str, Any]] = [{"body": None, "note": None, "n": 1}, {"body": "Untitled", "note": None, "n": 1}]
        write(path, [*rows, *({"body": text, "note": None, "n": 1} for text in PROSE)])
        assert read(path) == sorted(["Untitled", *PROSE])

    def test_a_guess_is_said_once(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(path, [{"n": i, "body": text} for i, text in enumerate(PROSE)])
        with caplog.at_level(logging.WARNING):
            assert read(path) == sorted(PROSE)
            assert read(path, column="body") == sorted(PROSE)
        assert len(caplog.messages) == 1
        assert f"reading the column 'body' of {str(path)!r}" in caplog.text

    @pytest.mark.parametrize("row", [{"id": "chat-1", "messages": CHAT}, {"id": "chat 1", "messages": CHAT}])
    def test_chats_are_not_replaced_by_their_ids(self, path: Path, row: dict[str, Any]) -> None:
        write(path, [row, row | {"messages": CHAT[:1]}])
        expected = ["user: How long is it?", "user: How long is it?\n\nassistant: Long."]
        for column in (None, "messages"):
            assert read(path, column=column) == expected

    @pytest.mark.parametrize("value", ["https://example.org/a", "doc-00017", "bridge.png"])
    def test_single_words_are_not_taken_for_text(self, path: Path, value: str) -> None:
        write(path, [{"name": f"{value}{i}", "n": i} for i in range(20)])
        with pytest.raises(UserError, match=r"cannot tell which column .* one of name, n"):
            read(path)
        assert len(read(path, column="name")) == 20

    def test_a_guess_that_a_later_row_contradicts(self, tmp_path: Path) -> None:
        rows = [{"summary": f"a bridge, {i}"} for i in range(1200)]
        path = write_jsonl(tmp_path / "x.jsonl", [*rows, {"summary": "b", "text": "the river ran under a bridge"}])
        with pytest.raises(UserError, match=r"row 1201 of .* has a column 'text'.* name 'summary'"):
            read(path)
        assert len(read(path, column="summary")) == 1201

    def test_a_row_of_another_type_is_named(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "x.jsonl", [{"text": PROSE[0]}, {"text": ["a"]}])
        with pytest.raises(UserError, match=r"line 2 of .* does not hold text"):
            read(path)

    def test_column_beside_one_that_it_is_a_prefix_of(self, path: Path) -> None:
        write(path, [{"text.summary": f"a {i}", "text": text} for i, text in enumerate(PROSE)])
        assert read(path) == sorted(PROSE)
        assert read(path, column="text.summary") == sorted(f"a {i}" for i in range(len(PROSE)))

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"])
    def test_every_string_type_of_arrow(self, tmp_path: Path, kind: Any) -> None:
        texts = pa.array([*PROSE, None])
        texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
        pq.write_table(pa.table({"url": ["u"] * 31, "text": texts}), tmp_path / "x.parquet")
        assert read(tmp_path / "x.parquet") == sorted(PROSE)

    def test_two_columns_of_one_name(self, tmp_path: Path) -> None:
        pq.write_table(pa.table([PROSE, PROSE], ["text", "text"]), tmp_path / "x.parquet")
        with pytest.raises(UserError, match="several columns 'text'"):
            read(tmp_path / "x.parquet")


class TestFolders:
    @pytest.mark.parametrize("name", ["metadata.jsonl", "a.jsonl", "zz/index.parquet"])
    @pytest.mark.parametrize("text", ["text.txt", "text.jsonl", "text.parquet"])
    def test_tables_about_the_text_are_left_out_by_name(
        self, tmp_path: Path, name: str, text: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        write(tmp_path / name, [{"file_name": f"{i} of many.txt", "label": i} for i in range(20)])
        if text.endswith(".txt"):
            (tmp_path / text).write_text("the river ran. " * 1000)
        else:
            write(tmp_path / text, [{"text": row} for row in PROSE])
        with caplog.at_level(logging.WARNING):
            found = read(tmp_path)
        assert not any("many" in document for document in found)
        assert len("".join(found)) == (15_000 if text.endswith(".txt") else sum(map(len, PROSE)))
        (message,) = caplog.messages
        assert f"ignored {str(tmp_path / name)!r}" in message
        assert "file_name, label" in message

    def test_one_column_for_all_files(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_jsonl(tmp_path / "a.jsonl", [{"body": text} for text in PROSE[:15]])
        write_parquet(tmp_path / "b.parquet", [{"body": text, "n": 1} for text in PROSE[15:]])
        with caplog.at_level(logging.WARNING):
            assert read(tmp_path) == sorted(PROSE)
        assert len(caplog.messages) == 1
        write_jsonl(tmp_path / "c.jsonl", [{"content": text} for text in PROSE])
        with pytest.raises(UserError, match=r"cannot tell which column .* body, n, content"):
            read(tmp_path)
        assert read(tmp_path, column="body") == sorted(PROSE)
        assert f"ignored {str(tmp_path / 'c.jsonl')!r}" in caplog.text

    def test_a_requested_column_that_holds_no_text_in_one_file(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.jsonl", [{"body": text} for text in PROSE])
        write_jsonl(tmp_path / "b.jsonl", [{"body": 3}])
        with pytest.raises(UserError, match=r"'body' of .*b\.jsonl' does not hold text"):
            read(tmp_path, column="body")

    def test_a_requested_column_that_no_file_has(self, tmp_path: Path) -> None:
        """Plain text beside the tables, such as a licence, is not read in its place."""
        (tmp_path / "licence.txt").write_text("the river ran. " * 1000)
        write_jsonl(tmp_path / "a.jsonl", [{"body": text} for text in PROSE])
        with pytest.raises(UserError, match=r"no column 'boby' in .*: the columns are body"):
            read(tmp_path, column="boby")

    def test_a_requested_column_of_plain_text(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "a.txt").write_text("the river ran. " * 1000)
        with caplog.at_level(logging.WARNING):
            assert read(tmp_path / "a.txt", column="text") == read(tmp_path / "a.txt")
            assert not caplog.messages
            assert read(tmp_path / "a.txt", column="body") == read(tmp_path / "a.txt")
        (message,) = caplog.messages
        assert "the column 'body' is not looked for" in message

    def test_empty_files_say_nothing(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.jsonl", [])
        (tmp_path / "b.txt").write_text("")
        write_jsonl(tmp_path / "c.jsonl", [{"body": text} for text in PROSE])
        assert read(tmp_path) == sorted(PROSE)
