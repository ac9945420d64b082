"""Where device time goes: intervals of device work, from torch.profiler.

busy     time in which anything runs
gaps     time in which nothing does: launches, the host
hidden   time of the Distillers' kernels in which something else runs too: it takes no time of the step
exposed  the rest of their time
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
DISTILLER_KERNELS = frozenset(
    f"_{name}_kernel"
    for name in (
        "project",
        "reduce",
        "expand",
        "norm",
        "mix",
        "error",
        "back",
        "gates",
        "settle",
        "update",
        "compare",
        "judge",
    )
)


class Interval(NamedTuple):
    name: str
    stream: int
    start: float  # microseconds
    end: float


def device_intervals(trace: dict[str, Any]) -> list[Interval]:
    """Device work of a Chrome trace as torch.profiler exports it."""
    return [
        Interval(e["name"], int(e["args"]["stream"]), float(e["ts"]), float(e["ts"]) + float(e["dur"]))
        for e in trace["traceEvents"]
        if e.get("ph") == "X" and e.get("cat") in DEVICE_WORK
    ]


def union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time as disjoint spans in order."""
    result: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def length(spans: Sequence[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def overlap(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    """Time covered by both; each is disjoint and in order."""
    return length(a) + length(b) - length(union([*a, *b]))


def breakdown(intervals: Sequence[Interval]) -> dict[str, float]:
    """Microseconds.  By kernel, not by stream: a graph's replay may put a branch on any.  Empty without device work."""
    if not intervals:
        return {}
    learning = union([(i.start, i.end) for i in intervals if i.name in DISTILLER_KERNELS])
    others = union([(i.start, i.end) for i in intervals if i.name not in DISTILLER_KERNELS])
    everything = union([*learning, *others])
    wall, hidden = everything[-1][1] - everything[0][0], overlap(learning, others)
    return {
        "wall_us": wall,
        "busy_us": length(everything),
        "gaps_us": wall - length(everything),
        "distiller_us": length(learning),
        "distiller_hidden_us": hidden,
        "distiller_exposed_us": length(learning) - hidden,
        "streams": float(len({i.stream for i in intervals})),
    }


def kernel_medians(intervals: Sequence[Interval]) -> dict[str, float]:
    """Median microseconds of this project's kernels, by name."""
    times: dict[str, list[float]] = {}
    for i in intervals:
        if i.name.startswith("_") and i.name.endswith("_kernel"):
            times.setdefault(i.name, []).append(i.end - i.start)
    return {name: statistics.median(t) for name, t in times.items()}


def record(work: Callable[[], object]) -> list[Interval]:
    """Run it under the profiler; its device work.  Without a GPU there is none."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds) as profile:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return device_intervals(json.loads(path.read_text(encoding="utf-8", errors="replace")))
