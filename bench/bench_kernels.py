"""Kernel microbenchmarks: every op and the whole step, beside their floors and their peers.

    python -m bench.bench_kernels [--dry] [--quick] [--seconds N] [--done FILE] [--resume] [--out FILE]
    python -m bench.bench_kernels --check CASE

Times are medians over interleaved rounds of CUDA-graph replays from a cold L2, inputs rotating.  ``bytes`` is what an
op must move at the least (each input read once, each output written once, in large); the floor is the larger of bytes
over the copy bandwidth and arithmetic over the matrix rate, both measured in the same run.

A case is timed only if its answers are right on this very device.  All cases are compared with the reference first,
several at a time and each in a process of its own (bench/check_cases.py): that also compiles every kernel into the
shared cache, and a case that crashes takes no other along.  Then they are timed one by one; the file is written after
each.  Where a case breaks the device for this process, it ends with status AGAIN; started again with --resume, it goes
on from the file.
"""

from __future__ import annotations

import argparse
import functools
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import check_cases, peers
from bench.cases import DRY_SHAPE, TARGETS, DistillerCase, SamplingCase, kernel_cases, make_sampling_inputs
from bench.kernel_ops import SETS, Case, Costs, ops
from bench.measure import (
    FLUSH_BYTES,
    Call,
    Clock,
    GraphClock,
    HostClock,
    copy_bandwidth,
    floor_seconds,
    matrix_rate,
    median,
    median_ratio,
    rotate,
    spread,
)
from bench.results import continued, dry_by_environment, load, output_folder, report, save, spoken, unproven
from bench.timeline import kernel_medians, record

AGAIN = 75  # exit status: the device is lost to this process, cases are left
WITH_PEERS = 9  # cases, of the most wanted, that are measured beside their peers
COMPILING = 60.0  # seconds for torch.compile, whose turn comes last


def sampling_peers(case: SamplingCase, device: str) -> dict[str, list[Call]]:
    inputs = make_sampling_inputs(case, device, SETS)
    return {
        f"peer {name}": [functools.partial(sampler, given.logits, given.params) for given in inputs]
        for name, sampler in peers.available().items()
    }


def measure_case(
    case: Case, device: str, clock: Clock, rounds: int, floors: dict[str, float], with_peers: bool
) -> list[dict[str, Any]]:
    """Everything of one case, as rows for the result file."""
    calls, costs = ops(case, device)
    if not with_peers:
        calls = {name: given for name, given in calls.items() if not name.startswith("peer")}
    elif isinstance(case, SamplingCase):
        calls |= sampling_peers(case, device)
    return measure(case, calls, costs, device, clock, rounds, floors)


def measure_compiled(
    case: SamplingCase, device: str, clock: Clock, rounds: int, floors: dict[str, float]
) -> list[dict[str, Any]]:
    """The peer that torch.compile makes, which takes long to make."""
    sampler, inputs = peers.compiled(), make_sampling_inputs(case, device, SETS)
    calls, costs = ops(case, device)
    chosen = {"vanilla": calls["vanilla"]}
    chosen["peer compiled"] = [functools.partial(sampler, given.logits, given.params) for given in inputs]
    rows = measure(case, chosen, costs, device, clock, rounds, floors)
    return [row for row in rows if row["op"] == "peer compiled"]


def measure(
    case: Case, calls: dict[str, list[Call]], costs: Costs, device: str, clock: Clock, rounds: int,
    floors: dict[str, float],
) -> list[dict[str, Any]]:  # fmt: skip
    """Time calls by turns; a row for each."""
    sampling = isinstance(case, SamplingCase)
    rate = floors["bf16_flops" if sampling else "tf32_flops"]
    whole = "explore" if sampling else "distiller_forward"
    rows: list[dict[str, Any]] = []

    def row(name: str, **values: Any) -> None:
        rows.append({"name": f"{case.name}: {name}", "case": case.name, "op": name, **axes(case), **values})

    prepared: dict[str, list[Call]] = {}
    for name, given in calls.items():
        try:
            prepared[name] = [clock.prepare(call) for call in given]
        except Exception as error:
            if not name.startswith("peer"):
                raise
            row(name, failed=f"{type(error).__name__}: {error}"[:200])  # a peer that cannot be captured, say
    times = rotate(prepared, clock, rounds)
    for name, seconds in times.items():
        middle = median(seconds)
        values: dict[str, Any] = {"microseconds": round(middle * 1e6, 3), "spread": round(spread(seconds), 4)}
        if name in costs:
            moved, flops = costs[name]
            floor = floor_seconds(moved, flops, floors["bytes_per_s"], rate)
            values |= {"bytes": moved, "flops": flops, "gb_per_s": round(moved / middle / 1e9, 1)}
            values |= {"of_floor": round(middle / floor, 3)}
        else:
            values |= {"speedup": round(median_ratio(seconds, ours_like(name, times)), 3)}
        for target in TARGETS:
            if target.case == case and target.what == name:
                values |= {"target": target.microseconds}
        if name.startswith("peer"):
            values |= {"graph": clock.captured(prepared[name][0])}
        if name == whole and device == "cuda":
            values |= {"peak_bytes": peak_bytes(calls[name][0])}
        row(name, **values)
    if device == "cuda" and whole in prepared:
        for kernel, microseconds in kernel_times(prepared, clock, (whole, "distiller_step_", "gauge_", "mix")).items():
            scan = {"bytes": case.scan_bytes} if sampling and kernel == "_block_max_kernel" else {}
            row(f"kernel {kernel}", microseconds=round(microseconds, 3), **scan)
    return rows


def ours_like(peer: str, times: dict[str, list[float]]) -> list[float]:
    """Our seconds for the same answer as a peer's.  A peer's step has to run its forward first."""
    if peer == "peer per_row forward and step":
        return [a + b for a, b in zip(times["distiller_forward"], times["distiller_step_"], strict=True)]
    if peer == "peer torch mix":
        return times["mix"]
    return times["distiller_forward" if peer.startswith("peer per_row") else "vanilla"]


def peak_bytes(call: Call) -> int:
    """Most memory that the call held beside its inputs."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def kernel_times(prepared: dict[str, list[Call]], clock: Clock, names: Sequence[str]) -> dict[str, float]:
    """Median microseconds of every kernel that these calls launch, from the profiler."""
    calls = [call for name in names if name in prepared for call in prepared[name] * 3]
    return kernel_medians(record(lambda: clock.seconds(calls)))


def axes(case: Case) -> dict[str, Any]:
    """What plots are drawn over."""
    shared = {"shape": case.shape.name, "V": case.shape.vocab, "H": case.shape.hidden, "R": case.rows}
    if isinstance(case, DistillerCase):
        return shared | {"S": case.slots}
    return shared | {"K": case.top_k, "dtype": str(case.dtype).removeprefix("torch."), "kind": case.kind}


def measure_floors(clock: Clock, device: str, dry: bool) -> dict[str, float]:
    elements, size = (2**12, 32) if dry else (2**29, 8192)
    # Products first: they raise the clocks, at which a copy should run too.
    result = {"bf16_flops": matrix_rate(clock, device, torch.bfloat16, size)}
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        result["tf32_flops"] = matrix_rate(clock, device, torch.float32, size)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    result["bytes_per_s"] = copy_bandwidth(clock, device, elements)
    return result


def dry_cases() -> list[Case]:
    return [
        SamplingCase(DRY_SHAPE, 3, 20, torch.bfloat16),
        SamplingCase(DRY_SHAPE, 2, 20, torch.float32, "clustered"),
        DistillerCase(DRY_SHAPE, 2, 2, rank=4),
    ]


class Results:
    """The result file as it grows."""

    def __init__(self, out: Path, command: str, cases: Sequence[Case], floors: dict[str, float], dry: bool) -> None:
        self.out, self._command, self._cases, self._floors, self._dry = out, command, cases, floors, dry
        self.rows = continued(out, "kernels")
        self.body: dict[str, Any] = {}
        if self.rows:
            self.add([])

    def done(self) -> set[str]:
        return {row["case"] for row in self.rows}

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        skipped = [case.name for case in self._cases if case.name not in self.done()]
        more = {
            "floors": self._floors,
            "skipped": skipped,
            "faults": faults(self.rows),
            "peers_missing": peers.missing(),
        }
        self.body = report("kernels", self._command, self.rows, dry=self._dry, **more)
        save(self.body, self.out)

    def add_failure(self, case: Case, what: str) -> None:
        self.add([{"name": f"{case.name}: failed", "case": case.name, "op": "case", **axes(case), "failed": what}])


def run(
    cases: Sequence[Case], device: str, *, dry: bool, seconds: float, command: str, out: Path,
    wrong: Callable[[Case], str | None],
) -> Results:  # fmt: skip
    """Measure cases in order until the time is up; what fails stays alone.  The file is written after each.

    wrong: what is wrong with a case's answers on this device.  Raises SystemExit(AGAIN) if the device is lost.
    """
    start = time.monotonic()
    clock: Clock = GraphClock(device, 2**12 if dry else FLUSH_BYTES) if device == "cuda" else HostClock()
    floors = measure_floors(clock, device, dry)
    results, rounds = Results(out, command, cases, floors, dry), 3 if dry else 30
    for number, case in enumerate(cases):
        if case.name in results.done():
            continue
        if time.monotonic() - start > seconds:
            break
        if (fault := wrong(case)) is not None:
            results.add_failure(case, f"wrong answers, not timed: {fault}")
            continue
        try:
            results.add(measure_case(case, device, clock, rounds, floors, with_peers=dry or number < WITH_PEERS))
        except Exception as error:
            traceback.print_exc()
            results.add_failure(case, f"{type(error).__name__}: {error}"[:300])
            if is_lost(device):
                raise SystemExit(AGAIN) from error
        print(f"{time.monotonic() - start:6.1f} s  {case.name}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    base = next((case for case in cases if isinstance(case, SamplingCase)), None)
    if base is not None and device == "cuda" and (dry or time.monotonic() - start < seconds - COMPILING):
        results.add(measure_compiled(base, device, clock, rounds, floors))
    return results


def is_lost(device: str) -> bool:
    """Whether nothing more can be done on the device from this process."""
    try:
        torch.zeros(1, device=device).add_(1).cpu()
    except Exception:
        return True
    return False


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """Whole steps that held as much memory as a byte per logit: a temporary as large as the vocabulary."""
    return [
        f"{row['name']} held {row['peak_bytes']} bytes beside its inputs, a byte per logit or more"
        for row in rows
        if row["op"] == "explore" and row["R"] >= 32 and row.get("peak_bytes", 0) >= row["R"] * row["V"]
    ]


def short_table(body: dict[str, Any]) -> str:
    lines = [] if (why := unproven(body)) is None else [f"UNPROVEN: {why}"]
    lines.append(f"{'case':52} {'us':>9} {'floor x':>8} {'GB/s':>7} {'target':>7}")
    for row in body["cases"]:
        numbers = [row.get(k) for k in ("microseconds", "of_floor", "gb_per_s", "target")]
        shown = ["-" if n is None else f"{n:.1f}" for n in numbers]
        lines.append(
            f"{row['name']:52} {shown[0]:>9} {shown[1]:>8} {shown[2]:>7} {shown[3]:>7} {row.get('failed', '')}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, no times kept; also without a GPU")
    parser.add_argument("--quick", action="store_true", help="the cases that have targets only")
    parser.add_argument("--check", metavar="CASE", help="only compare this case with the reference")
    parser.add_argument("--seconds", type=float, default=180.0, help="start no case after this long")
    parser.add_argument("--done", type=Path, action="append", default=[], help="result file whose cases are left out")
    parser.add_argument("--out", type=Path, help="result file; default kernels.json in ESAMP_BENCH_OUT or bench/out")
    parser.add_argument("--resume", action="store_true", help="go on from --out, if this run began it")
    a = parser.parse_args(arguments)
    dry = a.dry or dry_by_environment()
    if not dry and not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing to measure here (--dry runs the same code on tiny shapes)")
    device, start = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic()
    cases = dry_cases() if dry else kernel_cases(a.quick)
    if a.check is not None:
        return check_cases.check_one(next(case for case in cases if case.name == a.check), device)
    finished = {row["case"] for path in a.done for row in load(path)["cases"] if not row.get("failed")}
    cases = [case for case in cases if case.name not in finished]
    out = a.out or output_folder() / "kernels.json"
    if not a.resume:  # a changed tree has the same commit, but not the same numbers
        out.unlink(missing_ok=True)
    command = spoken("bench.bench_kernels", arguments)
    left = [case for case in cases if case.name not in {row["case"] for row in continued(out, "kernels")}]
    wrong = check_cases.check_all([case.name for case in left], dry, a.seconds / 2)
    with torch.no_grad():
        results = run(
            cases, device, dry=dry, seconds=a.seconds - (time.monotonic() - start), command=command, out=out,
            wrong=lambda case: wrong[case.name],
        )  # fmt: skip
    if not results.body:
        raise SystemExit(f"no time for a single case in {a.seconds:.0f} s")
    print(short_table(results.body))
    bad = [f"{row['name']}: {row['failed']}" for row in results.rows if row["op"] == "case"] + results.body["faults"]
    print(*bad, sep="\n")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
