"""Write docs/api/: a page for each public module, from its docstrings. `python docs/build_api.py`, or `make docs`.

The summary of a docstring becomes a paragraph, the rest stays as it was written: its columns of names, shapes and units
are set by hand. Names, order and signatures come from the modules themselves.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api"

MODULES = {
    "tsae_kernels": "the statistics op, the encoder with statistics, the papers' losses",
    "tsae.sae.model": "the autoencoder: encode, decode, save, load",
    "tsae.sae.thresholds": "thresholds per token, per batch, and steered to an L0",
    "tsae.sae.hysteresis": "hysteresis from both sides, and the threshold for an exact number of features",
    "tsae.sae.release": "a trained autoencoder with another release ratio",
    "tsae.training.objectives": "the training loss and its terms",
    "tsae.training.temporal_objectives": "the contrastive, slowness and window terms",
    "tsae.training.feature_state": "running statistics of the features: variance, lag-1 correlation, dead ones",
    "tsae.training.schedules": "what changes with the step",
    "tsae.sae.normalization": "centring and scaling of the input",
    "tsae.training.trainer": "one autoencoder in training, step by step",
    "tsae.training.sweep": "many runs on one stream of activations",
    "tsae.training.checkpoint": "checkpoints of a run",
    "tsae.evaluation.evaluator": "measuring an autoencoder on a language model",
    "tsae.evaluation.metrics": "the metrics, as sums over batches",
    "tsae.evaluation.held_out": "the text that a run is measured on",
    "tsae.reports.figure": "the figure of a run",
    "tsae.probe.problems": "sparse probes: what is probed for",
    "tsae.probe.probes": "sparse probes: fitted and scored",
    "tsae.probe.token_classes": "a class for every token, from its characters",
    "tsae.view.data": "the page of features: its content",
    "tsae.view.page": "the page of features: one HTML file",
    "tsae.formats": "autoencoders of any known format, from a directory or the hub",
    "tsae.export": "autoencoders in another library's form",
    "tsae.hub": "to the Hugging Face hub and back, with a model card",
    "tsae.lm.loading": "language models of transformers",
    "tsae.lm.hooks": "reading and replacing a block's output",
    "tsae.data.text": "text sources, and what is held out",
    "tsae.data.sequences": "documents packed into token sequences",
    "tsae.data.harvest": "tokens to activations",
    "tsae.data.feed": "activations on demand, from the language model or a cache",
    "tsae.data.cache": "activations on disk",
    "tsae.data.buffer": "activations in memory, mixed",
    "tsae.config": "every option of a run",
    "tsae.utils.config_json": "configurations from and to JSON",
    "tsae.presets": "named configurations",
    "tsae.errors": "what a bad input raises",
}
"""Module -> what the index says of it."""

WIDTH = 100  # columns of a signature before it is broken into lines


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines itself, in the order of its source."""
    for name, value in vars(cls).items():
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        generated = dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")
        public = not name.startswith("_") or (name == "__call__" and not generated)
        if public and (inspect.isfunction(value) or isinstance(value, property)):
            yield name, value


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The names that a module exports, with what they are."""
    for name in module.__all__:
        yield name, getattr(module, name)


def signature(name: str, value: Any) -> str:
    """`name(parameters) -> result`, one parameter a line where it is long; annotations as they were written."""
    if isinstance(value, property):
        return f"{name} -> {value.fget.__annotations__.get('return', 'Any')}"
    parameters, result = [], ""
    own = inspect.signature(value)
    kind = None
    for parameter in own.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and kind is not parameter.KEYWORD_ONLY:
            parameters.append("*")
        kind = parameter.kind
        annotation = parameter.annotation
        text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(kind, "") + parameter.name
        text += f": {annotation}" if annotation is not parameter.empty else ""
        text += f" = {written(parameter.default)}" if parameter.default is not parameter.empty else ""
        parameters.append(text)
    if own.return_annotation not in (own.empty, "None", None):
        result = f" -> {own.return_annotation}"
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){result}"


def written(default: Any) -> str:
    """A default as Python writes it; of a function, whose repr is its address, the name."""
    return default.__name__.replace("<lambda>", "...") if inspect.isfunction(default) else repr(default)


def docstring(text: str | None) -> str:
    """A docstring as Markdown: its first paragraph, and the rest as it stands."""
    if not text:
        return ""
    summary, _, rest = inspect.cleandoc(text).partition("\n\n")
    out = summary.replace("``", "`").replace("<", r"\<") + "\n"
    return out + (f"\n```text\n{rest}\n```\n" if rest else "")


def documented(name: str, value: Any, docs: dict[str, str]) -> str:
    """The docstring of an exported name, "" where it has none; of a constant the text beside it."""
    if inspect.isclass(value) or (callable(value) and not hasattr(value, "__args__")):
        generated = inspect.isclass(value) and (value.__doc__ or "").startswith(f"{name}(")  # as a dataclass makes it
        return "" if generated else value.__doc__ or ""
    return docs.get(name, "")


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass: what `--help` prints."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, after in zip(body, body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs


def fields(cls: type) -> str:
    """A dataclass's fields as a table, where they have docstrings."""
    docs = field_docs(cls)
    if not docs:
        return ""
    rows = ["| field | default | |", "| --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        if field.default_factory is not dataclasses.MISSING:
            default = f"`{getattr(field.default_factory, '__name__', 'made')}()`"
        text = docs.get(field.name, "").replace("|", r"\|").replace("<", r"\<")
        rows.append(f"| `{field.name}` | {default} | {text} |")
    return "\n".join(rows) + "\n"


def entry(name: str, value: Any, docs: dict[str, str]) -> str:
    """The section of one exported name."""
    parts = [f"## `{name}`\n"]
    if inspect.isclass(value):
        if dataclasses.is_dataclass(value):
            parts += [docstring(documented(name, value, docs)), fields(value)]
        else:
            if "_fields" not in vars(value) and not issubclass(value, Exception):
                parts.append(f"```text\n{signature(name, value)}\n```\n")
            parts.append(docstring(value.__doc__))
        for method, function in members(value):
            parts.append(f"### `{name}.{method}`\n")
            parts.append(f"```text\n{signature(method, function)}\n```\n")
            parts.append(docstring(inspect.getdoc(function) or inspect.getdoc(getattr(value, method))))
    elif callable(value) and not hasattr(value, "__args__"):
        parts += [f"```text\n{signature(name, value)}\n```\n", docstring(value.__doc__)]
    else:
        written = str(value).removeprefix("typing.") if hasattr(value, "__args__") else repr(value)
        if isinstance(value, dict):
            written = "{" + ", ".join(f"{key!r}: ..." for key in value) + "}"  # functions have no stable repr
        short = written if len(written) <= WIDTH else f"{written[:WIDTH]}..."
        parts += [f"```text\n{name} = {short}\n```\n", docstring(documented(name, value, docs))]
    return "\n".join(part for part in parts if part)


def constant_docs(module: ModuleType) -> dict[str, str]:
    """The string or the trailing comment of each constant of a module, or of the module that it was imported from."""
    found: dict[str, str] = {}
    for place in (module, *_sources(module)):
        lines = inspect.getsource(place).splitlines()
        body = ast.parse("\n".join(lines)).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if not isinstance(node, (ast.Assign, ast.AnnAssign)):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if not isinstance(target, ast.Name) or target.id in found:
                    continue
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    found[target.id] = str(after.value.value)
                elif "  # " in (line := lines[(node.end_lineno or node.lineno) - 1]):
                    found[target.id] = line.split("  # ", 1)[1]
    return found


def _sources(module: ModuleType) -> Iterator[ModuleType]:
    for node in ast.parse(inspect.getsource(module)).body:
        ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tsae")
        if ours and any(alias.name in module.__all__ for alias in node.names):
            yield importlib.import_module(node.module)


def page(name: str) -> str:
    """The Markdown of one module."""
    module = importlib.import_module(name)
    docs = constant_docs(module)
    head = f"# `{name}`\n\n<!-- Written by docs/build_api.py from the docstrings: edit those. -->\n"
    sections = [entry(exported, value, docs) for exported, value in public(module)]
    return "\n".join([head, docstring(module.__doc__), *sections])


def index() -> str:
    """The Markdown of the reference's index."""
    rows = "\n".join(f"| [`{name}`]({name}.md) | {what} |" for name, what in MODULES.items())
    return (
        "# API reference\n\n<!-- Written by docs/build_api.py. -->\n\n"
        "From the docstrings, each module's public names. A docstring names shapes (`[B, T, k]`: sequences, tokens,\n"
        "features), dtypes, units and errors, and the paper's equation where there is one.\n\n"
        f"| module | |\n| --- | --- |\n{rows}\n"
    )


def pages() -> dict[str, str]:
    """File name -> content, of all that belongs into docs/api."""
    return {"index.md": index()} | {f"{name}.md": page(name) for name in MODULES}


def main() -> None:
    """Rewrite docs/api."""
    wanted = pages()
    API.mkdir(exist_ok=True)
    for old in API.glob("*.md"):
        if old.name not in wanted:
            old.unlink()
    for name, content in wanted.items():
        (API / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
