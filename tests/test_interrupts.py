"""An exception or Ctrl-C at any point of the main loop leaves the Explorer usable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from explorer_helpers import PARAMS, logits_of, make, taps
from simulated_lane import SimulatedLane
from torch import Tensor

from esamp_core.explorer.streams import Lane, SerialLane
from esamp_core.sample import CapacityError, DistillerConfig, Draw, Explorer, Rows

CONFIG = DistillerConfig(rank=4, deep_scale=1.0, momentum=0.5)
LANES: dict[str, Callable[[], Lane]] = {"serial": SerialLane, "late": lambda: SimulatedLane(3)}
VERBS = ("open", "predict", "sample", "learn")


def verbs(explorer: Explorer, rows: Rows, number: int) -> list[Callable[[], Draw | None]]:
    shallow, deep = taps(len(rows), number)
    return [
        lambda: explorer.predict(shallow, rows),
        lambda: explorer.sample(logits_of(explorer, deep), rows),
        lambda: explorer.learn(deep, rows),
    ]


def step(explorer: Explorer, rows: Rows, number: int) -> list[Tensor]:
    _, draw, _ = (verb() for verb in verbs(explorer, rows, number))
    assert draw is not None
    return list(draw)


def learned(explorer: Explorer, group: str) -> list[Tensor]:
    state = explorer.state_dict()
    place = [entry["group"] for entry in state["groups"]].index(group)
    return [tensor[place].nan_to_num(-1.0) for tensor in state["tensors"].values()]


def alone(group: str, steps: list[int]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """What a group draws and learns in an Explorer of its own."""
    explorer = make(CONFIG, max_groups=1)
    rows = explorer.open([group] * 3, PARAMS)
    return [step(explorer, rows, number) for number in steps], learned(explorer, group)


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else all(equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("after", VERBS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_between_two_verbs(lane: str, after: str, error: type[BaseException]) -> None:
    """Group b, which takes turns with the group that was interrupted, and group c, which gets its slot: as if alone."""
    explorer = make(CONFIG, max_groups=2, lane=LANES[lane]())
    b, drawn, a = explorer.open(["b"] * 3, PARAMS), [], None
    with pytest.raises(error):
        a = explorer.open(["a"] * 3, PARAMS)
        for number in range(3):
            step(explorer, a, 50 + number)
            drawn.append(step(explorer, b, number))
        for verb in verbs(explorer, a, 53)[: VERBS.index(after)]:
            verb()
        raise error
    with pytest.raises(CapacityError):
        explorer.open(["c"])
    assert a is not None
    explorer.close(a)
    c, drawn_by_c = explorer.open(["c"] * 3, PARAMS), []
    for number in range(3, 6):
        drawn.append(step(explorer, b, number))
        drawn_by_c.append(step(explorer, c, 100 + number))
    assert set(explorer.stats()) == {"b", "c"}
    assert equal((drawn, learned(explorer, "b")), alone("b", [*range(6)]))
    assert equal((drawn_by_c, learned(explorer, "c")), alone("c", [103, 104, 105]))
    explorer.close(b)
    explorer.close(c)
    assert not explorer.stats()


class InterruptedLane(SimulatedLane):
    """Ctrl-C before or after one of its calls."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.calls, self.interrupt_at, self.late = 0, -1, False
        for name in ("stage", "publish", "run", "mark", "wait"):
            setattr(self, name, self._interruptible(getattr(self, name)))

    def _interruptible(self, call: Callable[..., None]) -> Callable[..., None]:
        def interruptible(*args: Any, **kwargs: Any) -> None:
            hit = self.calls == self.interrupt_at
            self.calls += 1
            if hit and not self.late:
                raise KeyboardInterrupt
            call(*args, **kwargs)
            if hit:
                raise KeyboardInterrupt

        return interruptible


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ["close", "keep"])
def test_inside_a_verb(late: bool, how: str) -> None:
    """At every call that a step makes of the second stream: the lesson may be lost, nothing else.  Main never reads or
    writes what is still in use, closing works, and the next group learns as if alone."""
    at, hits = 0, 0
    while True:
        lane = InterruptedLane(at)
        explorer = make(CONFIG, max_groups=1, lane=lane)
        rows = explorer.open(["a"] * 3, PARAMS)
        step(explorer, rows, 0)
        lane.calls, lane.interrupt_at, lane.late = 0, at, late
        try:
            step(explorer, rows, 1)
        except KeyboardInterrupt:
            hits += 1
        else:
            break
        lane.interrupt_at = -1
        if how == "keep":  # without waiting for what is in flight
            rows = rows.keep([0, 1])
            assert all(torch.isfinite(t.double()).all() for t in step(explorer, rows, 2))
            assert explorer.stats()["a"].nonfinite == 0
        explorer.close(rows)
        new = explorer.open(["n"] * 3, PARAMS)
        drawn = [step(explorer, new, number) for number in (5, 6, 7)]
        assert equal((drawn, learned(explorer, "n")), alone("n", [5, 6, 7])), at
        at += 1
    assert hits >= 8
