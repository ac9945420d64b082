"""What the simulated graph and the look at the cache notice: else the tests of graph mode would prove nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from esamp_core.decoder import kv_cache
from tests.simulated_graph import SimulatedGraph


def test_host_state_names_what_changed() -> None:
    layer = type("Layer", (), {})()
    layer.keys, layer.states, layer.count, layer.kind = torch.zeros(2), {0: torch.zeros(3)}, 1, object()
    cache = type("Cache", (), {"layers": [layer]})()
    before = kv_cache.host_state(cache)
    layer.keys += 1
    assert kv_cache.host_state(cache) == before  # in place
    old = layer.keys, layer.states[0]  # keeps their memory from being reused
    layer.keys, layer.states[0], layer.count = layer.keys + 1, torch.zeros(3), 2
    after = kv_cache.host_state(cache)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {f"Layer.{name} of layer 0" for name in ("keys", "states", "count")} and len(old) == 2


def test_simulated_graph_repeats_the_device_work_only() -> None:
    x, total, count, out = torch.ones(3), torch.zeros(3), 0, torch.zeros(0)

    def step() -> None:
        nonlocal count, out
        count += 1
        total.add_(x * 2)
        out = total[:2] + count

    graph = SimulatedGraph()
    graph.capture(step)
    assert total.tolist() == [0, 0, 0] and out.isnan().all()  # nothing was computed
    result: Tensor = out
    for value in (1.0, 10.0):
        x.fill_(value)
        graph.replay()
    assert total.tolist() == [22, 22, 22] and result.tolist() == [23, 23]  # count stood still


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.tensor([1, 2]) + x,
        lambda x: x.cpu(),
    ],
    ids=["item", "tolist", "numpy", "bool", "mask", "nonzero", "masked_select", "unique", "from_host", "cpu"],
)
def test_simulated_graph_refuses_to_wait(wait: Any) -> None:
    x, before = torch.ones(2), torch.zeros(2)

    def step() -> None:
        before.add_(1)
        wait(x)

    graph = SimulatedGraph()
    assert "waits" in (graph.rehearse(step) or "")
    before.zero_()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        graph.capture(step)
    assert before.tolist() == [0, 0]
