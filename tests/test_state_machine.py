"""Groups never see each other: any schedule of a batch gives each group the bits of running alone."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_lane import SimulatedLane

from esamp_core.explorer.streams import SerialLane
from esamp_core.sample import CapacityError, DistillerConfig, Draw, Explorer, Head, Rows, SamplingParams

HIDDEN, VOCAB = 12, 40
WEIGHT = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))
GROUPS = [f"g{i}" for i in range(8)]


def noise(*key: object, size: int) -> torch.Tensor:
    """A tensor that depends on the key alone."""
    return torch.randn(size, generator=torch.Generator().manual_seed(zlib.crc32(repr(key).encode())))


def params_of(group: str) -> SamplingParams:
    number = GROUPS.index(group)
    beta = [0.25, 1.0, 0.0, 0.5][number % 4]
    return SamplingParams(temperature=0.7 + 0.1 * number, min_p=0.02 * (number % 3), beta=beta, seed=number)


def make_explorer(lane: object, max_groups: int, on_full: str = "error") -> Explorer:
    config = DistillerConfig(rank=3, lr=0.5, momentum=0.5, deep_scale=1.3, weight_dtype=torch.bfloat16)
    return Explorer(
        Head(WEIGHT), HIDDEN, config, max_groups=max_groups, max_rows=64, max_candidates=16, on_full=on_full, lane=lane
    )


def step(explorer: Explorer, rows: Rows, taps: list[tuple[torch.Tensor, torch.Tensor]]) -> Draw:
    shallow = torch.stack([s for s, _ in taps])
    deep = torch.stack([d for _, d in taps])
    logits = (deep[:, None] * WEIGHT).sum(-1)  # not a matmul: its rounding depends on the number of rows
    explorer.predict(shallow, rows)
    shallow.fill_(float("nan"))  # engines overwrite residuals in place
    draw = explorer.sample(logits, rows)
    explorer.learn(deep, rows)
    deep.fill_(float("nan"))
    return draw


@dataclass
class Life:
    """Everything that happened to one group between two resets of its Distiller."""

    group: str
    events: list[tuple[str, object]] = field(default_factory=list)

    def replay_alone(self) -> tuple[list[dict[int, list[float]]], dict[str, torch.Tensor]]:
        """The draws of every step by sample index, and the Distiller at the end."""
        explorer = make_explorer(SerialLane(), 1)
        rows: Rows | None = None
        draws = []
        for kind, what in self.events:
            if kind == "open":
                new = explorer.open([self.group] * len(what), params_of(self.group), sample_index=what, retain=True)
                rows = new if rows is None else rows + new
            elif kind == "end":
                assert rows is not None
                rows = rows.keep([i for i, s in enumerate(rows.sample_index) if s not in what])
            else:
                # In order of joining, whatever the order in the batch was.
                assert rows is not None
                order = [list(what).index(s) for s in rows.sample_index]
                rows.active.copy_(torch.tensor([list(what.values())[i][1] for i in order]))
                draw = step(explorer, rows, [list(what.values())[i][0] for i in order])
                draws.append({s: bits(draw, i) for i, s in enumerate(rows.sample_index)})
        return draws, explorer.state_dict()["tensors"]


def bits(draw: Draw, row: int) -> list[float]:
    return [column[row].item() for column in draw]


class Schedules(RuleBasedStateMachine):
    """open / step / keep / reorder / close / reopen, on a second stream that is late at random."""

    @initialize(seed=st.integers(0, 2**16), max_groups=st.sampled_from([3, 8]))
    def start(self, seed: int, max_groups: int) -> None:
        self.max_groups = max_groups
        self.explorer = make_explorer(SimulatedLane(seed), max_groups, on_full="evict")
        self.rows = self.explorer.open([])
        self.lives: dict[str, Life] = {}
        self.draws: dict[str, list[dict[int, list[float]]]] = {}
        self.step_number = 0
        self.names: list[tuple[str | None, int]] = []  # (group, sample index) of every row, in batch order

    def forget(self, group: str) -> None:
        """The group's Distiller was given up: its life must have been what it would have been alone."""
        life, drawn = self.lives.pop(group), self.draws.pop(group)
        assert life.replay_alone()[0] == drawn

    @rule(group=st.sampled_from([*GROUPS, None]), count=st.integers(1, 3), retain=st.booleans())
    def open(self, group: str | None, count: int, retain: bool) -> None:
        leases = self.explorer.ledger.leases
        full = len(leases) == self.max_groups and all(rows for _, rows in leases.values())
        params = SamplingParams(seed=99) if group is None else params_of(group)
        try:
            new = self.explorer.open([group] * count, params, retain=retain)
        except CapacityError:
            assert group is not None and group not in leases and full
            return
        for evicted in set(leases) - set(self.explorer.ledger.leases):
            self.forget(evicted)
        if group is not None:
            self.lives.setdefault(group, Life(group)).events.append(("open", new.sample_index))
            self.draws.setdefault(group, [])
        self.names += [(group, s) for s in new.sample_index]
        self.rows = self.rows + new

    @precondition(lambda self: self.names)
    @rule(off=st.integers(0, 2**12))
    def decode(self, off: int) -> None:
        active = [not (off >> 8 == 0 and off >> i & 1) for i in range(len(self.names))]
        self.rows.active.copy_(torch.tensor(active))
        taps = [
            (
                noise("shallow", *name, self.step_number, size=HIDDEN),
                noise("deep", *name, self.step_number, size=HIDDEN),
            )
            for name in self.names
        ]
        self.step_number += 1
        draw = step(self.explorer, self.rows, taps)
        for group, life in self.lives.items():
            members = {s: i for i, (g, s) in enumerate(self.names) if g == group}
            if members:
                life.events.append(("step", {s: (taps[i], active[i]) for s, i in members.items()}))
                self.draws[group].append({s: bits(draw, i) for s, i in members.items()})

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        order = data.draw(st.permutations(range(len(self.names))))
        order = order[: data.draw(st.integers(0, len(order)))]
        retained = {g for g, (lease, _) in self.explorer.ledger.leases.items() if lease.retain}
        ended = [name for i, name in enumerate(self.names) if i not in order]
        self.rows = self.rows.keep(order)
        self.names = [self.names[i] for i in order]
        for group in {g for g, _ in ended} - {None}:
            self.lives[group].events.append(("end", [s for g, s in ended if g == group]))
            if not any(g == group for g, _ in self.names) and group not in retained:
                self.forget(group)

    @rule()
    def look(self) -> None:
        """Reading statistics in between flushes, and changes nothing."""
        self.explorer.stats()

    @invariant()
    def leases_match_rows(self) -> None:
        if hasattr(self, "explorer"):
            leases = self.explorer.ledger.leases
            assert set(leases) == set(self.lives)
            for group, (_, rows) in leases.items():
                assert rows == sum(g == group for g, _ in self.names)

    def teardown(self) -> None:
        if not hasattr(self, "explorer"):
            return
        saved = self.explorer.state_dict()
        for i, entry in enumerate(saved["groups"]):
            group = entry["group"]
            draws, alone = self.lives[group].replay_alone()
            assert draws == self.draws[group]
            for name, tensor in saved["tensors"].items():
                assert torch.equal(tensor[i].nan_to_num(-1), alone[name][0].nan_to_num(-1)), (group, name)


Schedules.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, phases=(Phase.explicit, Phase.generate)
)
TestSchedules = Schedules.TestCase
