"""The labels of documents from another column: every format, pieces of long rows, rows without one, mixtures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tsae.config import TextConfig
from tsae.data.labels import labels
from tsae.data.text import open_text
from tsae.errors import UserError

ROWS = [{"text": f"text number {i} of the rows", "kind": ("book", "code", None, "")[i % 4]} for i in range(8)]
WANTED = {"book": 2, "code": 2}


def write(path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".csv":
        path.write_text("text,kind\n" + "".join(f"{row['text']},{row['kind'] or ''}\n" for row in ROWS))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(ROWS), path)
    return path


def counted(source: str, column: str = "kind", config: TextConfig | None = None) -> dict[str, int]:
    config = config or TextConfig(evaluation_share=0.5)
    documents = list(open_text(source, part="evaluation", seed=0, config=TextConfig(threshold=1.0)))
    found = labels(source, documents, column, config)
    assert set(found) <= {document.name for document in documents}
    values = list(found.values())
    return {value: values.count(value) for value in sorted(set(values))}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_every_format_of_rows(tmp_path: Path, name: str) -> None:
    assert counted(str(write(tmp_path / name))) == WANTED


def test_the_label_stands_at_its_own_row(tmp_path: Path) -> None:
    source = str(write(tmp_path / "a.jsonl"))
    documents = list(open_text(source, part="evaluation", seed=3, config=TextConfig(threshold=1.0)))
    found = labels(source, documents, "kind")
    for document in documents:
        number = int(document.text.split()[2])
        assert found.get(document.name, "") == (ROWS[number]["kind"] or "")


def test_folders_and_mixtures(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name)
    (tmp_path / "c.txt").write_text("Plain text has no columns.\n")
    twice = {value: 2 * number for value, number in WANTED.items()}
    assert counted(str(tmp_path)) == twice
    assert counted(f"{tmp_path / 'a.jsonl'}:0.5,{tmp_path / 'c.txt'}:0.5").keys() == WANTED.keys()


def test_pieces_of_a_long_row_have_its_label(tmp_path: Path) -> None:
    rows = [{"text": "words and more words. " * 10_000, "kind": "book"}, {"text": "short", "kind": "code"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = counted(str(tmp_path / "a.jsonl"))
    assert found["book"] > 2
    assert found["code"] == 1


def test_numbers_inner_columns_and_what_is_no_label(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "year": 1900 + i, "meta": {"topic": "a"}, "score": 0.5} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = str(tmp_path / "a.jsonl")
    assert counted(source, "year") == {"1900": 1, "1901": 1, "1902": 1}
    assert counted(source, "meta.topic") == {"a": 3}
    with pytest.raises(UserError, match=r"row 1 of .* has 0\.5 in the column 'score', which is no label"):
        counted(source, "score")
    with pytest.raises(UserError, match=r"no document of .* has a label in a column 'topic'"):
        counted(source, "topic")


def test_text_without_rows_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Plain text.\n")
    with pytest.raises(UserError, match=r"no document of .* has a label"):
        counted(str(tmp_path / "a.txt"))
