"""What decides the kernels' speed, before any GPU is seen: python -m bench.roofline (make roofline)

The launchers of one exploratory step and one Distiller step compile for sm_90 and launch nothing.  From each kernel's
machine code come registers, shared memory, how many of its programs (CTAs) a multiprocessor holds, and a warp's
instructions; from the case come its programs and the bytes that it must move.

    issue    the busiest of a scheduler's pipes, all programs spread over all schedulers
    bytes    at the bandwidth that a large copy reaches
    latency  a program's dependent trips to memory and its warps' instructions, DEPENDENT cycles each, as often as
             programs take turns: what counts where too few programs are there to hide it, or many leave at once
    time     one launch of a replayed graph, and the largest of the three

LAUNCH, MEMORY and DEPENDENT are estimates that a card has to confirm.  Exit status 1 if a kernel exceeds one of its
limits: they lie about 5 % above what was counted last, so that nothing becomes slower unnoticed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bench import sass
from bench.cases import QWEN_7B, DistillerCase
from bench.results import ROOT
from esamp_core.kernels.tuning import Layout, config_for

if TYPE_CHECKING:
    from bench import compile_only

TARGET = "sm_90"
ROWS, VOCAB, HIDDEN, TOP_K, WIDTH = 128, 151_936, 3584, 50, 256
DISTILLER = DistillerCase(QWEN_7B, 8, 16)
MULTIPROCESSORS, CLOCK = 132, 1.755e9  # H100 SXM and H200, boost
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  # bytes per second, read and written, of a large copy
LAUNCH, MEMORY = 2.5e-6, 0.6e-6  # seconds: a launch in a replayed graph, a trip to memory
DEPENDENT = 2  # cycles per instruction of a warp alone: tiles are several independent elements per thread
NOTES, START, END = ROOT / "bench" / "NOTES.md", "<!-- roofline: made by `make roofline` -->", "<!-- /roofline -->"
TOP_P = "weight = tl.where(x == top, 1.0, tl.exp(scale(x, t) - scale(top, t)))"


@dataclass(frozen=True)
class Way:
    """How a kernel is run through: see sass.count; and the most that it may have."""

    kernel: str
    bytes: float
    instructions: int  # of a warp, at most
    registers: int  # of a thread, at most
    trips: int  # to memory that wait for one another, of a program
    loops: tuple[float, ...] = ()
    through: tuple[str, ...] = ()
    note: str = ""
    step: str = "explore"  # the launch belongs to it; "" for a variant that stands beside
    working: int | None = None  # programs that do not leave at once; default all


@dataclass(frozen=True)
class Row:
    way: Way
    grid: tuple[int, ...]
    threads: int
    registers: int
    shared: int
    spills: int
    counts: sass.Counts

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def working(self) -> int:
        return self.programs if self.way.working is None else self.way.working

    @property
    def resident(self) -> int:
        return sass.programs_at_once(TARGET, self.threads, self.registers, self.shared)

    @property
    def issue(self) -> float:
        """Seconds."""
        fullest = math.ceil(self.working / MULTIPROCESSORS)  # programs of the busiest multiprocessor
        return fullest * self.threads / 32 * self.counts.busiest / (4 * CLOCK)

    @property
    def latency(self) -> float:
        at_once = MULTIPROCESSORS * self.resident
        turns, idle_turns = math.ceil(self.working / at_once), math.ceil((self.programs - self.working) / at_once)
        alone = self.counts.instructions * DEPENDENT / CLOCK + self.way.trips * MEMORY
        return turns * alone + idle_turns * MEMORY

    def seconds(self, card: str) -> float:
        return LAUNCH + max(self.issue, self.latency, self.way.bytes / BANDWIDTH[card])

    def faults(self) -> list[str]:
        found = [f"{self.spills} bytes spilled"] if self.spills else []
        for what, value, most in (
            ("instructions", self.counts.instructions, self.way.instructions),
            ("registers", self.registers, self.way.registers),
        ):
            found += [f"{value:.0f} {what}, {most} at most"] if value > most else []
        return [f"{self.way.kernel} {self.way.note}: {fault}" for fault in found]


def ways() -> list[Way]:
    config = config_for(TARGET, VOCAB, HIDDEN, WIDTH, 2)
    layout, rows, weights = Layout.of(VOCAB, config), ROWS, float(DISTILLER.weight_bytes)
    scan, maxima, state = 2.0 * rows * VOCAB, 4.0 * rows * layout.blocks, 4.0 * DISTILLER.rows * HIDDEN
    near = 2.0 * rows * TOP_K * layout.block  # blocks that hold candidates
    gather = -(-TOP_K * layout.block // config.select_elements)
    listing = 12.0 * rows * WIDTH
    tiles = config.distiller_split // config.distiller_hidden
    scored = rows * -(-TOP_K // config.score_candidates)
    parts = HIDDEN // config.score_hidden
    return [
        Way("block_max", scan, 564, 90, 1, note="no top-p", step=""),
        Way("block_max", scan, 1150, 90, 1, through=(TOP_P,), note="top-p"),
        Way("select", maxima + near, 4520, 246, 6, loops=(gather, 0, 0, 0)),
        Way("finalise", listing, 1860, 67, 3, through=("in_set = present & (keys >= kth)",)),
        Way("beyond", 0.0, 12, 164, 1, loops=(0,) * 13, note="no row flagged", working=0),
        Way("score", scored * config.score_candidates * HIDDEN * 2.0, 1200, 84, 4, loops=(parts,), working=scored),
        Way("tail", 0.0, 14, 145, 1, note="no row capped", working=0),
        Way("draw", listing, 1100, 47, 3, through=("perturbed = ",)),
        Way("project", weights * 2 / 3, 2300, 175, 4, loops=(tiles, 1), step="forward"),
        Way("reduce", state, 313, 31, 3, loops=(1,), step="forward"),
        Way("expand", weights / 3 + state, 1065, 133, 3, loops=(1,), step="forward"),
        Way("norm", 2 * state, 347, 49, 3, loops=(1,), step="forward"),
        Way("error", 4 * state, 985, 84, 4, loops=(1,), step="step"),
        Way("back", weights / 3 + state, 1500, 132, 4, loops=(tiles, 1), step="step"),
        Way("gates", 0.0, 305, 34, 3, through=("d_gate = ",), step="step"),
        Way("settle", 0.0, 333, 34, 4, loops=(1, 1), step="step"),
        Way("update", 2 * weights + 3 * state, 1430, 175, 4, loops=(1, 1), step="step"),
    ]


def launches() -> dict[str, compile_only.Launch]:
    """What one exploratory step and one Distiller forward and step launch."""
    from bench import compile_only  # turns Triton's interpreter off, for this process
    from esamp_core.kernels import explore

    with compile_only.compiling(TARGET) as found:
        new = torch.empty
        one, number = new(ROWS), new(ROWS, dtype=torch.int64)
        explore.explore_triton(
            new(ROWS, VOCAB, dtype=torch.bfloat16), one, number, one, one, one, number, number, None, None, None,
            new(ROWS, HIDDEN), new(VOCAB, HIDDEN, dtype=torch.bfloat16), None, None, 1.0, None, None, 0, 1.0, WIDTH,
            False, config_for(TARGET, VOCAB, HIDDEN, WIDTH, 2),
        )  # fmt: skip
    with compile_only.compiling(TARGET) as learned:
        case = compile_only.DistillerCase(
            TARGET, HIDDEN, DISTILLER.rank, torch.float32, extras=False, rows=DISTILLER.rows, slots=DISTILLER.slots
        )
        compile_only.launch_distiller(case)
    return {launch.name: launch for launch in (*found, *learned)}


def rows_of(found: dict[str, compile_only.Launch], table: Sequence[Way]) -> list[Row]:
    from bench import compile_only

    folder = ROOT / "kernels"
    sources = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    rows = []
    for way in table:
        kernel: Any = found[way.kernel].kernel
        registers, spills = compile_only.resources(TARGET, kernel)
        try:
            counts = sass.count(kernel.asm["cubin"], sources, way.loops, way.through)
        except sass.UnknownCode as error:
            raise SystemExit(f"{way.kernel}: {error}") from error
        grid = found[way.kernel].grid
        rows.append(Row(way, grid, 32 * kernel.metadata.num_warps, registers, kernel.metadata.shared, spills, counts))
    return rows


def cells(row: Row) -> list[str]:
    logits = ROWS * VOCAB if row.way.kernel == "block_max" else 0
    per_logit = row.counts.instructions * row.programs * row.threads / logits if logits else None
    times = (row.issue, row.latency, *(row.way.bytes / b for b in BANDWIDTH.values()), *map(row.seconds, BANDWIDTH))
    return [
        f"{row.way.kernel} {row.way.note}".strip(),
        "x".join(map(str, row.grid)),
        *map(str, (row.threads, row.registers, row.shared, row.resident, row.spills)),
        f"{row.counts.instructions:.0f}",
        "" if per_logit is None else f"{per_logit:.1f}",
        *(f"{time * 1e6:.1f}" for time in times),
    ]


HEAD = [
    "kernel", "programs", "threads", "registers", "shared", "per SM", "spills", "instructions", "per logit",
    "issue", "latency", *(f"bytes {card}" for card in BANDWIDTH), *(f"time {card}" for card in BANDWIDTH),
]  # fmt: skip


def sums(rows: Sequence[Row]) -> list[list[str]]:
    result = []
    for step in dict.fromkeys(row.way.step for row in rows if row.way.step):
        chosen = [row for row in rows if row.way.step == step]
        totals = [f"{sum(row.seconds(card) for row in chosen) * 1e6:.1f}" for card in BANDWIDTH]
        result.append([f"**{step}**: {len(chosen)} launches", *[""] * (len(HEAD) - 3), *totals])
    return result


def markdown(rows: Sequence[Row]) -> str:
    table = [HEAD, ["---"] * len(HEAD), *map(cells, rows), *sums(rows)]
    caption = (
        f"R={ROWS}, V={VOCAB}, H={HIDDEN}, {TOP_K} candidates, r={DISTILLER.rank}, {DISTILLER.slots} slots; bfloat16 "
        f"logits and head, float32 Distillers. Times in µs; instructions are those of a warp."
    )
    return caption + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into bench/NOTES.md")
    parser.add_argument("--check", action="store_true", help="fail if bench/NOTES.md shows another table")
    a = parser.parse_args(arguments)
    rows = rows_of(launches(), ways())
    text = markdown(rows)
    print(text)
    faults = [fault for row in rows for fault in row.faults()]
    before, rest = NOTES.read_text(encoding="utf-8").split(START)
    shown, after = rest.split(END)
    if a.write:
        NOTES.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    elif a.check and shown.strip() != text:
        faults.append("bench/NOTES.md shows another table: make roofline ROOFLINE_ARGS=--write")
    print(*(f"FAULT {fault}" for fault in faults), sep="\n", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
