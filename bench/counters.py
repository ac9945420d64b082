"""What the hardware counts in every kernel, by NVIDIA's ncu: python -m bench.counters FOLDER

    counters.csv  each launch: time, the busiest unit's share, bytes, warps, registers, why warps wait
    source.csv    each machine instruction of the kernel that reads the vocabulary: how often it ran, who waited at it

The program that is looked at is `python -m bench.bench_kernels --check CASE`: one case of sampling, one of a Distiller.
Times under ncu are those of a kernel alone, each launch from a cold cache; clocks are left as they are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.bench_kernels import dry_cases
from bench.cases import DistillerCase, SamplingCase, kernel_cases
from bench.results import ROOT, dry_by_environment

SECTIONS = (
    "SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "InstructionStats",
    "MemoryWorkloadAnalysis", "SourceCounters",
)  # fmt: skip
LAUNCHES = {SamplingCase: 30, DistillerCase: 16}  # enough that each kernel is among them
SCAN = "_block_max_kernel"


def profile_command(case: str, launches: int, report: Path, dry: bool) -> list[str]:
    sections = [word for name in SECTIONS for word in ("--section", name)]
    chosen = ["--kernel-name", "regex:^_.*_kernel$", "--launch-count", str(launches), "--clock-control", "none"]
    check = [sys.executable, "-m", "bench.bench_kernels", *(["--dry"] if dry else []), "--check", case]
    return ["ncu", "--force-overwrite", "--export", str(report), *sections, *chosen, *check]


def pages(report: Path) -> dict[str, list[str]]:
    """The commands that print what a report holds, by the file they fill."""
    read = ["ncu", "--import", str(report), "--csv", "--print-units", "base"]
    source = ["--page", "source", "--print-source", "sass", "--kernel-name", f"regex:^{SCAN}$", "--launch-count", "1"]
    return {"counters.csv": [*read, "--page", "details"], "source.csv": [*read, *source]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder, dry = parser.parse_args(arguments).folder, dry_by_environment()
    cases = dry_cases() if dry else kernel_cases(quick=True)
    with tempfile.TemporaryDirectory() as temporary:
        for kind, launches in LAUNCHES.items():
            case, report = next(case for case in cases if isinstance(case, kind)), Path(temporary) / "kernels.ncu-rep"
            subprocess.run(profile_command(case.name, launches, report, dry), cwd=ROOT, check=True)
            for name, command in pages(report).items():
                if name == "source.csv" and kind is not SamplingCase:
                    continue
                printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                with (folder / name).open("a", encoding="utf-8") as file:
                    file.write(f"# {case.name}\n{printed}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
