"""The import graph: no circles, and a top level of `tsae` that holds commands, configuration and errors only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import tsae
import tsae_kernels

TOP_LEVEL = {"__init__", "config", "errors", "evaluate", "export", "presets", "train"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Names in import statements, also those inside functions, but not under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imported(node)


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports, including the `__init__` of their packages."""
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            parts = name.split(".")
            prefixes = [".".join(parts[: n + 1]) for n in range(len(parts))]
            *packages, target = [prefix for prefix in prefixes if prefix in files] or [module]
            # The `__init__` of a module's own packages has run before the module itself.
            packages = [package for package in packages if not module.startswith(f"{package}.")]
            graph[module] |= {*packages, target} - {module}
    return graph


@pytest.mark.parametrize("package", [tsae, tsae_kernels])
def test_no_module_imports_itself_in_a_circle(package: object) -> None:
    graph = import_graph(Path(package.__file__).parent)  # type: ignore[attr-defined]
    assert len(graph) > 20
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def test_a_circle_through_a_function_or_a_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "p" / "q").mkdir(parents=True)
    files = {"__init__": "", "a": "def f():\n    from p.q import c", "q/__init__": "import p.q.c", "q/c": "import p.a"}
    for name, text in files.items():
        (tmp_path / "p" / f"{name}.py").write_text(text)
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(tmp_path / "p")).prepare()
    (tmp_path / "p" / "q" / "c.py").write_text("from p.q import name")
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(tmp_path / "p")).prepare()
    (tmp_path / "p" / "q" / "c.py").write_text("import p.a")
    (tmp_path / "p" / "a.py").write_text("if TYPE_CHECKING:\n    from p.q import c")
    TopologicalSorter(import_graph(tmp_path / "p")).prepare()


def test_the_top_level_holds_commands_configuration_and_errors() -> None:
    assert {path.stem for path in Path(tsae.__file__).parent.glob("*.py")} <= TOP_LEVEL
