"""Fixtures: a browser, and pages in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chrome
import pytest
from made_up import made_up_page

from tsae.view.page import write_page


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("selenium")
    if reason := chrome.missing():
        pytest.skip(reason)
    started = chrome.start(tmp_path_factory.mktemp("profile"))
    yield started
    started.quit()


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A page of 60 features, with markup in its text."""
    return made_up_page(tmp_path_factory.mktemp("page") / "run<b>", d_sae=60, hostile=True)


@pytest.fixture(scope="session")
def page(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "view.html"
    write_page(content, path)
    return path
