"""Files are complete or absent, whatever was killed before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tsae.errors import UserError
from tsae.rundir.directory import check_writable
from tsae.utils.atomic import atomic_directory, atomic_write, write_json


def test_kills_leave_one_temporary_file_at_most_and_the_next_write_takes_it(tmp_path: Path) -> None:
    target = tmp_path / "eval.json"
    write_json(target, {"a": 1})
    whole = target.read_bytes()
    for _ in range(3):
        child = os.fork()
        if child == 0:
            with atomic_write(target) as temporary:
                temporary.write_text("half")
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert target.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) <= 2
    write_json(target, {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "F.json"
    with atomic_write(target) as first, atomic_write(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"  # the last to be complete
    assert [path.name for path in tmp_path.iterdir()] == ["F.json"]


def test_two_writers_of_one_directory(tmp_path: Path) -> None:
    target = tmp_path / "exported"
    with atomic_directory(target) as first:
        with (
            pytest.raises(UserError, match=r"exported is being written by another process \("),
            atomic_directory(target),
        ):
            pass
        (first / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    assert (target / "file").is_file()


def test_a_link_and_a_device_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_json(tmp_path / "link", 1)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "1\n"
    write_json(Path("/dev/null"), 1)
    assert Path("/dev/null").is_char_device()


def test_a_link_to_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link") as directory:
        (directory / "file").write_text("a")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "a"


def test_another_writers_temporary_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one starts right after the first has renamed its file."""
    target, real = tmp_path / "eval.json", os.replace

    def replace(source: Path, destination: Path) -> None:
        real(source, destination)
        Path(source).write_text("another's")

    monkeypatch.setattr(os, "replace", replace)
    with atomic_write(target) as temporary:
        temporary.write_text("ours")
    assert target.read_text() == "ours"
    assert temporary.read_text() == "another's"


def test_a_name_that_is_not_unicode_is_refused() -> None:
    """safetensors would write files there that it cannot read."""
    with pytest.raises(UserError, match="is not UTF-8"), atomic_directory(Path("x\udcff")):
        pass
    with pytest.raises(UserError, match="is not UTF-8"):
        check_writable(Path("x\udcff"))


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text(str(1 / 0))
    with pytest.raises(ValueError):
        write_json(tmp_path / "x", float("nan"))
    assert list(tmp_path.iterdir()) == []
