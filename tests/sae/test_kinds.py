"""The table of activations."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest

import tsae
from tsae.config import SAEConfig
from tsae.errors import UserError
from tsae.sae.kinds import KINDS, Activation, Kind

PACKAGE = Path(tsae.__file__).parent
# Values and other libraries' tables, where a name is a name: the table itself, presets, formats.
NAMES_THEM = ("sae/kinds.py", "presets.py", "formats/")


def test_the_table_has_a_row_for_every_name_a_configuration_takes() -> None:
    assert tuple(KINDS) == get_args(Activation)
    assert SAEConfig(activation="topk").kind is KINDS["topk"]
    with pytest.raises(UserError, match=r"sae\.activation is 'softplus'; use relu, gelu, "):
        SAEConfig(activation="softplus").check()  # type: ignore[arg-type]


def test_properties_are_consistent() -> None:
    for name, kind in KINDS.items():
        assert kind.learned or kind.threshold_parameters == 0, name
        assert kind.k_sparse or not kind.stores_threshold, name
        assert kind.stores_threshold or not kind.release, name
        assert kind.homogeneous or not kind.k_sparse, name  # the kernels take thresholds with relu alone
    assert all(field.name in (Kind.__doc__ or "") for field in dataclasses.fields(Kind))


def test_no_other_module_compares_with_the_name_of_an_activation() -> None:
    own = "|".join(name for name in KINDS if name not in ("relu", "gelu"))
    compared = re.compile(rf'activation"?\]?\s*(?:[!=]=|(?:not )?in)\s*\(?"(?:{own}|relu|gelu)"')
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        if not where.startswith(NAMES_THEM):
            lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            found += [f"{where}:{n}: {line.strip()}" for n, line in lines if compared.search(line)]
    assert not found, "ask for a property of tsae.sae.kinds.Kind"
