"""How long a call takes: interleaved variants, rotating inputs, medians.

On a GPU a call is captured in a CUDA graph and its replay is timed by events, with the L2 cache flushed before each.
Elsewhere the host's clock is read around a plain call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]

FLUSH_BYTES = 2**28  # several times an H200's 60 MB of L2


class Clock(Protocol):
    def prepare(self, call: Call) -> Call:
        """Warm the call up; returns what is to be timed."""

    def captured(self, prepared: Call) -> bool:
        """Whether a prepared call is a graph's replay."""

    def seconds(self, calls: Sequence[Call]) -> list[float]:
        """Run prepared calls in this order; the time of each."""


class HostClock:
    """Wall-clock time of plain calls."""

    def __init__(self, now: Callable[[], float] = time.perf_counter, warm_ups: int = 1) -> None:
        self._now, self._warm_ups = now, warm_ups

    def prepare(self, call: Call) -> Call:
        for _ in range(self._warm_ups):
            call()
        return call

    def captured(self, prepared: Call) -> bool:
        return False

    def seconds(self, calls: Sequence[Call]) -> list[float]:
        times = []
        for call in calls:
            start = self._now()
            call()
            times.append(self._now() - start)
        return times


class GraphClock:
    """Device time of a graph's replay, from a cold L2; of a call that waits for the device, which no graph can hold, of
    its plain run, launches included.
    """

    def __init__(self, device: str = "cuda", flush_bytes: int = FLUSH_BYTES) -> None:
        self._flush = torch.empty(flush_bytes, dtype=torch.int8, device=device)

    def prepare(self, call: Call) -> Call:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compile, allocate, settle
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if self._waits(call):
            return call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    def captured(self, prepared: Call) -> bool:
        return getattr(prepared, "__name__", "") == "replay"

    def _waits(self, call: Call) -> bool:
        """A capture that breaks leaves torch's allocator in a bad state, so this is found out before."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def seconds(self, calls: Sequence[Call]) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
        for call, (start, end) in zip(calls, events, strict=True):
            self._flush.zero_()  # also keeps the device busy while the host enqueues what is timed
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]


def interleaved(variants: Mapping[str, Sequence[Call]], clock: Clock, rounds: int) -> dict[str, list[float]]:
    """:func:`rotate` of calls that this prepares."""
    return rotate({name: [clock.prepare(call) for call in calls] for name, calls in variants.items()}, clock, rounds)


def rotate(prepared: Mapping[str, Sequence[Call]], clock: Clock, rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round, all on the same inputs at nearly the same time.

    prepared: for each name the same call on different inputs; round i uses input i, cyclically, and starts with another
    variant each time, so that neither drift nor neighbours favour one.
    """
    names = list(prepared)
    result: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        order = names[i % len(names) :] + names[: i % len(names)]
        times = clock.seconds([prepared[name][i % len(prepared[name])] for name in order])
        for name, seconds in zip(order, times, strict=True):
            result[name].append(seconds)
    return result


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles, relative to the median: a smaller difference is noise."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / middle


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of time / base: what both suffered in a round cancels."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def copy_bandwidth(clock: Clock, device: str, elements: int = 2**29, rounds: int = 30) -> float:
    """Bytes per second, read and written ones counted: the faster of a large copy and of a kernel that adds a number.

    In a replayed graph the copy alone was no ceiling: 2.7 TB/s on an H200, on which a gather reached 3.2.
    """
    source = torch.randn(elements, device=device).bfloat16()
    target = torch.empty_like(source)
    calls: dict[str, list[Call]] = {
        "copy": [lambda: target.copy_(source)],
        "add": [lambda: torch.add(source, 1.0, out=target)],
    }
    times = interleaved(calls, clock, rounds)
    return 2 * source.numel() * source.element_size() / min(map(median, times.values()))


def matrix_rate(clock: Clock, device: str, dtype: torch.dtype, size: int = 4096, rounds: int = 15) -> float:
    """Floating-point operations per second of a large square product of random matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = interleaved({"matmul": [lambda: a @ b]}, clock, rounds)["matmul"]
    return 2 * size**3 / median(times)


def floor_seconds(moved: float, flops: float, bandwidth: float, rate: float) -> float:
    """No version runs faster than its bytes at the copy's bandwidth, nor than its arithmetic at the product's rate."""
    return max(moved / bandwidth, flops / rate)
