"""Folders of text: links, special files, what is left out."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from tsae.data.folders import find_files
from tsae.errors import UserError


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"text of {path.name}")
    return path


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_files(folder)]


def test_linked_folders_and_files_are_read(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/deep/a.txt")
    write(tmp_path / "blobs/0123")
    folder = tmp_path / "data"
    write(folder / "b.txt")
    (folder / "part").symlink_to(tmp_path / "elsewhere")
    (folder / "c.TXT").symlink_to("../blobs/0123")  # as in the cache of the hub
    assert names(folder) == ["b.txt", "c.TXT", "part/deep/a.txt"]
    (tmp_path / "link").symlink_to(folder)
    assert names(tmp_path / "link") == ["b.txt", "c.TXT", "part/deep/a.txt"]


def test_each_real_folder_and_file_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "real/a.txt")
    (tmp_path / "a folder first in order").symlink_to("real")
    (tmp_path / "another").symlink_to("real")
    (tmp_path / "0.txt").symlink_to("real/a.txt")
    os.link(tmp_path / "real/a.txt", tmp_path / "real/b.txt")
    (tmp_path / "real/up").symlink_to(tmp_path)  # a loop
    (tmp_path / "real/here").symlink_to(".")
    assert names(tmp_path) == ["real/a.txt"]


def test_loop_through_folders_outside(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder / "a.txt")
    write(tmp_path / "other/b.txt")
    (folder / "other").symlink_to("../other")
    (tmp_path / "other/back").symlink_to("../data")
    assert names(folder) == ["a.txt", "other/b.txt"]


def test_what_is_ignored_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.txt")
    write(tmp_path / ".hidden.txt")
    for name in ("b.csv", "c.csv", "d/e.md", "README"):
        write(tmp_path / name)
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")  # opening it would wait for ever
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path) == ["a.txt"]
        assert names(tmp_path) == ["a.txt"]
    said = sorted(caplog.messages)
    assert len(said) == 3
    assert "2 .csv, 1 without a suffix, 1 .md" in said[2] or "2 .csv, 1 .md, 1 without a suffix" in said[2]
    assert "gone" in said[0]
    assert "leads nowhere" in said[0]
    assert "pipe.txt" in said[1]


@pytest.mark.parametrize("target", ["nowhere.txt", "a.txt"])
def test_a_linked_text_file_that_is_gone_is_refused(tmp_path: Path, target: str) -> None:
    write(tmp_path / "b.txt")
    (tmp_path / "a.txt").symlink_to(target)
    with pytest.raises(UserError, match=r"a\.txt'.* leads nowhere"):
        find_files(tmp_path)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt")
    write(tmp_path / "closed/b.txt")
    iterdir = Path.iterdir

    def denied(folder: Path) -> object:
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(UserError, match=r"cannot read the folder .*closed'.*Permission denied"):
        find_files(tmp_path)


def test_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        find_files(tmp_path / "pipe.txt")
