"""`make check-kernels`: compile every kernel, with every tuning configuration, for GPUs that are not here.

bench/compile_only.py says how.  Rows are 16-aligned.  Fails on

- any register spill,
- more shared memory than a program of the target may have,
- on NVIDIA, a load of logits narrower than 16 bytes per thread (all tiles are read by one line of
  kernels/sampling/row.py),
- a product of the Distiller's matrices that is not on tensor cores, or not in the precision it asks for,
- a kernel of the Distiller that a step compiles though warm_up has run.

Arguments: names of targets (sm_90, ...), and "sampling" or "distiller" for these kernels only.  Default all.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.compile_only import (
    TARGETS,
    DistillerCase,
    Launch,
    code_size,
    compiling,
    launch_distiller,
    resources,
)
from bench.sass import SHARED_LIMIT, programs_at_once
from esamp_core.kernels import warm_up
from esamp_core.kernels.sampling import ops, row
from esamp_core.kernels.tuning import TABLE, Config, Layout, config_for

HIDDEN, VOCAB = 3584, 152064
# The Distiller's kernels that multiply matrices, and what tl.dot must become: by dtype of the weights.
MULTIPLY = {"project", "expand", "back", "update"}
PRODUCTS = {
    "sm": {torch.float32: r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*tf32", torch.bfloat16: r"(?:mma\.sync|"
           r"wgmma\.mma_async)\S*\.bf16\.bf16|tcgen05\.mma\S*f16"},
    "gf": {torch.float32: r"v_mfma_f32_\w+x\d_?f32", torch.bfloat16: r"v_mfma_f32_\w+_?bf16"},
}  # fmt: skip


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


@dataclasses.dataclass
class Line:
    target: str
    kernel: str
    case: str
    registers: int
    spills: int
    shared: int
    load_bytes: int | None  # the narrowest load of logits, per thread
    threads: int
    instructions: int  # in its code, each once; what is executed, `make roofline` counts
    logits: int | None  # that a program reads
    products: int | None = None  # matrix products on tensor cores

    @property
    def per_logit(self) -> float | None:
        """Instructions of a thread, all its code once, per logit."""
        return None if self.logits is None else self.instructions * self.threads / self.logits

    @property
    def resident(self) -> int:
        return programs_at_once(self.target, self.threads, self.registers, self.shared)

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


def products(case: DistillerCase, kernel: Any) -> int:
    """Tensor-core instructions of the precision that the weights' dtype asks for, and no others."""
    text = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
    found = re.findall(r"(?:mma\.sync\.|wgmma\.mma_async\.|tcgen05\.mma\.|v_mfma_)\S+", text)
    wanted = [name for name in found if re.match(PRODUCTS[case.target[:2]][case.dtype], name)]
    return len(wanted) if wanted == found else 0


def launch_sampling(case: Case) -> None:
    """The kernels of `explore`, of the ops that it is fused from, and of siblings drawn without replacement."""
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
    # On the second pass a mask, the model's own logits, all that a head can have, and stratified rows.
    plain, full = (None, None, None, 1.0, None, None), (codes, bias, center, 0.5, 30.0, 3.0)
    for mask, model, (used, *extras) in ((None, None, plain), (active, logits, full)):
        ops.explore_triton(
            logits, *params, number, number, used, mask, model, direction, weight, *extras, first_id=0,
            model_weight=1.0, neutral=True, width=case.width, vllm=case.vllm,
        )  # fmt: skip
    chosen = torch.empty(rows, case.width)
    ids = torch.empty(rows, case.width, dtype=torch.int64)
    status = torch.empty(rows, dtype=torch.int32)
    ops.reweight_triton(ids, chosen, status, chosen, one, one, None, 1.0, True, config)
    scan = ops.block_max_triton(logits, None, None, None, config, log_sum=True)
    tail = ops.tail_triton(logits, one, number, number, ids, chosen, one, number, status, config)
    ops.draw_triton(
        ids, chosen, number, status, logits, scan, tail, one, one, number, number, config, new=chosen, novelty=chosen
    )
    for children in (4, 64, 1024):
        config = config_for(case.target, case.vocab, 0, max(case.width, children), case.dtype.itemsize)
        ops.children_triton(
            ids, chosen, one, number, status, chosen, chosen, logits, one, number, number, number, one, one, config,
            width=children,
        )  # fmt: skip


def compiled_by(case: Case | DistillerCase) -> list[Launch]:
    """What the launchers compile for a case, each once."""
    with compiling(case.target) as found:
        if isinstance(case, DistillerCase):
            launch_distiller(case)
        else:
            launch_sampling(case)
    return list({launch.kernel.hash: launch for launch in found}.values())


def cold(target: str) -> set[str]:
    """Kernels of the Distiller that steps of some number of rows and slots compile, though warm_up has run."""
    missing = set()
    for dtype in (torch.float32, torch.bfloat16):
        with compiling(target) as warm:
            weight, center = torch.empty(VOCAB, 256, dtype=torch.bfloat16), torch.empty(256)
            warm_up.warm_up_distiller(256, 16, dtype, True, weight, center, device="meta", mixed_dtype=torch.bfloat16)
        for rows, slots in ((1, 1), (2, 16), (16, 32), (37, 48), (512, 5)):
            with compiling(target) as found:
                launch_distiller(DistillerCase(target, 256, 16, dtype, extras=True, rows=rows, slots=slots))
            hashes = {launch.kernel.hash for launch in warm}
            missing |= {launch.name for launch in found if launch.kernel.hash not in hashes}
    return missing


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
    for name, kernel, _ in compiled_by(case):
        registers, spills = resources(case.target, kernel)
        load_bytes = narrowest_load(kernel.asm["llir"]) if "ptx" in kernel.asm else None
        shared, warp = kernel.metadata.shared, 64 if case.target.startswith("gfx") else 32
        threads = warp * kernel.metadata.num_warps
        logits = None
        if name == "block_max":
            layout = Layout.of(case.vocab, case.config)
            logits = layout.block * layout.split_blocks
        line = Line(
            case.target, name, str(case), registers, spills, shared, load_bytes, threads, code_size(kernel), logits
        )
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
    columns = f"{'threads':>8}{'registers':>10}{'spills':>8}{'shared':>8}{'per SM':>8}{'code':>8}{'per logit':>10}"
    columns += f"{'load bytes':>12}{'products':>10}"
    print(f"{'target':8}{'kernel':12}{'case':36}{columns}")
    faults, read_logits = [], set()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for lines in pool.map(check, work):
            for line in lines:
                load = "" if line.load_bytes is None else line.load_bytes
                per_logit = "" if line.per_logit is None else f"{line.per_logit:.0f}"
                print(
                    f"{line.target:8}{line.kernel:12}{line.case:36}{line.threads:>8}{line.registers:>10}{line.spills:>8}"
                    f"{line.shared:>8}{line.resident:>8}{line.instructions:>8}{per_logit:>10}"
                    f"{load:>12}{'' if line.products is None else line.products:>10}",
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
    missing = {"block_max", "select", "beyond", "tail", "children"} - read_logits
    if "sampling" in kinds and missing and any(target.startswith("sm") for target in wanted):
        faults.append(f"no load of logits found in {missing}")
    print(f"{len(faults)} faults, {time.perf_counter() - start:.0f} s", *faults[-1:])
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
