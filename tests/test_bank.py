"""The Distiller bank through the Explorer: leases, eviction, save and load, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from explorer_helpers import PARAMS, make, step

from esamp_core.sample import ArgumentError, CapacityError, DistillerConfig, Draw, Explorer, Head, StateError


def test_retained_groups_keep_learning_and_others_start_afresh() -> None:
    explorer = make()
    for retain in (True, False):
        rows = explorer.open(["a"], PARAMS, retain=retain)
        for t in range(5):
            step(explorer, rows, seed=t)
        explorer.close(rows)
        assert ("a" in explorer.stats()) == retain
    rows = explorer.open(["a"], PARAMS)
    assert explorer.stats()["a"].updates == 0
    assert rows.sample_index == [0]


def test_eviction_takes_the_least_recently_used_idle_group() -> None:
    explorer = make(max_groups=3, on_full="evict")
    for group in "abc":
        explorer.close(explorer.open([group], PARAMS, retain=True))
    explorer.close(explorer.open(["a"], PARAMS, retain=True))  # used again: b is now the oldest
    running = explorer.open(["d"], PARAMS, retain=True)
    assert set(explorer.stats()) == {"a", "c", "d"}
    e = explorer.open(["e"], PARAMS)
    assert set(explorer.stats()) == {"a", "d", "e"}
    f = explorer.open(["f"], PARAMS)
    with pytest.raises(CapacityError, match="0 of them are idle"):
        explorer.open(["g"], PARAMS)
    for rows in (running, e, f):
        explorer.close(rows)


def test_a_thousand_prompts_through_two_slots() -> None:
    explorer = make(max_groups=2)
    for i in range(1000):
        explorer.close(explorer.open([i], PARAMS))
    assert explorer.stats() == {}


@pytest.mark.parametrize(
    "config",
    [
        DistillerConfig(rank=4, momentum=0.5),
        DistillerConfig(rank=4, momentum=0.5, weight_dtype=torch.bfloat16),
        DistillerConfig(recipe="paper", rank=4, gate=False),
        DistillerConfig(recipe="release", rank=4, gate=False),
    ],
)
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, config: DistillerConfig) -> None:
    whole = make(config)
    rows = whole.open(["a", "a", "b"], PARAMS, retain=True)
    for t in range(10):
        step(whole, rows, seed=t)
    whole.save(tmp_path / "bank.safetensors")
    want = [step(whole, rows, seed=t) for t in range(10, 20)]

    resumed = make(config)
    resumed.load(tmp_path / "bank.safetensors")
    again = resumed.open(["a", "a", "b"], PARAMS, sample_index=[0, 1, 0], position=10)
    for t, expected in zip(range(10, 20), want, strict=True):
        for field, a, b in zip(Draw._fields, step(resumed, again, seed=t), expected, strict=True):
            assert torch.equal(a, b), field
    assert len(rows) == len(again)  # NaN is not NaN
    assert repr(resumed.stats()) == repr(whole.stats())


def test_load_refuses_what_does_not_fit(tmp_path: Path) -> None:
    explorer = make()
    rows = explorer.open(["a"], PARAMS)
    explorer.save(tmp_path / "bank.safetensors")
    with pytest.raises(StateError, match="unused bank"):
        explorer.load(tmp_path / "bank.safetensors")
    with pytest.raises(ArgumentError, match="must fit config"):
        make(DistillerConfig(rank=8, deep_scale=1.0)).load(tmp_path / "bank.safetensors")
    explorer.close(rows)
    rows = explorer.open([("prompt", 1)], PARAMS)
    with pytest.raises(ArgumentError, match="string or an integer"):
        explorer.save(tmp_path / "other.safetensors")


def test_repr_states_memory() -> None:
    head = Head(torch.zeros(1, 3584))
    for dtype, limit in ((torch.float32, 3e9), (torch.bfloat16, 1.5e9)):
        explorer = Explorer(head, 3584, DistillerConfig(weight_dtype=dtype), max_groups=1, max_rows=1)
        assert explorer._bank.bytes_per_slot * 1024 < limit
        assert f"{explorer._bank.bytes_per_slot / 2**20:.2f} MiB per group" in repr(explorer)


def test_an_open_that_fails_leaves_nothing_behind() -> None:
    explorer = make(max_groups=2)
    rows = explorer.open(["old"], PARAMS)
    for t in range(5):
        step(explorer, rows, seed=t)
    explorer.close(rows)  # its slot is free again, with what it learned still in it
    with pytest.raises(CapacityError):
        explorer.open(["a", "b", "c"], PARAMS, retain=True)
    assert explorer.stats() == {}
    rows = explorer.open(["a", "b"], PARAMS)
    assert [s.updates for s in explorer.stats().values()] == [0, 0] and len(rows) == 2


def test_an_idle_group_that_is_opened_again_is_not_evicted_for_its_neighbour() -> None:
    explorer = make(max_groups=2, on_full="evict")
    for group in ("a", "b"):
        rows = explorer.open([group], PARAMS, retain=True)
        step(explorer, rows)
        explorer.close(rows)
    rows = explorer.open(["new", "a"], PARAMS)  # a is the least recently used, and wanted
    assert {group: s.updates for group, s in explorer.stats().items()} == {"a": 1, "new": 0} and len(rows) == 2
