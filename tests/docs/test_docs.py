"""The code, commands, links and file names in README.md, CONTRIBUTING.md and docs/ are valid.

* `python` blocks run in order, each page in its own namespace and folder. The folder holds `my-model/`, a tiny language
  model with random weights; `my-texts/`, generated text; and `runs/latest`, a finished run on them.
* `python -m tsae...` in `bash` blocks is parsed by the real command line. In the quick start and the how-to pages it
  also runs, in order with the page's Python blocks; a training command gets `STAND_INS` before its own options and
  `SIZES` after them.
* A block that cannot run is preceded by `<!-- not run: reason -->`; it is still parsed, and `NOT_RUN` counts it.
"""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_pages import PAGES, ROOT, Block, blocks, commands, module_call, name
from tiny_runs import write_text

from tsae.errors import UserError
from tsae.training.sweep_file import read_sweep
from tsae.training.temporal_objectives import count_pairs, slow_loss
from tsae.utils.cli import parse
from tsae_kernels import TemporalStats, activate_with_stats

GUIDES = [page for page in PAGES if name(page) == "docs/quickstart.md" or "howto" in page.parts]

# Model and text of a training command whose page names none ...
STAND_INS = shlex.split("--model my-model --data my-texts")
# ... and the sizes at which it runs, overriding the page.
SIZES = shlex.split(
    "--layer 1 --steps 4 --batch 2 --device cpu --sae.d-sae 48 --sae.k 6 --buffer.sequences 8 --buffer.reuse 1"
    " --buffer.estimate-sequences 8 --evaluation.sequences 4 --evaluation.ce-sequences 2 --text.evaluation-share 0.2"
)
WITHOUT_OPTIONS = ("--resume", "--sweep")

# Blocks that do not run, per page.
NOT_RUN = {
    "docs/quickstart.md": 1,
    "docs/howto/notebook.md": 1,
    "docs/howto/own-model.md": 2,
    "docs/howto/fine-tune.md": 1,
    "docs/howto/own-text.md": 1,
    "docs/howto/length.md": 1,
    "docs/howto/multi-gpu.md": 3,
    "docs/formats.md": 2,
    "docs/sharing.md": 1,
}


@pytest.fixture(scope="session")
def prepared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the pages refer to."""
    from tsae.train import main

    folder = tmp_path_factory.mktemp("pages") / "folder"
    shutil.copytree(tiny_llama, folder / "my-model")
    (folder / "my-texts").mkdir()
    write_text(folder / "my-texts" / "river.txt")
    out = folder / "runs" / "demo" / "first"
    sources = ["--model", str(folder / "my-model"), "--data", str(folder / "my-texts")]
    assert main([*sources, "--out", str(out), *SIZES]) == 0
    (folder / "runs" / "latest").symlink_to(Path("demo", "first"))
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it as working directory, with PyTorch's generator seeded."""
    place = tmp_path / "page"
    shutil.copytree(prepared, place, symlinks=True)
    monkeypatch.chdir(place)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield place


class Parsed(Exception):  # noqa: N818  (ends a command once its options are parsed)
    pass


def main_of(module: str) -> tuple[Any, Callable[[list[str]], int]]:
    """The module behind `python -m NAME`, and its `main`."""
    assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    return found, found.main


def parse_command(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments with the module's command line, without running it."""
    if module == "tsae_kernels":
        assert not arguments, "python -m tsae_kernels takes no options"
        return
    if module == "tsae.train":
        from tsae.train import command

        command(arguments)[0].check()
        return
    found, main = main_of(module)

    def parse_and_stop(*args: Any) -> None:
        parse(*args)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(found, "parse", parse_and_stop)
        try:
            status = main(arguments)
        except Parsed:
            return
    raise AssertionError(f"{module} refused its arguments with status {status}")  # the reason is on stderr


def check_other_command(words: list[str], page: Path) -> None:
    """Check a command other than `python -m tsae...`: its targets, files, modules and extras exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    match words:
        case ["make", target]:
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M), f"no target {target}"
        case ["python", script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file(), f"there is no {script}"
        case ["pytest", *paths] | ["python", "-m", "pytest", *paths]:
            for path in paths:
                assert path.startswith("-") or (ROOT / path).exists(), f"there is no {path}"
        case ["python" | "python3", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
        case ["pip", "install", *arguments]:
            for extra in re.findall(r"^\.\[(.*)\]$", "\n".join(arguments), re.M):
                assert set(extra.split(",")) <= set(extras), f"no extra {extra}"
        case ["git" | "cd" | "wait" | "source" | ".venv/bin/pip" | ".venv/bin/pre-commit", *_]:
            pass
        case _:
            raise AssertionError(f"{name(page)}: this test does not know the command {words[0]!r}")


def run_command(module: str, arguments: list[str]) -> None:
    if module == "tsae.train" and arguments[:1] and arguments[0] in WITHOUT_OPTIONS:
        pass
    elif module == "tsae.train":
        arguments = [*STAND_INS, *arguments, *SIZES]
    status = main_of(module)[1](*([] if module == "tsae_kernels" else [arguments]))
    assert status in (0, None), f"python -m {module} {' '.join(arguments)} ended with status {status}"


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    code = "\n" * (block.line - 1) + block.code  # so that tracebacks show the page's line
    linecache.cache[str(block.page)] = (len(code), None, block.page.read_text().splitlines(True), str(block.page))
    exec(compile(code, str(block.page), "exec"), namespace)


def run_page(page: Path) -> None:
    """Run a page in the current folder."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.not_run is not None:
            continue
        if block.language == "python":
            run_python(block, namespace)
        elif block.language == "bash" and page in GUIDES:
            for words in commands(block.code):
                call = module_call(words)
                assert call is not None, f"{block}: {words[0]} cannot run here: mark the block with its reason"
                run_command(*call)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_every_command_of_a_page_is_valid(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(page):
        if block.language == "bash":
            for words in commands(block.code):
                call = module_call(words)
                if call is None:
                    check_other_command(words, page)
                else:
                    parse_command(*call, monkeypatch)
        elif block.language == "python":
            compile(block.code, str(block), "exec")
        elif block.language == "yaml":
            Path("page.yaml").write_text(block.code)
            for cfg in read_sweep(Path("page.yaml")).values():
                cfg.check()


RUNNABLE = [
    page
    for page in PAGES
    if any(b.not_run is None and (b.language == "python" or b.language == "bash") for b in blocks(page))
    and (page in GUIDES or any(b.language == "python" for b in blocks(page)))
]


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_the_code_of_a_page_runs(page: Path, folder: Path) -> None:
    run_page(page)


def test_the_guides_are_there_and_run() -> None:
    """These pages contain code that runs."""
    assert {"docs/quickstart.md", "docs/howto/own-model.md", "docs/howto/own-text.md", "docs/howto/own-loss.md"} <= {
        name(page) for page in RUNNABLE
    }
    assert "README.md" in {name(page) for page in RUNNABLE}


def test_blocks_that_do_not_run_are_few() -> None:
    found = {name(page): sum(block.not_run is not None for block in blocks(page)) for page in PAGES}
    assert {page: count for page, count in found.items() if count} == NOT_RUN


LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)")


def links(page: Path) -> Iterator[tuple[Path, str, str]]:
    """File, link and anchor of every link of a page to a file."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target, anchor in LINK.findall(prose):
        if not re.match(r"[a-z]+:", target):
            yield (page.parent / target if target else page).resolve(), target, anchor


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them; the site's build checks its own."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_has_a_target(page: Path) -> None:
    for file, target, anchor in links(page):
        assert file.exists(), f"{name(page)} links to {target}, which is not there"
        assert not anchor or anchor in anchors(file), f"{name(page)}: {target} has no heading for #{anchor}"


def test_the_indexes_link_every_page() -> None:
    home, reference = ROOT / "docs" / "index.md", ROOT / "docs" / "reference" / "index.md"
    linked = {file for index in (home, reference) for file, _, _ in links(index)}
    assert sorted(map(name, set(PAGES) - linked - {home, ROOT / "README.md", ROOT / "CONTRIBUTING.md"})) == []


def test_links_of_the_docs_stay_inside_them() -> None:
    """The site holds docs/ alone; other files are named in inline code."""
    docs = ROOT / "docs"
    outside = [
        (name(page), target)
        for page in docs.rglob("*.md")
        for file, target, _ in links(page)
        if not file.is_relative_to(docs)
    ]
    assert outside == []


def test_files_named_in_the_docs_exist() -> None:
    """Inline code that is the path of a file or a folder of the repository."""
    path = re.compile(r"`((?:benchmarks|csrc|docs|examples|experiments|tests|tools|tsae|tsae_kernels)/[\w./-]*)`")
    missing = {f"{name(page)}: {found}" for page in PAGES for found in path.findall(page.read_text(encoding="utf-8"))}
    assert {each for each in missing if not (ROOT / each.split(": ")[1]).exists()} == set()


def files_of_the_tree() -> set[str]:
    """The files that the tree in docs/architecture.md lists."""
    found, folders = set(), []
    page = ROOT / "docs" / "architecture.md"
    for line in next(block for block in blocks(page) if block.language == "text").code.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        entry = line.split()[0]
        folders = folders[:depth]
        if entry.endswith("/"):
            folders.append(entry)
        else:
            found.add("".join(folders) + entry)
    return found


def test_the_architecture_page_lists_every_source_file() -> None:
    sources = ("tsae", "tsae_kernels", "csrc", "tools", "benchmarks")
    tracked = subprocess.run(["git", "ls-files", *sources], cwd=ROOT, text=True, capture_output=True, check=True)
    expected = {file for file in tracked.stdout.split() if Path(file).name not in ("__init__.py", "py.typed")}
    assert files_of_the_tree() == expected


def test_the_readme_lists_every_folder() -> None:
    tree = next(block for block in blocks(ROOT / "README.md") if block.language == "text").code
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()
    parents = [Path(file).parts[:-1] for file in tracked if not file.startswith(".")]
    folders = {parts[0] for parts in parents if parts} | {
        parts[1] for parts in parents if parts[1:] and parts[0] == "tsae"
    }
    assert {folder for folder in folders if not re.search(rf"(^|\s){folder}/", tree)} == set()


def test_the_reference_covers_every_package() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    documented = set(re.findall(r"^::: (\S+)$", pages, re.M))
    top = {f"tsae.{path.stem}" for path in (ROOT / "tsae").glob("*.py") if path.stem != "__init__"}
    packages = {f"tsae.{path.parent.name}" for path in (ROOT / "tsae").glob("*/__init__.py")}
    assert documented == {"tsae", "tsae_kernels"} | top | packages


def test_the_loss_that_people_copy_is_slowness() -> None:
    """Value and gradient against the built-in one; and no NaN where nothing is active."""
    namespace: dict[str, Any] = {}
    page = ROOT / "docs" / "howto" / "own-loss.md"
    run_python(next(block for block in blocks(page) if block.language == "python"), namespace)
    pre = torch.randn(3, 20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[0] * 12 + [1] * 8, [0] * 20, [0] * 9 + [-1] * 3 + [2] * 8])

    def stats(x: torch.Tensor) -> TemporalStats:
        return activate_with_stats(x, threshold=0.5, release=0.1, bands=((1, 1),), segments=segments)[1]

    results = []
    for loss in (
        lambda s: namespace["lag1_penalty"](s, segments),
        lambda s: slow_loss(s, (segments >= 0).sum(), count_pairs(segments, 1)),
    ):
        x = pre.clone().requires_grad_()
        value = loss(stats(x))
        results.append((value, *torch.autograd.grad(value, x)))
    torch.testing.assert_close(*results)
    off = torch.zeros_like(pre).requires_grad_()
    value = namespace["lag1_penalty"](stats(off), segments)
    assert (value.item(), float(torch.autograd.grad(value, off)[0].abs().sum())) == (0.0, 0.0)


# Tests of these tests: a wrong page fails.


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nassert 1 + 1 == 3\n```\n", AssertionError),
        ("```python\nx = 1\n```\n\n```python\nprint(y)\n```\n", NameError),
        ("```py\nx = 1\n```\n", ValueError),
        ("```python\nx = 1\n", ValueError),
    ],
    ids=["assertion", "name", "language", "no-end"],
)
def test_a_broken_snippet_fails(text: str, error: type[Exception], folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "broken.md"
    page.write_text(text)
    with pytest.raises(error):
        run_page(page)


def test_blocks_share_their_pages_namespace_and_a_marked_one_does_not_run(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = [1]\n```\n\n<!-- not run: a reason -->\n```python\nx.append(2)\n```\n\n"
        "```python\nassert x == [1]\n```\n"
    )
    assert [block.not_run for block in blocks(page)] == [None, "a reason", None]
    run_page(page)


@pytest.mark.parametrize(
    "command",
    [
        "python -m tsae.train --no-such-option 3",
        "python -m tsae.train no-such-preset",
        "python -m tsae.train --objective no-such-term",
        "python -m tsae.evaluate runs/latest --no-such-option 3",
        "python -m tsae.evaluate runs/latest --layer one",
        "python -m tsae.nothing",
        "python -m tsae_kernels --verbose",
        "make no-such-target",
        "pytest no-such-folder",
        "python no-such-script.py",
        "unknown-program",
        "pip install --no-build-isolation .[no-such-extra]",
        "python -m benchmarks.nothing",
    ],
)
def test_a_wrong_command_fails(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = commands(command)
    call = module_call(words)
    check = (
        partial(check_other_command, words, PAGES[0]) if call is None else partial(parse_command, *call, monkeypatch)
    )
    with pytest.raises((AssertionError, UserError)):
        check()


def test_commands_are_read_as_a_shell_would() -> None:
    code = "A=1 B=2 python -m tsae.train \\\n    --seed 1 &  # comment\n\npip install '.[demo]'\n"
    assert commands(code) == [["python", "-m", "tsae.train", "--seed", "1"], ["pip", "install", ".[demo]"]]
    with pytest.raises(ValueError, match="more shell"):
        commands("for i in 1 2; do echo; done")
