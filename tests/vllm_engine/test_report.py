"""What the log and Prometheus are told, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from esamp_core.bindings.vllm_config import PluginConfig
from esamp_core.bindings.vllm_report import Report
from esamp_core.sample import GroupStats, Status


def mixed(betas: list[float], flags: list[int], active: list[bool]) -> Any:
    status = torch.tensor(flags, dtype=torch.int32)
    return SimpleNamespace(active=torch.tensor(active), params=SimpleNamespace(beta=torch.tensor(betas)), status=status)


def explorer(*updates: int) -> Any:
    stats = {i: GroupStats(1, n, 0.5, 1.0, 0, True, 0.5, 0.7, 0.2) for i, n in enumerate(updates)}
    stats["idle"] = GroupStats(0, 100, 0.5, 1.0, 0, True, 0.5, 0.7, 0.2)
    return SimpleNamespace(max_groups=8, stats=lambda: stats)


def count(name: str) -> float:
    return REGISTRY.get_sample_value(f"esamp:{name}") or 0.0


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("esamp_core.bindings.vllm_report.time.monotonic", lambda: next(clock))
    return Report(PluginConfig(log_interval=10.0), lambda: True)


def test_one_line_per_interval(report: Report, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="vllm.esamp")
    names = ("mixed_rows_total", "plain_rows_total", "nonfinite_rows_total", "faults_total")
    before = [count(name) for name in names]
    flag = int(Status.NONFINITE_NOVELTY)
    for _ in range(4):  # at 6, 12, 18 and 24 seconds
        rows = mixed([0.5, 0.0, 0.5, 0.5, 0.5], [0, 0, 0, flag, 0], [True, True, False, True, True])
        report.plain(1)
        report.fault()
        report.step(explorer(3, 4), rows)
        assert rows.status.tolist() == [0] * 5  # counted once
    lines = [record.getMessage() for record in caplog.records]
    line = "esamp: 4 rows mixed in 2 steps, 2 sampled plainly; 2/8 slots in use, with 7 updates so far"
    assert lines == [line] * 2
    assert [count(name) - old for name, old in zip(names, before, strict=True)] == [8, 4, 4, 4]
    assert count("groups") == 2


def test_updates_that_stay_0_warn_once(report: Report, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        report.step(explorer(0), mixed([1.0], [0], [True]))
    assert caplog.text.count("no Distiller has been updated") == 1


def test_updates_that_come_late_do_not_warn(report: Report, caplog: pytest.LogCaptureFixture) -> None:
    for updates in (0, 0, 1, 1, 0, 0, 2, 2):
        report.step(explorer(updates), mixed([1.0], [0], [True]))
    assert "no Distiller has been updated" not in caplog.text


def test_other_ranks_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    report = Report(PluginConfig(), lambda: False)
    report.full(5)
    report.no_tap(3)
    assert not caplog.records
