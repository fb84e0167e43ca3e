"""`pytest tests/peers --no-skips`: a test skipped because a package is missing fails instead."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail skipped tests")


def strict(config: pytest.Config) -> bool:
    return config.getoption("--no-skips", default=False)  # undefined unless this folder is on the command line


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, pytest.CollectReport]:
    report = yield
    if report.skipped and strict(collector.config):
        report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, pytest.TestReport]:
    report = yield
    if report.skipped and strict(item.config):
        report.outcome = "failed"
    return report
