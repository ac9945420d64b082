"""Ctrl-C at every line of a verb: it has happened or it has not, and nothing is lost for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from explorer_helpers import make, step, taps
from interrupts import InterruptAt, interrupted

from esamp_core.sample import ArgumentError, CapacityError, DistillerConfig, Explorer, Rows, SamplingParams, StateError

GROUPS = 4
CONFIG = DistillerConfig(rank=2, deep_scale=1.0, momentum=0.5)


def params(seed: int, **others: Any) -> SamplingParams:
    return SamplingParams(seed=seed, beta=0.5, **others)


@dataclass
class World:
    """An Explorer with two groups that have begun, one that is idle, and one free slot."""

    explorer: Explorer = field(default_factory=lambda: make(CONFIG, max_groups=GROUPS, max_rows=16, on_full="evict"))
    a: Rows = field(init=False)
    b: Rows = field(init=False)

    def __post_init__(self) -> None:
        ex = self.explorer
        idle = ex.open(["idle"], params(9), retain=True)
        self.a, self.b = ex.open(["a"] * 2, params(1)), ex.open(["b", None], params(2))
        for rows in (idle, self.a, self.b):
            step(ex, rows)
        ex.close(idle)

    def after(self, *held: Rows) -> list[object]:
        """What comes of these rows in the next steps, the books, and what the idle group has learned, as bits."""
        found: list[object] = [step(self.explorer, rows, 3)[0].tolist() for rows in held]
        found.append(
            {g: (lease.retain, lease.next_sample_index, n) for g, (lease, n) in self.explorer.ledger.leases.items()}
        )
        state = self.explorer.state_dict()
        for place, entry in enumerate(state["groups"]):
            tensors = {k: t[place].double().nan_to_num(-1.0).flatten().tolist() for k, t in state["tensors"].items()}
            tensors.pop("seed")  # of a group without a seed a fresh one
            found.append((entry["group"], tensors))
        return found

    def close_all(self, *held: Rows) -> None:
        """The caller can close all that it holds; then every row and slot can be had again."""
        for rows in held:
            self.explorer.close(rows)
        assert self.explorer.open_rows == 0
        assert {g for g, (_, rows) in self.explorer.ledger.leases.items() if rows} == set()
        names = [f"n{i}" for i in range(GROUPS)]
        with self.explorer.open(names + [None] * (16 - GROUPS), params(3)) as rows:
            step(self.explorer, rows)
            assert [s.updates for s in self.explorer.stats().values()] == [1] * GROUPS
        assert self.explorer.open_rows == 0 and not self.explorer.stats()


# Each: what is called, and what the caller holds where it has not happened; where it has, what it returns and the rest.
Verb = Callable[[World], Any]
VERBS: dict[str, tuple[Verb, Callable[[World], list[Rows]], Callable[[World, Any], list[Rows]]]] = {
    "open": (
        lambda w: w.explorer.open(["c", "c", None], params(3, min_p=0.1)),
        lambda w: [w.a, w.b],
        lambda w, new: [w.a, w.b, new],
    ),
    "open of a group that goes on": (
        lambda w: w.explorer.open(["idle", "a"], params(3), retain=True),
        lambda w: [w.a, w.b],
        lambda w, new: [w.a, w.b, new],
    ),
    "open that evicts": (
        lambda w: w.explorer.open(["c", "d"], params(3)),
        lambda w: [w.a, w.b],
        lambda w, new: [w.a, w.b, new],
    ),
    "keep": (lambda w: w.a.keep([1]), lambda w: [w.a, w.b], lambda w, new: [new, w.b]),
    "keep none": (lambda w: w.a.keep([]), lambda w: [w.a, w.b], lambda w, new: [new, w.b]),
    "add": (lambda w: w.a + w.b, lambda w: [w.a, w.b], lambda w, new: [new]),
    "close": (lambda w: w.explorer.close(w.a), lambda w: [w.a, w.b], lambda w, _: [w.b]),
    "end": (lambda w: w.a.end(), lambda w: [w.a, w.b], lambda w, _: [w.b]),
    "spread": (lambda w: w.a.spread([1, -1, 0]), lambda w: [w.a, w.b], lambda w, _: [w.a, w.b]),
    "stats": (lambda w: w.explorer.stats(), lambda w: [w.a, w.b], lambda w, _: [w.a, w.b]),
    "state_dict": (lambda w: w.explorer.state_dict(), lambda w: [w.a, w.b], lambda w, _: [w.a, w.b]),
}


# Of these every third line: they run through code that others have at every line.
LIKE_OTHERS = {"open of a group that goes on", "open that evicts", "keep none", "end", "spread", "stats", "state_dict"}


@pytest.mark.parametrize("name", VERBS)
def test_what_changes_rows_and_slots(name: str) -> None:
    """Interrupted at any line, it has not happened: what follows has the same bits, and so has the verb, repeated."""
    verb, before, held_after = VERBS[name]
    untouched = World()
    want_before = untouched.after(*before(untouched))
    done = World()
    want_after = done.after(*held_after(done, verb(done)))
    made: list[World] = []

    def again(_: int) -> Callable[[], object]:
        made.append(World())
        return lambda: verb(made[-1])

    lines = 0
    every = 3 if name in LIKE_OTHERS else 1
    for lines, where in enumerate(interrupted(again, "/explorer/", every), 1):
        world = made.pop()
        if lines % 2:
            assert world.after(*before(world)) == want_before, where
            world.close_all(*before(world))
        else:
            held = held_after(world, verb(world))
            assert world.after(*held) == want_after, where
            world.close_all(*held)
        made.clear()
    assert lines >= 10


STEPS: dict[str, Callable[[World, Rows], object]] = {
    "candidates": lambda w, rows: step(w.explorer, rows, 5),
    "latent": lambda w, rows: mixed_step(w.explorer, rows, 5),
}


def mixed_step(explorer: Explorer, rows: Rows, seed: int) -> None:
    shallow, deep = taps(len(rows), seed)
    explorer.predict(shallow, rows)
    assert explorer.head is not None
    explorer.sample(explorer.mix(deep, rows) @ explorer.head.weight.T, rows)
    explorer.learn(deep, rows)


@pytest.mark.parametrize(
    ("name", "room", "every"), [("candidates", "/explorer/", 1), ("candidates", "/reference/", 5), ("latent", "", 7)]
)
def test_a_step(name: str, room: str, every: int) -> None:
    """The lesson and the draw may be lost; no row or slot is, groups of other rows never see it, and nothing is NaN."""
    other = World()
    want = [step(other.explorer, other.b, seed)[0].tolist() for seed in (6, 7)]
    made: list[World] = []

    def again(_: int) -> Callable[[], object]:
        made.append(World())
        return lambda: STEPS[name](made[-1], made[-1].a)

    lines = 0
    for lines, where in enumerate(interrupted(again, room, every), 1):
        world = made.pop()
        a = world.a.keep([0, 1]) if lines % 2 else world.a  # replaced, or closed below
        if lines % 2:
            draw = step(world.explorer, a, 8)
            assert torch.isfinite(draw.logprob).all() and (draw.status == 0).all(), where
            world.explorer.close(a)
            assert [step(world.explorer, world.b, seed)[0].tolist() for seed in (6, 7)] == want, where
            assert all(s.nonfinite == 0 for s in world.explorer.stats().values()), where
            world.close_all(world.b)
        else:
            world.close_all(a, world.b)
        made.clear()
    assert lines >= 100


def test_distinct_siblings_are_never_half_moved() -> None:
    """Where branch is cut short its rows have changed places whole, or not at all."""

    def start() -> tuple[Explorer, Rows]:
        explorer = make(CONFIG)
        rows = explorer.open(["a"] * 4, params(1, distinct=True))
        for seed in range(2):
            branch(explorer, rows, seed)
        return explorer, rows

    def branch(explorer: Explorer, rows: Rows, seed: int) -> None:
        assert explorer.head is not None
        shallow, deep = taps(len(rows), seed)
        explorer.predict(shallow, rows)
        explorer.branch(deep @ explorer.head.weight.T, rows)
        explorer.learn(deep, rows)

    def look(rows: Rows) -> list[list[float]]:
        columns = (rows.positions, rows.seeds, rows.active, *rows.tree)
        return [column.double().tolist() for column in columns]

    explorer, rows = start()
    before = look(rows)
    branch(explorer, rows, 2)
    after = look(rows)
    made: list[tuple[Explorer, Rows]] = []

    def again(_: int) -> Callable[[], object]:
        made.append(start())
        return lambda: branch(*made[-1], 2)

    seen = set()
    for where in interrupted(again, "/explorer/"):
        explorer, rows = made.pop()
        assert look(rows) in (before, after), where
        seen.add(look(rows) == after)
        explorer.close(rows)
        assert explorer.open_rows == 0
    assert seen == {False, True}


def test_load_is_all_or_nothing() -> None:
    saved = World().explorer.state_dict()  # its rows are gone: the idle group and those of others are in it
    assert saved["groups"]
    made: list[Explorer] = []

    def again(_: int) -> Callable[[], object]:
        made.append(make(CONFIG, max_groups=GROUPS))
        return lambda: made[-1].load_state_dict({**saved, "scale": torch.tensor(2.5)})

    for where in interrupted(again):
        explorer = made.pop()
        assert not explorer.stats() and float(explorer.state_dict()["scale"]) == 1.0, where
        explorer.load_state_dict(saved)
        assert float(explorer.state_dict()["scale"]) == float(saved["scale"])
        assert set(explorer.stats()) == {entry["group"] for entry in saved["groups"]}


def test_rows_that_nobody_holds_are_closed() -> None:
    """So an interrupt between a verb and its assignment, where no code of ours runs, loses nothing either."""
    explorer = make(CONFIG, max_groups=2, max_rows=3)
    for number in range(20):
        explorer.open([f"g{number}", "other", None], params(number))
    assert explorer.open_rows == 0 and not explorer.stats()
    rows = explorer.open(["a"], params(1))
    with pytest.raises(CapacityError):
        explorer.open(["b", "c"], params(1))
    rows.keep([0])  # and lost: the rows that it was made from are outdated
    assert explorer.open_rows == 0
    rows.end()
    with pytest.raises(StateError, match="closed, or replaced"):
        explorer.close(rows)


def test_a_context_closes_what_its_rows_have_become() -> None:
    explorer = make(CONFIG, max_groups=3)
    with pytest.raises(ZeroDivisionError), explorer.open([]) as batch:
        for number in range(3):
            batch = batch + explorer.open([f"g{number}"] * 2, params(number))
            step(explorer, batch)
        batch = batch.keep([5, 0, 2])
        assert explorer.open_rows == 3
        raise ZeroDivisionError
    assert explorer.open_rows == 0 and not explorer.stats()
    with explorer.open(["a"], params(1)) as rows:
        explorer.close(rows)  # may be closed before
    with explorer.open(["a"], params(1)) as first, explorer.open(["b"], params(1)) as second:
        joined = second + first
        assert first.latest is joined and second.latest is joined
        joined = joined.keep([1])
        assert joined.groups == ["a"]
    assert explorer.open_rows == 0 and first.latest is None


def test_added_to_each_other_in_both_orders_after_an_interrupt() -> None:
    """Which Rows the others went into is only written down for good with the commit."""
    for number in (1, 2, 5, 10, 20, 40):
        world = World()
        with InterruptAt(number), pytest.raises(KeyboardInterrupt):
            world.a + world.b
        joined = world.b + world.a
        assert world.a.latest is joined and world.b.latest is joined
        world.explorer.close(joined)
        assert world.a.latest is None and world.b.latest is None


@pytest.mark.parametrize(
    "given",
    [
        {"position": 2**63},
        {"position": [2**62]},
        {"position": -1},
        {"position": [0, 0]},
        {"position": "0"},
        {"sample_index": [2**63]},
        {"sample_index": [2**70]},
        {"sample_index": [-1]},
        {"sample_index": ["0"]},
        {"sample_index": 0},
        {"sample_index": [True]},
        {"sets": [[1]]},
        {"sets": [[1]], "params": SamplingParams(seed=1, stratified=True)},
        {"sets": ["s", "t"]},
        {"params": [SamplingParams(), SamplingParams()]},
        {"params": ["p"]},
        {"params": SamplingParams(stratified=True), "position": 3},
    ],
)
def test_an_open_that_is_refused_opens_nothing(given: dict[str, Any]) -> None:
    explorer = make(CONFIG, max_groups=1, max_rows=1)
    with pytest.raises(ArgumentError):
        explorer.open(["g"], **given)
    assert explorer.open_rows == 0 and not explorer.stats()
    for groups in ([["unhashable"]], [{}], "g", 5):
        with pytest.raises(ArgumentError):
            explorer.open(groups, params(1))  # type: ignore[arg-type]
    with explorer.open(["h"], params(1)) as rows:
        step(explorer, rows)


def test_sample_indices_stop_before_they_overflow() -> None:
    explorer = make(CONFIG)
    rows = explorer.open(["g"], params(1), sample_index=[2**62 - 1], retain=True)
    with pytest.raises(ArgumentError, match="sample_index must be below"):
        explorer.open(["g"], params(1))
    explorer.close(rows)
    other = make(CONFIG)
    other.load_state_dict(explorer.state_dict())  # what was counted so far can be kept


def test_adding_outdated_rows_changes_nothing() -> None:
    world = World()
    stale, b = world.b, world.b.keep([0])
    for left, right in ((world.a, stale), (stale, world.a)):
        with pytest.raises(StateError):
            left + right
    assert world.a.current and b.current
    world.close_all(world.a, b)


@pytest.mark.parametrize("fails", ["grouped", "fill", "tree"])
def test_memory_that_runs_out_while_rows_are_made(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is allocated before the books change."""
    from esamp_core.explorer import rows as module

    world = World()
    before = world.explorer.ledger.books

    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("simulated")

    name = {"grouped": "group_rows", "fill": "starting_codes", "tree": "families_of"}[fails]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            world.explorer.open(["c", "d"], params(3))
        if fails != "fill":
            for verb in (lambda: world.a.keep([0]), lambda: world.a + world.b):
                with pytest.raises(torch.OutOfMemoryError):
                    verb()
    assert world.explorer.ledger.books is before
    world.close_all(world.a, world.b)
