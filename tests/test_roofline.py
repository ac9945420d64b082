"""The roofline's own arithmetic: instructions counted along a way, limits, what it says of unknown code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which carries the disassembler", allow_module_level=True)

from bench import sass

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
.L_x_3:
        /*00b0*/                   STG.E [R8], R1 ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""
SOURCES = {
    "k.py": "def k():\n    if row:\n        while x:\n            x = exp(x)\n    if rare:\n        y = twice(y)\n"
}


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
    counts = sass.count(b"", SOURCES, loops=(10,))
    assert counts.instructions == 2 + 10 * 5 + 1 + 2
    assert counts.cycles["special"] == 10 * 8 and counts.cycles["fma"] == 10 * 2 and "double" not in counts.cycles
    rare = sass.count(b"", SOURCES, loops=(10,), through=("y = twice",))
    assert rare.instructions == counts.instructions + 2 and rare.cycles["double"] == 2 * 2
    early = sass.count(b"", SOURCES, loops=(0,))
    assert early.instructions == 2
    assert counts.busiest == counts.cycles["special"] and early.busiest == 2


def test_unknown_code_is_an_error() -> None:
    with pytest.raises(sass.UnknownCode, match=r"0 loops were told, the code has 1: \['while x:'\]"):
        sass.count(b"", SOURCES)
    with pytest.raises(sass.UnknownCode, match="no instruction comes from a line 'z ='"):
        sass.count(b"", SOURCES, loops=(1,), through=("z =",))


def test_times_and_limits() -> None:
    from bench.roofline import CLOCK, LAUNCH, MEMORY, Row, Way

    counts = sass.Counts(1000, {"issue": 1000, "alu": 1600})
    way = Way("k", 3.0e6, 1000, 64, 2)
    row = Row(way, (264, 2), 128, 64, 0, 0, counts)
    assert row.resident == 8 and row.programs == 528 and row.faults() == []
    assert row.issue == pytest.approx(4 * 4 * 1600 / 4 / CLOCK)  # 4 programs of 4 warps on each, 4 schedulers
    assert row.latency == pytest.approx(2000 / CLOCK + 2 * MEMORY)
    assert row.seconds("H100") == pytest.approx(LAUNCH + max(row.issue, row.latency))
    idle = Row(Way("k", 0.0, 1000, 64, 2, working=0), (264, 20), 128, 64, 0, 0, counts)
    assert idle.issue == 0 and idle.latency == pytest.approx(5 * MEMORY)  # 5,280 programs, 1,056 at once
    worse = Row(way, (1,), 128, 65, 0, 16, sass.Counts(1001, {"issue": 1001}))
    assert len(worse.faults()) == 3 and "16 bytes spilled" in worse.faults()[0]


def test_the_notes_have_a_place_for_the_table() -> None:
    from bench.roofline import END, NOTES, START

    text = Path(NOTES).read_text(encoding="utf-8")
    assert text.count(START) == text.count(END) == 1
