"""Every public name has a docstring, and in the main modules every parameter is described."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tsae
import tsae_kernels

PACKAGES = (tsae, tsae_kernels)
# Modules whose parameters must be described.
STRICT = (
    *("tsae_kernels", "tsae.sae.model", "tsae.evaluation.evaluator", "tsae.evaluation.metrics"),
    *("tsae.formats", "tsae.hub"),
)
OBVIOUS = {"progress", "mode", "other"}  # explained by the function's summary, or by PyTorch


def undocumented(path: Path) -> list[str]:
    """The public functions, classes and methods of a source file without a docstring. A method may inherit it from an
    earlier class of the file, such as a protocol; the variants of an overloaded function have that of the function."""
    described, missing = set(), []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        for each in (node, *inside):
            if not isinstance(each, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            if any(isinstance(decorator, ast.Name) and decorator.id == "overload" for decorator in each.decorator_list):
                continue
            if ast.get_docstring(each) is not None:
                described.add(each.name)
            elif not each.name.startswith("_") and each.name not in described:
                missing.append(f"{path}:{each.lineno} {each.name}")
    return missing


def test_every_public_name_has_a_docstring() -> None:
    files = [path for package in PACKAGES for path in Path(package.__file__).parent.rglob("*.py")]
    files = [path for path in files if path.parent.name != "integrations"]  # these override other libraries' methods
    assert len(files) > 80
    assert [name for path in files for name in undocumented(path)] == []


def exported(module: str) -> Iterator[tuple[str, Any]]:
    """The public functions that a module defines or a package exports, and the methods of its classes."""
    found = importlib.import_module(module)
    wanted = getattr(found, "__all__", None)
    for name, value in [(name, getattr(found, name)) for name in wanted or vars(found)]:
        if wanted or (not name.startswith("_") and getattr(value, "__module__", "") == module):
            yield name, value
            for method, function in vars(value).items() if inspect.isclass(value) else ():
                if not method.startswith("_"):
                    yield f"{name}.{method}", getattr(function, "__func__", function)


@pytest.mark.parametrize("module", STRICT)
def test_every_parameter_is_in_the_docstring(module: str) -> None:
    missing = []
    for name, value in exported(module):
        if inspect.isfunction(value):
            wanted = set(inspect.signature(value).parameters) - {"self", "cls"} - OBVIOUS
            doc = inspect.getdoc(value) or ""
            missing += [f"{name}: {parameter}" for parameter in wanted if not re.search(rf"\b{parameter}\b", doc)]
    assert sorted(missing) == []
