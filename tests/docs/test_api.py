"""The API reference: it says what the docstrings say, and every public name has one."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("build_api", ROOT / "docs" / "build_api.py")
assert SPEC is not None
assert SPEC.loader is not None
build_api = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build_api)

# Of these the parameters are described, too.
STRICT = (
    *("tsae_kernels", "tsae.sae.model", "tsae.evaluation.evaluator", "tsae.evaluation.metrics"),
    *("tsae.formats", "tsae.hub"),
)
OBVIOUS = {"progress", "mode", "other"}  # said by the function's own text, or by PyTorch


def test_the_pages_are_what_the_docstrings_say() -> None:
    wanted = build_api.pages()
    assert {path.name for path in build_api.API.glob("*.md")} == set(wanted), "run `make docs`"
    for name, content in wanted.items():
        assert (build_api.API / name).read_text(encoding="utf-8") == content, f"{name} is stale: run `make docs`"


def names(module: str) -> Iterator[tuple[str, Any, str]]:
    """Every public name of a module, methods too, what it is, and its docstring."""
    found = importlib.import_module(module)
    docs = build_api.constant_docs(found)
    for name, value in build_api.public(found):
        yield name, value, build_api.documented(name, value, docs)
        if inspect.isclass(value):
            for method, function in build_api.members(value):
                inherited = inspect.getdoc(getattr(value, method)) or ""
                yield f"{name}.{method}", function, inspect.getdoc(function) or inherited


@pytest.mark.parametrize("module", build_api.MODULES)
def test_every_public_name_has_a_docstring(module: str) -> None:
    assert [name for name, _, doc in names(module) if not doc.strip()] == []


@pytest.mark.parametrize("module", STRICT)
def test_every_parameter_is_in_the_docstring(module: str) -> None:
    missing = []
    for name, value, doc in names(module):
        if inspect.isfunction(value):
            wanted = set(inspect.signature(value).parameters) - {"self", "cls"} - OBVIOUS
            missing += [f"{name}: {parameter}" for parameter in wanted if not re.search(rf"\b{parameter}\b", doc)]
    assert sorted(missing) == []


def test_a_page_holds_the_parts_of_a_docstring() -> None:
    page = build_api.page("tsae_kernels")
    assert "## `activate_with_stats`\n" in page
    assert "    segments: Tensor | None = None,\n    *,\n    backend: str | None = None,\n)" in page
    assert "threshold: None, a number or [], [k] or [B, T, 1]" in page  # below the summary, in its own columns
    assert "Bands = tuple[tuple[int, int], ...]" in page
    assert "Disjoint, ascending, inclusive ranges of offsets" in page  # the string under the name, where it is defined
    config = build_api.page("tsae.config")
    assert "| `steps` | `1000` | Optimizer steps. |" in config
    assert " at 0x" not in "".join(build_api.pages().values())  # an address would differ from run to run
