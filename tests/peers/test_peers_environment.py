"""The peers are tested beside the versions that everything else is tested with."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import pytest
from peers_environment import ALONE, BELOW, CONSTRAINTS, below, versions

PIN = re.compile(r"^(\S+)==(\S+)$", re.M)


def test_what_is_installed_alone_is_pinned_as_the_rest_is() -> None:
    pins = dict(PIN.findall(CONSTRAINTS.read_text()))
    alone = dict(PIN.findall(ALONE.read_text()))
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
