"""The second stream changes when work is done, never what comes out."""

from __future__ import annotations

import random

import pytest
import torch
from simulated_lane import SimulatedLane

from esamp_core.explorer.streams import SerialLane
from esamp_core.sample import DistillerConfig, Explorer, Head, SamplingParams

HIDDEN, VOCAB = 16, 60


def run(
    lane: object, steps: int, schedule_seed: int, config: DistillerConfig, device: str = "cpu", flushes: float = 0.0
) -> tuple[list[object], dict[str, object]]:
    """A random schedule of joins, ends and masks: the draws of every step, and the bank at the end.

    flushes: how often what is staged is enqueued at once, which must change nothing.
    """
    flush = random.Random(schedule_seed)
    rng, generator = random.Random(schedule_seed), torch.Generator().manual_seed(schedule_seed)
    head = Head(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0)).to(device))
    explorer = Explorer(head, HIDDEN, config, max_groups=6, max_rows=24, max_candidates=20, lane=lane)
    rows, draws, opened = explorer.open([]), [], 0
    for _ in range(steps):
        if rng.random() < 0.2 and len(rows) <= 20 and len({*rows.groups}) < 6:
            group = f"g{opened}"
            opened += 1
            rows = rows + explorer.open(
                [group] * rng.randint(1, 4), SamplingParams(temperature=0.9, beta=0.5, seed=opened)
            )
        if rng.random() < 0.15 and len(rows):
            rows = rows.keep(rng.sample(range(len(rows)), rng.randint(0, len(rows))))
        if rng.random() < 0.3 and len(rows):
            rows.active[rng.randrange(len(rows))] = False
        if rng.random() < 0.05:
            explorer.stats()
        shallow = torch.randn(len(rows), HIDDEN, generator=generator)
        deep = shallow.roll(1, -1) + 0.1 * torch.randn(len(rows), HIDDEN, generator=generator)
        shallow, deep = shallow.to(device), deep.to(device)
        logits = (deep[:, None] * head.weight).sum(-1)
        explorer.predict(shallow, rows)
        shallow.fill_(float("nan"))  # the engine reuses its residual
        draw = explorer.sample(logits, rows)
        logits.fill_(float("nan"))
        explorer.learn(deep, rows)
        deep.fill_(float("nan"))
        if flush.random() < flushes:
            explorer.flush()
        draws.append([t.clone() for t in draw])
    state = explorer.state_dict()
    return draws, state


CONFIGS = {
    "deep": DistillerConfig(rank=4, deep_scale=1.0),
    "measured scale": DistillerConfig(rank=4),
    "momentum": DistillerConfig(rank=4, deep_scale=1.0, momentum=0.8),
    "bfloat16": DistillerConfig(rank=4, deep_scale=1.0, weight_dtype=torch.bfloat16),
    "choice": DistillerConfig(rank=4, target="choice"),
    "frozen": DistillerConfig(rank=4, deep_scale=1.0, lr=0.0, gate=False),
    "paper": DistillerConfig(recipe="paper", rank=4, gate=False),
    "release": DistillerConfig(recipe="release", rank=4, gate=False),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_late_second_stream_equals_serial(name: str, seed: int) -> None:
    steps = 1000 if name == "deep" else 150
    serial, serial_state = run(SerialLane(), steps, seed, CONFIGS[name])
    late, late_state = run(SimulatedLane(seed), steps, seed, CONFIGS[name], flushes=0.3)
    assert len(serial) == len(late) == steps
    for a, b in zip(serial, late, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert serial_state["groups"] == late_state["groups"]
    assert torch.equal(serial_state["scale"], late_state["scale"])
    for key, tensor in serial_state["tensors"].items():
        assert torch.equal(tensor.nan_to_num(-1.0), late_state["tensors"][key].nan_to_num(-1.0)), key
    explored = torch.cat([d[3] for d in serial])
    assert (explored != 0).any(), "the schedule explored nothing, so the test showed nothing"


class ForgetfulLane(SimulatedLane):
    """A lane whose named call does nothing."""

    def __init__(self, seed: int, forgets: str) -> None:
        super().__init__(seed)
        setattr(self, forgets, lambda *_: None)


def test_the_simulation_catches_a_missing_wait() -> None:
    serial, _ = run(SerialLane(), 60, 0, CONFIGS["deep"])
    late, _ = run(ForgetfulLane(0, "wait"), 60, 0, CONFIGS["deep"])
    assert any(not torch.equal(x, y) for a, b in zip(serial, late, strict=True) for x, y in zip(a, b, strict=True))


def test_the_simulation_catches_a_missing_publish() -> None:
    with pytest.raises(AssertionError, match="before main's writes"):
        run(ForgetfulLane(0, "publish"), 60, 0, CONFIGS["deep"])
