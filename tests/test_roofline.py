"""The roofline's own arithmetic: instructions counted along a way, programs at once, limits, unknown code."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which carries the disassembler", allow_module_level=True)

from bench import roofline, sass
from bench.roofline import CLOCK, IDLE, LAUNCH, MEMORY, Most

# A kernel with an early exit, a loop of two blocks, a branch around the dearer half, and the loop that pads its end.
CODE = """
_k_kernel:
	//## File "/somewhere/k.py", line 2
        /*0000*/                   ISETP.NE.AND P0, PT, R0, RZ, PT ;
        /*0010*/              @!P0 EXIT ;
	//## File "/somewhere/k.py", line 3
.L_x_1:
        /*0020*/                   FADD R1, R1, R2 ;
        /*0030*/                   MUFU.EX2 R3, R1 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   FMNMX R1, R1, R3, PT ;
.L_x_2:
        /*0060*/                   FADD R1, R1, R2 ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
	//## File "/somewhere/k.py", line 5
        /*0080*/               @P3 BRA `(.L_x_3) ;
	//## File "/somewhere/k.py", line 6
        /*0090*/                   DADD R4, R4, R6 ;
        /*00a0*/                   DADD R4, R4, R6 ;
	//## File "/somewhere/k.py", line 7
.L_x_3:
        /*00b0*/                   STG.E [R8], R1 ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""
SOURCES = {
    "k.py": """def k():
    if row:
        while x:
            x = exp(x)
    if rare:
        y = twice(y)
    store(y)
"""
}
LOOP, RARE = "k: while x", "k: if rare"


@pytest.fixture(autouse=True)
def _code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass, "disassemble", lambda cubin: CODE)


def test_blocks_and_loops() -> None:
    blocks = sass.blocks_of(*sass.parse(CODE))
    assert {address: block.following for address, block in blocks.items()} == {
        0x00: [0x20], 0x20: [0x60, 0x50], 0x50: [0x60], 0x60: [0x20, 0x80], 0x80: [0xB0, 0x90], 0x90: [0xB0], 0xB0: [],
        0xD0: [0xD0],
    }  # fmt: skip
    assert sass.loop_of(blocks, 0x20, 0x60) == {0x20, 0x50, 0x60}


def test_a_way_runs_its_loop_and_leaves_out_what_is_rare() -> None:
    """By hand: 2 before the loop, 5 in it (not 0x50), 1 + 2 behind it."""
    counts = sass.count(b"", SOURCES, [(LOOP, 10)], without=[RARE])
    assert counts.instructions == 2 + 10 * 5 + 1 + 2
    assert counts.cycles["special"] == 10 * 8 and counts.cycles["fma"] == 10 * 2 and "double" not in counts.cycles
    rare = sass.count(b"", SOURCES, [(LOOP, 10)], through=["y = twice"])
    assert rare.instructions == counts.instructions + 2 and rare.cycles["double"] == 2 * 2
    early = sass.count(b"", SOURCES, without=None)
    assert early.instructions == 2
    assert counts.busiest == counts.cycles["special"] and early.busiest == 2


def test_nothing_of_the_source_is_left_out_unsaid() -> None:
    with pytest.raises(sass.UnknownCode, match=r"leaves out k\.py:6 y = twice\(y\)$"):
        sass.count(b"", SOURCES, [(LOOP, 1)])
    with pytest.raises(sass.UnknownCode, match=r"no \['k: if never'\]"):
        sass.count(b"", SOURCES, [(LOOP, 1)], without=[RARE, "k: if never"])
    assert sass.count(b"", SOURCES, [(LOOP, 0)], without=["k"]).instructions == 2  # a whole function


def test_unknown_code_is_an_error() -> None:
    for told in ([], [("k: while y", 1)], [(LOOP, 1), (LOOP, 1)]):
        with pytest.raises(sass.UnknownCode, match=r"the code's loops are \['k: while x'\]"):
            sass.count(b"", SOURCES, told, without=[RARE])
    with pytest.raises(sass.UnknownCode, match="no instruction comes from a line 'z ='"):
        sass.count(b"", SOURCES, [(LOOP, 1)], through=["z ="])


def test_a_loop_without_a_statement_is_told_by_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass, "disassemble", lambda cubin: CODE.replace("line 3", "line 5"))
    with pytest.raises(sass.UnknownCode, match=r"none at \('k\.py', 5\)"):
        sass.count(b"", SOURCES, [(LOOP, 1)], without=[RARE])


def test_the_innermost_of_inlined_places_counts() -> None:
    code = """
	//## File "/a/lib.py", line 7 inlined at "/a/k.py", line 3
	//## File "/a/k.py", line 3
        /*0000*/                   FADD R1, R1, R2 ;
	//## File "/a/k.py", line 5
        /*0010*/                   EXIT ;
"""
    assert [instruction.line for instruction in sass.parse(code)[0]] == [("lib.py", 7), ("k.py", 5)]


def test_statements_of_a_source() -> None:
    source = """def f(n):
    for i in range(0, n, 4):  # four
        if i == n:
            a()
        else:
            b()
"""
    found = {s.name: (s.first, s.last, s.loop) for s in sass.statements({"f.py": source})}
    assert found == {
        "f": (1, 6, False),
        "f: for i in range(0, n, 4)": (2, 6, True),
        "f: if i == n": (4, 4, False),
        "f: else of if i == n": (6, 6, False),
    }


def test_cycles_of_a_schedulers_pipes() -> None:
    def cycles(opcode: str) -> dict[str, float]:
        return sass.Instruction(0, "", opcode, "", ("", 0)).cycles

    assert (
        cycles("FFMA") == {"fma": 1} and cycles("ISETP.GE.AND") == {"alu": 2} and cycles("MUFU.EX2") == {"special": 8}
    )
    assert cycles("IMAD.WIDE.U32") == {"fma": 1, "multiply": 2}  # half of the fma lanes multiply integers
    assert cycles("HGMMA.64x64x8.F32.TF32") == {"tensor": 32}
    assert cycles("BAR.SYNC.DEFER_BLOCKING") == cycles("UIADD3") == {}
    with pytest.raises(sass.UnknownCode, match="no rate is known of XYZZY"):
        cycles("XYZZY.X")


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "programs"),
    [  # as CUDA's occupancy calculator gives them, but for the last three
        ("sm_90", 256, 32, 0, 8),  # 2,048 threads
        ("sm_90", 32, 16, 0, 32),  # the most programs
        ("sm_90", 128, 138, 16, 3),  # registers: 4,608 a warp
        ("sm_90", 256, 85, 128, 2),  # registers: 2,816 a warp, 5 warps a scheduler
        ("sm_90", 64, 85, 0, 10),  # 20 warps, not 23: schedulers share no registers
        ("sm_90", 1024, 64, 0, 1),
        ("sm_90", 1024, 65, 0, 0),
        ("sm_90", 128, 32, 100 * 1024, 2),  # shared memory: 101 KiB each of 228
        ("sm_90", 128, 32, 227 * 1024, 1),
        ("sm_80", 128, 32, 100 * 1024, 1),  # of 164
        ("gfx942", 256, 64, 0, 8),  # 8 waves a SIMD
        ("gfx942", 256, 132, 0, 3),  # 512 / 136
        ("gfx942", 256, 64, 32 * 1024, 2),
    ],
)
def test_programs_at_once(target: str, threads: int, registers: int, shared: int, programs: int) -> None:
    assert sass.programs_at_once(target, threads, registers, shared) == programs


def row(way: roofline.Way, grid: tuple[int, ...], **changes: Any) -> roofline.Row:
    known = {"registers": 64, "spills": 0, "counts": sass.Counts(1000, {"issue": 1000, "alu": 1600})} | changes
    return roofline.Row(way, grid, 128, shared=0, **known)


WAY = roofline.Way("k", 3.0e6, 2)


def test_times() -> None:
    busy = row(WAY, (264, 2))
    assert busy.resident == 8 and busy.programs == 528 and busy.waves == 0.5
    assert busy.issue == pytest.approx(4 * 4 * 1600 / 4 / CLOCK)  # 4 programs of 4 warps on each, 4 schedulers
    assert busy.latency == pytest.approx(2000 / CLOCK + 2 * MEMORY)
    assert busy.seconds("H100") == pytest.approx(LAUNCH + busy.issue + busy.latency)
    large = row(dataclasses.replace(WAY, bytes=3.0e9), (264, 2))
    assert large.seconds("H100") == pytest.approx(LAUNCH + large.issue + 1e-3)
    assert large.seconds("H200") == pytest.approx(LAUNCH + large.issue + 3.0e9 / 4.3e12)
    idle = row(dataclasses.replace(WAY, working=0), (264, 20))
    assert idle.issue == 0 and idle.latency == pytest.approx(5 * IDLE)  # 5,280 programs, 1,056 at once


def test_limits() -> None:
    busy = row(WAY, (264, 2))
    micros = busy.seconds("H100") * 1e6
    assert busy.faults(Most(1000, 64, micros)) == []
    assert busy.faults(Most(999, 64, micros)) == ["k: 1000 instructions, 999 at most"]
    assert busy.faults(Most(1000, 63, micros)) == ["k: 64 registers, 63 at most"]
    assert busy.faults(Most(1000, 64, 1.0)) == [f"k: {micros:.4g} µs on an H100, 1.0 at most"]
    assert row(WAY, (1,), spills=16).faults(Most(1000, 64, micros)) == ["k: 16 bytes spilled"]


def test_what_the_table_names_is_in_the_kernels() -> None:
    """Compiles nothing, so that a renamed statement shows at once."""
    ways = roofline.ways()
    assert {way.name for way in ways} == set(roofline.LIMITS) and len(ways) == len(roofline.LIMITS)
    sources = {path.name: path.read_text(encoding="utf-8") for path in (roofline.ROOT / "kernels").rglob("*.py")}
    known = {statement.name for statement in sass.statements(sources)}
    assert {name for way in ways for name in (*way.without, *(loop for loop, _ in way.loops))} <= known
    lines = [line.strip() for text in sources.values() for line in text.splitlines()]
    for start in {start for way in ways for start in way.through}:
        assert any(line.startswith(start) for line in lines), start


def test_status_and_notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "NOTES.md"
    notes.write_text(f"before\n{roofline.START}\nold\n{roofline.END}\nafter\n", encoding="utf-8")
    rows = [row(WAY, (264, 2))]
    monkeypatch.setattr(roofline, "NOTES", notes)
    monkeypatch.setattr(roofline, "launches", dict)
    monkeypatch.setattr(roofline, "rows_of", lambda found, table: rows)
    monkeypatch.setattr(roofline, "LIMITS", {"k": Most(1000, 64, 100.0)})
    assert roofline.main([]) == 0 and "old" in notes.read_text(encoding="utf-8")
    assert roofline.main(["--check"]) == 1 and "another table" in capsys.readouterr().err
    assert roofline.main(["--write"]) == 0 and roofline.main(["--check"]) == 0
    text = notes.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{roofline.START}\n") and text.endswith(f"{roofline.END}\nafter\n")
    assert "| k | 264x2 | 128 | 64 | 0 | 8 | 0.5 | 0 | 1000 |" in text and "old" not in text
    monkeypatch.setattr(roofline, "LIMITS", {"k": Most(1000, 63, 100.0)})
    assert roofline.main([]) == 1
    assert capsys.readouterr().err.strip().endswith("FAULT k: 64 registers, 63 at most")


def test_the_notes_have_a_place_for_the_table() -> None:
    text = roofline.NOTES.read_text(encoding="utf-8")
    assert text.count(roofline.START) == text.count(roofline.END) == 1
