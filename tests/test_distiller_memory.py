"""The Distiller's ops in given memory, with tokens as targets, and as torch ops that say what they write."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from esamp_core import ops
from esamp_core.base.config import DistillerConfig
from esamp_core.base.errors import ArgumentError
from esamp_core.base.tensors import Activations, DistillerState, DistillerWeights, Head
from esamp_core.reference import distiller as reference_distiller
from esamp_core.reference.distiller import group_rows, learning_rates, slot_gradients
from tests.conftest import poison_
from tests.kernel_cases import equal_bits, quick_interpreter, to
from tests.test_distiller_ops import make_state, make_weights, states

pytest.importorskip("triton")

from esamp_core.kernels.distiller import ops as distiller
from esamp_core.kernels.warm_up import warm_up_distiller
from esamp_core.ops import triton_distiller

BACKENDS = {"torch": reference_distiller, "triton": triton_distiller}
HIDDEN, RANK, SLOTS, VOCAB = 37, 5, 3, 11


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


def make_float_state(dtype: torch.dtype = torch.float32, momentum: bool = False, hidden: int = HIDDEN) -> Any:
    weights = make_weights(SLOTS, hidden, RANK, torch.float32)
    return make_state(DistillerWeights(*(w.to(dtype) for w in weights[:3]), *weights[3:]), momentum)


def make_token_head(dtype: torch.dtype, center: bool = True, stride: int = HIDDEN) -> Head:
    """lm_head as an engine may hold it: rows apart from each other."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.full((VOCAB, stride), float("nan"), dtype=dtype)[:, :HIDDEN]
    weight.copy_(torch.randn(VOCAB, HIDDEN, generator=generator) + 0.3)
    middle = torch.randn(HIDDEN, generator=generator) if center else None
    return Head(weight, bias=torch.randn(VOCAB), scale=0.37, softcap=20.0, center=middle)


def tensors(state: DistillerState) -> tuple[Tensor, ...]:
    return (*state.weights, *(state.momentum or ()), *state[3:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "center", "stride"),
    [(torch.float32, True, HIDDEN), (torch.bfloat16, True, 48), (torch.float16, False, 37)],
)
def test_tokens_teach_their_head_rows(
    backend: str, masked: bool, dtype: torch.dtype, center: bool, stride: int, device: str
) -> None:
    """As if their rows, centred and scaled by hand, had been given; ids that the head lacks do not teach."""
    op, head, config = BACKENDS[backend], make_token_head(dtype, center, stride), DistillerConfig(rank=RANK)
    token_ids = torch.tensor([3, -1, 10, 0, VOCAB, 7, -(2**40), 2**40])
    rows = len(token_ids)
    target = torch.full((rows, HIDDEN), float("nan"))
    for i, token in enumerate(token_ids.tolist()):
        if 0 <= token < VOCAB:
            row = head.weight[token].double() - (head.center.double() if center else 0)
            target[i] = (row * 0.37).float()
    known = torch.tensor([0 <= t < VOCAB for t in token_ids.tolist()])
    mask = torch.arange(rows) != 2 if masked else torch.ones(rows, dtype=torch.bool)
    shallow, scale = states(rows, HIDDEN)[0].float(), torch.tensor(0.4)
    groups, results = group_rows(torch.tensor([0, 0, 1, 1, 2, 0, 2, 2]), SLOTS), []
    for given in ((target, None, mask & known), (token_ids, head, mask if masked else None)):
        state = make_float_state()
        arguments = to(device, state, shallow, groups, scale, given[0], given[2])
        moved = None if given[1] is None else Head(
            *to(device, head.weight, head.bias), scale=0.37, softcap=20.0, center=to(device, head.center)[0]
        )  # fmt: skip
        state, x, g, s, y, active = arguments
        saved = op.distiller_forward(x, g, state.weights, s)
        op.distiller_step_(state, saved, y, g, s, config, head=moved, active=active)
        results.append(to("cpu", state)[0])
    assert results[0].updates.tolist() == results[1].updates.tolist() == [1, 1, 0]
    for a, b in zip(tensors(results[0]), tensors(results[1]), strict=True):
        # The targets differ in a last bit, and a weight by its rate times that: relative to what the tensor holds.
        assert (a.double() - b.double()).abs().max() <= 1e-6 * b.double().abs().max()


@pytest.mark.parametrize("head", ["none", "shard", "wide", "for numbers"])
def test_heads_that_name_no_targets_are_refused(head: str) -> None:
    state, (shallow, deep) = make_float_state(), (t.float() for t in states(4, HIDDEN))
    groups, scale, config = group_rows(torch.arange(4) % SLOTS, SLOTS), torch.tensor(1.0), DistillerConfig(rank=RANK)
    saved, token_ids = ops.distiller_forward(shallow, groups, state.weights, scale), torch.arange(4)
    target, given, what = {
        "none": (token_ids, None, r"target must be a float tensor \[4, 37\].*int64 \[4\]"),
        "shard": (token_ids, Head(torch.zeros(VOCAB, HIDDEN), vocab_start=11), "head.vocab_start .*whole head.*11"),
        "wide": (token_ids, Head(torch.zeros(VOCAB, HIDDEN + 1)), r"head.weight .*\[any, 37\].*\[11, 38\]"),
        "for numbers": (
            deep,
            Head(torch.zeros(VOCAB, HIDDEN)),
            r"target must be a int tensor \[4\].*float32 \[4, 37\]",
        ),
    }[head]
    with pytest.raises(ArgumentError, match=what):
        ops.distiller_step_(state, saved, target, groups, scale, config, head=given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_full_of_nan_gives_the_same_bits(
    backend: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations and scratch of a larger batch, poisoned before every use, against new ones."""
    monkeypatch.setenv("ESAMP_BACKEND", backend)
    rows, most, config = 7, 19, DistillerConfig(rank=RANK, momentum=0.5)
    (shallow, deep), scale = (t.float() for t in states(rows, HIDDEN)), torch.tensor(1.3)
    groups, active = group_rows(torch.tensor([0, 2, -1, 2, 0, 2, -1]), SLOTS), torch.arange(rows) != 4
    fresh, given = (to(device, make_float_state(dtype, momentum=True))[0] for _ in range(2))
    shallow, deep, groups, scale, active = to(device, shallow, deep, groups, scale, active)
    memory = Activations.empty(most, HIDDEN, RANK, shallow.device)
    scratch = ops.distiller_scratch(given.weights, most)
    for _ in range(3):
        want = ops.distiller_forward(shallow, groups, fresh.weights, scale)
        ops.distiller_step_(fresh, want, deep, groups, scale, config, active=active)
        for tensor in (*memory, scratch):
            poison_(tensor)
        out = Activations(*(field[:rows] for field in memory))
        got = ops.distiller_forward(shallow, groups, given.weights, scale, out=out, scratch=scratch)
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(got, memory, strict=True))
        poison_(scratch)
        ops.distiller_step_(given, got, deep, groups, scale, config, active=active, scratch=scratch)
        assert equal_bits(got, want) and equal_bits(tensors(given), tensors(fresh))
        assert all(field[rows:].isnan().all() for field in memory), "rows beyond R were written"
    assert given.updates.tolist() == [3, 0, 3]


def test_memory_that_does_not_fit_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESAMP_BACKEND", "triton")
    state, shallow = make_float_state(), states(4, HIDDEN)[0].float()
    groups, scale = group_rows(torch.arange(4) % SLOTS, SLOTS), torch.tensor(1.0)
    state, shallow, groups, scale = to(device, state, shallow, groups, scale)
    out = Activations.empty(4, HIDDEN, RANK, shallow.device)
    for bad, what in (
        (Activations.empty(5, HIDDEN, RANK, shallow.device), r"out.x .*\[4, 37\].*\[5, 37\]"),
        (out._replace(up=out.gate.double()), "out.up .*float32.*float64"),
        (out._replace(y=out.y.mT.contiguous().mT), r"out.y .*contiguous.*\(1, 4\)"),
    ):
        with pytest.raises(ArgumentError, match=what):
            ops.distiller_forward(shallow, groups, state.weights, scale, out=bad)
    scratch = ops.distiller_scratch(state.weights, 4)
    for bad, what in (
        (scratch[:-1], rf"scratch .*{scratch.numel()} numbers.*{scratch.numel() - 1}"),
        (scratch.double(), "scratch .*float64"),
    ):
        with pytest.raises(ArgumentError, match=what):
            ops.distiller_forward(shallow, groups, state.weights, scale, scratch=bad)


@pytest.fixture
def arguments(device: str) -> dict[str, tuple[object, ...]]:
    state, head = make_float_state(torch.bfloat16, momentum=True), make_token_head(torch.bfloat16)
    shallow, token_ids, scale = states(4, HIDDEN)[0].float(), torch.tensor([1, -1, 5, 9]), torch.tensor(1.0)
    groups, active = group_rows(torch.tensor([0, 0, 2, 2]), SLOTS), torch.tensor([True, True, False, True])
    state, shallow, groups, scale = to(device, state, shallow, groups, scale)
    weight, center, token_ids, active = to(device, head.weight, head.center, token_ids, active)
    saved, scratch = (
        Activations.empty(4, HIDDEN, RANK, shallow.device),
        triton_distiller.distiller_scratch(state.weights, 4),
    )
    forward = (shallow, *groups, list(state.weights), scale, list(saved), scratch, True)
    distiller.forward_op(*forward)
    columns = [state.updates, state.loss, state.first_loss, state.nonfinite]
    return {
        "forward": forward,
        "norm": (*groups, list(state.weights), scale, list(saved)),
        "mix": (
            shallow.bfloat16(), saved.y, list(state.weights), scale, torch.full_like(saved.mean, 0.5), active, *groups,
            saved.mean, saved.rstd, torch.zeros_like(shallow, dtype=torch.bfloat16), torch.zeros_like(token_ids).int(),
        ),
        "step": (
            list(state.weights), list(state.momentum), state.seed, columns, list(saved), weight, token_ids, center, 0.4,
            *groups, scale, active, [0.01] * 6, 0.5, 1.0, scratch,
        ),
        "gauge": (
            [torch.zeros_like(state.weights.norm_bias), *(t.clone() for t in (state.updates, *(state.loss,) * 3))],
            list(saved), shallow, *groups, list(state.weights), scale, active, scratch,
        ),
    }  # fmt: skip


@pytest.mark.traced
@pytest.mark.parametrize("name", ["forward", "norm", "mix", "step", "gauge"])
def test_opcheck(arguments: dict[str, tuple[object, ...]], name: str) -> None:
    """Among them: what an op does not say it writes, it does not write."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(distiller, f"{name}_op"), arguments[name], test_utils=checks)


@pytest.mark.traced
def test_both_ops_in_a_compiled_step(device: str) -> None:
    """torch.compile keeps both, in order, and what they write arrives."""
    state, (shallow, deep) = make_float_state(), (t.float() for t in states(4, HIDDEN))
    groups, scale, config = group_rows(torch.arange(4) % SLOTS, SLOTS), torch.tensor(1.0), DistillerConfig(rank=RANK)
    eager, compiled = make_float_state(), state
    eager, compiled, shallow, deep, groups, scale = to(device, eager, compiled, shallow, deep, groups, scale)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    def step(state: DistillerState) -> Tensor:
        saved = triton_distiller.distiller_forward(shallow, groups, state.weights, scale)
        triton_distiller.distiller_step_(state, saved, deep, groups, scale, config)
        return saved.pred

    want = step(eager)
    got = torch.compile(step, backend=keep, fullgraph=True)(compiled)
    assert equal_bits((got, *tensors(compiled)), (want, *tensors(eager)))
    calls = [str(node.target) for node in graphs[0].graph.nodes if "esamp" in str(node.target)]
    assert [call.split(".")[1] for call in calls] == ["distiller_forward", "distiller_step"]


def test_warm_up_runs(device: str) -> None:
    """That nothing is compiled after it, `make check-kernels` shows."""
    head = make_token_head(torch.bfloat16)
    weight, center = to(device, head.weight, head.center)
    for dtype, momentum in ((torch.float32, False), (torch.bfloat16, True)):
        warm_up_distiller(HIDDEN, RANK, dtype, momentum, weight, center, device=device)


@pytest.mark.parametrize("op", [reference_distiller, triton_distiller], ids=BACKENDS)
def test_the_updates_of_bfloat16_weights_are_unbiased(op: ModuleType, device: str) -> None:
    """z-test of how far weights lie above what they should be, over more than 10^5 updates: each is rounded up with the
    probability that makes its mean exact.  False alarms: 3 tests of 2e-5 for either backend."""
    hidden, rank, rows = 224, 64, 12
    config, slot = DistillerConfig(rank=rank, lr=0.02), torch.arange(rows) % SLOTS
    weights = make_weights(SLOTS, hidden, rank, torch.float32)
    state = make_state(DistillerWeights(*(w.bfloat16() for w in weights[:3]), *weights[3:]))
    before, scale = [w.float().clone() for w in state.weights[:3]], torch.tensor(2.0)
    (shallow, deep), groups = (t.float() for t in states(rows, hidden)), group_rows(slot, SLOTS)
    on_device = to(device, make_state(state.weights))[0]
    x, y, g, s = to(device, shallow, deep, groups, scale)
    saved = op.distiller_forward(x, g, on_device.weights, s)
    op.distiller_step_(on_device, saved, y, g, s, config)
    saved, after = to("cpu", saved, on_device.weights)
    gradients = [slot_gradients(state.weights, i, saved, (slot == i).nonzero()[:, 0], deep, scale, config.clip)[1]
                 for i in range(SLOTS)]  # fmt: skip
    updates = 0
    for index, rate in enumerate(learning_rates(config, hidden)[:3]):
        exact = before[index] - rate * torch.stack([grads[index] for grads in gradients])
        low = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)  # towards zero
        ulp = ((exact.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32) - low
        share, up = ((exact - low) / ulp).double(), ((after[index].float() - low) / ulp).double()
        # The kernel's gradients, sums of products of bfloat16 numbers, lie a little beside the exact ones.  Weights so
        # near 0 that a step goes over many of their places may then end more than one place away.
        few = 4 * ulp.abs() > (exact - before[index]).std()
        share, up = share[few], up[few]
        sure = (share > 0.1) & (share < 0.9)
        assert ((up == 0) | (up == 1))[sure].all() and sure.sum() > 1000
        variance = float((share * (1 - share)).sum())
        z = float((up - share).sum()) / math.sqrt(variance)
        assert abs(z) < 4.3 and variance > 1000, (index, z, variance)
        updates += share.numel()
    assert updates > 100_000, updates
