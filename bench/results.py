"""Result files: when, where, with what, and the cases.

    {"kind": "kernels" | "decode" | "cpu" | "bed", "dry": false, "date": ..., "command": ..., "commit": ...,
     "machine": {...}, "versions": {...}, "tests": {...} | null, "floors": {...}, "cases": [{"name": ..., ...}]}

A dry run exercises the code on tiny shapes; its times say nothing and are not kept.  ``tests`` are those that ran
before on the same machine: where some failed or did not finish, the numbers are unproven, and every table says so.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esamp_core.base import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

# Fields that are measurements of time or made from them, wherever they stand in a case.
TIMES = (
    "microseconds",
    "milliseconds",
    "step_milliseconds",
    "call_milliseconds",
    "step_ratio",
    "seconds",
    "spread",
    "ratio",
    "gb_per_s",
    "of_floor",
    "tokens_per_s",
    "speedup",
)


def output_folder() -> Path:
    folder = Path(os.environ.get("ESAMP_BENCH_OUT") or ROOT / "bench" / "out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def dry_by_environment() -> bool:
    """ESAMP_BENCH_DRY=1: tiny shapes, whatever the command says."""
    return os.environ.get("ESAMP_BENCH_DRY") == "1"


def commit() -> str:
    """This tree's."""
    return environment.commit(ROOT)


def spoken(module: str, arguments: Sequence[str] | None) -> str:
    """The command that measures this again; where its file lay, and that it went on from one, is left out."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    while "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return " ".join(["python -m", module, *(word for word in words if word != "--resume")])


def report(kind: str, command: str, cases: list[dict[str, Any]], *, dry: bool, **more: Any) -> dict[str, Any]:
    """What is written to a file.  Times of a dry run are dropped here, so that none can be quoted."""
    body = {
        "kind": kind,
        "dry": dry,
        "date": datetime.date.today().isoformat(),
        "command": command,
        "commit": commit(),
        "machine": environment.machine(),
        "versions": environment.installed("python", "torch", "triton", "transformers", "flashinfer-python"),
        "tests": recorded_tests(),
        **more,
        "cases": cases,
    }
    return without_times(body) if dry else body


def recorded_tests() -> dict[str, Any] | None:
    """What tests/record.py wrote into ESAMP_TEST_RECORD: how many passed, which failed, and whether all ran."""
    path = os.environ.get("ESAMP_TEST_RECORD")
    if not path or not Path(path).exists():
        return None
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    outcomes: dict[str, str] = {}
    for line in lines:
        if "test" in line and (line["outcome"] != "passed" or line["test"] not in outcomes):
            outcomes[line["test"]] = line["outcome"]
    failed = sorted(test for test, outcome in outcomes.items() if outcome == "failed")
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    return {"passed": passed, "failed": failed, "finished": any("exit" in line for line in lines)}


def unproven(body: dict[str, Any]) -> str | None:
    """Why this result's numbers are not proven by the tests of the same run; None where they are, or need not be."""
    if body["kind"] == "cpu":
        return None
    tests = body.get("tests")
    if tests is None:
        return "no tests ran before"
    if tests["failed"]:
        return f"{len(tests['failed'])} tests failed: {', '.join(tests['failed'][:5])}"
    return None if tests["finished"] and tests["passed"] else f"the tests did not finish, {tests['passed']} passed"


def continued(path: Path, kind: str) -> list[dict[str, Any]]:
    """The cases of a result file that this very run began: same commit, same day, dry or not as now; else none."""
    if not path.exists():
        return []
    body, now = load(path), {"kind": kind, "commit": commit(), "date": datetime.date.today().isoformat()}
    return body["cases"] if {key: body[key] for key in now} == now else []


def without_times(value: Any) -> Any:
    """The same structure, every measurement of time None."""
    if isinstance(value, dict):
        return {k: None if k in TIMES else without_times(v) for k, v in value.items()}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def save(body: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    missing = {"kind", "dry", "date", "command", "commit", "machine", "versions", "cases"} - set(body)
    if missing:
        raise SystemExit(f"{path} is no result file: it lacks {', '.join(sorted(missing))}")
    return body
