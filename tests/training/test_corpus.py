"""The corpus script on packages made here: markup, archives, duplicates, limits, checksums, equal bytes each time."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import struct
import subprocess
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import corpus
from experiments.corpus import CorpusError, Source, assemble, fetched, read_sources, scripture, without_markup

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
PAGE = (
    """<html><head><title>No</title></head><body><div class="navheader">Next <div>inner</div></div>
<h1>A title</h1><p>One   sentence with <b>bold</b> words.<br>Another&nbsp;line.</p><pre>  kept   as is
</pre><script>var x</script><p>"""
    + "Last words of the page. " * 20
    + "</p></body></html>"
)
PROGRAM = "def f(x):\n    return x + 1\n\n\n" * 20


def source(**options: Any) -> Source:
    base: dict[str, Any] = {"package": "made-up", "version": "1.0", "sha256": "", "licence": "MIT", "kind": "manual"}
    base |= {"language": "english", "characters": 10**9, "reader": "html", "include": "*.html"}
    return Source(**base | {"exclude": "", "archive": ""} | options)


def package(folder: Path, files: dict[str, bytes | str], name: str = "made-up") -> tuple[Path, str]:
    """A .deb with these files in `folder`, and its SHA256."""
    root = folder / f"{name}-root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\n"
        "Description: none\n"
    )
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    packages = folder / "packages"
    packages.mkdir(exist_ok=True)
    made = packages / f"{name}_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, made], check=True, capture_output=True)
    shutil.rmtree(root)
    return made, hashlib.sha256(made.read_bytes()).hexdigest()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_markup_is_taken_out_and_blocks_stand_apart() -> None:
    lines = without_markup(PAGE).split("\n")
    assert lines[:6] == ["A title", "", "One sentence with bold words.", "Another line.", "", "  kept   as is"]
    assert lines[-1].startswith("Last words of the page. Last")
    assert not {"No", "Next", "inner", "var"} & set(" ".join(lines).split())


@needs_dpkg
def test_a_corpus_of_two_packages(tmp_path: Path) -> None:
    twice = "<p>" + "The same words on two pages. " * 20 + "</p>"
    files = {
        "usr/a.html": twice,
        "usr/b.html": f"<div>{twice}</div>",
        "usr/c.html": PAGE,
        "usr/short.html": "<p>Few</p>",
    }
    _, manual = package(tmp_path, files)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        members = {"x-1/a.py": PROGRAM, "x-1/tests/b.py": PROGRAM + "#", "x-1/made.py": f"# DO NOT EDIT\n{PROGRAM}"}
        members |= {"x-1/wide.py": PROGRAM + "#" * 600, "x-1/other.txt": PROGRAM}
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    _, code = package(tmp_path, {"usr/src/x-1.tar.xz": archive.getvalue()}, "code")
    sources = [
        source(sha256=manual),
        replace(
            source(package="code", sha256=code, kind="code", language="python", reader="code"),
            include="*.py",
            exclude="*/tests/*",
            archive="*/x-*.tar.xz",
        ),
    ]
    counted = [
        (each.package, documents) for each, documents, _ in assemble(tmp_path / "out", tmp_path / "packages", sources)
    ]
    assert counted == [("made-up", 2), ("code", 1)]
    rows = read(tmp_path / "out" / "made-up.jsonl.gz")
    assert [row["file"] for row in rows] == ["usr/a.html", "usr/c.html"]
    assert read(tmp_path / "out" / "code.jsonl.gz") == [
        {"text": PROGRAM.strip("\n"), "source": "code", "kind": "code", "language": "python", "file": "x-1/a.py"}
    ]
    list(assemble(tmp_path / "again", tmp_path / "packages", sources))
    for path in sorted((tmp_path / "out").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@needs_dpkg
def test_long_files_are_cut_and_a_limit_chooses_documents_in_order(tmp_path: Path) -> None:
    text = "".join(f"<p>{i} " + "word " * 100 + "</p>" for i in range(200))
    _, digest = package(tmp_path, {"usr/long.html": text})
    whole = source(sha256=digest)
    list(assemble(tmp_path / "whole", tmp_path / "packages", [whole]))
    documents = [row["text"] for row in read(tmp_path / "whole" / "made-up.jsonl.gz")]
    assert len(documents) > 5
    assert max(map(len, documents)) <= corpus.LONGEST
    list(assemble(tmp_path / "some", tmp_path / "packages", [replace(whole, characters=30_000)]))
    some = [row["text"] for row in read(tmp_path / "some" / "made-up.jsonl.gz")]
    assert 30_000 <= sum(map(len, some)) <= 30_000 + corpus.LONGEST
    assert some == [each for each in documents if each in some]


@needs_dpkg
def test_another_version_of_a_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, digest = package(tmp_path, {"usr/a.html": PAGE})
    assert fetched(source(sha256=digest), made.parent) == made
    gone = subprocess.CompletedProcess([], 100, "", "E: Version '1.0' for 'made-up' was not found\n")
    monkeypatch.setattr(corpus.subprocess, "run", lambda *_, **__: gone)
    with pytest.raises(CorpusError) as raised:
        fetched(source(sha256="0" * 64), made.parent)
    assert "made-up=1.0" in str(raised.value)
    assert "was not found" in str(raised.value)
    assert "\n" not in str(raised.value)


@needs_dpkg
def test_a_package_without_documents_is_refused(tmp_path: Path) -> None:
    _, digest = package(tmp_path, {"usr/short.html": "<p>Few words</p>"})
    with pytest.raises(CorpusError, match=r"No document was found in made-up 1\.0"):
        list(assemble(tmp_path / "out", tmp_path / "packages", [source(sha256=digest)]))


def test_scripture_is_read_verse_by_verse(tmp_path: Path) -> None:
    """Blocks in zlib, an index of 12 bytes a block, and of 10 bytes a verse; a comment on two verses stands once."""
    verses = [b"<w>In</w> the <note>x</note>beginning", b"And God said", b"And God said", b"After"]
    blocks = [zlib.compress(b"".join(verses[:3])), zlib.compress(verses[3])]
    index, at = b"", 0
    for block, size in zip(blocks, (sum(map(len, verses[:3])), len(verses[3])), strict=True):
        index, at = index + struct.pack("<III", at, len(block), size), at + len(block)
    places, start = struct.pack("<IIH", 0, 0, 0), 0
    for verse in verses[:3]:
        places, start = places + struct.pack("<IIH", 0, start, len(verse)), start + len(verse)
    places += struct.pack("<IIH", 1, 0, len(verses[3]))
    for suffix, content in ((".bzs", index), (".bzz", b"".join(blocks)), (".bzv", places)):
        (tmp_path / f"nt{suffix}").write_bytes(content)
    assert list(scripture(tmp_path / "nt.bzs")) == ["In the beginning\nAnd God said", "After"]


def test_every_package_is_pinned_and_has_a_licence() -> None:
    sources = read_sources()
    assert len({each.package for each in sources}) == len(sources) > 30
    for each in sources:
        assert len(each.sha256) == 64
        assert each.version
        assert each.licence
        assert each.kind in ("book", "manual", "code")
        assert each.reader in corpus.READERS
    assert {each.kind for each in sources} == {"book", "manual", "code"}
    assert len({each.language for each in sources}) >= 10
