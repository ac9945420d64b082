"""A pytest plugin (-p tests.record): every outcome at once as a line of JSON in ESAMP_TEST_RECORD.

A run that is killed leaves what it knew.  Under xdist the process that collects the reports writes.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest


def _write(**line: Any) -> None:
    path = os.environ.get("ESAMP_TEST_RECORD")
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":  # of set-up and tear-down only what went wrong
        _write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(test=report.nodeid, outcome="failed", seconds=0.0)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    _write(exit=int(exitstatus))
