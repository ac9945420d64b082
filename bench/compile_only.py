"""The kernels as GPUs that are not here would run them: launchers compile for a target and launch nothing.

The launchers themselves run, on tensors without memory, under a driver that only names its target; Triton then
specialises and compiles exactly what it would on that GPU.  Importing this turns Triton's interpreter off, for all of
the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from esamp_core.kernels.distiller.forward import distiller_forward_triton
from esamp_core.kernels.distiller.gauge import gauge_triton
from esamp_core.kernels.distiller.mix import mix_triton
from esamp_core.kernels.distiller.ops import scratch_size
from esamp_core.kernels.distiller.step import distiller_step_triton
from esamp_core.kernels.tuning import Config, config_for

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
VOCAB = 152064


class NamedTarget:
    """A driver that knows its target and can launch nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)  # Triton keeps one target per device number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class Launch(NamedTuple):
    """A kernel that a launcher asked for."""

    name: str
    kernel: Any  # as Triton compiled it
    grid: tuple[int, ...]


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[Launch]]:
    """Launchers compile for a target and launch nothing; what they asked for."""
    found: list[Launch] = []
    real_run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = real_run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(Launch(self.fn.__name__.strip("_").removesuffix("_kernel"), kernel, tuple(grid)))
        return kernel

    triton.runtime.driver.set_active(NamedTarget(TARGETS[target]))
    JITFunction.run = compile_only
    try:
        with torch.device("meta"):
            yield found
    finally:
        JITFunction.run = real_run


def resources(target: str, kernel: Any) -> tuple[int, int]:
    """Registers per thread, and bytes spilled."""
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        number = {k: int(v) for k, v in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", text)}
        return number["vgpr_count"], 4 * (number["vgpr_spill_count"] + number["sgpr_spill_count"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def code_size(kernel: Any) -> int:
    """Instructions in a kernel's code."""
    if "amdgcn" in kernel.asm:
        return len(re.findall(r"^\t(?:v|s|ds|global|buffer|flat)_\w+", kernel.asm["amdgcn"], re.MULTILINE))
    elf = kernel.asm["cubin"]  # an ELF file: the section of executable code, 16 bytes an instruction
    start, (size, number) = struct.unpack_from("<Q", elf, 0x28)[0], struct.unpack_from("<HH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(number)]
    return sum(length for _, _, flags, _, _, length in sections if flags & 4) // 16


@dataclasses.dataclass(frozen=True)
class DistillerCase:
    target: str
    hidden: int
    rank: int
    dtype: torch.dtype  # of the weights
    extras: bool  # momentum, an active mask, and tokens that teach
    rows: int = 16
    slots: int = 16

    @property
    def config(self) -> Config:
        return config_for(self.target, 0, self.hidden, 0, self.dtype.itemsize)

    def __str__(self) -> str:
        return f"H={self.hidden} r={self.rank} {str(self.dtype)[6:]}{' momentum' if self.extras else ''}"


def launch_distiller(case: DistillerCase) -> None:
    rows, slots, hidden, rank, new = case.rows, case.slots, case.hidden, case.rank, torch.empty
    matrices = new(slots, hidden, rank), new(slots, hidden, rank), new(slots, rank, hidden)
    weights = (*(m.to(case.dtype) for m in matrices), new(slots, rank), new(slots, hidden), new(slots, hidden))
    velocities = tuple(w.float() for w in weights) if case.extras else ()
    num_groups = min(rows, slots)
    groups = tuple(new(n, dtype=torch.int32) for n in (rows, num_groups, num_groups + 1))
    number, column, scale = new(slots, dtype=torch.int64), new(slots), new(())
    wide, narrow = (rows, hidden), (rows, rank)
    saved = [new(shape) for shape in (wide, narrow, narrow, wide, rows, rows, wide)]
    scratch = new(scratch_size(rows, weights[0]))
    distiller_forward_triton(new(wide), *groups, weights, scale, saved, scratch, case.config)
    # Engines mix states of their own dtype; with extras some rows are switched off.
    _, _, _, y, mean, rstd, _ = saved
    deep, mixed = new(wide, dtype=torch.bfloat16), new(wide, dtype=torch.bfloat16)
    mixing = new(rows, dtype=torch.bool) if case.extras else None
    mix_triton(
        deep, y, weights[4], weights[5], scale, new(rows), mixing, groups, mean, rstd, mixed,
        new(rows, dtype=torch.int32), rank, case.config,
    )  # fmt: skip
    active, target = None, (new(wide), None, None, 1.0)
    if case.extras:
        active = new(rows, dtype=torch.bool)
        target = (new(VOCAB, hidden, dtype=torch.bfloat16), new(rows, dtype=torch.int64), new(hidden), 0.5)
    gauge_triton(
        (new(slots, hidden), number, column, column, column), saved, new(wide), *groups, weights, scale, active,
        scratch, case.config,
    )  # fmt: skip
    distiller_step_triton(
        weights, velocities, number, (number, column, column, number), saved, *target, *groups, scale, active,
        (0.5,) * 6, 0.5, 1.0, scratch, case.config,
    )  # fmt: skip
