"""The files that hosting services and tools read: workflows, hooks, citation, versions, what mypy excuses."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    assert jobs, path
    return [step for job in jobs.values() for step in job["steps"]]


def made(script: str) -> set[str]:
    """The targets of the `make` commands in a shell script."""
    words = (word for line in re.findall(r"^ *make +(.+)$", script, re.M) for word in shlex.split(line))
    return {word for word in words if re.match("[a-z]", word)}  # no option, no number of jobs


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_complete_and_makes_only_what_there_is(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow[True], "YAML reads `on` as true; without it the workflow never runs"
    for name, job in workflow["jobs"].items():
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job), name
    for step in steps(path):
        assert len({"uses", "run"} & set(step)) == 1, step
        for target in made(step.get("run", "")):
            assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.M), f"{path.name}: no target {target}"
        assert "@" in step.get("uses", "@"), "an action has a version"


def test_the_jobs_are_the_checks_of_ci_run() -> None:
    here = made((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    there = set().union(*(made(step.get("run", "")) for step in steps(ROOT / ".github" / "workflows" / "ci.yml")))
    assert {"lint", "test", "test-slow", "test-peers", "demo-short"} <= here
    assert here == there


def recipe(target: str) -> list[str]:
    """The commands of a target, without `$(BIN)/`."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    assert found, target
    return [line.strip().removeprefix("$(BIN)/") for line in found[1].splitlines()]


def test_the_hooks_are_those_of_make_lint() -> None:
    """With the programs of `.venv`, for the files that changed instead of `.`."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"
    hooks = repository["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in hooks]
    assert entries == [command.removesuffix(" .") for command in recipe("lint")]


def test_the_wheels_are_built_with_the_pinned_tools_for_one_python() -> None:
    """One wheel serves all versions (abi3), so it is built once, with the oldest."""
    options = PROJECT["tool"]["cibuildwheel"]
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=").replace(".", "")
    assert options["build"] == f"cp{oldest}-manylinux_*"
    assert options["environment"]["TSAE_BUILD"] == "cpu"
    assert "--no-build-isolation" in options["build-frontend"]["args"]  # else no torch, and no kernels
    runs = [step.get("run", "") for step in steps(ROOT / ".github" / "workflows" / "wheels.yml")]
    installed = [run for run in runs if "pip install" in run]
    assert installed
    assert all("==" in run for run in installed)


def test_version_and_licence_are_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "date-released", "license"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == PROJECT["project"]["name"]
    version, date = citation["version"], citation["date-released"]
    assert version == PROJECT["project"]["version"]
    heading = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert heading
    assert heading[1] == f"{version}, {date}"
    assert citation["license"] == PROJECT["project"]["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_the_programs_of_the_checks_are_pinned() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wanted = {re.split(r"[\[<>=; ]", name)[0].lower() for name in PROJECT["project"]["optional-dependencies"]["dev"]}
    assert {"ruff", "mypy", "pytest", "types-pyyaml"} <= wanted
    assert wanted <= pinned


def test_mypy_is_strict_and_excuses_say_what_they_excuse() -> None:
    """No blanket ignores: neither in a comment nor for a module of ours."""
    options = PROJECT["tool"]["mypy"]
    assert options["strict"] is True
    assert {"tsae_kernels", "tsae", "tools", "benchmarks"} <= set(options["files"])
    for each in options["overrides"]:
        modules = each["module"]
        ours = [name for name in modules if name.startswith(("tsae", "tools", "benchmarks"))]
        assert "ignore_errors" not in each
        assert "disable_error_code" not in each
        assert not (ours and ("ignore_missing_imports" in each or "follow_imports" in each)), ours
        assert not any(name in ("tsae_kernels", "tsae_kernels.*") for name in ours), "tsae_kernels is strict"
    sources = ("tsae_kernels", "tsae", "tools", "benchmarks")
    tracked = subprocess.run(["git", "ls-files", *sources], cwd=ROOT, text=True, capture_output=True, check=True)
    blanket = re.compile(r"#\s*type:\s*ignore(?!\[[a-z-]+)|#\s*mypy:|no_type_check")
    found = []
    for name in tracked.stdout.split():
        if name.endswith(".py"):
            lines = enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
            found += [f"{name}:{number}" for number, line in lines if blanket.search(line)]
    assert found == []
