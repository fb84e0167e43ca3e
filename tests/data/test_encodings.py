"""Encodings: a byte-order mark decides, else UTF-8; anything else is refused with the file and the byte."""

from __future__ import annotations

import codecs
import gzip
import json
import logging
from pathlib import Path

import pytest

from tsae.data.text import TextConfig, open_text
from tsae.errors import UserError

TEXT = "Der Fluß führte unter der Brücke hindurch 🌉.\r\nЗатем\n"
MARKED = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def read(path: Path) -> list[str]:
    config = TextConfig(evaluation_share=0)
    return [document.text for document in open_text(str(path), part="train", seed=0, config=config)]


def write(folder: Path, name: str, content: bytes) -> Path:
    import pyarrow as pa

    path = folder / name
    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".zst"):
        content = b"".join(
            pa.Codec("zstd").compress(content[i : i + 3], asbytes=True) for i in range(0, len(content), 3)
        )
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.txt.zst", "x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("encoding", MARKED)
def test_the_byte_order_mark_decides(tmp_path: Path, encoding: str, name: str) -> None:
    text = json.dumps({"text": TEXT}, ensure_ascii=False) + "\n" if "jsonl" in name else TEXT
    path = write(tmp_path, name, MARKED[encoding] + text.encode(encoding))
    assert read(path) == [TEXT if "jsonl" in name else TEXT.replace("\r\n", "\n")]


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.txt.zst", "x.jsonl", "x.jsonl.zst"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("café".encode("latin-1"), "byte 3.* is not UTF-8"),
        (codecs.BOM_UTF8 + "café".encode("latin-1"), "byte 6.* is not UTF-8"),
        (b"x" * 3_000_000 + b"\x80", "byte 3000000.* is not UTF-8"),
        (b"bridge \xc3", "byte 7.* is not UTF-8"),
        ("the river".encode("utf-16-le"), "byte 1.* is NUL, as in UTF-16 without a byte-order mark"),
        ("the river".encode("utf-16-be"), "byte 0.* is NUL, as in UTF-16"),
        ("the river".encode("utf-32-be"), "byte 0.* is NUL"),
        (b"the river\0ran", "byte 9.* is NUL"),
        (codecs.BOM_UTF16_LE + "a\0b".encode("utf-16-le"), "byte 4.* is NUL"),
        (codecs.BOM_UTF16_LE + "abc".encode("utf-16-le")[:-1], "byte 6.* is not UTF-16-LE"),
        (codecs.BOM_UTF16_BE + b"\xd8\x00\x00a", "byte 2.* is not UTF-16-BE"),
        (codecs.BOM_UTF32_LE + b"\xff\xff\xff\xff", "byte 4.* is not UTF-32-LE"),
    ],
)
def test_other_bytes_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"cannot read '.*{name}' as text: {message}") as info:
        read(write(tmp_path, name, content))
    assert "\n" not in str(info.value)


def test_before_training_also_in_the_last_file_of_a_folder(tmp_path: Path) -> None:
    """Opening the text is enough; no document has to be reached."""
    for i in range(5):
        write(tmp_path, f"{i}.txt", b"the river ran under a bridge. " * 3000)
    write(tmp_path, "9.txt", b"caf\xe9")
    with pytest.raises(UserError, match=r"9\.txt"):
        open_text(str(tmp_path), part="train", seed=0)


def test_nul_spelled_in_json_is_text(tmp_path: Path) -> None:
    assert read(write(tmp_path, "x.jsonl", b'{"text": "a \\u0000 b"}\n')) == ["a \0 b"]


@pytest.mark.parametrize(
    ("spelled", "text", "said"),
    [("a \\u0000 b", "a \0 b", "the character NUL"), ("a \\ud800 b", "a ? b", "lone surrogates")],
)
def test_what_json_spells_and_no_file_of_text_may_hold(
    tmp_path: Path, spelled: str, text: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "x.jsonl", f'{{"text": "{spelled}"}}\n'.encode() * 3)
    with caplog.at_level(logging.WARNING):
        assert read(path) == [text] * 3
    (message,) = caplog.messages
    assert said in message
    assert "x.jsonl" in message
