"""The peers are tested with the same package versions as everything else."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from peers_environment import BELOW, CONSTRAINTS, ROOT, SINGLE_PROCESS, below, versions

PIN = re.compile(r"^(\S+)==(\S+)$", re.M)


def test_packages_installed_without_dependencies_are_pinned_too() -> None:
    pins = dict(PIN.findall(CONSTRAINTS.read_text()))
    alone = dict(PIN.findall(SINGLE_PROCESS.read_text()))
    assert alone
    assert alone.items() <= pins.items()


def test_the_peers_environment_overrides_no_version_of_the_one_below() -> None:
    packages = Path(sysconfig.get_path("purelib"))
    if not (packages / BELOW).exists():
        pytest.skip("not the peers environment; make peers")
    lower, upper = versions(below(packages)), versions(packages)
    assert {"torch", "transformers", "numpy"} <= set(lower)
    assert {"sae-lens", "sae-bench", "dictionary-learning", "eai-sparsify"} <= set(upper) - set(lower)
    assert {name: (lower[name], upper[name]) for name in set(lower) & set(upper)} == {}
    pins = {name.lower().replace("_", "-"): version for name, version in PIN.findall(CONSTRAINTS.read_text())}
    assert upper.items() <= pins.items()


@pytest.mark.parametrize("option", [(), ("--no-skips",)])
def test_a_missing_peer_is_skipped_or_an_error_with_no_skips(option: tuple[str, ...]) -> None:
    arguments = ["tests/peers/test_peers_sparsify.py", "-p", "no:cacheprovider", "-rs", *option]
    code = f"import sys, pytest; sys.modules['sparsify'] = None; sys.exit(pytest.main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "eai-sparsify is not installed; make peers" in done.stdout
    assert done.returncode == (pytest.ExitCode.INTERRUPTED if option else pytest.ExitCode.NO_TESTS_COLLECTED)
