"""distiller_forward and distiller_step against the reference in float64, and what must hold bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from explorer_helpers import PARAMS, logits_of, make, taps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esamp_core.base.config import DistillerConfig
from esamp_core.base.errors import ArgumentError
from esamp_core.base.tensors import Activations, DistillerState, DistillerWeights, RowGroups
from esamp_core.reference import distiller as reference_distiller
from esamp_core.reference.distiller import group_rows, learning_rates, slot_gradients
from tests.kernel_cases import equal_bits, padded, quick_interpreter, stepped, to
from tests.test_distiller_ops import make_state, make_weights, states

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from esamp_core.kernels.distiller import forward as forward_kernels  # noqa: E402
from esamp_core.kernels.distiller.rounding import stochastic_round  # noqa: E402
from esamp_core.ops import triton_distiller  # noqa: E402

NAMES = DistillerWeights._fields
# Relative error, in the Euclidean norm, of sums in float32 and of products of bfloat16 operands, in other orders than
# float64's.  A gradient is a difference: it keeps fewer of their digits.
FORWARD_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
GRADIENT_ERROR = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
ATOMS = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}  # what rounding may add to a weight, relative to it


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


def narrow(weights: DistillerWeights, dtype: torch.dtype = torch.float32) -> DistillerWeights:
    """Weights as the kernels take them: matrices of dtype, the rest float32."""
    matrices = {name: getattr(weights, name).to(dtype) for name in ("up", "gate", "down")}
    return DistillerWeights(*(w.float() for w in weights))._replace(**matrices)


def wide(weights: DistillerWeights) -> DistillerWeights:
    return DistillerWeights(*(w.double() for w in weights))


def near(got: Tensor, want: Tensor, error: float, what: str) -> None:
    got, want = got.double().cpu(), want.double()
    assert torch.isfinite(got).all(), what
    assert (got - want).norm() <= error * want.norm() + 1e-12, f"{what}: {(got - want).norm() / want.norm():.2g}"


def clone(state: DistillerState) -> DistillerState:
    """An independent copy."""

    def copy(value: Any) -> Any:
        if isinstance(value, tuple):
            return DistillerWeights(*(w.clone() for w in value))
        return None if value is None else value.clone()

    return DistillerState(*(copy(value) for value in state))


def run(
    shallow: Tensor, groups: RowGroups, state: DistillerState, target: Tensor, scale: Tensor, config: DistillerConfig,
    device: str, active: Tensor | None = None,
) -> tuple[Activations, DistillerState]:  # fmt: skip
    """Forward and one step by the kernels, on copies; results on the CPU."""
    state = to(device, clone(state))[0]
    shallow, groups, target, scale, active = to(device, shallow, groups, target, scale, active)
    saved = triton_distiller.distiller_forward(shallow, groups, state.weights, scale)
    triton_distiller.distiller_step_(state, saved, target, groups, scale, config, active=active)
    return tuple(to("cpu", saved, state))  # type: ignore[return-value]


def compare(
    slot: Tensor, hidden: int, rank: int, slots: int, config: DistillerConfig, device: str, *,
    dtype: torch.dtype = torch.float32, active: Tensor | None = None, seed: int = 0,
    given: Callable[[Tensor], Tensor] = Tensor.float,
) -> None:  # fmt: skip
    """Forward, loss, counters and every updated parameter (and velocity) against the reference in float64.

    given: what the kernels are given for states in float64; the reference is given their values.
    """
    weights = narrow(make_weights(slots, hidden, rank, seed=seed), dtype)
    taps = [given(t.to(device)) for t in states(len(slot), hidden, seed + 1)]  # there, as a copy may be contiguous
    shallow, deep = (t.double().cpu() for t in taps)
    groups, scale = group_rows(slot, slots), torch.tensor(2.5)
    state, want = make_state(weights, config.momentum > 0), make_state(wide(weights), config.momentum > 0)
    for velocity, exact in zip(state.momentum or (), want.momentum or (), strict=True):
        velocity.copy_(torch.randn(velocity.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
        exact.copy_(velocity)
    exact_saved = reference_distiller.distiller_forward(shallow, groups, want.weights, scale.double())
    reference_distiller.distiller_step_(want, exact_saved, deep, groups, scale.double(), config, active=active)
    saved, got = run(taps[0], groups, state, taps[1], scale, config, device, active)

    for name, a, b in zip(Activations._fields, saved, exact_saved, strict=True):
        assert a.dtype == torch.float32
        if name not in ("mean", "up", "gate"):
            near(a, b, FORWARD_ERROR[dtype], name)
    # A mean may cancel to nothing, so its error is measured by what it is the mean of: that of y's errors is at most
    # their rms, and adding them up rounds no more than once again.
    allowed = 2 * FORWARD_ERROR[dtype] * exact_saved.y.norm() / hidden**0.5
    assert (saved.mean.double() - exact_saved.mean).norm() <= allowed + 1e-12
    # So may a product: its error is measured by the sizes of its terms.
    terms, at = wide(weights), slot.clamp(0, slots - 1)
    sizes = {
        "up": torch.einsum("rh,rhk->rk", exact_saved.x.abs(), terms.up[at].abs()),
        "gate": torch.einsum("rh,rhk->rk", exact_saved.x.abs(), terms.gate[at].abs()) + terms.gate_bias[at].abs(),
    }
    for name, size in sizes.items():
        error = getattr(saved, name).double() - getattr(exact_saved, name)
        assert error.norm() <= FORWARD_ERROR[dtype] * size[exact_saved.rstd > 0].norm() + 1e-12, name
    no_slot = (slot < 0) | (slot >= slots)
    assert all((field[no_slot] == 0).all() for field in saved)
    assert torch.equal(got.updates, want.updates) and torch.equal(got.nonfinite, want.nonfinite)
    near(got.loss, want.loss, 3 * FORWARD_ERROR[dtype], "loss")
    near(got.first_loss, want.first_loss, 3 * FORWARD_ERROR[dtype], "first_loss")
    touched = want.updates > 0
    for name, a, b, before in zip(NAMES, got.weights, want.weights, weights, strict=True):
        assert a.dtype == before.dtype and torch.equal(a[~touched], before[~touched]), name
        moved = (b - before.double()).norm()
        allowed = GRADIENT_ERROR[dtype] * moved + 1e-7 * b.norm() + (ATOMS[a.dtype] * b).norm()
        assert (a.double() - b).norm() <= allowed, f"{name}: {(a.double() - b).norm() / moved:.2g}"
    for name, v, exact in zip(NAMES, got.momentum or (), want.momentum or (), strict=False):
        near(v, exact, GRADIENT_ERROR[dtype], f"velocity of {name}")


# rows, H, r, slots: one tile, several tiles of rows (40 of one group), of H, of r, odd everything, one of everything
SHAPES = [(1, 16, 1, 1), (7, 64, 8, 3), (19, 129, 17, 4), (40, 35, 66, 2), (4, 333, 9, 8)]


@pytest.mark.parametrize(("rows", "hidden", "rank", "slots"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "momentum", "clip"),
    [(torch.float32, 0.0, 1.0), (torch.float32, 0.9, 1e9), (torch.float32, 0.5, 0.02), (torch.bfloat16, 0.9, 1.0)],
)
def test_is_the_reference(
    rows: int, hidden: int, rank: int, slots: int, dtype: torch.dtype, momentum: float, clip: float, device: str
) -> None:
    slot = (torch.arange(rows) ** 2) % (slots + 1) - (1 if slots > 1 else 0)  # uneven; some rows without a slot
    slot = torch.where(torch.arange(rows) > 12, 0, slot)
    active = torch.arange(rows) % 4 != 3 if clip == 1.0 else None
    config = DistillerConfig(rank=rank, lr=0.3, clip=clip, momentum=momentum)
    compare(slot, hidden, rank, slots, config, device, dtype=dtype, active=active)


@settings(max_examples=10)
@given(
    slot=st.lists(st.integers(-1, 4), min_size=0, max_size=12),
    hidden=st.integers(16, 100),
    rank=st.integers(1, 20),
    slots=st.integers(1, 4),
    momentum=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 100),
)
def test_any_schedule(
    device: str, slot: list[int], hidden: int, rank: int, slots: int, momentum: float, seed: int
) -> None:
    active = torch.rand(len(slot), generator=torch.Generator().manual_seed(seed)) < 0.7
    config = DistillerConfig(rank=rank, momentum=momentum)
    compare(torch.tensor(slot, dtype=torch.long), hidden, rank, slots, config, device, active=active, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slot_number_and_other_groups_do_not_matter(dtype: torch.dtype, device: str) -> None:
    """A group of 19 rows alone in a bank of 1, and in slot 4 of 6 between others: the same bits, and twice the same."""
    hidden, rank, size = 101, 18, 19
    weights, (shallow, deep) = narrow(make_weights(6, hidden, rank), dtype), states(40, hidden)
    shallow, deep, config = shallow.float(), deep.float(), DistillerConfig(rank=rank, momentum=0.5)
    state, scale = make_state(weights, momentum=True), torch.tensor(1.5)
    slot = torch.tensor([4] * size + [0] * 5 + [5] * 9 + [-1] * 2 + [2] * 5)[
        torch.randperm(40, generator=torch.Generator().manual_seed(3))
    ]
    active = torch.arange(40) % 5 != 0
    groups = group_rows(slot, 6)
    saved, together = run(shallow, groups, state, deep, scale, config, device, active)
    again = run(shallow, groups, state, deep, scale, config, device, active)
    assert equal_bits(saved, again[0]) and equal_bits(together.weights, again[1].weights)

    mine = (slot == 4).nonzero()[:, 0]

    def only(t: Tensor) -> Tensor:
        return t[4:5].clone()

    assert state.momentum is not None
    alone = DistillerState(
        DistillerWeights(*map(only, state.weights)), DistillerWeights(*map(only, state.momentum)),
        *(only(t) for t in state[2:]),  # type: ignore[arg-type]
    )  # fmt: skip
    one = group_rows(torch.zeros(size, dtype=torch.long), 1)
    saved_alone, alone = run(shallow[mine], one, alone, deep[mine], scale, config, device, active[mine])
    assert equal_bits(saved_alone, tuple(field[mine] for field in saved))
    assert alone.momentum is not None and together.momentum is not None
    assert equal_bits(alone.weights, tuple(map(only, together.weights)))
    assert equal_bits(alone.momentum, tuple(map(only, together.momentum)))
    assert equal_bits((alone.loss, alone.updates), (together.loss[4:5], together.updates[4:5]))


@pytest.mark.parametrize("given", [Tensor.bfloat16, Tensor.half, padded, stepped])
def test_inputs_of_any_kind(given: Callable[[Tensor], Tensor], device: str) -> None:
    """Right for each.  Not the bits of a contiguous float32 copy: what a thread loads at once, and thereby the order
    of its sums, depends on dtype and strides.
    """
    slot = torch.arange(6) % 2
    compare(slot, 37, 5, 2, DistillerConfig(rank=5), device, given=given)
    compare(slot, 64, 8, 2, DistillerConfig(rank=8), device, given=given)


def test_no_rows_and_no_rate(device: str) -> None:
    hidden, rank, rows = 37, 5, 6
    state, scale = make_state(narrow(make_weights(2, hidden, rank))), torch.tensor(1.0)
    groups, (shallow, deep) = group_rows(torch.arange(rows) % 2, 2), (t.float() for t in states(rows, hidden))
    config = DistillerConfig(rank=rank)
    nothing = run(shallow[:0], group_rows(torch.zeros(0).long(), 2), state, deep[:0], scale, config, device)
    assert nothing[0].pred.shape == (0, hidden) and equal_bits(nothing[1].weights, state.weights)
    frozen = run(shallow, groups, state, deep, scale, DistillerConfig(rank=rank, lr=0.0, gate=False), device)
    assert equal_bits(frozen[1].weights, state.weights) and frozen[1].updates.sum() == 0


def test_weights_that_the_kernels_cannot_update_are_refused(device: str) -> None:
    weights, (shallow, _) = make_weights(1, 8, 2), states(2, 8)
    groups, scale = group_rows(torch.zeros(2, dtype=torch.long), 1), torch.tensor(1.0)
    mixed = narrow(weights)._replace(up=weights.up.bfloat16())
    strided = narrow(weights)._replace(down=weights.down.float().mT.contiguous().mT)
    for bad, what in (
        (weights, r"weights\.up.*float64"),
        (strided, r"weights\.down.*contiguous"),
        (mixed, "one dtype"),
    ):
        with pytest.raises(ArgumentError, match=what):
            triton_distiller.distiller_forward(shallow, groups, bad, scale)


@pytest.mark.parametrize("bad", ["nan", "inf", "zero target", "weights", "overflow"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_non_finite_leaves_the_slot_alone(bad: str, momentum: float, device: str) -> None:
    hidden, rank = 40, 6
    weights, (shallow, deep) = narrow(make_weights(3, hidden, rank)), (t.float() for t in states(9, hidden))
    groups, scale = group_rows(torch.arange(9) % 3, 3), torch.tensor(1.0)
    config, state = DistillerConfig(rank=rank, momentum=momentum), make_state(weights, momentum > 0)
    _, want = run(shallow, groups, state, deep, scale, config, device)
    before, broken = clone(state), deep.clone()
    if bad == "weights":
        before.weights.down[1, 2, 3] = float("inf")
    elif bad == "overflow":
        before.weights.up[1, 0, 0] = 3e38
    else:
        broken[4, slice(None) if bad == "zero target" else 7] = 0.0 if bad == "zero target" else float(bad)
    _, got = run(shallow, groups, before, broken, scale, config, device)
    assert got.nonfinite.tolist() == [0, 1, 0] and got.updates.tolist() == [1, 0, 1]
    for after, same, other in (
        (got.weights, before.weights, want.weights), (got.momentum or (), before.momentum or (), want.momentum or ()),
    ):  # fmt: skip
        for a, b, c in zip(after, same, other, strict=True):
            assert torch.equal(a[1], b[1]) and torch.equal(a[0], c[0]) and torch.equal(a[2], c[2])
    assert got.loss[1] == before.loss[1] and torch.isfinite(got.loss).all()
    if bad in ("nan", "inf", "zero target"):  # a row that does not teach may hold anything
        _, got = run(shallow, groups, state, broken, scale, config, device, torch.arange(9) != 4)
        assert got.updates.tolist() == [1, 1, 1] and all(torch.isfinite(w).all() for w in got.weights)


def test_a_row_too_far_off_for_float32_teaches_nothing_and_spoils_nothing(device: str) -> None:
    """The target of one row is so small that its error overflows when squared: its clip factor is 0, as in the
    reference, and its siblings teach."""
    hidden, rank, slot = 48, 4, torch.zeros(4, dtype=torch.long)
    weights, (shallow, deep) = narrow(make_weights(1, hidden, rank)), (t.float() for t in states(4, hidden))
    deep[2] *= 1e-14
    groups, scale, config = group_rows(slot, 1), torch.tensor(1.0), DistillerConfig(rank=rank)
    want = make_state(weights)
    saved = reference_distiller.distiller_forward(shallow, groups, want.weights, scale)
    reference_distiller.distiller_step_(want, saved, deep, groups, scale, config)
    _, got = run(shallow, groups, make_state(weights), deep, scale, config, device)
    assert want.updates.tolist() == got.updates.tolist() == [1]
    for name, a, b in zip(NAMES, got.weights, want.weights, strict=True):
        near(a, b, 1e-5, name)


@triton.jit
def _round_kernel(
    x_ptr, out_ptr, seed_ptr, update_ptr, tensor_index, N: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    i, k = tl.arange(0, N), tl.arange(0, TILE)
    x = tl.load(x_ptr + i[:, None] * M + k[None, :], mask=(k < M)[None, :], other=0.0)
    rounded = stochastic_round(x, i * M, tensor_index, tl.load(seed_ptr), tl.load(update_ptr), M % 4 == 0)
    tl.store(out_ptr + i[:, None] * M + k[None, :], rounded, mask=(k < M)[None, :])


@pytest.mark.parametrize("m", [64, 61])  # four neighbours from one Philox block, and each from its own
@pytest.mark.parametrize(("seed", "update", "tensor_index"), [(3, 0, 0), (-7, 2**33 + 1, 2), (2**62 + 5, 1000, 1)])
def test_rounding_is_the_reference_bit_for_bit(m: int, seed: int, update: int, tensor_index: int, device: str) -> None:
    x = torch.randn(64, m, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-20, 44)[:, None].clamp(
        max=37
    )
    x[0, :6] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 2.0**-140])
    x[1, :3] = torch.tensor([3.4e38, -3.4e38, 1.0])
    keys = torch.tensor(seed), torch.tensor(update)
    want = reference_distiller.stochastic_round(x, *keys, tensor_index)
    x, *keys = to(device, x, *keys)
    got = torch.empty(64, m, dtype=torch.bfloat16, device=device)
    _round_kernel[(1,)](x, got, *keys, tensor_index, N=64, M=m, TILE=64)
    got = got.cpu()
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    assert torch.equal(got.view(torch.int16)[number], want.view(torch.int16)[number])


def test_bfloat16_step_rounds_as_the_reference_does(device: str) -> None:
    """The same noise is added to nearly the same numbers: of the weights that move, nearly all agree in every bit."""
    hidden, rank, rows = 90, 12, 5
    weights, (shallow, deep) = narrow(make_weights(2, hidden, rank), torch.bfloat16), states(rows, hidden)
    shallow, deep, slot = shallow.float(), deep.float(), torch.ones(rows, dtype=torch.long)
    groups, scale, config = group_rows(slot, 2), torch.tensor(2.5), DistillerConfig(rank=rank, lr=2e-3)
    saved, got = run(shallow, groups, make_state(weights), deep, scale, config, device)
    _, grads = slot_gradients(weights, 1, saved, torch.arange(rows), deep, scale, config.clip)
    rates = learning_rates(config, hidden)
    for index, name in enumerate(NAMES[:3]):
        before = weights[index][1].float()
        exact = before - rates[index] * grads[index]
        want = reference_distiller.stochastic_round(exact, torch.tensor(6), torch.tensor(0), index)
        differ, moved = (got.weights[index][1] != want).sum(), (want != weights[index][1]).sum()
        assert moved > 30 and differ < 0.1 * moved, f"{name}: {differ} of {moved}"


def test_bfloat16_keeps_learning_where_plain_rounding_stalls(device: str) -> None:
    hidden, rank, rows, steps = 32, 8, 4, 24
    shallow, deep = (t.float() for t in states(rows, hidden))
    groups, scale = group_rows(torch.zeros(rows, dtype=torch.long), 1), deep.square().mean().sqrt()
    config, exact = DistillerConfig(rank=rank, lr=1e-3), make_weights(1, hidden, rank, torch.float32, seed=2)
    rates, moved = learning_rates(config, hidden), {}
    for dtype in (torch.float32, torch.bfloat16):
        state = make_state(narrow(exact, dtype))
        start = [w.float().clone() for w in state.weights[:3]]
        device_state, *rest = to(device, state, shallow, groups, deep, scale)
        for _ in range(steps):
            saved = triton_distiller.distiller_forward(rest[0], rest[1], device_state.weights, rest[3])
            triton_distiller.distiller_step_(device_state, saved, rest[2], rest[1], rest[3], config)
        after = to("cpu", device_state.weights)[0]
        moved[dtype] = [a.float() - b for a, b in zip(after[:3], start, strict=True)]
    plain = make_state(narrow(exact, torch.bfloat16))
    start = [w.float().clone() for w in plain.weights[:3]]
    for _ in range(steps):
        saved = reference_distiller.distiller_forward(shallow, groups, plain.weights, scale)
        _, grads = slot_gradients(plain.weights, 0, saved, torch.arange(rows), deep, scale, config.clip)
        for weight, grad, rate in zip(plain.weights[:3], grads, rates, strict=False):
            weight[0] = (weight[0].float() - rate * grad).bfloat16()
    for index in (0, 1):  # A and G, whose steps are far below half a bfloat16 ulp
        full, rounded = moved[torch.float32][index].flatten(), moved[torch.bfloat16][index].flatten()
        stalled = (plain.weights[index].float() - start[index]).flatten()
        assert torch.dot(full, stalled) < 0.3 * torch.dot(full, full), "plain rounding was to stall"
        assert 0.5 < torch.dot(full, rounded) / torch.dot(full, full) < 1.5


def test_tiles_never_look_at_rows() -> None:
    assert forward_kernels.tiles.__code__.co_varnames[:3] == ("hidden", "rank", "config")
    config = forward_kernels.Config()
    for hidden in (1, 64, 100, 3584, 16384):
        for rank in (1, 8, 64, 255, 256):
            size = forward_kernels.tiles(hidden, rank, config)
            assert size["split"] * size["splits"] >= hidden > size["split"] * (size["splits"] - 1)
            assert size["splits"] <= forward_kernels.MOST_SPLITS and size["split"] % size["hidden"] == 0
            assert min(size["hidden"], size["ranks"]) >= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explorer_on_kernels_and_on_torch(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps of two groups, a row leaving on the way: the same tokens and nearly the same numbers."""
    results = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("ESAMP_BACKEND", backend)
        explorer = make(DistillerConfig(rank=4, lr=0.3, weight_dtype=dtype), device)
        rows = explorer.open(["a", "a", "a", "b", "b"], PARAMS)
        tokens, novelty = [], []
        for step in range(6):
            if step == 3:
                rows = rows.keep([True, True, False, True, True])
            shallow, deep = to(device, *taps(len(rows), step))
            explorer.predict(shallow, rows)
            draw = explorer.sample(logits_of(explorer, deep), rows)
            explorer.learn(deep, rows)
            tokens.append(draw.token_ids), novelty.append(draw.novelty)
        stats = explorer.stats()
        results[backend] = torch.cat(tokens), torch.cat(novelty), [stats[g].loss for g in "ab"]
        assert [stats[g].updates for g in "ab"] == [6, 6]
    (tokens, novelty, losses), (kernel_tokens, kernel_novelty, kernel_losses) = results["torch"], results["triton"]
    if dtype == torch.float32:
        assert torch.equal(tokens, kernel_tokens)
        torch.testing.assert_close(novelty, kernel_novelty, rtol=1e-3, atol=1e-3)
    assert losses == pytest.approx(kernel_losses, rel=1e-3 if dtype == torch.float32 else 0.05)
