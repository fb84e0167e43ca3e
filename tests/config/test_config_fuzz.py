"""Arbitrary configurations: a run or one sentence."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import options

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.presets import PRESETS, preset
from tsae.train import command, main
from tsae.training.run import run
from tsae.utils.config_json import from_dict, load_json, to_dict

LARGE = [2**31, 2**63, -(2**63), 10**30, 10**400]
numbers = st.integers(-3, 300) | st.sampled_from(LARGE) | st.floats()
WORDS = ["", "none", "auto", "topk", "nan", "window+slow", "\0", "\ud800", "🌉"]
strings = st.sampled_from(WORDS) | st.text(max_size=5)
leaves = st.none() | st.booleans() | numbers | strings
junk = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=2))


def places(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all keys, of groups too."""
    found = []
    for key, value in values.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += places(value, (*prefix, key))
    return found


def changed(base: dict[str, Any], changes: list[tuple[tuple[str, ...], str, Any]]) -> dict[str, Any]:
    values = copy.deepcopy(base)
    for place, kind, value in changes:
        at: Any = values
        for key in place[:-1]:
            at = at.get(key) if isinstance(at, dict) else None
        if not isinstance(at, dict):  # removed by an earlier change
            continue
        if kind == "remove":
            at.pop(place[-1], None)
        else:
            at[place[-1] + ("?" if kind == "unknown" else "")] = value
    return values


def changes(base: dict[str, Any], values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    kinds = st.sampled_from(["replace"] * 8 + ["remove", "unknown"])
    return st.lists(st.tuples(st.sampled_from(places(base)), kinds, values), min_size=1, max_size=3)


def one_sentence(error: UserError) -> None:
    assert str(error)
    assert "\n" not in str(error)
    assert "Traceback" not in str(error)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_any_json_is_a_configuration_or_a_sentence(name: str) -> None:
    base = to_dict(preset(name))

    @settings(deadline=None, max_examples=300)
    @given(changes(base, junk))
    def check(drawn: list[Any]) -> None:
        values = json.loads(json.dumps(changed(base, drawn)))
        try:
            config = from_dict(TrainConfig, values)
            config.check()
        except UserError as error:
            one_sentence(error)
        else:
            assert from_dict(TrainConfig, to_dict(config)) == config

    check()


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**6), st.integers(0, 7), st.sampled_from(["flip", "cut", "insert"]), st.binary(max_size=8))
def test_any_bytes_are_an_object_or_a_sentence(at: int, bit: int, kind: str, more: bytes) -> None:
    content = bytearray(json.dumps(to_dict(preset("demo"))).encode())
    at %= len(content)
    content[at] ^= (1 << bit) * (kind == "flip")
    if kind == "cut":
        del content[at:]
    if kind == "insert":
        content[at:at] = more
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_bytes(content)
        try:
            from_dict(TrainConfig, load_json(path)).check()
        except UserError as error:
            one_sentence(error)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"steps": ' + "9" * 5000 + "}", "\ufeff{}", "", "null"]
)
def test_pathological_json_is_one_sentence(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert main(["--config", str(path)]) == 2
    assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.slow
def test_any_small_configuration_runs_or_is_a_sentence(tiny_neox: Path, text_file: Path) -> None:
    """Train with small sizes and otherwise arbitrary values."""
    base = to_dict(command(options(tiny_neox, text_file, Path("unused"), "--steps", "2"))[0])
    small = st.integers(-1, 40) | st.floats(-2, 4) | st.just(float("nan")) | strings | st.booleans()

    @settings(deadline=None, max_examples=80)
    @given(changes(base, small | st.lists(small, max_size=3)))
    def check(drawn: list[Any]) -> None:
        drawn = [change for change in drawn if change[0] != ("cache",)]  # creates a directory of any name
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            try:
                run(from_dict(TrainConfig, json.loads(json.dumps(changed(base, drawn)))), Path(folder) / "run")
            except UserError as error:
                one_sentence(error)

    check()


OPTIONS = (
    "--steps --sae.k --sae.activation --objective.bands --normalize --data-seed --log --text.column -- -x --no demo"
)
arguments = st.sampled_from([*OPTIONS.split(), "@", "="]) | strings | numbers.map(str)


@settings(deadline=None, max_examples=25)
@given(st.lists(arguments, max_size=5))
def test_any_command_line_is_a_command_or_a_sentence(argv: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            config, _ = command(argv)
            config.check()
        except UserError as error:
            one_sentence(error)


@pytest.mark.parametrize(
    "more",
    [
        "--sae.d-sae 1000000000000",
        "--batch 100000000 --buffer.sequences 100000000",
        "--buffer.sequences 10000000000 --steps 10000000000",
        "--buffer.sequences 10000000000000 --steps 10000000000000",
    ],
)
def test_too_much_memory_is_one_sentence(
    more: str, tiny_neox: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(tiny_neox, text_file, tmp_path / "run", *more.split())) == 2
    (sentence,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "memory" in sentence
    assert not (tmp_path / "run").exists()
