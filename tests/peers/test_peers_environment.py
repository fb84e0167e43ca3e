"""The peers are tested beside the versions that everything else is tested with."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from peers_environment import BELOW, CONSTRAINTS, ROOT, SINGLE_PROCESS, below, versions

PIN = re.compile(r"^(\S+)==(\S+)$", re.M)


def test_what_is_installed_alone_is_pinned_as_the_rest_is() -> None:
    pins = dict(PIN.findall(CONSTRAINTS.read_text()))
    alone = dict(PIN.findall(SINGLE_PROCESS.read_text()))
    assert alone
    assert alone.items() <= pins.items()


def test_no_package_of_the_environment_below_is_there_in_another_version() -> None:
    packages = Path(sysconfig.get_path("purelib"))
    if not (packages / BELOW).exists():
        pytest.skip("these are not the peers' environment; make peers")
    lower, upper = versions(below(packages)), versions(packages)
    assert {"torch", "transformers", "numpy"} <= set(lower)
    assert {"sae-lens", "sae-bench", "dictionary-learning", "eai-sparsify"} <= set(upper) - set(lower)
    assert {name: (lower[name], upper[name]) for name in set(lower) & set(upper)} == {}
    pins = {name.lower().replace("_", "-"): version for name, version in PIN.findall(CONSTRAINTS.read_text())}
    assert upper.items() <= pins.items()


@pytest.mark.parametrize("option", [(), ("--no-skips",)])
def test_a_missing_peer_is_skipped_or_on_request_an_error(option: tuple[str, ...]) -> None:
    arguments = ["tests/peers/test_peers_sparsify.py", "-p", "no:cacheprovider", "-rs", *option]
    code = f"import sys, pytest; sys.modules['sparsify'] = None; sys.exit(pytest.main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "eai-sparsify is not installed; make peers" in done.stdout
    assert done.returncode == (pytest.ExitCode.INTERRUPTED if option else pytest.ExitCode.NO_TESTS_COLLECTED)
