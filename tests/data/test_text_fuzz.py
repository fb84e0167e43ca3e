"""Arbitrary bytes as text: documents that equal the text, or one sentence."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsae.data.documents import Document, cut
from tsae.data.sequences import SequenceStream, TooShortError
from tsae.data.text import TextConfig, open_text
from tsae.errors import UserError

BOM = b"\xef\xbb\xbf"
WORDS = [b"the river ran ", b"under a bridge. ", b"\n", b"\n\n", b"\r\n", b"\r", b" ", "\u2028\x85\x0b".encode()]
EMOJI = "🌉👩\u200d👩\u200d👧é\u0301".encode()
ODDITIES = [b"\0", b"\0" * 300, b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f", b"\xc3", BOM, EMOJI, b"x" * 5000]
contents = st.lists(st.sampled_from(WORDS + ODDITIES) | st.binary(max_size=40), max_size=60).map(b"".join)
texts = st.text(st.characters(), max_size=80)  # with lone surrogates
quickly = settings(deadline=None, max_examples=80)


@contextmanager
def file_of(name: str, content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def read(path: Path) -> list[str] | None:
    """All documents of both parts, or None if there is an error."""
    found = []
    for part in ("train", "evaluation"):
        try:
            found += [d.text for d in open_text(str(path), part=part, seed=0, config=TextConfig())]
        except UserError as error:
            if part == "evaluation" and "single document" in str(error):
                continue
            return None
    return found


@quickly
@given(contents)
def test_passages_of_any_bytes_are_the_text(content: bytes) -> None:
    with file_of("text.txt", content) as path:
        found = read(path)
    try:
        utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff")) and not content.startswith(b"\xff\xfe\0\0")
        decoded = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        assert found is None
        return
    decoded = decoded.replace("\r\n", "\n").replace("\r", "\n")
    wanted = [piece for piece in cut([decoded]) if piece and not piece.isspace()]
    assert sorted(found or []) == ([] if "\0" in decoded else sorted(wanted))


@settings(deadline=None, max_examples=40)
@given(contents, st.integers(1, 3))
def test_any_text_packs_into_its_own_tokens(tokenizer: Any, content: bytes, rows: int) -> None:
    documents = [Document(str(i), piece) for i, piece in enumerate(cut([content.decode("utf-8", errors="replace")]))]
    documents = [document for document in documents if not document.text.isspace()] * 3
    encoded = [tokenizer(document.text, add_special_tokens=False)["input_ids"] for document in documents]
    wanted = [token for ids in encoded for token in ids]
    stream = SequenceStream(lambda epoch: iter(documents), tokenizer, 16, repeat=False)
    got, special = [], set(tokenizer.all_special_ids)
    with suppress(TooShortError):
        while (batch := stream.next_batch(rows)).tokens.shape[0]:
            for row, segments in zip(batch.tokens[:, 1:].tolist(), batch.segments.tolist(), strict=True):
                got += [token for token, segment in zip(row, segments, strict=True) if segment >= 0 or token in special]
    while got and got[-1] == tokenizer.pad_token_id and len(got) > len(wanted):
        got.pop()  # of the last row
    assert got == wanted[: len(got)]
    assert len(wanted) - len(got) < 16


@quickly
@given(st.lists(texts, min_size=1, max_size=12), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans(), st.booleans())
def test_rows_of_any_text_are_the_documents(rows: list[str], end: str, bom: bool, spelled: bool) -> None:
    if not spelled:  # lone surrogates can only be escaped
        rows = [row.encode("utf-8", "replace").decode() for row in rows]
    lines = "".join(json.dumps({"text": row}, ensure_ascii=spelled) + end for row in rows)
    wanted = [row.encode("utf-8", "replace").decode() for row in rows]
    with file_of("rows.jsonl", BOM * bom + lines.encode()) as path:
        assert sorted(read(path) or []) == sorted(row for row in wanted if row and not row.isspace())


@quickly
@given(st.lists(st.none() | texts.map(lambda t: t.encode("utf-8", "replace").decode()), min_size=1, max_size=12))
def test_parquet_of_any_text_is_the_documents(rows: list[str | None]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), buffer)
    with file_of("rows.parquet", buffer.getvalue()) as path:
        assert sorted(read(path) or []) == sorted(row for row in rows if row and not row.isspace())


def written(kind: str) -> bytes:
    rows = [f"the river ran under bridge {i} 🌉" for i in range(40)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    if kind == "rows.parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.table({"text": rows}), buffer, write_page_checksum=True)
        return buffer.getvalue()
    if kind.endswith(".gz"):
        return gzip.compress(lines)
    return pa.Codec("zstd").compress(lines, asbytes=True) if kind.endswith(".zst") else lines


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_a_damaged_file_is_a_sentence_or_text(kind: str) -> None:
    """A format with checksums (gzip, optionally parquet) never gives wrong text."""
    right = written(kind)
    with file_of(kind, right) as path:
        documents = sorted(read(path) or [])
    assert len(documents) == 40

    @settings(deadline=None, max_examples=100)
    @given(st.integers(0, len(right) - 1), st.integers(0, 7), st.booleans())
    def check(at: int, bit: int, cut_there: bool) -> None:
        content = bytearray(right)
        content[at] ^= 1 << bit
        with file_of(kind, bytes(content[:at] if cut_there else content)) as path:
            found = read(path)
            if kind.endswith(".gz") and found is not None:
                assert sorted(found) == documents

    check()
