"""All of it in one go: correctness tests, kernels, decode; JSON and logs in ESAMP_BENCH_OUT; a short table last.

    python -m bench.run_gpu [--dry]        (make bench-gpu, make bench-gpu DRY=1)

Within 9 minutes on one GPU.  Red tests mean no number: nothing is measured then.  If the tests do not finish in their
time without having failed, the kernels are checked against the reference case by case instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import bench_decode, bench_kernels
from bench.results import ROOT, load, output_folder

TOTAL = 530.0  # seconds for everything
TESTS = 160.0
KERNELS = 180.0
CASE = 50.0  # the longest single case; none is started later than this before a part's end
GPU_TESTS = ("kernels_gpu", "kernels_select", "kernels_draw", "kernels_distiller", "kernels_ops")
DRY_TESTS = ("kernels_gpu",)  # all skipped without a GPU, and then the measurements' own face to pytest


class Part(NamedTuple):
    name: str
    state: str  # "ok", "failed", "out of time"
    seconds: float


def run_part(name: str, command: Sequence[str], limit: float, folder: Path) -> Part:
    """Run a program with its output in a log; stopped, with all that it started, at the limit."""
    start = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
        )
        try:
            state = "ok" if process.wait(max(1.0, limit)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            state = "out of time"
    part = Part(name, state, time.monotonic() - start)
    print(f"==> {name}: {state}, {part.seconds:.0f} s", flush=True)
    return part


def environment() -> dict[str, str]:
    """Compiled kernels where there is a GPU; no tool reaches for the network."""
    result = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if torch.cuda.is_available():
        result.pop("TRITON_INTERPRET", None)
    return result


def test_command(dry: bool) -> list[str]:
    names = DRY_TESTS if dry else GPU_TESTS
    files = [f"tests/test_{name}.py" for name in names] + (["bench/speed_pytest.py"] if dry else [])
    workers = ["-n", "6"] if not dry and importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "-x", *workers, *files]


def bench_command(module: str, dry: bool, tested: bool, limit: float, out: Path) -> list[str]:
    flags = ["--dry"] if dry else []
    flags += ["--tested"] if tested else []
    return [sys.executable, "-m", module, *flags, "--seconds", f"{max(1.0, limit - CASE):.0f}", "--out", str(out)]


def tail(path: Path, lines: int) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, no times kept")
    dry = parser.parse_args(arguments).dry
    if not dry and not torch.cuda.is_available():
        print("no GPU that PyTorch can use; DRY=1 runs the same code on the CPU")
        return 2
    start, folder = time.monotonic(), output_folder()
    tests = run_part("tests", test_command(dry), TESTS, folder)
    if tests.state == "failed":
        print(tail(folder / "tests.log", 40))
        print("no number while the correctness tests fail")
        return 1
    kernels_out, decode_out = folder / "kernels.json", folder / "decode.json"
    for stale in (kernels_out, decode_out):
        stale.unlink(missing_ok=True)
    # A dry run checks its cases too, so that the checking itself is exercised.
    tested = tests.state == "ok" and not dry
    command = bench_command("bench.bench_kernels", dry, tested, KERNELS, kernels_out)
    parts = [tests, run_part("kernels", command, KERNELS, folder)]
    left = TOTAL - (time.monotonic() - start)
    command = bench_command("bench.bench_decode", dry, False, left, decode_out)
    parts.append(run_part("decode", command, left, folder))

    for part, out, table in zip(
        parts[1:], (kernels_out, decode_out), (bench_kernels.short_table, bench_decode.short_table), strict=True
    ):
        if part.state != "ok":
            print(tail(folder / f"{part.name}.log", 15))
        if out.exists():
            body = load(out)
            print(f"\n{table(body)}")
            if body["skipped"]:
                print(f"not run, out of time: {', '.join(body['skipped'])}")
    print(f"\nresults and logs in {folder}; {time.monotonic() - start:.0f} s{'; dry: no times' if dry else ''}")
    # What was measured before the time ran out stands; what failed does not.
    return int(any(part.state == "failed" for part in parts[1:]) or not (kernels_out.exists() and decode_out.exists()))


if __name__ == "__main__":
    raise SystemExit(main())
