"""bench_kernels as pytest-benchmark cases: pytest bench/speed_pytest.py --benchmark-json=speed.json

Every case is checked before it is timed; medians, bytes, rates and ratios to the floor are in ``extra_info``.  Without
a GPU the dry cases run, and no time is kept there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.bench_kernels import dry_cases, measure_case, measure_floors
from bench.cases import SamplingCase, kernel_cases
from bench.kernel_ops import Case, check, ops
from bench.measure import Clock, GraphClock, HostClock
from bench.results import without_times

pytest.importorskip("pytest_benchmark")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(scope="module")
def clock() -> Clock:
    return GraphClock() if GPU else HostClock()


@pytest.fixture(scope="module")
def floors(clock: Clock) -> dict[str, float]:
    return measure_floors(clock, DEVICE, dry=not GPU)


@pytest.mark.parametrize("case", kernel_cases() if GPU else dry_cases(), ids=lambda case: case.name)
@torch.no_grad()
def test_speed(case: Case, clock: Clock, floors: dict[str, float], benchmark: Any) -> None:
    assert check(case, DEVICE) is None
    rows = measure_case(case, DEVICE, clock, 30 if GPU else 3, floors, with_peers=True)
    benchmark.extra_info["floors"] = floors if GPU else None
    benchmark.extra_info["ops"] = rows if GPU else without_times(rows)
    # What pytest-benchmark itself times is an ordinary call, host and launches included.
    calls, _ = ops(case, DEVICE)
    whole = calls["explore" if isinstance(case, SamplingCase) else "distiller_forward"][0]

    def call() -> None:
        whole()
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
