"""Streaming from the hub, with a local dataset in place of the hub."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tsae.data import hub_datasets
from tsae.data.text import TextConfig, open_text
from tsae.errors import UserError

ROWS = [{"id": i, "text": f"document {i}" if i % 10 else "", "title": f"title {i}"} for i in range(400)]
PROSE = [f"the river ran under bridge {i}" for i in range(20)]
OTHER_ROWS: dict[str, list[dict[str, Any]]] = {
    "null": [{"text": None, "url": "u v"}, *({"text": text, "url": "u v"} for text in PROSE)],
    "guess": [{"body": text, "n": 3} for text in PROSE],
    "inside": [{"n": 3, "a": {"b": text, "c": {"d": text}}} for text in PROSE],
    "ids": [{"id": f"doc-{i}", "n": 3} for i in range(20)],
    "chat": [{"id": f"chat {i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(PROSE)],
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Make every hub id give ROWS; the list records the arguments of `load_dataset`."""
    datasets = pytest.importorskip("datasets")
    calls: list[dict[str, Any]] = []

    def load_dataset(path: str, **options: Any) -> Any:
        calls.append({"path": path, **options})
        for name, other in OTHER_ROWS.items():
            if name in path:
                rows = datasets.Dataset.from_list(other).to_iterable_dataset()
                return rows.map(lambda row: row) if "untyped" in path else rows
        if "broken" in path:
            raise RuntimeError("first line\nsecond line")
        rows = datasets.Dataset.from_list([] if "empty" in path else ROWS).to_iterable_dataset(num_shards=4)
        return rows.map(lambda row: row) if "untyped" in path else rows  # mapped rows have no known columns

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub_datasets, "hub_is_reachable", lambda: True)
    return calls


def read(source: str, part: str = "train", seed: int = 0, epoch: int = 0, **config: Any) -> list[str]:
    documents = open_text(source, part=part, seed=seed, epoch=epoch, config=TextConfig(**config))
    return [document.text for document in documents]


@pytest.mark.parametrize("source", ["someone/typed", "untyped"])
def test_parts_and_order(asked: list[dict[str, Any]], source: str) -> None:
    options = {"evaluation_share": 0.2, "shuffle_buffer": 50}
    train, evaluation = read(source, **options), read(source, "evaluation", **options)
    assert sorted(train + evaluation) == sorted(row["text"] for row in ROWS if row["text"])
    assert 30 < len(evaluation) < 120
    assert train == read(source, **options)
    for other in (read(source, seed=1, **options), read(source, epoch=1, **options)):
        assert train != other
        assert sorted(train) == sorted(other)


def test_subset_split_and_column_are_passed_on(asked: list[dict[str, Any]]) -> None:
    texts = read("someone/some", subset="en", split="validation", column="title")
    assert asked == [{"path": "someone/some", "name": "en", "split": "validation", "streaming": True}]
    assert all(text.startswith("title") for text in texts)


@pytest.mark.parametrize("source", ["someone/typed", "untyped"])
def test_missing_column_lists_the_columns(asked: list[dict[str, Any]], source: str) -> None:
    with pytest.raises(UserError, match=r"'body'.*id, text, title"):
        open_text(source, part="train", seed=0, config=TextConfig(column="body"))


def test_error_of_the_library_is_one_sentence(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"cannot open the dataset 'some/broken'.*: first line$"):
        open_text("some/broken", part="train", seed=0)


def test_zstandard_is_streamed_and_a_file_cut_short_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the Pile; `datasets` needs an extra package for it."""
    datasets = pytest.importorskip("datasets")
    if sys.version_info < (3, 14):
        pytest.importorskip("backports.zstd")
    import pyarrow as pa

    # 18 MB, more than is read at once, so that the stream opens before the truncated end is reached.
    rows = [[json.dumps({"text": f"document {i} of {j} " + "x" * 60_000}) + "\n" for i in range(100)] for j in range(3)]
    frames = b"".join(pa.Codec("zstd").compress("".join(some).encode(), asbytes=True) for some in rows)
    real = datasets.load_dataset

    def load_dataset(path: str, name: str | None, split: str, streaming: bool) -> Any:
        return real("json", data_files=str(tmp_path / f"{path}.jsonl.zst"), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub_datasets, "hub_is_reachable", lambda: True)
    (tmp_path / "whole.jsonl.zst").write_bytes(frames)
    (tmp_path / "cut.jsonl.zst").write_bytes(frames[:-9])
    assert sorted(read("whole", evaluation_share=0)) == sorted(json.loads(line)["text"] for line in sum(rows, []))
    with pytest.raises(UserError, match="cannot read on in the dataset 'cut'") as info:
        read("cut", evaluation_share=0)
    assert "\n" not in str(info.value)


def test_part_without_text(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="no evaluation text"):
        read("someone/some", "evaluation", evaluation_share=0)
    with pytest.raises(UserError):
        read("some/empty")


def read_all(source: str, **config: Any) -> list[str]:
    return sorted(read(source, evaluation_share=0, **config))


@pytest.mark.parametrize("typed", ["typed", "untyped"])
class TestColumns:
    def test_null_in_the_first_row_says_nothing(self, asked: list[dict[str, Any]], typed: str) -> None:
        assert read_all(f"null/{typed}") == read_all(f"null/{typed}", column="text") == sorted(PROSE)

    def test_a_guess_is_said(self, asked: list[dict[str, Any]], typed: str, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            assert read_all(f"guess/{typed}", shuffle_buffer=3 + len(typed)) == sorted(PROSE)
        assert f"reading the column 'body' of the dataset 'guess/{typed}'" in caplog.text

    def test_ids_are_not_text(self, asked: list[dict[str, Any]], typed: str) -> None:
        with pytest.raises(UserError, match=r"cannot tell which column .* one of id, n"):
            read_all(f"ids/{typed}")

    @pytest.mark.parametrize("column", [None, "messages"])
    def test_chats(self, asked: list[dict[str, Any]], typed: str, column: str | None) -> None:
        assert read_all(f"chat/{typed}", column=column) == sorted(f"user: {text}" for text in PROSE)

    @pytest.mark.parametrize("column", ["a.b", "a.c.d"])
    def test_a_column_in_an_object(self, asked: list[dict[str, Any]], typed: str, column: str) -> None:
        assert read_all(f"inside/{typed}", column=column) == sorted(PROSE)
        with pytest.raises(UserError, match=r"no column 'a.x' in .*: the columns are n, a"):
            read_all(f"inside/{typed}", column="a.x")


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ({"text": 3}, "row 1 of the dataset 'x': the column 'text' does not hold text"),
        ({"other": "a"}, None),
        (RuntimeError("first line\nsecond line"), "cannot read on in the dataset 'x': first line$"),
    ],
)
def test_later_rows_of_untyped_data(monkeypatch: pytest.MonkeyPatch, later: Any, message: str | None) -> None:
    datasets = pytest.importorskip("datasets")

    def rows() -> Iterator[dict[str, Any]]:
        yield {"text": "a river"}
        if isinstance(later, Exception):
            raise later
        yield later

    monkeypatch.setattr(hub_datasets, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    if message is None:
        assert read_all("x", shuffle_buffer=1) == ["a river"]
        return
    with pytest.raises(UserError, match=message):
        read_all("x", shuffle_buffer=1)
