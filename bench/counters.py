"""What the hardware counts in every kernel, by NVIDIA's ncu: python -m bench.counters FOLDER

    counters.csv  each launch: time, the busiest unit's share, bytes, warps, registers, why warps wait
    source.csv    each machine instruction of the kernel that reads the vocabulary: how often it ran, who waited at it

The program that is looked at is this one with --one CASE: a step of one case of sampling, and of one of a Distiller,
once, after it was compiled.  A counted launch costs about two seconds.  Times under ncu are those of a kernel alone,
each launch from a cold cache; clocks are left as they are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.bench_kernels import dry_cases
from bench.cases import DistillerCase, SamplingCase, kernel_cases
from bench.kernel_ops import Case, ops
from bench.results import ROOT, dry_by_environment, output_folder

SECTIONS = (
    "SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "InstructionStats",
    "MemoryWorkloadAnalysis", "SourceCounters",
)  # fmt: skip
CALLS = {SamplingCase: ("explore",), DistillerCase: ("distiller_forward", "gauge_", "distiller_step_")}
SCAN = "_block_max_kernel"


def profile_command(case: str, report: Path) -> list[str]:
    sections = [word for name in SECTIONS for word in ("--section", name)]
    chosen = ["--profile-from-start", "off", "--kernel-name", "regex:^_.*_kernel$", "--clock-control", "none"]
    program = [sys.executable, "-m", "bench.counters", "--one", case]
    return ["ncu", "--force-overwrite", "--export", str(report), *sections, *chosen, *program]


def run_one(case: Case, device: str) -> None:
    """What is counted: the case's calls, between two marks for the profiler."""
    calls, _ = ops(case, device)
    chosen = [calls[name][0] for name in CALLS[type(case)]]
    for call in chosen:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in chosen:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def pages(report: Path) -> dict[str, list[str]]:
    """The commands that print what a report holds, by the file they fill."""
    read = ["ncu", "--import", str(report), "--csv", "--print-units", "base"]
    source = ["--page", "source", "--print-source", "sass", "--kernel-name", f"regex:^{SCAN}$", "--launch-count", "1"]
    return {"counters.csv": [*read, "--page", "details"], "source.csv": [*read, *source]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="default ESAMP_BENCH_OUT or bench/out")
    parser.add_argument("--one", metavar="CASE", help="only run this case, as the program that ncu looks at")
    a = parser.parse_args(arguments)
    folder, cases = a.folder or output_folder(), dry_cases() if dry_by_environment() else kernel_cases(quick=True)
    if a.one is not None:
        with torch.no_grad():
            run_one(next(case for case in cases if case.name == a.one), "cuda")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        for kind in CALLS:
            case, report = next(case for case in cases if isinstance(case, kind)), Path(temporary) / "kernels.ncu-rep"
            subprocess.run(profile_command(case.name, report), cwd=ROOT, check=True)
            for name, command in pages(report).items():
                if name == "source.csv" and kind is not SamplingCase:
                    continue
                printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                with (folder / name).open("a", encoding="utf-8") as file:
                    file.write(f"# {case.name}\n{printed}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
