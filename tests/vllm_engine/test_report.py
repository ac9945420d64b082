"""What the log says, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esamp_core.bindings.vllm_config import PluginConfig
from esamp_core.bindings.vllm_report import Report
from esamp_core.sample import Draw, GroupStats


def drawn(novelty: list[float], token_ids: list[int]) -> Draw:
    column = torch.tensor(novelty)
    zeros = torch.zeros_like(column)
    return Draw(torch.tensor(token_ids), zeros, zeros, column, column / 4, zeros.long(), zeros.int())


def explorer(*updates: int) -> Any:
    stats = {i: GroupStats(1, n, 0.5, 1.0, 0, True) for i, n in enumerate(updates)}
    stats["idle"] = GroupStats(0, 100, 0.5, 1.0, 0, True)
    return SimpleNamespace(max_groups=8, stats=lambda: stats)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("esamp_core.bindings.vllm_report.time.monotonic", lambda: next(clock))
    return Report(PluginConfig(log_interval=10.0), lambda: True)


def test_one_line_per_interval(report: Report, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="vllm.esamp")
    for _ in range(4):  # at 6, 12, 18 and 24 seconds
        report.draw(drawn([2.0, 4.0, 9.0], [5, 6, -1]))
        report.untouched(1)
        report.step(explorer(3, 4))
    lines = [record.getMessage() for record in caplog.records]
    line = (
        "esamp: 4 rows in 2 steps, mean novelty 3, KL 0.75, 2 rows untouched; 2/8 slots in use, with 7 updates so far"
    )
    assert lines == [line] * 2


def test_updates_that_stay_0_warn_once(report: Report, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        report.draw(drawn([2.0], [5]))
        report.step(explorer(0))
    assert caplog.text.count("no Distiller has been updated") == 1


def test_updates_that_come_late_do_not_warn(report: Report, caplog: pytest.LogCaptureFixture) -> None:
    for updates in (0, 0, 1, 1, 0, 0, 2, 2):
        report.draw(drawn([2.0], [5]))
        report.step(explorer(updates))
    assert "no Distiller has been updated" not in caplog.text


def test_other_ranks_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    report = Report(PluginConfig(), lambda: False)
    report.full(5)
    report.no_tap(3)
    assert not caplog.records
