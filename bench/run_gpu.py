"""Everything that needs a GPU, in runs that fit a machine which is lent for minutes: python -m bench.run_gpu first

    first     what was carried is unpacked; all tests that a GPU runs; kernels, and their counters; decode
    second    memory checks, and what the first run left: kernels, decode, transformers compiled
    quality   the samplers' main table, 64 problems and 3 seeds, 1,024 rows at a time
    memcheck  the memory checks alone

Each takes 8 minutes at most.  Every part has its own time and its own processes.  A part that fails or overruns stops
no other: failing tests are listed first, and the numbers that come after them are marked as unproven.  JSON is written
after each test and case, into ESAMP_BENCH_OUT: tests.jsonl, kernels.json, decode.json; counters are CSV; the rest is in
run.log.  ``send_command`` is the line to send to a machine that takes a tree and one command; `make rehearse-gpu` runs
it on a CPU first.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from bench import bench_decode, bench_kernels
from bench.results import RESULTS, ROOT, commit, dry_by_environment, load, output_folder, recorded_tests

TOTAL = 480.0  # seconds for all parts of a run
CASE = 45.0  # the longest single case; none is started later than this before a part's end
WORKERS = 12  # pytest processes; more would wait for each other's memory on one card
CARRIED = ROOT / ".carry"  # made by `make carry`; ignored by git, so it has to be named to whatever sends the tree
SITE = ROOT / ".carry-site"


@dataclass(frozen=True)
class Part:
    """One program and its time.  again: started anew where it says that only its process is broken."""

    name: str
    command: tuple[str, ...]
    seconds: float
    again: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


class Outcome(NamedTuple):
    name: str
    state: str  # "ok", "failed", "out of time", "no time left"
    seconds: float


def send_command(run: str) -> str:
    """One line, run in the root of the copied tree, whose .git may be another's.  OUT is the folder that comes back."""
    limit = f"timeout {TOTAL + 20:.0f}"
    return f'ESAMP_BENCH_OUT="$OUT" ESAMP_COMMIT={commit()} {limit} python3 -m bench.run_gpu {run}'


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def test_command() -> tuple[str, ...]:
    """All tests that use a GPU.  With xdist by several processes, which also compile the kernels side by side."""
    workers = ("-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal")
    alone = () if importlib.util.find_spec("xdist") or any(CARRIED.glob("*/pytest_xdist*")) else ("-p", "no:xdist")
    limit = ("--timeout", f"{100 * patience():.0f}") if importlib.util.find_spec("pytest_timeout") else ()
    chosen = ("-m", "gpu or device", "--durations", "15")
    return python("-m", "pytest", "-q", "-p", "tests.record", *chosen, *limit, *(alone or workers))


def memcheck_command() -> tuple[str, ...]:
    """Small kernel tests under NVIDIA's compute-sanitizer: reads and writes outside what was allocated."""
    tests = ("tests/test_kernels_select.py", "tests/test_kernels_draw.py")
    chosen = ("-k", "not full_size and not many_rows and not larger", "-p", "no:cacheprovider")
    checker = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1")
    return (*checker, *python("-m", "pytest", "-q", "-x", "-m", "device", *chosen, *tests))


def bench_command(module: str, seconds: float, out: Path, *flags: str) -> tuple[str, ...]:
    until = max(1.0, seconds - CASE) * patience()
    return python("-m", module, "--seconds", f"{until:.0f}", "--out", str(out), "--resume", *flags)


def first(folder: Path) -> list[Part]:
    kernels, decode = folder / "kernels.json", folder / "decode.json"
    return [
        Part("unpack", unpack_command(), 30),
        Part("tests", test_command(), 130),
        Part("kernels", bench_command("bench.bench_kernels", 140, kernels), 140, again=True),
        Part("counters", python("-m", "bench.counters", str(folder)), 60),
        Part("decode", bench_command("bench.bench_decode", 120, decode), 120),
    ]


def second(folder: Path) -> list[Part]:
    """bench/results holds the first run's files by then; what they have is left out."""
    kernels, decode = folder / "kernels.json", folder / "decode.json"
    done = {
        kind: [f"--done={path}" for path in sorted(RESULTS.glob(f"*{kind}*.json"))] for kind in ("kernels", "decode")
    }
    return [
        Part("unpack", unpack_command(), 40),
        memcheck()[0],
        Part("kernels", bench_command("bench.bench_kernels", 130, kernels, *done["kernels"]), 130, again=True),
        Part("decode", bench_command("bench.bench_decode", 220, decode, "--peers", *done["decode"]), 220),
    ]


def memcheck(folder: Path | None = None) -> list[Part]:
    more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "KERNEL_EXAMPLES": "5"}
    return [Part("memcheck", memcheck_command(), 90, environment=more)]


def quality(folder: Path) -> list[Part]:
    work, workers = ROOT / "bench" / "out" / "quality", min(6, os.cpu_count() or 1)
    size = ("--study", "quick", "--problems", "2", "--seeds", "1", "--ks", "2")
    if not dry_by_environment():
        size = ("--study", "main", "--problems", "64", "--seeds", "3", "--ks", "1,4,16")
    study = ("run", "--out", str(work), "--pool", "report", *size, "--device", "cuda", "--workers", str(workers))
    pack = f"import shutil; shutil.make_archive({str(folder / 'quality')!r}, 'gztar', {str(work)!r})"
    return [
        Part("unpack", unpack_command(), 40),
        Part("quality", python("-m", "bench.passk", *study), 240),
        Part("pack", python("-c", pack), 30),
    ]


RUNS = {"first": first, "second": second, "quality": quality, "memcheck": memcheck}


def unpack_command() -> tuple[str, ...]:
    """Packages that the machine lacks; nothing is fetched."""
    if not CARRIED.exists():
        return python("-c", "print('nothing was carried')")
    return python("-m", "bench.carry", "unpack", str(CARRIED), str(SITE))


def environment(folder: Path) -> dict[str, str]:
    """Compiled kernels, one cache for all processes; carried packages; no tool reaches for the network."""
    path = [str(ROOT), str(SITE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    result = {
        "TRITON_CACHE_DIR": str(ROOT / ".triton"),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "ESAMP_BENCH_OUT": str(folder),
        "ESAMP_TEST_RECORD": str(folder / "tests.jsonl"),
    }
    result.pop("TRITON_INTERPRET", None)
    return result


def patience() -> float:
    """How many times their time the parts may take: a rehearsal without a GPU is slower."""
    return float(os.environ.get("ESAMP_BENCH_PATIENCE", "1"))


def run_part(part: Part, left: float, folder: Path) -> Outcome:
    """Run a program, its output at the end of the log; stopped, with all that it started, at its limit."""
    start = time.monotonic()
    end = start + min(part.seconds * patience(), left)
    state = "no time left"
    while end - time.monotonic() > 1:
        with (folder / "run.log").open("a") as log:
            print(f"\n==> {part.name}: {' '.join(part.command)}", file=log, flush=True)
            try:
                process = subprocess.Popen(
                    part.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    env=environment(folder) | part.environment,
                )  # fmt: skip
            except OSError as error:
                print(error, file=log)
                state, code = "failed", 127
                break
            try:
                code = process.wait(end - time.monotonic())
                state = "ok" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                state = "out of time"
        if not (part.again and state == "failed" and code == bench_kernels.AGAIN):
            break
    outcome = Outcome(part.name, state, time.monotonic() - start)
    print(f"==> {outcome.name}: {outcome.state}, {outcome.seconds:.0f} s", flush=True)
    return outcome


def tests_summary() -> str:
    found = recorded_tests()
    if found is None:
        return "tests: none ran"
    end = "" if found["finished"] else "; they did not finish"
    lines = [f"tests: {found['passed']} passed, {len(found['failed'])} failed{end}"]
    return "\n".join(lines + [f"  FAILED {test}" for test in found["failed"][:40]])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=RUNS)
    name = parser.parse_args(arguments).run
    if not torch.cuda.is_available():
        print("no GPU that PyTorch can use; `make rehearse-gpu` runs the same commands on a CPU")
        return 2
    start, folder = time.monotonic(), output_folder()
    for stale in ("tests.jsonl", "kernels.json", "decode.json", "run.log", "counters.csv", "source.csv"):
        (folder / stale).unlink(missing_ok=True)
    os.environ["ESAMP_TEST_RECORD"] = str(folder / "tests.jsonl")
    total = TOTAL * patience()
    outcomes = [run_part(part, total - (time.monotonic() - start), folder) for part in RUNS[name](folder)]
    if (folder / "tests.jsonl").exists():
        print(f"\n{tests_summary()}")
    tables = (("kernels.json", bench_kernels.short_table), ("decode.json", bench_decode.short_table))
    for file, table in tables:
        if (folder / file).exists():
            body = load(folder / file)
            print(f"\n{table(body)}")
            if body["skipped"]:
                print(f"not run, out of time: {', '.join(body['skipped'])}")
    for outcome in outcomes:
        if outcome.state != "ok":
            print(f"{outcome.state.upper()}: {outcome.name}; see run.log")
    print(f"\nresults in {folder}; {time.monotonic() - start:.0f} s")
    return int(any(outcome.state == "failed" for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
