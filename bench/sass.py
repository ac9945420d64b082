"""What a compiled kernel executes: its instructions, read with the disassembler that Triton carries.

A kernel's machine code is cut into basic blocks.  A warp's way through them is the shortest one from entry to exit
that passes what it is told to pass (``through``: lines of the source) and runs every loop as often as it is told, so
that rare branches are left out unless named.  Of a branch the cheaper side counts; subroutines (a division's slow path)
do not.

Rates are those of compute capability 9.0 in the CUDA C++ Programming Guide (arithmetic instructions, results per clock
and multiprocessor), per scheduler, of which a multiprocessor has four: a warp's instruction takes the cycles below.
"""

from __future__ import annotations

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
# 32 lanes per cycle: fma.  16: integers, logic, comparisons, selects, minima.  4: special functions, conversions.
PIPES: dict[str, tuple[int, str]] = {
    "fma": (1, "FADD FMUL FFMA HADD2 HMUL2 HFMA2 IMAD"),
    "alu": (2, "FMNMX FSEL FSET FSETP FCHK IADD3 IADD IABS IMNMX VIMNMX VIADD ISETP LEA LOP3 LOP PLOP3 SEL SHF SHL SHR "
            "PRMT SGXT BMSK HMNMX2 HSET2 HSETP2 IDP ISCADD MOV P2R R2P VABSDIFF"),
    "special": (8, "MUFU F2F F2I I2F F2IP I2FP I2IP FRND POPC FLO BREV"),
    "double": (2, "DADD DMUL DFMA DSETP DMNMX"),
    "tensor": (4, "HMMA IMMA DMMA"),
    "memory": (4, "LDG STG LDS STS LDSM STSM LDGSTS ATOM ATOMG ATOMS RED LDL STL SHFL LD ST UBLKCP UTMALDG"),
}  # fmt: skip
PIPE_OF = {opcode: (pipe, cycles) for pipe, (cycles, names) in PIPES.items() for opcode in names.split()}
# Bytes of shared memory that one program may use.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str  # with its suffixes
    operands: str
    line: tuple[str, int]  # file name and line of the source

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


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
    for row in text.splitlines():
        if place := re.match(r'\s*//## File "([^"]+)", line (\d+)', row):
            line = (Path(place[1]).name, int(place[2]))
        elif label := re.match(r"\s*(\.L_x_\d+):", row):
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
    """The code has other loops than were told, or lacks a line that was named."""


def count(cubin: bytes, sources: Mapping[str, str], loops: Sequence[float] = (), through: Sequence[str] = ()) -> Counts:
    """Count one warp's instructions.

    sources: text of the kernels' files by name.  loops: how often each loop runs, in the order of their addresses; 0
    for what is not entered.  through: lines of the sources, by how they begin, which the way passes.

    Raises UnknownCode.
    """
    blocks = blocks_of(*parse(disassemble(cubin)))
    back = [(a, to) for a, block in blocks.items() for to in block.following if to <= a]
    back = [(a, to) for a, to in back if blocks[a].following != [a]]  # an endless one pads the code after its end
    if len(back) != len(loops):
        lines = [_text(blocks[a].instructions[-1].line, sources) for a, _ in back]
        raise UnknownCode(f"{len(loops)} loops were told, the code has {len(back)}: {lines}")
    times, avoided, required = dict.fromkeys(blocks, 1.0), set[int](), set[int]()
    for (tail, head), number in zip(back, loops, strict=True):
        for address in loop_of(blocks, head, tail):
            times[address] *= number
        (required if number else avoided).add(head)
    for wanted in through:
        share = {a: sum(_text(i.line, sources).startswith(wanted) for i in b.instructions) for a, b in blocks.items()}
        most = max(share, key=share.__getitem__)
        if not share[most]:
            raise UnknownCode(f"no instruction comes from a line {wanted!r}")
        required.add(most)
    total: Counter[str] = Counter()
    for address in _way(blocks, times, avoided, sorted(required)):
        for instruction in blocks[address].instructions:
            pipe, cycles = PIPE_OF.get(instruction.name, ("other", 0))
            total["issue"] += times[address]  # type: ignore[assignment]
            total[pipe] += cycles * times[address]  # type: ignore[assignment]
    return Counts(total["issue"], dict(total))


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

    NVIDIA (CUDA's occupancy calculator): 65,536 registers, given to warps in units of 256; 64 warps; 32 programs; every
    program takes 1 KiB of shared memory more than it asks for, in units of 128 bytes.  gfx942: 4 SIMDs, each of 8 waves
    of 64 threads, with 512 registers per lane in units of 8.
    """
    most_shared = SHARED_LIMIT[target] + 1024
    if target.startswith("gfx"):
        waves = 4 * min(8, 512 // (-(-max(1, registers) // 8) * 8))
        return min(waves // -(-threads // 64), SHARED_LIMIT[target] // shared if shared else 32)
    warps = -(-threads // 32)
    by_registers = 65_536 // (warps * -(-registers * 32 // 256) * 256)
    return min(32, 64 // warps, by_registers, most_shared // (-(-shared // 128) * 128 + 1024))
