"""What a compiled kernel executes: its instructions, read with the disassembler that Triton carries.

A kernel's machine code is cut into basic blocks.  A warp's way through them is the shortest one from entry to exit
that passes what it is told to pass (``through``: lines of the source) and runs every loop as often as it is told.  Of
the branches that the compiler made (a division's slow path) the cheaper side counts; subroutines do not.  Of those that
the source makes nothing is left out silently: a line with code, but none of it on the way, must belong to what
``without`` names.

Loops, statements and functions are named "function: header" or "function", as the source has them.  Only the innermost
place of an instruction is used: not every version of Triton says from where a function was inlined.  So calls of one
function are told apart by the order of their code, and a branch whose code is all in functions that others call as
well is not noticed when it is left out; name one of its lines in ``through``.  A loop that the compiler unrolled in
part shows as one loop more, for the rest, unless there is no rest: then it is counted too often.

Rates are those of compute capability 9.0 as commonly stated, not checked against the CUDA C++ Programming Guide's table
(results per clock and multiprocessor) nor on a card: per scheduler, of which a multiprocessor has four, a warp's
instruction takes the cycles below.  Those of tensor cores are worked out from the H100's peak rate.
"""

from __future__ import annotations

import ast
import heapq
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
# Cycles of a scheduler's pipe per warp instruction, and the opcodes (before the first dot) that go through it.
# Lanes per cycle: 32 fma, half of which multiply integers too; 16 integers, logic, comparisons, selects, minima;
# 8 memory, shuffles; 4 special functions, conversions, reductions of a warp.
# Tensor cores, 512 bfloat16 products a cycle: 4 cycles for HMMA, and N / 2 for HGMMA of N columns.
PIPES: dict[str, tuple[int, str]] = {
    "fma": (1, "FADD FMUL FFMA HADD2 HMUL2 HFMA2 IMAD IMUL"),
    "multiply": (2, "IMAD IMUL"),
    "alu": (2, "FMNMX FSEL FSET FSETP FCHK IADD3 IADD IABS IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX ISETP LEA LOP3 LOP "
            "PLOP3 SEL SHF SHL SHR PRMT SGXT BMSK HMNMX2 HSET2 HSETP2 IDP ISCADD MOV P2R R2P VABSDIFF VOTE VOTEU CS2R"),
    # F2FP packs two at a time: 64 lanes a cycle of a multiprocessor, as far as the CUDA guide tells of conversions.
    "pack": (2, "F2FP"),
    "special": (8, "MUFU F2F F2I I2F F2IP I2FP I2IP FRND POPC FLO BREV REDUX"),
    "double": (2, "DADD DMUL DFMA DSETP DMNMX"),
    "tensor": (4, "HMMA IMMA DMMA"),
    "memory": (4, "LDG STG LDS STS LDSM STSM LDGSTS ATOM ATOMG ATOMS RED LDL STL SHFL LD ST UBLKCP UTMALDG"),
}  # fmt: skip
# Only a slot of the scheduler: constants and special registers, control, barriers; and the uniform datapath, U*.
ISSUE_ONLY = (
    "LDC S2R S2UR R2UR BRA BSSY BSYNC BREAK BAR CALL RET EXIT NOP WARPSYNC NANOSLEEP YIELD MEMBAR FENCE ERRBAR CCTL "
    "LDGDEPBAR DEPBAR WARPGROUP ELECT SYNCS ACQBULK PREEXIT"
)
# Bytes of shared memory that one program may use.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str  # with its suffixes
    operands: str
    line: tuple[str, int]  # file name and line of the source, the innermost

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def cycles(self) -> dict[str, float]:
        """By pipe.  Raises UnknownCode if no rate is known."""
        if shape := re.match(r"HGMMA\.\d+x(\d+)x", self.opcode):
            return {"tensor": int(shape[1]) / 2}
        found: dict[str, float] = {}
        for pipe, (cycles, names) in PIPES.items():
            if self.name in names.split():
                found[pipe] = cycles
        if not found and self.name not in ISSUE_ONLY.split() and not self.name.startswith("U"):
            raise UnknownCode(f"no rate is known of {self.opcode}")
        return found


@dataclass(frozen=True)
class Statement:
    """A function, a loop, or a side of a branch in the source."""

    name: str  # "function" or "function: header"
    file: str
    first: int
    last: int
    loop: bool = False

    def holds(self, line: tuple[str, int]) -> bool:
        return self.file == line[0] and self.first <= line[1] <= self.last


@dataclass
class Block:
    instructions: list[Instruction]
    following: list[int] = field(default_factory=list)  # addresses of the blocks that may come next

    @property
    def address(self) -> int:
        return self.instructions[0].address


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BIN / "nvdisasm"), "-c", "-gi", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the addresses of labels."""
    found, labels, waiting, line = [], {}, [], ("", 0)
    outer = False  # whether the place before was one too: then this is where that one was inlined
    for row in text.splitlines():
        if place := re.match(r'\s*//## File "([^"]+)", line (\d+)', row):
            if not outer:
                line = (Path(place[1]).name, int(place[2]))
            outer = True
            continue
        outer = False
        if label := re.match(r"\s*(\.L_x_\d+):", row):
            waiting.append(label[1])
        elif code := INSTRUCTION.search(row):
            address = int(code[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            found.append(Instruction(address, code[2] or "", code[3], code[4], line))
    return found, labels


def blocks_of(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> dict[int, Block]:
    """Basic blocks by address.  Calls return; what only a call reaches is in no block's following."""

    def target(instruction: Instruction) -> int | None:
        label = re.search(r"`\((\.L_x_\d+)\)", instruction.operands)
        return labels.get(label[1]) if label and instruction.name == "BRA" else None

    starts = {instructions[0].address, *labels.values()}
    for before, after in itertools.pairwise(instructions):
        if before.name in ("BRA", "EXIT", "RET"):
            starts.add(after.address)
    blocks: dict[int, Block] = {}
    for instruction in instructions:
        if instruction.address in starts:
            blocks[instruction.address] = block = Block([])
        block.instructions.append(instruction)
    order = sorted(blocks)
    for address, after in zip(order, [*order[1:], None], strict=True):
        last = blocks[address].instructions[-1]
        if (to := target(last)) is not None:
            blocks[address].following.append(to)
        # A branch may depend on its predicate, or on a condition among its operands.
        always = last.name in ("BRA", "EXIT", "RET") and not last.predicate and not re.match(r"!?U?P\d", last.operands)
        if not always and after is not None:
            blocks[address].following.append(after)
    return blocks


def loop_of(blocks: Mapping[int, Block], head: int, tail: int) -> set[int]:
    """Addresses of the natural loop of the back edge tail -> head."""
    before: dict[int, list[int]] = {}
    for address, block in blocks.items():
        for after in block.following:
            before.setdefault(after, []).append(address)
    inside, waiting = {head, tail}, [tail]
    while waiting:
        address = waiting.pop()
        if address == head:
            continue
        for previous in before.get(address, []):
            if previous not in inside:
                inside.add(previous)
                waiting.append(previous)
    return inside


@dataclass(frozen=True)
class Counts:
    """Of one warp's way through a kernel."""

    instructions: float
    cycles: Mapping[str, float]  # by pipe, of a scheduler; "issue" is one per instruction

    @property
    def busiest(self) -> float:
        return max(self.cycles.values())


class UnknownCode(Exception):
    """The code has other loops, lines or instructions than were told."""


def statements(sources: Mapping[str, str]) -> list[Statement]:
    found = []
    for file, text in sources.items():
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            found.append(Statement(function.name, file, function.lineno, function.end_lineno or 0))
            for node in ast.walk(function):
                if isinstance(node, ast.While | ast.For | ast.If):
                    header = text.splitlines()[node.lineno - 1].split("#")[0].strip().rstrip(":")
                    name = f"{function.name}: {header}"
                    if isinstance(node, ast.If):
                        found.append(_side(name, file, node.body))
                        if node.orelse:
                            found.append(_side(f"{function.name}: else of {header}", file, node.orelse))
                    else:
                        found.append(Statement(name, file, node.lineno, node.end_lineno or 0, loop=True))
    return found


def _side(name: str, file: str, body: Sequence[ast.stmt]) -> Statement:
    return Statement(name, file, body[0].lineno, body[-1].end_lineno or 0)


def count(
    cubin: bytes,
    sources: Mapping[str, str],
    loops: Sequence[tuple[str, float]] = (),
    through: Sequence[str] = (),
    without: Sequence[str] | None = (),
) -> Counts:
    """Count one warp's instructions.

    sources: text of the kernels' files by name.  loops: the code's loops in the order of their ends, each with how
    often it runs; 0 for what is not entered.  through: lines of the sources, by how they begin, which the way passes.
    without: statements or functions that it leaves out; None where a program leaves at once: it may leave out anything
    then, and enters no loop.

    Raises UnknownCode.
    """
    blocks, known = blocks_of(*parse(disassemble(cubin))), statements(sources)
    back = [(a, to) for a, block in blocks.items() for to in block.following if to <= a]
    back = [(a, to) for a, to in back if blocks[a].following != [a]]  # an endless one pads the code after its end
    names = [_loop_at(blocks[a].instructions[-1].line, known) for a, _ in back]
    if without is None:
        loops = [(name, 0) for name in names]
    if names != [name for name, _ in loops]:
        raise UnknownCode(f"the code's loops are {names}, told were {[name for name, _ in loops]}")
    if absent := {name for name in without or ()} - {statement.name for statement in known}:
        raise UnknownCode(f"the sources have no {sorted(absent)}")
    times, avoided, required = dict.fromkeys(blocks, 1.0), set[int](), set[int]()
    for (tail, head), (_, number) in zip(back, loops, strict=True):
        for address in loop_of(blocks, head, tail):
            times[address] *= number
        (required if number else avoided).add(head)
    for wanted in through:
        share = {a: sum(_text(i.line, sources).startswith(wanted) for i in b.instructions) for a, b in blocks.items()}
        most = max(share, key=share.__getitem__)
        if not share[most]:
            raise UnknownCode(f"no instruction comes from a line {wanted!r}")
        required.add(most)
    way = _way(blocks, times, avoided, sorted(required))
    if without is not None:
        _check_left_out(blocks, way, known, {*without, *(name for name, number in loops if not number)}, sources)
    total: Counter[str] = Counter()
    for address in way:
        for instruction in blocks[address].instructions:
            total["issue"] += times[address]  # type: ignore[assignment]
            for pipe, cycles in instruction.cycles.items():
                total[pipe] += cycles * times[address]  # type: ignore[assignment]
    return Counts(total["issue"], dict(total))


def _loop_at(line: tuple[str, int], known: Sequence[Statement]) -> str:
    """The innermost loop around a line; a loop's branch back comes from its header."""
    around = [statement for statement in known if statement.loop and statement.holds(line)]
    return max(around, key=lambda statement: statement.first).name if around else f"none at {line}"


def _check_left_out(
    blocks: Mapping[int, Block],
    way: Sequence[int],
    known: Sequence[Statement],
    without: set[str],
    sources: Mapping[str, str],
) -> None:
    passed = {i.line for address in way for i in blocks[address].instructions}
    lines = {i.line for block in blocks.values() for i in block.instructions if i.name != "NOP"}
    allowed = [statement for statement in known if statement.name in without]
    left_out = sorted(
        line
        for line in lines - passed
        # A line without text is where a function ends.
        if _text(line, sources) and not any(statement.holds(line) for statement in allowed)
    )
    if left_out:
        shown = [f"{file}:{number} {_text((file, number), sources)}" for file, number in left_out]
        raise UnknownCode("the way leaves out " + "; ".join(shown))


def _text(line: tuple[str, int], sources: Mapping[str, str]) -> str:
    rows = sources.get(line[0], "").splitlines()
    return rows[line[1] - 1].strip() if 0 < line[1] <= len(rows) else ""


def _way(blocks: Mapping[int, Block], times: Mapping[int, float], avoided: set[int], required: list[int]) -> list[int]:
    """The cheapest way from entry to exit through the required blocks, in the order of their addresses."""

    def shortest(start: int, goal: int | None) -> list[int]:
        waiting, seen = [(0.0, start, [start])], set[int]()
        while waiting:
            cost, at, way = heapq.heappop(waiting)
            if at == goal or (goal is None and blocks[at].instructions[-1].name == "EXIT"):
                return way
            if at in seen:
                continue
            seen.add(at)
            for to in blocks[at].following:
                if to > at and to not in avoided:
                    heapq.heappush(waiting, (cost + len(blocks[to].instructions) * times[to], to, [*way, to]))
        raise UnknownCode(f"no way from {start:#x} to {'an exit' if goal is None else hex(goal)}")

    way = [min(blocks)]
    for goal in [*(a for a in required if a != way[0]), None]:
        way += shortest(way[-1], goal)[1:]
    return way


def programs_at_once(target: str, threads: int, registers: int, shared: int) -> int:
    """Programs that one multiprocessor of the target holds, as registers, warps and shared memory allow.

    NVIDIA (CUDA's occupancy calculator): four schedulers with 16,384 registers each, given to warps in units of 256; 64
    warps; 32 programs; every program takes 1 KiB of shared memory more than it asks for, in units of 128 bytes.
    gfx942: 4 SIMDs, each of 8 waves of 64 threads, with 512 registers per lane in units of 8.
    """
    most_shared = SHARED_LIMIT[target] + 1024
    if target.startswith("gfx"):
        waves = 4 * min(8, 512 // (-(-max(1, registers) // 8) * 8))
        return min(waves // -(-threads // 64), SHARED_LIMIT[target] // shared if shared else 32)
    warps = -(-threads // 32)
    by_registers = 16_384 // (-(-max(1, registers) * 32 // 256) * 256) * 4 // warps
    return min(32, 64 // warps, by_registers, most_shared // (-(-shared // 128) * 128 + 1024))
