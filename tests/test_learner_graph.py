"""A step of the learner allocates nothing, and may be captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from explorer_helpers import HIDDEN, PARAMS, VOCAB, make
from simulated_graph import SimulatedGraph, like_cuda
from torch import Tensor

from esamp_core.base.errors import StateError
from esamp_core.explorer.learner import Learner
from esamp_core.sample import Activations, DistillerConfig, Explorer, Rows, Status
from tests.kernel_cases import equal_bits, quick_interpreter

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

ROWS, STEPS = 4, 7
Results = tuple[Tensor, ...]  # of a step: a Draw, or the prediction


def make_mixing(config: DistillerConfig) -> Explorer:
    return Explorer(None, HIDDEN, config, max_groups=4, max_rows=32, device="cpu")


CONFIGS = {
    "gated": DistillerConfig(rank=4, deep_scale=1.0),
    "deep": DistillerConfig(rank=4, deep_scale=1.0, gate=False),
    "measured scale, bfloat16, momentum": DistillerConfig(
        rank=4, momentum=0.8, weight_dtype=torch.bfloat16, gate=False
    ),
    "choice": DistillerConfig(rank=4, target="choice"),
    "frozen": DistillerConfig(rank=4, deep_scale=1.0, lr=0.0, gate=False),
}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESAMP_BACKEND", "triton")
    like_cuda(monkeypatch, kernels=False)  # the kernels are torch ops: all that they do is recorded


class Run:
    """An Explorer, and memory for the inputs of its steps that stays where it is."""

    def __init__(self, config: DistillerConfig, samples: bool = True, mixes: bool = False) -> None:
        self.samples = samples  # or only predicts, which the interpreter does faster
        self.mixes = mixes
        self.explorer: Explorer = make(config) if not mixes else make_mixing(config)
        self.rows: Rows = self.explorer.open(["a", "b", None, "a"], PARAMS)
        self.shallow, self.deep = torch.zeros(ROWS, HIDDEN), torch.zeros(ROWS, HIDDEN)
        self.logits, self.mixed = torch.zeros(ROWS, VOCAB), torch.zeros(ROWS, HIDDEN)

    def fill(self, number: int) -> None:
        """The inputs of one step; some rows are off."""
        generator = torch.Generator().manual_seed(number)
        for tensor in (self.shallow, self.deep, self.logits):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        self.rows.active.copy_(torch.rand(ROWS, generator=generator) < 0.8)

    def step(self) -> Results:
        self.explorer.predict(self.shallow, self.rows)
        results: Results
        if self.mixes:
            results = (self.explorer.mix(self.deep, self.rows, self.mixed).clone(), self.rows.status.clone())
        elif self.samples:
            results = self.explorer.sample(self.logits, self.rows)
        else:
            results = (self.explorer._learner.prediction().clone(),)
        self.explorer.learn(self.deep, self.rows)
        return results

    def eager(self, numbers: range) -> list[Results]:
        draws = []
        for number in numbers:
            self.fill(number)
            draws.append(self.step())
        return draws


def capture(step: Callable[[], Results | None]) -> tuple[SimulatedGraph, Results | None]:
    """A step that is recorded, and not yet done; its results, which every replay overwrites."""
    graph, results = SimulatedGraph(), []
    graph.capture(lambda: results.append(step()))
    return graph, results[0]


def record(run: Run, eager: int = 3) -> tuple[list[Results], SimulatedGraph, Results]:
    """A few steps as they come, and the next one captured."""
    draws = run.eager(range(eager))
    before = run.explorer._learner.host_state
    graph, drawn = capture(run.step)
    assert drawn is not None and run.explorer._learner.host_state == before
    return draws, graph, drawn


def replayed(run: Run, between: Callable[[int], bool] = lambda number: False) -> list[Results]:
    """STEPS steps, the first ones eager, the later ones replayed; between: whether a step must be an eager one."""
    draws, graph, drawn = record(run)
    for number in range(len(draws), STEPS):
        if between(number):
            draws += run.eager(range(number, number + 1))
        else:
            run.fill(number)
            graph.replay()
            draws.append(tuple(column.clone() for column in drawn))
    return draws


def same(a: Run, b: Run) -> bool:
    x, y = (run.explorer.state_dict()["tensors"] for run in (a, b))
    return all(torch.equal(t.nan_to_num(-1.0), y[key].nan_to_num(-1.0)) for key, t in x.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_replay_is_the_eager_step_bit_for_bit(name: str) -> None:
    """Inputs and active mask change from step to step."""
    plain, captured = (Run(CONFIGS[name], samples=name != "frozen") for _ in range(2))
    for number, (a, b) in enumerate(zip(plain.eager(range(STEPS)), replayed(captured), strict=True)):
        assert equal_bits(a, b), number
    updates = [g.updates for g in plain.explorer.stats().values()]
    assert updates == [g.updates for g in captured.explorer.stats().values()]
    assert all(u >= STEPS - 2 for u in updates) or name == "frozen"
    assert same(plain, captured)


@pytest.mark.parametrize("name", ["deep", "measured scale, bfloat16, momentum", "frozen"])
def test_a_step_that_mixes_is_replayed_bit_for_bit(name: str) -> None:
    """The LayerNorm that predict leaves to mix is within the capture, and so are flags, which add up."""

    class Faulty(Run):
        def fill(self, number: int) -> None:
            super().fill(number)
            if number == STEPS - 1:
                self.deep[1, 2] = float("nan")
                self.rows.active[1] = True

    plain, captured = (Faulty(CONFIGS[name], mixes=True) for _ in range(2))
    for number, (a, b) in enumerate(zip(plain.eager(range(STEPS)), replayed(captured), strict=True)):
        assert equal_bits(a, b), number
    assert captured.rows.status.tolist() == [0, int(Status.NONFINITE_NOVELTY), 0, 0] and same(plain, captured)


def test_a_look_in_between_asks_for_an_eager_step() -> None:
    """stats() enqueues what was staged: the host's state tells that a replay would teach it twice."""
    plain, captured = Run(CONFIGS["deep"], samples=False), Run(CONFIGS["deep"], samples=False)
    steady: list[object] = []

    def look(number: int) -> bool:
        learner = captured.explorer._learner
        steady.append(learner.host_state)
        if number == 5:
            captured.explorer.stats()
        return learner.host_state != steady[0]

    draws = replayed(captured, look)
    assert all(equal_bits(a, b) for a, b in zip(plain.eager(range(STEPS)), draws, strict=True))
    assert len(set(steady)) == 1 and same(plain, captured)


def test_recording_notices_memory_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: activations in fresh memory at every step, as good as any other while nothing is replayed."""
    plain, captured, moving = (Run(CONFIGS["deep"], samples=False) for _ in range(3))
    forward = Learner._forward

    def elsewhere(learner: Learner, rows: int) -> None:
        if learner is not plain.explorer._learner:
            learner._kept = Activations.empty(32, HIDDEN, 4, torch.device("cpu"))
        forward(learner, rows)

    monkeypatch.setattr(Learner, "_forward", elsewhere)
    want = plain.eager(range(STEPS))
    assert all(equal_bits(a, b) for a, b in zip(want, moving.eager(range(STEPS)), strict=True))
    assert not all(equal_bits(a, b) for a, b in zip(want, replayed(captured), strict=True))


@pytest.mark.parametrize("name", ["deep", "choice"])
def test_a_step_allocates_nothing(name: str) -> None:
    """Views, copies into buffers, and the two ops: nothing that makes a tensor."""
    run = Run(CONFIGS[name])
    run.eager(range(2))
    learner = run.explorer._learner
    target = torch.zeros(ROWS, dtype=torch.int64) if name == "choice" else run.deep

    def step() -> None:
        learner.predict(run.shallow, run.rows.row_groups, run.rows.slots, run.rows.active)
        learner.prediction()
        learner.stage(target)

    graph, _ = capture(step)
    assert graph.names >= {"esamp.distiller_forward", "esamp.distiller_step", "aten.copy_"}
    views = {"aten.slice", "aten.detach", "aten.alias", "aten.view"}
    assert graph.names <= views | {"esamp.distiller_forward", "esamp.distiller_step", "aten.copy_"}


def test_only_a_step_like_the_one_before_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(CONFIGS["measured scale, bfloat16, momentum"])
    learner = run.explorer._learner
    capturing: list[bool] = []
    monkeypatch.setattr(Learner, "_captured", property(lambda self: bool(capturing)))

    def refused(rows: Rows) -> bool:
        capturing.append(True)
        state = learner.host_state
        try:
            learner.predict(run.shallow, rows.row_groups, rows.slots, rows.active)
        except StateError as error:
            assert "only after a whole step" in str(error) and learner.host_state == state
            return True
        finally:
            capturing.clear()
        return False

    assert refused(run.rows)  # the first step
    run.eager(range(1))
    assert refused(run.rows)  # the learning would measure the scale
    run.eager(range(1, 2))
    run.explorer.stats()
    assert refused(run.rows)  # nothing is staged
    run.eager(range(2, 3))
    run.rows = run.rows.keep(range(ROWS))
    assert refused(run.rows)  # their groups are not in place
    run.eager(range(3, 4))
    assert not refused(run.rows)
