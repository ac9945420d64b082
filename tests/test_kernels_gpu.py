"""What only a GPU can show: no wait for the device, CUDA graphs that see new values, the real second stream."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from esamp_core.explorer.streams import CudaLane, SerialLane
from esamp_core.sample import DistillerConfig, Draw, Explorer, Head, SamplingParams
from tests.kernel_cases import (
    INTERPRETED,
    ROW_KINDS,
    equal_bits,
    make_head,
    make_params,
    make_rows,
    quick_interpreter,
    to,
)
from tests.test_learner import CONFIGS, run

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from esamp_core.ops import triton_backend  # noqa: E402

# In a rehearsal without a GPU the interpreter has to do it all.
VOCAB, HIDDEN, ROWS = 140 if INTERPRETED else 5003, 64, 2 * len(ROW_KINDS)
REPLAYS = 8 if INTERPRETED else 54


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


def inputs(seed: int) -> list[Any]:
    logits = make_rows(ROW_KINDS * 2, VOCAB, seed, torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 2**62, (2, ROWS), generator=generator)
    active = torch.rand(ROWS, generator=generator) < 0.8
    direction = torch.randn(ROWS, HIDDEN, generator=generator)
    return to("cuda", logits, make_params(seed, ROWS, VOCAB), numbers[0], numbers[1], direction, active)


def step(head: Any, logits: Any, params: Any, seed: Any, position: Any, direction: Any, active: Any) -> Any:
    return triton_backend.explore(
        logits, params, seed, position, direction=direction, head=head, active=active, max_candidates=16
    )


@pytest.fixture
def head() -> Any:
    cpu_head, _ = make_head(VOCAB, HIDDEN, 0)
    return type(cpu_head)(cpu_head.weight.cuda())


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device(head: Any) -> None:
    values = inputs(1)
    step(head, *values)
    with no_waiting():
        step(head, *values)


def test_graph_replay_sees_new_values(head: Any) -> None:
    static = inputs(1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(head, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = step(head, *static)
    for seed in (1, 2, 3):
        for old, new in zip(static, inputs(seed), strict=True):
            pairs = zip(old, new, strict=True) if isinstance(old, tuple) else [(old, new)]
            for a, b in pairs:
                a.copy_(b)
        graph.replay()
        torch.cuda.synchronize()
        assert equal_bits(drawn, step(head, *inputs(seed)))


def test_rows_beyond_32_bit_offsets() -> None:
    """R * V > 2^31: the last rows are read where they are."""
    vocab, rows = 152064, 14200
    if torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 8 GB")
    logits = torch.full((rows, vocab), -5.0, dtype=torch.bfloat16, device="cuda")
    winners = torch.randint(0, vocab, (rows,), device="cuda")
    logits[torch.arange(rows, device="cuda"), winners] = 20.0
    params = make_params(0, rows, vocab, beta=0.0)._replace(temperature=torch.zeros(rows))
    zero = torch.zeros(rows, dtype=torch.int64, device="cuda")
    drawn = triton_backend.explore(logits, *to("cuda", params), zero, zero, max_candidates=8)
    assert torch.equal(drawn.token_ids, winners)


class SleepyLane(CudaLane):
    """The real second stream, kept busy at random in front of its work, so that it is late."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.device("cuda"))
        self._random = random.Random(seed)

    def run(self, work: Callable[[], None], writes: tuple[Tensor, ...] = ()) -> None:
        cycles = self._random.choice((0, 0, 20_000, 400_000))

        def late() -> None:
            if cycles:
                torch.cuda._sleep(cycles)
            work()

        super().run(late, writes)


@pytest.mark.parametrize("name", CONFIGS)
def test_second_stream_equals_serial(name: str) -> None:
    """A random schedule of joins, ends and masks, bit for bit."""
    steps = 6 if INTERPRETED else 1000 if name == "deep" else 200
    serial, serial_state = run(SerialLane(), steps, 0, CONFIGS[name], "cuda")
    late, late_state = run(SleepyLane(0), steps, 0, CONFIGS[name], "cuda")
    for number, (a, b) in enumerate(zip(serial, late, strict=True)):
        assert equal_bits(a, b), number
    for key, tensor in serial_state["tensors"].items():
        assert torch.equal(tensor.nan_to_num(-1.0), late_state["tensors"][key].nan_to_num(-1.0)), key


class Decoding:
    """An Explorer on the device, and memory for the inputs of its steps that stays where it is."""

    rows, hidden, vocab = (9, 32, VOCAB) if INTERPRETED else (24, 320, VOCAB)

    def __init__(self, config: DistillerConfig) -> None:
        weight = torch.randn(self.vocab, self.hidden, generator=torch.Generator().manual_seed(0)) / self.hidden**0.5
        self.explorer = Explorer(Head(weight.bfloat16().cuda()), self.hidden, config, max_groups=4, max_rows=32)
        groups = [*"abc" * ((self.rows - 3) // 3), None, "d", "d"]
        self.open = self.explorer.open(groups, SamplingParams(temperature=0.9, min_p=0.02, beta=0.5, seed=3))
        self.shallow, self.deep = (torch.zeros(self.rows, self.hidden, device="cuda") for _ in range(2))
        self.logits = torch.zeros(self.rows, self.vocab, device="cuda", dtype=torch.bfloat16)

    def fill(self, number: int) -> None:
        """The inputs of one step; some rows are off."""
        generator = torch.Generator().manual_seed(number)
        for tensor in (self.shallow, self.deep, self.logits):
            tensor.copy_(3 * torch.randn(tensor.shape, generator=generator))
        self.open.active.copy_(torch.rand(self.rows, generator=generator) < 0.8)

    def step(self) -> Draw:
        self.explorer.predict(self.shallow, self.open)
        draw = self.explorer.sample(self.logits, self.open)
        self.explorer.learn(self.deep, self.open)
        return draw

    def steps(self, numbers: range) -> list[list[Tensor]]:
        draws = []
        for number in numbers:
            self.fill(number)
            draws.append([column.clone() for column in self.step()])
        return draws


STEP_CONFIGS = {
    "deep": DistillerConfig(rank=16, deep_scale=3.0),
    "measured scale, bfloat16, momentum": DistillerConfig(rank=16, momentum=0.8, weight_dtype=torch.bfloat16),
    "choice": DistillerConfig(rank=16, target="choice"),
    "frozen": DistillerConfig(rank=16, deep_scale=3.0, lr=0.0, gate=False),
}


@pytest.mark.parametrize("name", STEP_CONFIGS)
def test_a_whole_step_never_waits(name: str) -> None:
    decoding = Decoding(STEP_CONFIGS[name])
    decoding.steps(range(3))
    for number in range(3, 6):
        decoding.fill(number)
        with no_waiting():
            decoding.step()


def test_learning_allocates_nothing() -> None:
    decoding = Decoding(STEP_CONFIGS["deep"])
    decoding.steps(range(3))
    learner, rows = decoding.explorer._learner, decoding.open

    def blocks() -> int:
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    before = blocks()
    for _ in range(3):
        learner.predict(decoding.shallow, rows.row_groups, rows.slots, rows.active)
        learner.prediction()
        learner.stage(decoding.deep)
    torch.cuda.synchronize()
    assert blocks() == before


@pytest.mark.parametrize("name", STEP_CONFIGS)
def test_captured_step_equals_eager(name: str) -> None:
    """Predict, sample and learn in one graph, the second stream forked and joined inside: 50 replays, bit for bit, one
    eager step after a look at the statistics among them."""
    eager, captured = Decoding(STEP_CONFIGS[name]), Decoding(STEP_CONFIGS[name])
    want = eager.steps(range(REPLAYS))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = captured.steps(range(3))
    torch.cuda.current_stream().wait_stream(stream)

    learner, graph = captured.explorer._learner, torch.cuda.CUDAGraph()
    steady = learner.host_state
    with torch.cuda.graph(graph, stream=stream):
        drawn = captured.step()
    assert learner.host_state == steady
    for number in range(3, REPLAYS):
        captured.fill(number)
        if number == REPLAYS // 2:
            captured.explorer.stats()
        if learner.host_state == steady:
            graph.replay()
            got.append([column.clone() for column in drawn])
        else:
            assert number == REPLAYS // 2
            got.append([column.clone() for column in captured.step()])
    for number, (a, b) in enumerate(zip(want, got, strict=True)):
        assert equal_bits(tuple(a), tuple(b)), number
    states = [d.explorer.state_dict()["tensors"] for d in (eager, captured)]
    assert all(torch.equal(t.nan_to_num(-1.0), states[1][key].nan_to_num(-1.0)) for key, t in states[0].items())
    captured.explorer.close(captured.open)
    assert not captured.explorer.stats()
