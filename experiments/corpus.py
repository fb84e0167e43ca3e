"""Assembles a corpus of English books, manuals and code from packages of Debian 12: one .jsonl.gz for each package.

    python experiments/corpus.py OUT [--packages DIR]

Needs `apt-get` and `dpkg-deb`, with Debian 12 (main) among the sources. Packages are pinned by version and SHA256 and
kept in DIR (OUT-packages by default); one that is there is not fetched again. Rows have the columns `text`, `source`
(the package), `kind` (book, manual, code), `language` (english, or that of the code) and `file`. Markup is taken out,
long files are cut at paragraphs, exact duplicates are left out. The same packages give the same bytes. corpus.csv
names every licence.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import csv
import fnmatch
import gzip
import hashlib
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path

from tsae.data.documents import cut
from tsae.utils.atomic import atomic_write

TABLE = Path(__file__).with_name("corpus.csv")
LONGEST = 20_000  # characters of a document; longer files are cut at a boundary
SHORTEST = 200
WIDEST_LINE = 500  # characters; code with longer lines is data, or was minified
GENERATED = re.compile(r"do not edit|generated (by|from|file)|automatically generated|@generated", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """What one package gives: a row of corpus.csv.

    kind: book, manual or code
    characters: at most; of more text, documents are chosen by their hash
    reader: how files become text, see `READERS`
    include, exclude: patterns of paths in the package, separated by spaces; `*` also matches `/`
    archive: pattern of a tar file in the package, whose members are read instead; may be empty
    """

    package: str
    version: str
    sha256: str
    licence: str
    kind: str
    language: str
    characters: int
    reader: str
    include: str
    exclude: str
    archive: str


@dataclass(frozen=True)
class Row:
    """A document."""

    text: str
    source: str
    kind: str
    language: str
    file: str


class CorpusError(Exception):
    """A package that cannot be had or used, as one sentence."""


class _Text(HTMLParser):
    """The text of HTML and of similar XML, with lines between blocks and without navigation."""

    BLOCKS = frozenset(
        (
            "p",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "pre",
            "table",
            "ul",
            "ol",
            "dl",
            "blockquote",
            "div",
            "section",
            "article",
            "title",
            "figure",
            "screen",
        )
    )
    LINES = frozenset(("br", "li", "dt", "dd", "tr", "item", "lb", "l", "lg"))
    SKIPPED = frozenset(("script", "style", "head", "nav", "footer", "info", "links", "note", "svg"))
    NAVIGATION = frozenset(
        (
            "nav",
            "navheader",
            "navfooter",
            "docnav",
            "sphinxsidebar",
            "related",
            "footer",
            "headerlink",
            "nav_panel",
            "tocframe",
            "toc",
        )
    )
    VOID = frozenset(("br", "hr", "img", "input", "link", "meta", "lb", "col", "area", "base", "wbr"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipping: list[str] = []  # open elements from a skipped one on
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipping:
            if tag == self._skipping[0]:
                self._skipping.append(tag)
            return
        classes = set((dict(attrs).get("class") or "").lower().split()) | {dict(attrs).get("role") or ""}
        if tag not in self.VOID and (tag in self.SKIPPED or classes & self.NAVIGATION or "navigation" in classes):
            self._skipping = [tag]
            return
        self._separate(tag)
        self._verbatim += tag in ("pre", "screen")

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            if tag == self._skipping[0]:
                self._skipping.pop()
            return
        self._separate(tag)
        if tag in ("pre", "screen"):
            self._verbatim = max(0, self._verbatim - 1)

    def handle_data(self, data: str) -> None:
        if self._skipping:
            return
        if not self._verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith("\n"):
                data = data.lstrip()
        if data:
            self.parts.append(data)

    def _separate(self, tag: str) -> None:
        if tag in self.BLOCKS or tag in self.LINES:
            self.parts.append("\n\n" if tag in self.BLOCKS else "\n")


def without_markup(text: str) -> str:
    """The text of HTML, OSIS or Mallard."""
    parser = _Text()
    parser.feed(text)
    parser.close()
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t\xa0]+\n", "\n", "".join(parser.parts))).strip()


def html(path: Path) -> Iterator[str]:
    """A page."""
    content = path.read_bytes()
    try:
        yield without_markup(content.decode("utf-8"))
    except UnicodeDecodeError:
        yield without_markup(content.decode("latin-1"))


def compressed(path: Path) -> Iterator[str]:
    """Plain text in gzip, or dictzip."""
    yield gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


def scripture(path: Path) -> Iterator[str]:
    """The books of a SWORD module, one a document: of `nt.bzs` the index, `nt.bzz` zlib blocks, `nt.bzv` the verses."""
    blocks, verses = path.with_suffix(".bzz").read_bytes(), path.with_suffix(".bzv").read_bytes()
    books = []
    for offset, size, _ in struct.iter_unpack("<III", path.read_bytes()):
        books.append(zlib.decompress(blocks[offset : offset + size]))
    passages: list[list[str]] = [[] for _ in books]
    for book, start, length in struct.iter_unpack("<IIH", verses):
        if book < len(books) and length:
            passage = without_markup(books[book][start : start + length].decode("utf-8", "replace"))
            if passage and passage not in passages[book][-1:]:  # a comment on several verses stands at each of them
                passages[book].append(passage)
    for book_passages in passages:
        yield "\n".join(book_passages)


def code(path: Path) -> Iterator[str]:
    """A source file, unless it is generated, minified or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    if GENERATED.search(text[:1000]) or any(len(line) > WIDEST_LINE for line in text.splitlines()):
        return
    yield text.expandtabs(8) if "\t" in text and path.suffix == ".c" else text


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    "html": html,
    "text.gz": compressed,
    "sword": scripture,
    "code": code,
}
"""Name in corpus.csv -> a function from a file to its texts."""


def read_sources(table: Path = TABLE) -> list[Source]:
    """The rows of the table, in its order."""
    with table.open(encoding="utf-8", newline="") as file:
        return [Source(**{**row, "characters": int(row["characters"])}) for row in csv.DictReader(file)]  # type: ignore[arg-type]


def fetched(source: Source, packages: Path) -> Path:
    """The package's file, downloaded if it is not there with the right checksum.

    Raises CorpusError if the archive no longer has this version, or has another file under its name.
    """
    packages.mkdir(parents=True, exist_ok=True)

    def found() -> Path | None:
        for path in sorted(packages.glob(f"{source.package}_*.deb")):
            if hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256:
                return path
        return None

    if (path := found()) is not None:
        return path
    wanted = f"{source.package}={source.version}"
    try:
        done = subprocess.run(
            ["apt-get", "download", wanted], cwd=packages, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise CorpusError(
            f"apt-get is not on this machine; put the package {wanted} into {packages} by hand."
        ) from None
    if (path := found()) is not None:
        return path
    said = (done.stderr.strip().splitlines() or ["it has another checksum"])[-1]
    raise CorpusError(
        f"The package {wanted} with the SHA256 {source.sha256} cannot be had ({said}): the archive no longer has that "
        "version, or its list is old (apt-get update)."
    )


def unpacked(package: Path, source: Source, directory: Path) -> Path:
    """The folder that holds the source's files: the package's content in ``directory``, or that of its archive."""
    content = directory / "content"
    subprocess.run(["dpkg-deb", "-x", package, content], check=True)
    if not source.archive:
        return content
    names = [path.relative_to(content).as_posix() for path in content.rglob("*")]
    (archive,) = fnmatch.filter(names, source.archive)
    members = directory / "members"
    with tarfile.open(content / archive) as file:
        wanted = [member for member in file if member.isfile() and _is_wanted(source, member.name)]  # no links
        file.extractall(members, wanted, filter="data")
    return members


def rows(source: Source, root: Path) -> Iterator[Row]:
    """The documents of a source, in the order of their files' names; of too many, those that `_at_most` chooses."""
    found: list[Row] = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() or not path.is_file() or not _is_wanted(source, name):
            continue
        for text in READERS[source.reader](path):
            for piece in cut([text], LONGEST):
                if len(piece.strip()) >= SHORTEST:
                    found.append(Row(piece.strip("\n"), source.package, source.kind, source.language, name))
    return _at_most(found, source.characters)


def _is_wanted(source: Source, name: str) -> bool:
    """Whether a path matches the patterns of a source."""
    included, excluded = (
        any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())
        for patterns in (source.include, source.exclude)
    )
    return included and not excluded


def _at_most(found: list[Row], characters: int) -> Iterator[Row]:
    """Distinct documents with about so many characters in all, in order."""
    distinct = {_digest(row.text): i for i, row in reversed(list(enumerate(found)))}  # the first of equal ones
    chosen, total = [], 0
    for _, i in sorted(distinct.items()):
        if total >= characters:
            break
        chosen.append(i)
        total += len(found[i].text)
    return (found[i] for i in sorted(chosen))


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).hexdigest()


def write(found: Iterable[Row], path: Path, known: set[str]) -> tuple[int, int]:
    """Write the documents that are not ``known`` and add them there; gives how many, and their characters."""
    documents = characters = 0
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file,  # neither name nor time: the same bytes
    ):
        for row in found:
            if (digest := _digest(row.text)) in known:
                continue
            known.add(digest)
            file.write((json.dumps(asdict(row), ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
            documents, characters = documents + 1, characters + len(row.text)
    return documents, characters


def assemble(out: Path, packages: Path, sources: list[Source]) -> Iterator[tuple[Source, int, int]]:
    """Write a file for each source; gives each source with its documents and characters.

    Raises CorpusError for the first package that cannot be had, before anything is unpacked, or that has no documents.
    """
    files = [fetched(source, packages) for source in sources]
    out.mkdir(parents=True, exist_ok=True)
    known: set[str] = set()
    for source, package in zip(sources, files, strict=True):
        with tempfile.TemporaryDirectory() as directory:
            root = unpacked(package, source, Path(directory))
            documents, characters = write(rows(source, root), out / f"{source.package}.jsonl.gz", known)
        if not documents:
            raise CorpusError(f"No document was found in {source.package} {source.version}; see its row in corpus.csv.")
        yield source, documents, characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the corpus")
    parser.add_argument("--packages", type=Path, help="folder for the packages; default OUT-packages")
    arguments = parser.parse_args()
    packages = arguments.packages or arguments.out.with_name(arguments.out.name + "-packages")
    print("| package | version | licence | kind | language | documents | characters |")
    print("| --- | --- | --- | --- | --- | ---: | ---: |")
    total_documents = total_characters = 0
    try:
        for source, documents, characters in assemble(arguments.out, packages, read_sources()):
            total_documents, total_characters = total_documents + documents, total_characters + characters
            head = f"| {source.package} | {source.version} | {source.licence} | {source.kind} | {source.language} "
            print(f"{head}| {documents:,} | {characters:,} |", flush=True)
    except CorpusError as error:
        sys.exit(str(error))
    print(f"| in all | | | | | {total_documents:,} | {total_characters:,} |")


if __name__ == "__main__":
    main()
