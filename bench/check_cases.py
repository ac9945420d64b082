"""Are the answers right on this device?  Every case in a process of its own, several at a time.

Each process runs all that will be timed once, and compares with the reference: so the kernels are compiled into the
cache that all processes share, and a case that breaks the device breaks it for itself alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from bench.kernel_ops import Case, check, ops
from bench.results import ROOT

PROCESSES = 16  # at most; each holds a few GB of the device for a moment


def check_one(case: Case, device: str) -> int:
    """Prints what is wrong; exit status 1 if something is."""
    with torch.no_grad():
        for given in ops(case, device)[0].values():
            given[0]()
        wrong = check(case, device)
    print(wrong or "right")
    return int(wrong is not None)


def check_all(names: Sequence[str], dry: bool, seconds: float) -> dict[str, str | None]:
    """By case: what is wrong, None if nothing.  What is not finished after so many seconds counts as wrong."""
    end = time.monotonic() + seconds
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def work(name: str) -> str | None:
        command = [sys.executable, "-m", "bench.bench_kernels", *(["--dry"] if dry else []), "--check", name]
        left = end - time.monotonic()
        try:
            if left < 1:
                raise subprocess.TimeoutExpired(command, seconds)
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            return f"not checked within {seconds:.0f} s"
        if done.returncode == 0:
            return None
        said = (done.stdout + done.stderr).strip().splitlines()
        return said[-1][:300] if said else f"exit status {done.returncode}"

    start = time.monotonic()
    with ThreadPoolExecutor(max(1, min(PROCESSES, os.cpu_count() or 1, len(names)))) as pool:
        found = dict(zip(names, pool.map(work, names), strict=True))
    for name, wrong in found.items():
        if wrong is not None:
            print(f"WRONG {name}: {wrong}", flush=True)
    print(f"{time.monotonic() - start:6.1f} s  {len(names)} cases checked", flush=True)
    return found
