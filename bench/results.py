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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esamp_core.base import environment
from esamp_core.base.errors import ArgumentError, EsampError
from esamp_core.base.files import lines_of, read_text, write_text
from esamp_core.base.schema import parse, read_json

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


@dataclass(frozen=True)
class Recorded:
    """A line of tests/record.py."""

    test: str | None = None
    outcome: str = ""
    seconds: float = 0.0
    exit: int | None = None


def recorded_tests() -> dict[str, Any] | None:
    """What tests/record.py wrote into ESAMP_TEST_RECORD: how many passed, which failed, and whether all ran."""
    path = os.environ.get("ESAMP_TEST_RECORD")
    if not path or not Path(path).exists():
        return None
    outcomes: dict[str, str] = {}
    ended, broken = False, False
    for number, text in enumerate(lines_of(Path(path).read_bytes().decode(errors="replace")), 1):
        try:
            line = parse(Recorded, read_json(text, f"line {number}"), f"line {number}")
        except ArgumentError:  # cut, where a run was killed: numbers of the same machine are not lost for that
            broken = True
            continue
        ended |= line.exit is not None
        if line.test is not None and (line.outcome != "passed" or line.test not in outcomes):
            outcomes[line.test] = line.outcome
    failed = sorted(test for test, outcome in outcomes.items() if outcome == "failed")
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    return {"passed": passed, "failed": failed, "finished": ended and not broken}


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
    write_text(path, json.dumps(body, indent=1) + "\n", str(path))


def read_object(path: Path, needed: Collection[str]) -> dict[str, Any]:
    """A JSON object with these fields at least.  Raises ArgumentError, in one line."""
    body: dict[str, Any] = parse(dict, read_json(read_text(path, "result"), str(path)), str(path))
    if missing := set(needed) - set(body):
        raise ArgumentError(f"{path} is no result file: it lacks {', '.join(sorted(missing))}")
    return body


def load(path: Path) -> dict[str, Any]:
    """A result file.  Raises SystemExit where it is another file."""
    try:
        return read_object(path, ("kind", "dry", "date", "command", "commit", "machine", "versions", "cases"))
    except ArgumentError as error:
        raise SystemExit(str(error)) from None


def told(command: Callable[[], Any]) -> None:
    """Run a command; what its user can mend is one line, and no traceback."""
    try:
        command()
    except EsampError as error:
        raise SystemExit(f"error: {error}") from None
