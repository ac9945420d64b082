"""Kernel microbenchmarks: every op and the whole step, beside their floors and their peers.

    python -m bench.bench_kernels [--dry] [--quick] [--tested] [--seconds N] [--out FILE]

Times are medians over interleaved rounds of CUDA-graph replays from a cold L2, inputs rotating.  ``bytes`` is what an
op must move at the least (each input read once, each output written once, in large); the floor is the larger of bytes
over the copy bandwidth and arithmetic over the matrix rate, both measured in the same run.  Nothing is timed unless the
answers are right on this very device: ``--tested`` says that the test suite just passed here; without it each case is
first compared with the reference.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.cases import DRY_SHAPE, TARGETS, DistillerCase, SamplingCase, kernel_cases, make_sampling_inputs
from bench.measure import (
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
from bench.results import output_folder, report, save
from bench.timeline import kernel_medians, record
from esamp_core import reference
from esamp_core.distiller import DistillerBank
from esamp_core.reference_distiller import learning_rates
from esamp_core.sample import (
    DistillerConfig,
    RowParams,
    distiller_forward,
    distiller_step_,
    draw,
    explore,
    group_rows,
    reweight,
    score_candidates,
    select_candidates,
)

Case = SamplingCase | DistillerCase
SETS = 3  # inputs that the rounds rotate through
MAX_CANDIDATES = 256


def sampling_ops(case: SamplingCase, device: str) -> tuple[dict[str, list[Call]], dict[str, tuple[float, float]]]:
    """Calls by name on SETS inputs, and what each must move and compute at the least: (bytes, operations)."""
    calls: dict[str, list[Call]] = {}
    rows, width, hidden = case.rows, MAX_CANDIDATES, case.shape.hidden
    for given in make_sampling_inputs(case, device, SETS):
        select = functools.partial(select_candidates, given.logits, given.params, max_candidates=width)
        found = select()
        score = functools.partial(score_candidates, given.direction, given.head, found.token_ids)
        projection = score()
        weigh = functools.partial(reweight, found, projection, given.params)
        new = weigh()
        options: dict[str, Any] = {"direction": given.direction, "head": given.head, "max_candidates": width}
        codes = torch.linspace(0, 0.999, 2 * rows, dtype=torch.float64, device=device).view(rows, 2)
        for name, call in {
            "select_candidates": select,
            "score_candidates": score,
            "reweight": weigh,
            "draw": functools.partial(draw, found, new, given.logits, given.params, given.seed, given.position),
            "explore": functools.partial(explore, *given[:4], **options),
            "explore, stratified": functools.partial(explore, *given[:4], codes=codes, **options),
            "vanilla": functools.partial(explore, *given[:4], max_candidates=width),
        }.items():
            calls.setdefault(name, []).append(call)
    # The filters leave fewer candidates than top-k allows; how many head rows are gathered is counted, not assumed.
    gathered = int((found.token_ids >= 0).sum())
    listing, heads = rows * width * 12, gathered * hidden * 2
    scan = case.scan_bytes
    moved = {
        "select_candidates": scan + listing,
        "score_candidates": heads + rows * (4 * hidden + 12 * width),
        "reweight": rows * width * 24,
        "draw": scan + listing + rows * width * 8,  # the scan is for base_logprob
        "explore": scan + heads + rows * 4 * hidden,
        "explore, stratified": scan + heads + rows * 4 * hidden,
        "vanilla": scan,
    }
    return calls, {name: (float(size), 2.0 * gathered * hidden * (size > heads)) for name, size in moved.items()}


def sampling_peers(case: SamplingCase, device: str, compile_too: bool) -> dict[str, list[Call]]:
    samplers: dict[str, Callable[..., Tensor]] = {"eager": peers.eager}
    if compile_too:
        samplers["compiled"] = peers.compiled()
    if peers.has_flashinfer():
        samplers["flashinfer"] = peers.flashinfer
    inputs = make_sampling_inputs(case, device, SETS)
    return {
        f"peer {name}": [functools.partial(sampler, given.logits, given.params) for given in inputs]
        for name, sampler in samplers.items()
    }


class DistillerInputs:
    """A bank whose slots have learned a little, rows of it, and the calls."""

    def __init__(self, case: DistillerCase, device: str, seed: int) -> None:
        g = torch.Generator(device).manual_seed(seed)
        hidden, rows = case.shape.hidden, case.rows
        self.config = DistillerConfig(rank=case.rank, deep_scale=1.0)
        bank = DistillerBank(hidden, self.config, case.slots, "error", torch.device(device))
        for slot in range(case.slots):
            bank.reset(slot, slot)
        self.state, self.scale = bank.state, bank.scale
        self.state.weights.down.normal_(0, 0.02, generator=g)
        self.shallow = torch.randn(rows, hidden, generator=g, device=device)
        self.target = torch.randn(rows, hidden, generator=g, device=device)
        self.slots = torch.arange(rows, device=device) % case.slots
        self.groups = group_rows(self.slots, case.slots)
        self.saved = self.forward()
        self.rates = tuple(float(r) for r in learning_rates(self.config, hidden))

    def forward(self) -> Any:
        return distiller_forward(self.shallow, self.groups, self.state.weights, self.scale)

    def step(self) -> None:
        distiller_step_(self.state, self.saved, self.target, self.groups, self.scale, self.config)

    def peer_forward(self) -> peers.PerRow:
        return peers.per_row_forward(self.shallow, self.slots, self.state, self.scale)

    def peer_step(self) -> None:
        peers.per_row_step_(self.state, self.peer_forward(), self.target, self.scale, self.config, self.rates)


def distiller_ops(case: DistillerCase, device: str) -> tuple[dict[str, list[Call]], dict[str, tuple[float, float]]]:
    inputs = [DistillerInputs(case, device, seed) for seed in range(SETS)]
    states = 4 * case.rows * case.shape.hidden
    costs = {
        "distiller_forward": (case.weight_bytes + 2.0 * states, float(case.forward_flops)),
        "distiller_step_": (2.0 * case.weight_bytes + 3.0 * states, float(case.step_flops)),
    }
    calls: dict[str, list[Call]] = {
        "distiller_forward": [i.forward for i in inputs],
        "distiller_step_": [i.step for i in inputs],
        "peer per_row forward": [i.peer_forward for i in inputs],
        "peer per_row forward and step": [i.peer_step for i in inputs],
    }
    return calls, costs


# ---------------------------------------------------------------------------------------------- correctness


def check(case: Case, device: str) -> str | None:
    """What is wrong with the answers on this device, against the reference on the CPU; None if nothing is."""
    if isinstance(case, DistillerCase):
        here, there = DistillerInputs(case, device, 7), DistillerInputs(case, device, 7)
        want = reference.distiller_forward(there.shallow, there.groups, there.state.weights, there.scale)
        error = float((here.saved.pred - want.pred).norm() / want.pred.norm())
        peer = float((here.peer_forward().pred - want.pred).norm() / want.pred.norm())
        here.step()
        reference.distiller_step_(there.state, want, there.target, there.groups, there.scale, there.config)
        step = float((here.state.weights.down - there.state.weights.down).norm() / there.state.weights.down.norm())
        worst = max(error, peer, step)
        return None if worst < 1e-3 else f"relative errors: pred {error:.1e}, peer's pred {peer:.1e}, step {step:.1e}"
    given, n = make_sampling_inputs(case, device, 1)[0], min(case.rows, 8)
    some = [given.logits[:n], RowParams(*(p[:n] for p in given.params)), given.seed[:n], given.position[:n]]
    options: dict[str, Any] = {"direction": given.direction[:n], "head": given.head, "max_candidates": MAX_CANDIDATES}
    got, want_draw = explore(*some, **options), reference.explore(*some, **options)
    if not torch.equal(got.count, want_draw.count):
        return f"candidate counts {got.count.tolist()}, expected {want_draw.count.tolist()}"
    same = got.token_ids == want_draw.token_ids
    if int((~same).sum()) > 1:  # one close call in eight rows may be chance, two are not
        return f"tokens {got.token_ids.tolist()}, expected {want_draw.token_ids.tolist()}"
    error = float((got.logprob - want_draw.logprob)[same].abs().max()) if bool(same.any()) else 1.0
    return None if error < 1e-3 else f"log-probabilities differ by {error:.1e}"


# ---------------------------------------------------------------------------------------------- measuring


def measure_case(
    case: Case, device: str, clock: Clock, rounds: int, floors: dict[str, float], with_peers: bool, compile_too: bool
) -> list[dict[str, Any]]:
    """Everything of one case, as rows for the result file."""
    sampling = isinstance(case, SamplingCase)
    calls, costs = sampling_ops(case, device) if sampling else distiller_ops(case, device)
    if sampling and with_peers:
        calls |= sampling_peers(case, device, compile_too)
    rate = floors["bf16_flops" if sampling else "tf32_flops"]
    whole = "explore" if sampling else "distiller_forward"
    rows: list[dict[str, Any]] = []

    def row(name: str, **values: Any) -> None:
        rows.append({"name": f"{case.name}: {name}", "case": case.name, "op": name, **axes(case), **values})

    prepared: dict[str, list[Call]] = {}
    for name, given in calls.items():
        if name.startswith("peer") and not with_peers:
            continue
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
        if name == whole and device == "cuda":
            values |= {"peak_bytes": peak_bytes(calls[name][0])}
        row(name, **values)
    if device == "cuda" and with_peers:
        for kernel, microseconds in kernel_times(prepared, clock, (whole, "distiller_step_")).items():
            scan = {"bytes": case.scan_bytes} if sampling and kernel == "_block_max_kernel" else {}
            row(f"kernel {kernel}", microseconds=round(microseconds, 3), **scan)
    return rows


def ours_like(peer: str, times: dict[str, list[float]]) -> list[float]:
    """Our seconds for the same answer as a peer's.  A peer's step has to run its forward first."""
    if peer == "peer per_row forward and step":
        return [a + b for a, b in zip(times["distiller_forward"], times["distiller_step_"], strict=True)]
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
    result = {"bytes_per_s": copy_bandwidth(clock, device, elements)}
    result["bf16_flops"] = matrix_rate(clock, device, torch.bfloat16, size)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        result["tf32_flops"] = matrix_rate(clock, device, torch.float32, size)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    return result


def dry_cases() -> list[Case]:
    return [
        SamplingCase(DRY_SHAPE, 3, 20, torch.bfloat16),
        SamplingCase(DRY_SHAPE, 2, 20, torch.float32, "clustered"),
        DistillerCase(DRY_SHAPE, 2, 2, rank=4),
    ]


def run(
    cases: Sequence[Case], device: str, *, dry: bool, tested: bool, seconds: float, command: str, out: Path
) -> dict[str, Any]:
    """Measure cases in order until the time is up; the file is written after each.  SystemExit for a wrong answer."""
    start = time.monotonic()
    clock: Clock = HostClock() if dry else GraphClock(device)
    floors = measure_floors(clock, device, dry)
    checked = "the test suite in the same run" if tested else "every case against the reference"
    rows: list[dict[str, Any]] = []
    done: list[str] = []
    for number, case in enumerate(cases):
        if time.monotonic() - start > seconds:
            break
        if not tested and (wrong := check(case, device)) is not None:
            raise SystemExit(f"{case.name}: {wrong}; no number while the answers are wrong")
        first, some = number == 0 and not dry, dry or number < 4
        rows += measure_case(case, device, clock, 3 if dry else 30, floors, with_peers=some, compile_too=first)
        done.append(case.name)
        print(f"{time.monotonic() - start:6.1f} s  {case.name}", flush=True)
        skipped = [case.name for case in cases if case.name not in done]
        more = {"floors": floors, "checked": checked, "skipped": skipped, "faults": faults(rows)}
        body = report("kernels", command, rows, dry=dry, **more)
        save(body, out)
        if device == "cuda":
            torch.cuda.empty_cache()
    if not done:
        raise SystemExit(f"no time for a single case in {seconds:.0f} s")
    return body


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """Whole steps that held as much memory as a byte per logit: a temporary as large as the vocabulary."""
    return [
        f"{row['name']} held {row['peak_bytes']} bytes beside its inputs, a byte per logit or more"
        for row in rows
        if row["op"] == "explore" and row["R"] >= 32 and row.get("peak_bytes", 0) >= row["R"] * row["V"]
    ]


def short_table(body: dict[str, Any]) -> str:
    lines = [f"{'case':52} {'us':>9} {'floor x':>8} {'GB/s':>7} {'target':>7}"]
    for row in body["cases"]:
        numbers = [row.get(k) for k in ("microseconds", "of_floor", "gb_per_s", "target")]
        shown = ["-" if n is None else f"{n:.1f}" for n in numbers]
        lines.append(
            f"{row['name']:52} {shown[0]:>9} {shown[1]:>8} {shown[2]:>7} {shown[3]:>7} {row.get('failed', '')}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, no times kept")
    parser.add_argument("--quick", action="store_true", help="the cases that have targets only")
    parser.add_argument("--tested", action="store_true", help="the tests passed on this device just now")
    parser.add_argument("--seconds", type=float, default=180.0, help="start no case after this long")
    parser.add_argument("--out", type=Path, help="result file; default kernels.json in ESAMP_BENCH_OUT or bench/out")
    a = parser.parse_args(arguments)
    if not a.dry and not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing to measure here (--dry runs the same code on tiny shapes)")
    cases = dry_cases() if a.dry else kernel_cases(a.quick)
    command = "python -m bench.bench_kernels " + " ".join(arguments if arguments is not None else sys.argv[1:])
    device, out = "cpu" if a.dry else "cuda", a.out or output_folder() / "kernels.json"
    with torch.no_grad():
        body = run(cases, device, dry=a.dry, tested=a.tested, seconds=a.seconds, command=command.strip(), out=out)
    print(short_table(body))
    if body["faults"]:
        raise SystemExit("\n".join(body["faults"]))


if __name__ == "__main__":
    main()
