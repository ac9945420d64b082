"""Benchmark runs in which something fails: what fails stays alone, and says what it makes doubtful."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_decode, results
from bench.bench_kernels import dry_cases
from bench.bench_kernels import run as run_kernels
from bench.kernel_ops import Case
from bench.results import ROOT, continued, load, recorded_tests, save, unproven


def measured(out: Path, wrong: Callable[[Case], str | None] = lambda case: None, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"cases": dry_cases(), "seconds": 60}
    with torch.no_grad():
        results = run_kernels(device="cpu", dry=True, command="test", out=out, wrong=wrong, **(options | changes))
    return results.body


def test_what_fails_stays_alone_and_a_run_goes_on_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One case has wrong answers, one breaks: they have no numbers, the third has; and nothing is done twice."""
    import bench.bench_kernels as module

    first, second, third = dry_cases()
    real, asked = module.measure_case, list[str]()

    def measure(case: Case, *arguments: Any, **options: Any) -> Any:
        asked.append(case.name)
        if case == second:
            raise RuntimeError("no kernel image")
        return real(case, *arguments, **options)

    monkeypatch.setattr(module, "measure_case", measure)
    monkeypatch.setattr(module, "measure_compiled", lambda *_: [])
    for _ in range(2):
        body = measured(tmp_path / "k.json", lambda case: "tokens differ" if case == first else None)
    assert asked == [second.name, third.name] and body["skipped"] == []
    failed = {row["case"]: row["failed"] for row in body["cases"] if row.get("failed")}
    assert "tokens differ" in failed[first.name] and "no kernel image" in failed[second.name] and len(failed) == 2
    assert {row["case"] for row in body["cases"]} == {first.name, second.name, third.name}
    # Another commit's numbers are not continued.
    save(body | {"commit": "another"}, tmp_path / "k.json")
    assert continued(tmp_path / "k.json", "kernels") == []


@pytest.mark.parametrize("resume", [False, True])
def test_only_a_run_that_is_asked_to_goes_on_from_an_older_file(tmp_path: Path, resume: bool) -> None:
    """The tree may have changed since, and its commit not."""
    out, old = tmp_path / "decode.json", {"name": "old: on", "case": "old", "op": "on", "updates": 1}
    save(results.report("decode", "test", [old], dry=True), out)
    assert bench_decode.main(["--dry", "--rounds", "1", "--out", str(out), *(["--resume"] if resume else [])]) == 0
    assert ("old" in {row["case"] for row in load(out)["cases"]}) == resume


def test_a_lost_device_ends_the_process_with_its_own_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.bench_kernels as module

    monkeypatch.setattr(module, "measure_case", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(module, "is_lost", lambda device: True)
    for number in range(1, 4):
        with pytest.raises(SystemExit) as end:
            measured(tmp_path / "k.json")
        assert end.value.code == module.AGAIN
        assert len(load(tmp_path / "k.json")["cases"]) == number  # each start goes one case further


def test_tests_of_the_run_prove_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plugin writes, also of a run that is killed; and what tables say of it."""
    test = tmp_path / "test_three.py"
    test.write_text("import os\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): os._exit(9)\n")
    record = tmp_path / "tests.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.record",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
    ]
    environment = {**os.environ, "ESAMP_TEST_RECORD": str(record), "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    assert subprocess.run([*command, test], env=environment, capture_output=True).returncode == 9
    monkeypatch.setenv("ESAMP_TEST_RECORD", str(record))
    found = recorded_tests()
    assert found == {"passed": 1, "failed": ["test_three.py::test_b"], "finished": False}
    assert "1 tests failed: test_three.py::test_b" in (unproven({"kind": "kernels", "tests": found}) or "")
    assert "did not finish" in (unproven({"kind": "decode", "tests": found | {"failed": []}}) or "")
    assert unproven({"kind": "decode", "tests": {"passed": 3, "failed": [], "finished": True}}) is None
    assert unproven({"kind": "kernels", "tests": None}) and unproven({"kind": "cpu", "tests": None}) is None


def test_commits_need_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are they what a .git says, where whoever sent the tree says another."""
    monkeypatch.setenv("ESAMP_COMMIT", "sent")
    assert results.commit() == "sent"
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("ESAMP_COMMIT", raising=False)
    assert results.commit() == "unknown"
    monkeypatch.setenv("ESAMP_COMMIT", "abc+")
    assert results.commit() == "abc+"


def test_a_command_is_said_without_places() -> None:
    said = results.spoken("bench.x", ["--quick", "--out", "/some/where.json", "--resume", "--seconds", "3"])
    assert said == "python -m bench.x --quick --seconds 3"
