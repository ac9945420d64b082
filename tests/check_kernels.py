"""`make check-kernels`: compile every kernel, with every tuning configuration, for GPUs that are not here.

The launchers themselves run, on tensors without memory, under a driver that only names its target; Triton then
specialises and compiles exactly what it would on that GPU, and nothing is launched.  Rows are 16-aligned.  Fails on

- any register spill,
- more shared memory than a program of the target may have,
- on NVIDIA, a load of logits narrower than 16 bytes per thread (all tiles are read by one line of kernels/row.py),
- a product of the Distiller's matrices that is not on tensor cores, or not in the precision it asks for,
- a kernel of the Distiller that a step compiles though warm_up has run.

Arguments: names of targets (sm_90, ...), and "sampling" or "distiller" for these kernels only.  Default all.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from esamp_core.kernels import explore, row
from esamp_core.kernels.distiller import scratch_size
from esamp_core.kernels.distiller_forward import distiller_forward_triton
from esamp_core.kernels.distiller_step import distiller_step_triton
from esamp_core.kernels.tuning import TABLE, Config, config_for
from esamp_core.kernels.warm_up import warm_up_distiller

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may use.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
HIDDEN, VOCAB = 3584, 152064
# The Distiller's kernels that multiply matrices, and what tl.dot must become: by dtype of the weights.
MULTIPLY = {"project", "expand", "back", "update"}
PRODUCTS = {
    "sm": {torch.float32: r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*tf32", torch.bfloat16: r"(?:mma\.sync|"
           r"wgmma\.mma_async)\S*\.bf16\.bf16|tcgen05\.mma\S*f16"},
    "gf": {torch.float32: r"v_mfma_f32_\w+x\d_?f32", torch.bfloat16: r"v_mfma_f32_\w+_?bf16"},
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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


@dataclasses.dataclass(frozen=True)
class Case:
    target: str
    vocab: int
    width: int
    dtype: torch.dtype
    vllm: bool

    @property
    def config(self) -> Config:
        return config_for(self.target, self.vocab, HIDDEN, self.width, self.dtype.itemsize)

    def __str__(self) -> str:
        return f"V={self.vocab} C={self.width} {str(self.dtype)[6:]}{' vllm' if self.vllm else ''}"


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


@dataclasses.dataclass
class Line:
    target: str
    kernel: str
    case: str
    registers: int
    spills: int
    shared: int
    load_bytes: int | None  # the narrowest load of logits, per thread
    products: int | None = None  # matrix products on tensor cores

    def faults(self) -> list[str]:
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes spilled")
        if self.shared > SHARED_LIMIT[self.target]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.target]} at most")
        if self.load_bytes is not None and self.load_bytes < 16:
            found.append(f"logits loaded {self.load_bytes} bytes at a time")
        if self.products == 0:
            found.append("no product on tensor cores")
        return found


def cases(target: str) -> Iterator[Case]:
    """Every configuration in the table, both filter orders, every dtype, vocabularies of every size."""
    yield Case(target, 152064, 64, torch.bfloat16, vllm=False)
    yield Case(target, 152064, 256, torch.float32, vllm=False)
    yield Case(target, 152064, 1024, torch.bfloat16, vllm=False)
    yield Case(target, 32000, 1024, torch.float32, vllm=True)
    yield Case(target, 262144, 256, torch.float16, vllm=True)


def distiller_cases(target: str) -> Iterator[DistillerCase]:
    """Both dtypes, with and without extras; the largest, and sizes that nothing divides."""
    for dtype in (torch.float32, torch.bfloat16):
        yield DistillerCase(target, HIDDEN, 64, dtype, extras=False)
        yield DistillerCase(target, HIDDEN, 64, dtype, extras=True)
        yield DistillerCase(target, 1001, 17, dtype, extras=True)
        yield DistillerCase(target, 16384, 256, dtype, extras=True)
    yield DistillerCase(target, 64, 8, torch.float32, extras=False)


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
    active, target = None, (new(wide), None, None, 1.0)
    if case.extras:
        active = new(rows, dtype=torch.bool)
        target = (new(VOCAB, hidden, dtype=torch.bfloat16), new(rows, dtype=torch.int64), new(hidden), 0.5)
    distiller_step_triton(
        weights, velocities, number, (number, column, column, number), saved, *target, *groups, scale, active,
        (0.5,) * 6, 0.5, 1.0, scratch, case.config,
    )  # fmt: skip


def products(case: DistillerCase, kernel: Any) -> int:
    """Tensor-core instructions of the precision that the weights' dtype asks for, and no others."""
    text = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
    found = re.findall(r"(?:mma\.sync\.|wgmma\.mma_async\.|tcgen05\.mma\.|v_mfma_)\S+", text)
    wanted = [name for name in found if re.match(PRODUCTS[case.target[:2]][case.dtype], name)]
    return len(wanted) if wanted == found else 0


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[tuple[str, Any]]]:
    """Launchers compile for a target and launch nothing; what they compile, by name."""
    found: list[tuple[str, Any]] = []
    real_run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = real_run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__.strip("_").removesuffix("_kernel"), kernel))
        return kernel

    triton.runtime.driver.set_active(NamedTarget(TARGETS[target]))
    JITFunction.run = compile_only
    try:
        with torch.device("meta"):
            yield found
    finally:
        JITFunction.run = real_run


def launch_sampling(case: Case) -> None:
    """The kernels of `explore`, and of the ops that it is fused from."""
    rows, config = 16, case.config
    logits = torch.empty(rows, case.vocab, dtype=case.dtype)
    one = torch.empty(rows)
    number = torch.empty(rows, dtype=torch.int64)
    active = torch.empty(rows, dtype=torch.bool)
    weight = torch.empty(case.vocab, HIDDEN, dtype=torch.bfloat16)
    bias, center = torch.empty(case.vocab), torch.empty(HIDDEN)
    direction = torch.empty(rows, HIDDEN)
    params = (one, number, one, one, one)
    codes = torch.empty(rows, 2, dtype=torch.float64)
    # The model's own logits everywhere on the second pass, with all that a head can have, and stratified rows.
    plain, full = (None, None, None, 1.0, None, None), (codes, bias, center, 0.5, 30.0, 3.0)
    for model, (used, *extras) in ((None, plain), (logits, full)):
        explore.explore_triton(
            logits, *params, number, number, used, active, model, direction, weight, *extras, 0, 1.0, case.width,
            case.vllm, config,
        )  # fmt: skip
    chosen = torch.empty(rows, case.width)
    ids = torch.empty(rows, case.width, dtype=torch.int64)
    status = torch.empty(rows, dtype=torch.int32)
    explore.reweight_triton(ids, chosen, status, chosen, one, one, None, 1.0, config)
    scan = explore.block_max_triton(logits, None, None, None, config, log_sum=True)
    tail = explore.tail_triton(logits, one, number, number, ids, chosen, one, number, status, config)
    explore.draw_triton(
        ids, chosen, number, status, logits, scan, tail, one, one, number, number, config, new=chosen, novelty=chosen
    )


def compiled_by(case: Case | DistillerCase) -> list[tuple[str, Any]]:
    """What the launchers compile for a case."""
    with compiling(case.target) as found:
        if isinstance(case, DistillerCase):
            launch_distiller(case)
        else:
            launch_sampling(case)
    return list({kernel.hash: (name, kernel) for name, kernel in found}.values())


def cold(target: str) -> set[str]:
    """Kernels of the Distiller that steps of some number of rows and slots compile, though warm_up has run."""
    missing = set()
    for dtype in (torch.float32, torch.bfloat16):
        with compiling(target) as warm:
            weight, center = torch.empty(VOCAB, 256, dtype=torch.bfloat16), torch.empty(256)
            warm_up_distiller(256, 16, dtype, True, weight, center, device="meta")
        for rows, slots in ((1, 1), (2, 16), (16, 32), (37, 48), (512, 5)):
            with compiling(target) as found:
                launch_distiller(DistillerCase(target, 256, 16, dtype, extras=True, rows=rows, slots=slots))
            missing |= {name for name, kernel in found if kernel.hash not in {k.hash for _, k in warm}}
    return missing


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


def narrowest_load(llir: str) -> int | None:
    """Bytes per thread of the narrowest global load made by row.load_logits; None if there is none.

    PTX places a load wherever its registers are last named, LLVM's IR where it was written: hence the IR."""
    code = row.load_logits.fn.__code__
    lines = range(code.co_firstlineno, code.co_firstlineno + 5)
    files = re.findall(rf'(!\d+) = !DIFile\(filename: "{Path(code.co_filename).name}"', llir)
    scopes = [scope for scope, file in re.findall(r"(!\d+) = .*?\bfile: (!\d+)", llir) if file in files]
    places = {
        place
        for place, line, scope in re.findall(r"(!\d+) = !DILocation\(line: (\d+),.*?scope: (!\d+)", llir)
        if int(line) in lines and scope in scopes
    }
    widths = [
        int(count or 1) * int(size) // 8
        for count, size, place in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[a-z](\d+) .*!dbg (!\d+)", llir)
        if place in places
    ]
    return min(widths, default=None)


def check(case: Case | DistillerCase) -> list[Line]:
    lines = []
    for name, kernel in compiled_by(case):
        registers, spills = resources(case.target, kernel)
        load_bytes = narrowest_load(kernel.asm["llir"]) if "ptx" in kernel.asm else None
        line = Line(case.target, name, str(case), registers, spills, kernel.metadata.shared, load_bytes)
        if isinstance(case, DistillerCase) and name in MULTIPLY:
            line.products = products(case, kernel)
        lines.append(line)
    return lines


def main() -> int:
    assert set(TARGETS) == set(TABLE)
    asked = set(sys.argv[1:])
    kinds = {"sampling": cases, "distiller": distiller_cases}
    assert asked <= {*TARGETS, *kinds}, f"arguments are {[*TARGETS, *kinds]}, got {sys.argv[1:]}"
    wanted = [target for target in TARGETS if target in asked or asked.isdisjoint(TARGETS)]
    kinds = {kind: make for kind, make in kinds.items() if kind in asked or asked.isdisjoint(kinds)}
    start = time.perf_counter()
    work = [case for target in wanted for make in kinds.values() for case in make(target)]
    columns = f"{'registers':>10}{'spills':>8}{'shared':>8}{'load bytes':>12}{'products':>10}"
    print(f"{'target':8}{'kernel':12}{'case':36}{columns}")
    faults, read_logits = [], set()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for lines in pool.map(check, work):
            for line in lines:
                load = "" if line.load_bytes is None else line.load_bytes
                print(
                    f"{line.target:8}{line.kernel:12}{line.case:36}{line.registers:>10}{line.spills:>8}"
                    f"{line.shared:>8}{load:>12}{'' if line.products is None else line.products:>10}",
                    *line.faults(),
                    flush=True,
                )
                faults += line.faults()
                if line.load_bytes is not None:
                    read_logits.add(line.kernel)
        if "distiller" in kinds:
            for target, names in zip(wanted, pool.map(cold, wanted), strict=True):
                print(f"{target}: {len(names)} kernels compiled after warm_up", *sorted(names))
                faults += [f"{name} on {target} compiled after warm_up" for name in names]
    missing = {"block_max", "select", "beyond", "tail"} - read_logits
    if "sampling" in kinds and missing and any(target.startswith("sm") for target in wanted):
        faults.append(f"no load of logits found in {missing}")
    print(f"{len(faults)} faults, {time.perf_counter() - start:.0f} s", *faults[-1:])
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
