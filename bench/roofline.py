"""What decides the kernels' speed, without a GPU: python -m bench.roofline (make roofline)

The launchers of one exploratory step and one Distiller step compile for sm_90 and launch nothing.  From each kernel's
machine code come registers, shared memory, how many of its programs (CTAs) a multiprocessor holds, and a warp's
instructions; from the case come its programs and the bytes that it must move.

    issue    the busiest of a scheduler's pipes, all programs spread over all schedulers
    bytes    at the bandwidth that a large copy reaches
    latency  a program's dependent trips to memory and its warps' instructions, DEPENDENT cycles each, as often as
             programs take turns: what counts where too few programs are there to hide it, or many leave at once
    time     one launch of a replayed graph, issue, and the larger of the other two: too few programs are resident for
             one to issue while another waits

LAUNCH, MEMORY, IDLE and DEPENDENT, and that sum, are what fits the kernels' times on an H200: bench/NOTES.md has them
side by side.  Exit status 1 if a kernel exceeds one of its limits: they lie about 5 % above the larger count of two
versions of Triton, 3.6 and 3.9, so that nothing becomes slower unnoticed.
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
LAUNCH, MEMORY = 1.0e-6, 0.6e-6  # seconds: a launch in a replayed graph, a trip to memory
IDLE = 0.3e-6  # a program that leaves at once
DEPENDENT = 2  # cycles per instruction of a warp alone: tiles are several independent elements per thread
NOTES, START, END = ROOT / "bench" / "NOTES.md", "<!-- roofline: made by `make roofline` -->", "<!-- /roofline -->"
TOP_P = "weight = tl.where(x == top, 1.0, tl.exp(scale(x, t) - scale(top, t)))"


@dataclass(frozen=True)
class Most:
    """What a kernel may have."""

    instructions: int  # of a warp
    registers: int  # of a thread
    micros: float  # on an H100


LIMITS = {
    "block_max no top-p": Most(600, 94, 51.9),
    "block_max top-p": Most(1160, 94, 89.0),
    "block_max float32 no top-p": Most(200, 49, 45.7),
    "block_max float32 top-p": Most(550, 49, 74.1),
    "select": Most(6090, 246, 19.7),
    "finalise": Most(2640, 68, 8.0),
    "beyond no row flagged": Most(12, 164, 1.4),
    "score": Most(1230, 84, 24.1),
    "tail no row capped": Most(14, 150, 9.1),
    "draw": Most(1150, 52, 4.9),
    "project": Most(2330, 176, 9.3),
    "reduce": Most(320, 32, 3.8),
    "expand": Most(1070, 133, 11.7),
    "norm": Most(350, 51, 3.8),
    "mix": Most(590, 48, 5.0),
    "error": Most(990, 95, 5.9),
    "compare": Most(580, 67, 5.6),
    "judge": Most(460, 43, 5.4),
    "back": Most(1500, 132, 7.2),
    "gates": Most(310, 34, 3.8),
    "settle": Most(340, 34, 4.2),
    "update": Most(1470, 179, 24.5),
}


@dataclass(frozen=True)
class Way:
    """How a kernel is run through: see sass.count."""

    kernel: str
    bytes: float
    trips: int  # to memory that wait for one another, of a program
    loops: tuple[tuple[str, float], ...] = ()
    through: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    note: str = ""
    step: str = "explore"  # the launch belongs to it; "" for a variant that stands beside
    working: int | None = None  # programs that do not leave at once; default all

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.note}".strip()


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
    def waves(self) -> float:
        """How often programs take turns on the card."""
        return self.programs / (MULTIPROCESSORS * self.resident)

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
        return turns * alone + idle_turns * IDLE

    def seconds(self, card: str) -> float:
        return LAUNCH + self.issue + max(self.latency, self.way.bytes / BANDWIDTH[card])

    def faults(self, most: Most) -> list[str]:
        found = [f"{self.spills} bytes spilled"] if self.spills else []
        for what, value, limit in (
            ("instructions", self.counts.instructions, most.instructions),
            ("registers", self.registers, most.registers),
            ("µs on an H100", self.seconds("H100") * 1e6, most.micros),
        ):
            found += [f"{value:.4g} {what}, {limit} at most"] if value > limit else []
        return [f"{self.way.name}: {fault}" for fault in found]


def ways() -> list[Way]:
    """A step with top-p, and of what stands beside it the scan without; all rows explore and teach."""
    config = config_for(TARGET, VOCAB, HIDDEN, WIDTH, 2)
    layout, rows, weights = Layout.of(VOCAB, config), ROWS, float(DISTILLER.weight_bytes)
    scan, maxima, state = 2.0 * rows * VOCAB, 4.0 * rows * layout.blocks, 4.0 * DISTILLER.rows * HIDDEN
    near = 2.0 * rows * TOP_K * layout.block  # blocks that hold candidates
    gather = "_gather: while start < listed"
    gathered = (gather, -(-TOP_K * layout.block // config.select_elements))
    refine = (("_count: while start < listed", 0), ("_select_kernel: while low < high", 0), (gather, 0))
    listing = 12.0 * rows * WIDTH
    tiles = config.distiller_split // config.distiller_hidden
    scored = rows * -(-TOP_K // config.score_candidates)
    parts = ("_score_kernel: for start in range(0, H, HIDDEN)", HIDDEN // config.score_hidden)
    split, group = "for start in range(0, SPLIT, HIDDEN)", ("group_of: while start < num_groups", 1)
    pieces = ("_compare_kernel: for start in range(0, H, WIDE)", -(-HIDDEN // 2048))
    rest = "if position >= tl.load(offsets_ptr + num_groups)"
    capped = "if ((status & CAPPED) != 0) &"
    no_mass = ("_block_max_kernel: if tl.load(top_p_ptr + row) < 1.0", "scale", "filter_temperature")
    return [
        Way("block_max", scan, 1, without=no_mass, note="no top-p", step=""),
        Way("block_max", scan, 1, through=(TOP_P,), note="top-p"),
        Way("block_max float32", 2 * scan, 1, without=no_mass, note="no top-p", step=""),
        Way("block_max float32", 2 * scan, 1, through=(TOP_P,), note="top-p", step=""),
        Way(
            "select",
            maxima + near,
            6,
            loops=(gathered, *refine),
            through=("enough = tl.sum((bits >= probe)", "tl.store(mass_ptr"),
            without=("_select_kernel: if n > SORT",),
        ),
        Way(
            "finalise",
            listing,
            3,
            through=("kept_n = tl.sum((in_set", "tl.store(count_ptr + row, count"),
            without=("_finalise_kernel: if n == 0", "_finalise_kernel: if n > SORT"),
        ),
        Way("beyond", 0.0, 1, note="no row flagged", working=0),
        Way("score", scored * config.score_candidates * HIDDEN * 2.0, 4, loops=(parts,), working=scored),
        Way("tail", 0.0, 1, note="no row capped", working=0),
        Way(
            "draw",
            listing,
            3,
            through=("perturbed = ",),
            without=(
                "_draw_kernel: if tl.load(count_ptr + row) == 0",
                "_draw_kernel: if has_tail",
                "log_sum",
                f"reweight: {capped} (temperature > 0.0)",
                "_log_sum_exp",
                "_top",
            ),
        ),
        Way(
            "project",
            weights * 2 / 3,
            4,
            through=("tl.store(part_square_ptr",),
            step="forward",
            loops=((f"_project_kernel: {split}", tiles), ("_project_kernel: while at < end", 1)),
        ),
        Way("reduce", state, 3, loops=(group,), without=(f"_reduce_kernel: {rest}",), step="forward"),
        Way(
            "expand",
            weights / 3 + state,
            3,
            loops=(("_expand_kernel: while at < end", 1),),
            step="forward",
        ),
        Way("norm", 2 * state, 3, loops=(group,), step="forward"),
        # Of an engine that mixes: it takes norm's place, and reads and writes a bfloat16 state.
        Way(
            "mix",
            2 * state,
            4,
            loops=(group,),
            without=("copy_row", "_mix_kernel: if bad > 0"),
            step="",
        ),
        Way("compare", 3 * state, 5, loops=(group, pieces), step="gauge"),
        Way(
            "judge",
            state,
            5,
            loops=(("_judge_kernel: while at < end", 1),),
            through=("tl.store(trust_ptr + slot",),
            step="gauge",
            without=("_judge_kernel: if slot < 0", "_judge_kernel: if count == 0"),
        ),
        Way("error", 4 * state, 4, loops=(group,), step="step"),
        Way(
            "back",
            weights / 3 + state,
            4,
            step="step",
            loops=((f"_back_kernel: {split}", tiles), ("_back_kernel: while at < end", 1)),
        ),
        Way(
            "gates",
            0.0,
            3,
            through=("d_gate = ",),
            step="step",
            without=(
                f"_gates_kernel: {rest}",
                "_gates_kernel: if tl.load(teach_ptr + row) == 0.0",
                "_gates_kernel: if tl.sum(bad, 0) > 0",
            ),
        ),
        Way(
            "settle",
            0.0,
            4,
            loops=(("_settle_kernel: while at < end", 1),) * 2,
            step="step",
            without=(
                "_settle_kernel: if slot < 0",
                "_settle_kernel: if updates == 0",
                "_settle_kernel: else of if (loss <= FLOAT_MAX) & (loss >= 0.0)",
            ),
        ),
        Way(
            "update",
            2 * weights + 3 * state,
            4,
            loops=(("_update_kernel: while at < end", 1),) * 2,
            step="step",
        ),
    ]


def launches() -> dict[str, compile_only.Launch]:
    """What one exploratory step and one Distiller forward and step launch."""
    from bench import compile_only  # turns Triton's interpreter off, for this process
    from esamp_core.kernels.sampling import block_max, ops

    with compile_only.compiling(TARGET) as found:
        new = torch.empty
        one, number = new(ROWS), new(ROWS, dtype=torch.int64)
        ops.explore_triton(
            logits=new(ROWS, VOCAB, dtype=torch.bfloat16), temperature=one, top_k=number, top_p=one, min_p=one,
            beta=one, seed=number, position=number, codes=None, active=None, model_logits=None,
            direction=new(ROWS, HIDDEN), weight=new(VOCAB, HIDDEN, dtype=torch.bfloat16), bias=None, center=None,
            head_scale=1.0, softcap=None, clip=None, first_id=0, model_weight=1.0, neutral=False, width=WIDTH,
            vllm=False,
        )  # fmt: skip
    with compile_only.compiling(TARGET) as learned:
        case = compile_only.DistillerCase(
            TARGET, HIDDEN, DISTILLER.rank, torch.float32, extras=False, rows=DISTILLER.rows, slots=DISTILLER.slots
        )
        compile_only.launch_distiller(case)
    with compile_only.compiling(TARGET) as scanned:
        config = config_for(TARGET, VOCAB, HIDDEN, WIDTH, 4)
        block_max.block_max_triton(new(ROWS, VOCAB), one, one, None, config, log_sum=False)
    single = {"block_max float32": scanned[0]}
    return {launch.name: launch for launch in (*found, *learned)} | single


def rows_of(found: dict[str, compile_only.Launch], table: Sequence[Way]) -> list[Row]:
    from bench import compile_only

    folder = ROOT / "kernels"
    sources = {path.name: path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    rows = []
    for way in table:
        kernel: Any = found[way.kernel].kernel
        registers, spills = compile_only.resources(TARGET, kernel)
        try:
            without = None if way.working == 0 else way.without
            counts = sass.count(kernel.asm["cubin"], sources, way.loops, way.through, without)
        except sass.UnknownCode as error:
            raise SystemExit(f"{way.name}: {error}") from error
        grid = found[way.kernel].grid
        rows.append(Row(way, grid, 32 * kernel.metadata.num_warps, registers, kernel.metadata.shared, spills, counts))
    return rows


def cells(row: Row) -> list[str]:
    logits = ROWS * VOCAB if row.way.kernel.startswith("block_max") else 0
    per_logit = row.counts.instructions * row.programs * row.threads / logits if logits else None
    times = (row.issue, row.latency, *(row.way.bytes / b for b in BANDWIDTH.values()), *map(row.seconds, BANDWIDTH))
    return [
        row.way.name,
        "x".join(map(str, row.grid)),
        *map(str, (row.threads, row.registers, row.shared, row.resident)),
        f"{row.waves:.1f}",
        str(row.spills),
        f"{row.counts.instructions:.0f}",
        "" if per_logit is None else f"{per_logit:.1f}",
        *(f"{time * 1e6:.1f}" for time in times),
    ]


HEAD = [
    "kernel", "programs", "threads", "registers", "shared", "per SM", "waves", "spills", "instructions", "per logit",
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
    faults = [fault for row in rows for fault in row.faults(LIMITS[row.way.name])]
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
