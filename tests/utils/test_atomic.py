"""Files are complete or absent, whatever was killed before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tsae.utils.atomic import atomic_write, write_json


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


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text(str(1 / 0))
    with pytest.raises(ValueError):
        write_json(tmp_path / "x", float("nan"))
    assert list(tmp_path.iterdir()) == []
