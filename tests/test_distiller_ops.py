"""The Distiller's ops against float64 formulas and autograd; rounding, momentum, independence, grouping."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esamp_core.reference.distiller import learning_rates, slot_gradients, stochastic_round
from esamp_core.sample import (
    Activations,
    DistillerConfig,
    DistillerState,
    DistillerWeights,
    RowGroups,
    distiller_forward,
    distiller_step_,
    group_rows,
)
from tests.oracles import assert_near

NAMES = DistillerWeights._fields


def make_weights(
    slots: int, hidden: int, rank: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> DistillerWeights:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + std * torch.randn(slots, *shape, generator=g, dtype=torch.float64)).to(dtype)

    return DistillerWeights(
        up=normal(hidden, rank, std=hidden**-0.5), gate=normal(hidden, rank, std=hidden**-0.5),
        down=normal(rank, hidden, std=0.3), gate_bias=normal(rank, std=0.5, mean=1.0),
        norm_weight=normal(hidden, std=0.2, mean=1.0), norm_bias=normal(hidden, std=0.1),
    )  # fmt: skip


def make_state(weights: DistillerWeights, momentum: bool = False) -> DistillerState:
    slots = weights.up.shape[0]
    wide = torch.float64 if weights.up.dtype == torch.float64 else torch.float32
    return DistillerState(
        weights=DistillerWeights(*(w.clone() for w in weights)),
        momentum=DistillerWeights(*(torch.zeros_like(w, dtype=wide) for w in weights)) if momentum else None,
        seed=torch.arange(slots) + 5, updates=torch.zeros(slots, dtype=torch.long),
        loss=torch.zeros(slots, dtype=wide), first_loss=torch.zeros(slots, dtype=wide),
        nonfinite=torch.zeros(slots, dtype=torch.long),
    )  # fmt: skip


def states(rows: int, hidden: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shallow = 7 * torch.randn(rows, hidden, generator=g, dtype=torch.float64)
    deep = 3 * (torch.randn(rows, hidden, generator=g, dtype=torch.float64) + 0.05 * shallow)
    return shallow, deep


def formula(shallow: Tensor, w: DistillerWeights, slot: int, scale: float) -> tuple[Tensor, Tensor]:
    """(pred, y) of rows that share a slot, from the documented formula."""
    x = shallow / shallow.square().mean(-1, keepdim=True).sqrt()
    gate = x @ w.gate[slot] + w.gate_bias[slot]
    y = x + ((x @ w.up[slot]) * (gate / (1 + torch.exp(-gate)))) @ w.down[slot]
    layer_norm = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return scale * (w.norm_weight[slot] * layer_norm + w.norm_bias[slot]), y


def wide(weights: DistillerWeights) -> DistillerWeights:
    return DistillerWeights(*(w.double() for w in weights))


SHAPES = [(1, 1, 1, 1), (6, 5, 3, 2), (13, 33, 7, 4), (9, 64, 16, 3), (5, 129, 1, 8)]  # rows, hidden, rank, slots


@pytest.mark.parametrize(("rows", "hidden", "rank", "slots"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward(rows: int, hidden: int, rank: int, slots: int, dtype: torch.dtype) -> None:
    matrices = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32 if dtype == torch.float16 else dtype
    weights = make_weights(slots, hidden, rank, dtype if dtype == torch.float64 else torch.float32)
    weights = DistillerWeights(*(w.to(matrices) for w in weights[:3]), *weights[3:])
    shallow = states(rows, hidden)[0].to(dtype)
    slot = torch.arange(rows) * 7 % (slots + 1) - 1  # some rows have no slot
    scale = torch.tensor(2.5, dtype=weights.norm_bias.dtype)
    got = distiller_forward(shallow, group_rows(slot, slots), weights, scale)
    assert {f.dtype for f in got} == {torch.float64 if dtype == torch.float64 else torch.float32}
    for i in range(rows):
        if slot[i] < 0:
            assert all((field[i] == 0).all() for field in got)
            continue
        pred, y = formula(shallow[i : i + 1].double(), wide(weights), int(slot[i]), 2.5)
        assert_near(got.pred[i : i + 1], pred, dtype, "pred")
        assert_near(got.y[i : i + 1], y, dtype, "y")


def gradients_by_autograd(
    weights: DistillerWeights, slot: int, shallow: Tensor, deep: Tensor, scale: float, clip: float
) -> tuple[Tensor, list[Tensor]]:
    """Loss and the documented gradient: (H / 2) * loss, each row's share of it scaled by its own clip factor."""
    leaves = [w[slot].clone().requires_grad_() for w in weights]
    one = DistillerWeights(*(leaf[None] for leaf in leaves))
    pred, y = formula(shallow, one, 0, 1.0)
    target = deep / scale
    each = (pred - target).square().sum(-1) / target.square().sum(-1)
    hidden = deep.shape[-1]
    to_pred, to_y = torch.autograd.grad(hidden / 2 * each.sum(), (pred, y), retain_graph=True)
    size = torch.maximum(to_pred.square().mean(-1), to_y.square().mean(-1)).sqrt()
    factor = (clip / size).clamp_max(1.0)
    grads = torch.autograd.grad((hidden / 2 * each * factor).mean(), leaves)
    return each.mean().detach(), list(grads)


@pytest.mark.parametrize(("rows", "hidden", "rank", "slots"), [s for s in SHAPES if s[1] > 1])
@pytest.mark.parametrize("clip", [1e6, 1.0, 0.05])
def test_step_is_autograd(rows: int, hidden: int, rank: int, slots: int, clip: float) -> None:
    weights, (shallow, deep) = make_weights(slots, hidden, rank), states(rows, hidden)
    slot = (torch.arange(rows) ** 2) % slots  # uneven groups, some slots empty
    active = torch.arange(rows) % 4 != 3
    if slots == 4:
        active |= True
        active[slot == 1] = False  # a group without a teacher
    config = DistillerConfig(rank=rank, lr=0.3, clip=clip)
    scale, groups, state = torch.tensor(2.5, dtype=torch.float64), group_rows(slot, slots), make_state(weights)
    saved = distiller_forward(shallow, groups, weights, scale)
    distiller_step_(state, saved, deep, groups, scale, config, active=active)
    # The documented rates.
    rates = [0.3 / hidden, 0.3 / hidden, 0.3 / (rank * hidden * (0.02 * 0.7311) ** 2), 0.3 / rank, 0.03, 0.1]
    assert [float(r) for r in learning_rates(config, hidden)] == pytest.approx(rates)
    for s in range(slots):
        taught = ((slot == s) & active).nonzero()[:, 0]
        if taught.numel() == 0:
            assert all(torch.equal(a[s], b[s]) for a, b in zip(state.weights, weights, strict=True))
            assert state.updates[s] == 0 and state.loss[s] == 0
            continue
        loss, grads = gradients_by_autograd(weights, s, shallow[taught], deep[taught], 2.5, clip)
        got_loss, got = slot_gradients(weights, s, saved, taught, deep, scale, clip)
        assert got_loss.dtype == torch.float64
        for value in (got_loss, state.loss[s], state.first_loss[s]):
            torch.testing.assert_close(value, loss, rtol=1e-10, atol=0)
        for name, a, b, rate, before, after in zip(NAMES, got, grads, rates, weights, state.weights, strict=True):
            error = (a - b).norm() / b.norm()
            assert error < 1e-10, f"{name}: {error}"
            torch.testing.assert_close(
                after[s], before[s] - rate * b, rtol=1e-10, atol=1e-12 * rate * float(b.abs().max())
            )
        assert state.updates[s] == 1 and state.nonfinite[s] == 0


def test_clip_is_on_and_off_where_the_test_above_says() -> None:
    weights, (shallow, deep) = make_weights(2, 33, 7), states(8, 33)
    one = [gradients_by_autograd(weights, 0, shallow, deep, 2.5, c)[1][2].norm() for c in (1e9, 1e6, 1.0, 0.05)]
    assert one[0] == one[1] > one[2] > one[3] > 0


@pytest.mark.parametrize("what", ["shallow", "deep"])
@pytest.mark.parametrize("by", [0.1, 10.0])
def test_multiplying_a_tap_changes_nothing_relative(what: str, by: float) -> None:
    slots, hidden, rank, rows = 2, 48, 8, 6
    shallow, deep = (t.float() for t in states(rows, hidden))
    weights, groups = make_weights(slots, hidden, rank, torch.float32), group_rows(torch.arange(rows) % 2, slots)
    losses = []
    for shallow_by, deep_by in ((1.0, 1.0), (by, 1.0) if what == "shallow" else (1.0, by)):
        state, x, target = make_state(weights), shallow * shallow_by, deep * deep_by
        scale, run = target.square().mean().sqrt(), []
        for _ in range(20):
            saved = distiller_forward(x, groups, state.weights, scale)
            distiller_step_(state, saved, target, groups, scale, DistillerConfig(rank=rank, lr=0.05))
            run.append(state.loss.clone())
        losses.append(torch.stack(run))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    assert (losses[0][-1] < 0.7 * losses[0][0]).all(), "nothing was learned"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_non_finite_target_leaves_the_slot_alone(bad: float, momentum: float) -> None:
    weights, (shallow, deep) = make_weights(3, 20, 4, torch.float32), (t.float() for t in states(9, 20))
    groups, scale = group_rows(torch.arange(9) % 3, 3), torch.tensor(1.0)
    config = DistillerConfig(rank=4, momentum=momentum)
    state, want = make_state(weights, momentum > 0), make_state(weights, momentum > 0)
    saved = distiller_forward(shallow, groups, weights, scale)
    for _ in range(2):
        distiller_step_(want, saved, deep, groups, scale, config)
    distiller_step_(state, saved, deep, groups, scale, config)
    middle = DistillerWeights(*(w[1].clone() for w in state.weights))
    broken = deep.clone()
    broken[4] = bad  # one row of slot 1; a zero target has no relative error
    distiller_step_(state, saved, broken, groups, scale, config)
    assert state.nonfinite.tolist() == [0, 1, 0] and state.updates.tolist() == [2, 1, 2]
    assert all(torch.equal(w[1], m) for w, m in zip(state.weights, middle, strict=True))
    assert torch.isfinite(state.loss).all()
    for s in (0, 2):
        assert all(torch.equal(a[s], b[s]) for a, b in zip(state.weights, want.weights, strict=True))
    # A row that does not teach may hold anything.
    active = torch.arange(9) != 4
    distiller_step_(state, saved, broken, groups, scale, config, active=active)
    assert state.updates.tolist() == [3, 2, 3] and all(torch.isfinite(w).all() for w in state.weights)


def test_lr_zero_freezes() -> None:
    weights, (shallow, deep) = make_weights(1, 9, 2, torch.float32), (t.float() for t in states(3, 9))
    state, groups, scale = make_state(weights), group_rows(torch.zeros(3, dtype=torch.long), 1), torch.tensor(1.0)
    distiller_step_(
        state,
        distiller_forward(shallow, groups, weights, scale),
        deep,
        groups,
        scale,
        DistillerConfig(rank=2, lr=0, gate=False),
    )
    assert all(torch.equal(a, b) for a, b in zip(state.weights, weights, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_is_torch_sgd(momentum: float) -> None:
    weights, (shallow, deep) = make_weights(1, 17, 3), states(5, 17)
    config = DistillerConfig(rank=3, lr=0.02, momentum=momentum, clip=1e9)
    groups, scale = group_rows(torch.zeros(5, dtype=torch.long), 1), torch.tensor(2.5, dtype=torch.float64)
    state = make_state(weights, momentum=True)
    leaves = [w[0].clone().requires_grad_() for w in weights]
    rates = learning_rates(config, 17)
    sgd = torch.optim.SGD(
        [{"params": [p], "lr": float(r)} for p, r in zip(leaves, rates, strict=True)], lr=1, momentum=momentum
    )
    for _ in range(4):
        distiller_step_(state, distiller_forward(shallow, groups, state.weights, scale), deep, groups, scale, config)
        pred, _ = formula(shallow, DistillerWeights(*(p[None] for p in leaves)), 0, 1.0)
        target = deep / 2.5
        loss = ((pred - target).square().sum(-1) / target.square().sum(-1)).mean()
        sgd.zero_grad()
        (17 / 2 * loss).backward()
        sgd.step()
        torch.testing.assert_close(state.loss[0], loss.detach(), rtol=1e-9, atol=0)
    for name, w, p in zip(NAMES, state.weights, leaves, strict=True):
        torch.testing.assert_close(w[0], p.detach(), rtol=1e-8, atol=1e-10, msg=name)


def test_stochastic_rounding_is_unbiased_and_exact_on_the_grid() -> None:
    """False alarms: 5 z-tests at 2e-5 each."""
    n, seed, update = 2**18, torch.tensor(3), torch.tensor(2**33 + 1)
    for x in (1.001, -0.0123, 3.14159e-5, 1e30, -(2.0**-133)):
        value = torch.tensor(x)
        low = (value.view(torch.int32) & ~0xFFFF).view(torch.float32)
        high = ((value.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
        got = stochastic_round(value.expand(n), seed, update, 2).float()
        assert ((got == low) | (got == high)).all()
        p = float((value.double() - low.double()) / (high.double() - low.double()))
        ups = int((got == high).sum())
        assert abs(ups - n * p) <= 4.3 * math.sqrt(n * p * (1 - p)) + 1e-9, x
    grid = torch.randn(5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
    assert torch.equal(stochastic_round(grid.float(), seed, update, 0), grid)
    assert torch.equal(stochastic_round(special, seed, update, 0)[:4], special[:4].bfloat16())
    assert stochastic_round(special, seed, update, 0)[4].isnan()
    x = torch.rand(4000)
    base = stochastic_round(x, seed, update, 0)
    for other in ((seed + 1, update, 0), (seed, update + 1, 0), (seed, update, 1)):
        assert (stochastic_round(x, *other) != base).any()
    assert torch.equal(stochastic_round(x.view(40, 100), seed, update, 0).flatten(), base)


def test_bfloat16_keeps_learning_where_plain_rounding_stalls() -> None:
    hidden, rank, rows, config = 64, 8, 4, DistillerConfig(rank=8, lr=1e-3)
    shallow, deep = (t.float() for t in states(rows, hidden))
    groups, scale = group_rows(torch.zeros(rows, dtype=torch.long), 1), deep.square().mean().sqrt()
    exact = make_weights(1, hidden, rank, torch.float32, seed=2)
    # Only the matrices learn here: the others are float32 in every variant and would hide the difference.
    moved = {}
    for variant in ("float32", "stochastic", "plain"):
        matrices = exact[:3] if variant == "float32" else tuple(w.bfloat16() for w in exact[:3])
        state = make_state(DistillerWeights(*matrices, *exact[3:]))
        start = [w.float().clone() for w in state.weights[:3]]
        for _ in range(200):
            saved = distiller_forward(shallow, groups, state.weights, scale)
            if variant == "plain":
                _, grads = slot_gradients(state.weights, 0, saved, torch.arange(rows), deep, scale, config.clip)
                for weight, grad, rate in zip(state.weights[:3], grads, learning_rates(config, hidden), strict=False):
                    weight[0] = (weight[0].float() - rate * grad).bfloat16()
            else:
                distiller_step_(state, saved, deep, groups, scale, config)
                for w, s in zip(state.weights[3:], exact[3:], strict=True):
                    w.copy_(s)
        moved[variant] = [(w.float() - s).flatten() for w, s in zip(state.weights[:3], start, strict=True)]
    for i, name in enumerate(NAMES[:2]):  # the input matrices, whose steps are far below a bfloat16's last place
        want = moved["float32"][i]
        along = {v: float(moved[v][i] @ want / want.square().sum()) for v in moved}
        assert along["plain"] < 0.5, (name, along)
        assert 0.7 < along["stochastic"] < 1.3, (name, along)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "rank"), [(33, 7), (64, 16)])
def test_independent_of_slot_number_and_other_groups(hidden: int, rank: int, dtype: torch.dtype) -> None:
    shallow, deep = (t.float() for t in states(5, hidden))
    single = make_weights(1, hidden, rank, torch.float32)
    single = DistillerWeights(*(w.to(dtype) for w in single[:3]), *single[3:])
    scale, config = torch.tensor(1.7), DistillerConfig(rank=rank, momentum=0.5)

    def go(slot: int, slots: int, others: int) -> tuple[Activations, DistillerState]:
        weights = make_weights(slots, hidden, rank, torch.float32, seed=9)
        weights = DistillerWeights(*(w.to(dtype) for w in weights[:3]), *weights[3:])
        for w, one in zip(weights, single, strict=True):
            w[slot] = one[0]
        state = make_state(weights, momentum=True)
        state.seed.fill_(5)
        g = torch.Generator().manual_seed(others)
        place = torch.randperm(5 + others, generator=g)
        mine = place[:5].sort().values
        which = torch.randint(-1, slots, (5 + others,), generator=g)
        which[which == slot] = -1
        which[mine] = slot
        x, y = torch.randn(5 + others, hidden, generator=g), torch.randn(5 + others, hidden, generator=g)
        x[mine], y[mine] = shallow, deep
        groups = group_rows(which, slots)
        for _ in range(3):
            saved = distiller_forward(x, groups, state.weights, scale)
            distiller_step_(state, saved, y, groups, scale, config)
        return Activations(*(f[mine] for f in saved)), state

    want, alone = go(0, 1, 0)
    for slot, slots, others in ((0, 1, 3), (2, 3, 0), (1, 4, 6), (6, 7, 11)):
        got, state = go(slot, slots, others)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (slot, slots, others)
        for a, b in ((state.weights, alone.weights), (state.momentum, alone.momentum)):
            assert all(torch.equal(x[slot], y[0]) for x, y in zip(a, b, strict=True)), (slot, slots, others)
        assert state.loss[slot] == alone.loss[0] and state.first_loss[slot] == alone.first_loss[0]


@given(
    slots=st.lists(st.integers(-2, 7), max_size=12),
    num_slots=st.integers(1, 6),
    ranked=st.booleans(),
    data=st.data(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_group_rows(slots: list[int], num_slots: int, ranked: bool, data: st.DataObject, dtype: torch.dtype) -> None:
    rank = data.draw(st.permutations(range(len(slots)))) if ranked else list(range(len(slots)))
    got = group_rows(torch.tensor(slots, dtype=dtype), num_slots, torch.tensor(rank, dtype=dtype) if ranked else None)
    members: dict[int, list[int]] = {}
    for row in sorted(range(len(slots)), key=lambda r: rank[r]):
        if 0 <= slots[row] < num_slots:
            members.setdefault(slots[row], []).append(row)
    assert isinstance(got, RowGroups) and {f.dtype for f in got} == {torch.int32}
    size = min(len(slots), num_slots)
    assert got.slots.shape == (size,) and got.offsets.shape == (size + 1,) and got.order.shape == (len(slots),)
    used = sorted(members)
    assert got.slots.tolist() == used + [-1] * (size - len(used))
    order, offsets = got.order.tolist(), got.offsets.tolist()
    for g in range(size):
        want = members[used[g]] if g < len(used) else []
        assert order[offsets[g] : offsets[g + 1]] == want
    assert sorted(order) == list(range(len(slots)))


def test_no_rows() -> None:
    weights, scale = make_weights(2, 6, 3, torch.float32), torch.tensor(1.0)
    groups = group_rows(torch.zeros(0, dtype=torch.long), 2)
    saved = distiller_forward(torch.zeros(0, 6), groups, weights, scale)
    assert saved.pred.shape == (0, 6) and saved.up.shape == (0, 3)
    state = make_state(weights)
    distiller_step_(state, saved, torch.zeros(0, 6), groups, scale, DistillerConfig(rank=3))
    assert state.updates.tolist() == [0, 0]
