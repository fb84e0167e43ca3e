"""Mutated sources of text: the same documents, one sentence, or other documents that a warning speaks of."""

from __future__ import annotations

import gzip
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tsae.data.text import TextConfig, open_text
from tsae.errors import UserError

PROSE = [f"the river ran under bridge {i}" for i in range(12)]
VALUES = [None, "", " ", 3, 1.5, True, [], {}, ["a b"], {"a": "b c"}, [{"role": "user", "content": "a b"}], "x", "x y"]


def read(source: Path, **config: Any) -> list[str]:
    config = TextConfig(evaluation_share=0.0, **config)
    return sorted(document.text for document in open_text(str(source), part="train", seed=0, config=config))


def outcome(source: Path, caplog: pytest.LogCaptureFixture, **config: Any) -> list[str] | None:
    """The documents; None for an error, which is one sentence. Anything but a UserError is raised."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        try:
            return read(source, **config)
        except UserError as error:
            message = str(error)
    assert "\n" not in message
    return None


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("column", [None, "text"])
@pytest.mark.parametrize("at", [0, 1, 11])
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_one_value_of_the_text_column(
    tmp_path: Path, value: Any, at: int, column: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A row is left out, read, or refused; the other rows are never replaced by another column."""
    rows: list[dict[str, Any]] = [{"url": f"https://example.org/{i} a", "text": text} for i, text in enumerate(PROSE)]
    rows[at]["text"] = value
    write(tmp_path / "x.jsonl", rows)
    others = PROSE[:at] + PROSE[at + 1 :]
    expected = [None, sorted(others), sorted([*others, str(value)])]
    found = outcome(tmp_path / "x.jsonl", caplog, column=column)
    assert found == expected[2 if isinstance(value, str) and value.strip() else 1 if value in (None, "", " ") else 0]


@pytest.mark.parametrize("kind", ["x.jsonl", "x.parquet", "x.jsonl.gz"])
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_another_column_of_any_type(tmp_path: Path, value: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Beside `text` it changes nothing; beside another column a choice is said or refused."""
    if kind.endswith(".parquet") and value in ([], {}):
        pytest.skip("parquet has no type for it")
    write(tmp_path / kind, [{"a": value, "text": text} for text in PROSE])
    assert outcome(tmp_path / kind, caplog) == sorted(PROSE)
    assert not caplog.messages
    write(tmp_path / kind, [{"a": value, "body": text} for text in PROSE])
    found = outcome(tmp_path / kind, caplog)
    is_refused = value in ("x", "x y") or (isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict))
    assert found == (None if is_refused else sorted(PROSE))
    assert is_refused or "reading the column 'body'" in caplog.text


@pytest.mark.parametrize("column", [None, "messages"])
@pytest.mark.parametrize("at", [0, 1, 11])
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_one_value_of_the_column_of_chats(
    tmp_path: Path, value: Any, at: int, column: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A row is left out, read, or refused; the other chats are never replaced by another column."""
    chats = [[{"role": "user", "content": text}] for text in PROSE]
    rows: list[dict[str, Any]] = [{"id": f"chat {i}", "messages": chat} for i, chat in enumerate(chats)]
    rows[at]["messages"] = value
    write(tmp_path / "x.jsonl", rows)
    others = sorted(f"user: {text}" for text in PROSE[:at] + PROSE[at + 1 :])
    expected = (
        others if value in (None, "", " ", []) else sorted([*others, "user: a b"]) if value == VALUES[10] else None
    )
    assert outcome(tmp_path / "x.jsonl", caplog, column=column) == expected


@pytest.mark.parametrize("line", ["3", "null", '"the river"', "[]", "{", "not json", '{"text": "a"} {', "\x00", "NaN"])
@pytest.mark.parametrize("at", [0, 6, 12])
def test_a_line_that_is_no_row(tmp_path: Path, line: str, at: int, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps({"text": text}) for text in PROSE]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines[:at], line, *lines[at:]]))
    assert outcome(tmp_path / "x.jsonl", caplog) is None


def plant(folder: Path, name: str, content: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


MORE: dict[str, Callable[[Path], object]] = {
    "an empty .txt": lambda folder: plant(folder, "empty.txt", b""),
    "an empty .jsonl": lambda folder: plant(folder, "empty.jsonl", b""),
    "blank lines": lambda folder: plant(folder, "blank.jsonl", b"\n \n"),
    "an empty .gz": lambda folder: plant(folder, "empty.txt.gz", gzip.compress(b"")),
    "a byte-order mark alone": lambda folder: plant(folder, "mark.txt", b"\xef\xbb\xbf"),
    "a UTF-16 mark alone": lambda folder: plant(folder, "mark.txt", b"\xff\xfe"),
    "rows of null": lambda folder: write(folder / "null.jsonl", [{"text": None, "id": "a b"}] * 3),
    "parquet without rows": lambda folder: pq.write_table(
        pa.table({"text": pa.array([], pa.string())}), folder / "empty.parquet"
    ),
    "a link to a file": lambda folder: (folder / "link.txt").symlink_to("plain.txt"),
    "a link to the folder": lambda folder: (folder / "loop").symlink_to("."),
    "a link to the parent": lambda folder: (folder / "deep/loop").symlink_to(".."),
    "a hard link": lambda folder: os.link(folder / "rows.jsonl", folder / "again.jsonl"),
    "a hidden folder": lambda folder: plant(folder, ".git/a.txt", b"hidden"),
    "an empty folder": lambda folder: (folder / "nothing/here").mkdir(parents=True),
}
NAMED: dict[str, Callable[[Path], object]] = {
    "metadata": lambda folder: write(folder / "metadata.jsonl", [{"file_name": "plain of.txt", "label": 3}]),
    "a table": lambda folder: write(folder / "deep/index.parquet", [{"path": "a b", "n": 3}]),
    "chats": lambda folder: write(folder / "chat.jsonl", [{"messages": VALUES[10]}]),
    "numbers called text": lambda folder: write(folder / "numbers.jsonl", [{"text": 3, "body": "a b"}]),
    "another kind of file": lambda folder: plant(folder, "a.csv", b"text\na b\n"),
    "a damaged .csv": lambda folder: plant(folder, "a.csv", b'text\n"a b'),
    "a compressed .json": lambda folder: plant(folder, "a.json.gz", gzip.compress(b'{"text": "a b"}\n')),
    "a saved dataset": lambda folder: [plant(folder, f"deep/saved/{name}", b"{}") for name in ("a.arrow", "b.arrow")],
    "a broken link": lambda folder: (folder / "gone").symlink_to("nowhere"),
    "a pipe": lambda folder: os.mkfifo(folder / "pipe"),
}
REFUSED: dict[str, Callable[[Path], object]] = {
    "latin-1": lambda folder: plant(folder, "z.txt", b"caf\xe9 au lait"),
    "latin-1 rows": lambda folder: plant(folder, "z.jsonl", b'{"text": "caf\xe9"}\n'),
    "UTF-16 without a mark": lambda folder: plant(folder, "z.txt", "the river".encode("utf-16-le")),
    "no gzip": lambda folder: plant(folder, "z.txt.gz", b"the river"),
    "no parquet": lambda folder: plant(folder, "z.parquet", b"the river"),
    "no JSON": lambda folder: plant(folder, "z.jsonl", b"the river\n"),
    "a broken link to text": lambda folder: (folder / "z.txt").symlink_to("nowhere"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of .txt, .jsonl and .parquet files."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "plain.txt").write_text(PROSE[0])
    write(tmp_path / "rows.jsonl", [{"text": text} for text in PROSE[1:6]])
    write(tmp_path / "deep/rows.parquet", [{"text": text, "n": 1} for text in PROSE[6:]])
    return tmp_path


@pytest.mark.parametrize("what", MORE)
def test_more_in_a_folder_that_says_nothing(folder: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    MORE[what](folder)
    assert outcome(folder, caplog) == sorted(PROSE)
    assert not caplog.messages


@pytest.mark.parametrize("what", NAMED)
def test_more_in_a_folder_that_is_named(folder: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    NAMED[what](folder)
    assert outcome(folder, caplog) == sorted(PROSE)
    (message,) = caplog.messages
    assert message.startswith("ignored ")


@pytest.mark.parametrize("what", REFUSED)
def test_more_in_a_folder_that_is_refused(folder: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """When the text is opened, before any document is taken."""
    REFUSED[what](folder)
    with pytest.raises(UserError, match=r"/z\.(txt|jsonl|parquet)") as info:
        open_text(str(folder), part="train", seed=0)
    assert "\n" not in str(info.value)


keys = st.sampled_from(["text", "body", "id", "messages", "a.b", "", "\n", "é", "text\n"])
values = st.sampled_from(VALUES) | st.text(max_size=20)
rows = st.lists(st.dictionaries(keys, values, max_size=4) | st.sampled_from([None, 3, "x", []]), max_size=6)
names = st.sampled_from(["a.jsonl", "b.jsonl", "c/d.jsonl.gz", "metadata.jsonl"])


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(names, rows, min_size=1, max_size=3), column=st.none() | keys)
@example(files={"a.jsonl": [{"messages": VALUES[10]}]}, column=None)
@example(files={"a.jsonl": [{"messages": VALUES[10]}]}, column="messages")
def test_any_rows_in_any_files(files: dict[str, list[Any]], column: str | None, caplog: Any) -> None:
    """Every document is a string or a chat of one column; of `text` or the named one, unless the guess is said."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            write(Path(folder, name), content)
        found = outcome(Path(folder), caplog, column=column)
        is_guess = "reading the column" in caplog.text or "reading the chats in the column" in caplog.text
        if found is None or is_guess:
            return
        name = column or "text"
        in_column = [row[name] for some in files.values() for row in some if isinstance(row, dict) and name in row]
        rendered = ["user: a b" if value == VALUES[10] else value for value in in_column]
        texts = [text.encode("utf-8", "replace").decode() for text in rendered if isinstance(text, str)]
        assert found == sorted(text for text in texts if text and not text.isspace())
