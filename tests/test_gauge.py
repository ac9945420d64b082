"""gauge_ and what hangs on it: a Distiller that is worse than a constant is not listened to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from explorer_helpers import HIDDEN, PARAMS, logits_of, make, step, taps
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_oracle import Gate
from torch import Tensor

from esamp_core import sample
from esamp_core.base.errors import ArgumentError
from esamp_core.reference import distiller_forward, group_rows
from esamp_core.reference import gauge_ as reference_gauge
from esamp_core.sample import Activations, DistillerConfig, DistillerWeights, Explorer, Gauge, SamplingParams
from tests.kernel_cases import equal_bits, padded, quick_interpreter, stepped, to
from tests.test_distiller_ops import make_weights, states

pytest.importorskip("triton")
from esamp_core.ops import triton_distiller

OPS = {"torch": reference_gauge, "triton": triton_distiller.gauge_}
# Relative error of a few sums in float32, in other orders than float64's.
ERROR = 1e-5


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


def fresh(slots: int, hidden: int, dtype: torch.dtype = torch.float32) -> Gauge:
    """As of slots that have seen nothing; what must not be read is NaN."""
    nothing = torch.full((slots,), math.nan, dtype=dtype)
    steps = torch.zeros(slots, dtype=torch.int64)
    return Gauge(torch.zeros(slots, hidden, dtype=dtype), steps, nothing, nothing.clone(), torch.zeros_like(nothing))


def narrow(things: Any) -> Any:
    return type(things)(*(t.float() if t.is_floating_point() else t for t in things))


class Case:
    """Steps of rows in slots, given to an op in float32, and to formulas written down anew in float64."""

    def __init__(self, slot: Tensor, hidden: int, slots: int, seed: int) -> None:
        self.slot, self.hidden, self.slots, self.seed = slot, hidden, slots, seed
        self.weights, self.scale = make_weights(slots, hidden, 3, seed=seed), torch.tensor(2.5).double()
        self.groups = group_rows(slot, slots)

    def inputs(self, number: int) -> tuple[Activations, Tensor]:
        shallow, deep = states(len(self.slot), self.hidden, self.seed + number)
        return distiller_forward(shallow, self.groups, self.weights, self.scale), deep

    def run(
        self, op: Any, device: str, steps: int = 4, active: Tensor | None = None,
        given: Callable[[Tensor], Tensor] = Tensor.float, scratch: float | None = None,
    ) -> Gauge:  # fmt: skip
        """scratch: what the memory given for it is full of; None lets the op make its own."""
        gauge, weights = to(device, fresh(self.slots, self.hidden), narrow(self.weights))
        groups, scale, mask = to(device, self.groups, self.scale.float(), active)
        memory = None if scratch is None else triton_distiller.distiller_scratch(weights, len(self.slot))
        for number in range(steps):
            saved, deep = self.inputs(number)
            saved = to(device, narrow(saved))[0]
            if memory is not None:
                memory.fill_(scratch)
            op(gauge, saved, given(deep.to(device)), groups, weights, scale, active=mask, scratch=memory)
        return to("cpu", gauge)[0]

    def expected(self, slot: int, steps: int = 4, active: Tensor | None = None) -> Gate | None:
        rows = (self.slot == slot) & (torch.ones(len(self.slot), dtype=torch.bool) if active is None else active)
        if not rows.any():
            return None
        gate = Gate(DistillerConfig(), self.hidden)
        for number in range(steps):
            saved, deep = self.inputs(number)
            gate.look(saved.pred[rows] / self.scale, deep[rows] / self.scale)
        return gate

    def check(self, got: Gauge, error: float = ERROR, **options: Any) -> None:
        for slot in range(self.slots):
            want = self.expected(slot, **options)
            if want is None:
                assert int(got.steps[slot]) == 0 and (got.mean[slot] == 0).all() and got.error[slot].isnan(), slot
                continue
            assert int(got.steps[slot]) == want._seen
            mine = torch.stack([got.error[slot], got.baseline[slot]]).double()
            torch.testing.assert_close(mine, torch.tensor(want._errors).double(), rtol=error, atol=0)
            torch.testing.assert_close(
                got.mean[slot].double(), want._mean, rtol=0, atol=error * float(want._mean.norm())
            )
            assert float(got.trust[slot]) == pytest.approx(
                want.trust, abs=3 * error * max(1.0, float(mine[0] / mine[1]))
            )


SHAPES = [(1, 16, 1), (7, 64, 3), (19, 129, 4), (40, 35, 2), (4, 333, 8)]  # rows, H, slots


@pytest.mark.parametrize("backend", OPS)
@pytest.mark.parametrize(("rows", "hidden", "slots"), SHAPES)
def test_is_the_formula(backend: str, rows: int, hidden: int, slots: int, device: str) -> None:
    slot = (torch.arange(rows) ** 2) % (slots + 1) - (1 if slots > 1 else 0)
    slot = torch.where(torch.arange(rows) > 12, 0, slot)
    for active in (None, torch.arange(rows) % 4 != 3):
        case = Case(slot, hidden, slots, seed=rows)
        case.check(case.run(OPS[backend], device, active=active), active=active)


@settings(max_examples=10)
@given(
    slot=st.lists(st.integers(-1, 4), min_size=0, max_size=12),
    hidden=st.integers(2, 100),
    slots=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_any_schedule(device: str, slot: list[int], hidden: int, slots: int, seed: int) -> None:
    active = torch.rand(len(slot), generator=torch.Generator().manual_seed(seed)) < 0.7
    case = Case(torch.tensor(slot, dtype=torch.long), hidden, slots, seed)
    case.check(case.run(OPS["triton"], device, active=active), active=active)


@pytest.mark.parametrize("backend", OPS)
def test_only_the_latest_steps_count(backend: str, device: str) -> None:
    """40 steps: more than the running means remember."""
    case = Case(torch.tensor([0, 0, 1]), 16, 2, seed=3)
    case.check(case.run(OPS[backend], device, steps=40), error=4 * ERROR, steps=40)


@pytest.mark.parametrize("given", [Tensor.bfloat16, padded, stepped])
def test_inputs_of_any_kind(given: Callable[[Tensor], Tensor], device: str) -> None:
    """Against the reference, which gets the same numbers."""
    case = Case(torch.arange(6) % 2, 37, 2, seed=5)
    got, want = (case.run(op, device, given=given) for op in (OPS["triton"], OPS["torch"]))
    for name, a, b in zip(Gauge._fields, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=ERROR, atol=ERROR * float(b.double().norm()), msg=name)


def test_memory_full_of_nan_gives_the_same_bits(device: str) -> None:
    case, active = Case(torch.tensor([0, 1, -1, 1, 0, 1]), 40, 2, seed=9), torch.arange(6) != 3
    fresh_memory = case.run(OPS["triton"], device, active=active)
    assert equal_bits(fresh_memory, case.run(OPS["triton"], device, active=active, scratch=math.nan))
    assert equal_bits(fresh_memory, case.run(OPS["triton"], device, active=active, scratch=1e9))


@pytest.mark.parametrize("backend", OPS)
def test_other_groups_do_not_matter(backend: str, device: str) -> None:
    """A group of 19 rows alone, and in slot 4 of 6 between others: the same bits, and twice the same."""
    slot = torch.tensor([4] * 19 + [0] * 5 + [5] * 9 + [-1] * 2 + [2] * 5)
    case = Case(slot[torch.randperm(40, generator=torch.Generator().manual_seed(3))], 101, 6, seed=6)
    together = case.run(OPS[backend], device)
    assert equal_bits(together, case.run(OPS[backend], device))
    mine = case.slot == 4
    alone = Case(torch.zeros(19, dtype=torch.long), 101, 1, seed=6)
    alone.weights = DistillerWeights(*(w[4:5] for w in case.weights))

    def inputs(number: int) -> tuple[Activations, Tensor]:
        saved, deep = case.inputs(number)
        return Activations(*(field[mine] for field in saved)), deep[mine]

    alone.inputs = inputs  # type: ignore[method-assign]
    assert equal_bits(alone.run(OPS[backend], device), tuple(t[4:5] for t in together))


@pytest.mark.parametrize("backend", OPS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30, 0.0])
def test_what_is_not_finite_leaves_the_slot_alone(backend: str, bad: float, device: str) -> None:
    """1e30 overflows when squared; a target of zeros has nothing to be relative to."""
    case = Case(torch.arange(6) % 2, 20, 2, seed=8)
    gauge, weights, groups, scale = to(device, fresh(2, 20), narrow(case.weights), case.groups, case.scale.float())
    for number in range(3):
        saved, deep = case.inputs(number)
        if number == 2:
            deep[1] = bad
            before = Gauge(*(t.clone() for t in gauge))
        OPS[backend](gauge, to(device, narrow(saved))[0], deep.float().to(device), groups, weights, scale)
    assert equal_bits(tuple(t[1:] for t in gauge), tuple(t[1:] for t in before))
    assert gauge.steps.tolist() == [3, 2]


def test_a_distiller_worse_than_a_constant_changes_nothing() -> None:
    """One that cannot learn, of states that hardly move: trust is 0, and every draw that of beta 0, bit for bit."""
    explorer, plain = make(DistillerConfig(rank=4, deep_scale=1.0, lr=1e-9)), make()
    rows = explorer.open(["a"] * 4, PARAMS)
    others = plain.open(["a"] * 4, SamplingParams(temperature=0.9, min_p=0.01, beta=0.0, seed=5))
    same = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
    for number in range(12):
        shallow, noise = taps(4, number)
        deep = 2 * same + 0.1 * noise
        draws = []
        for one, open_rows in ((explorer, rows), (plain, others)):
            one.predict(shallow, open_rows)
            draws.append(one.sample(logits_of(one, deep), open_rows))
            one.learn(deep, open_rows)
        assert equal_bits(*draws)
    stats = explorer.stats()["a"]
    assert stats.trust == 0.0 and stats.error > 10 * stats.baseline
    ungated = make(DistillerConfig(rank=4, deep_scale=1.0, lr=1e-9, gate=False))
    assert (step(ungated, ungated.open(["a"] * 4, PARAMS)).novelty != 0).all()  # which would have explored


def test_beta_grows_with_what_was_learned() -> None:
    """Novelty stays what it is, and beta is scaled by trust: the shift of a logit says by how much."""
    explorer = make(DistillerConfig(rank=8, deep_scale=1.0, lr=0.3))
    rows = explorer.open(["a"] * 4, PARAMS)
    trusts = []
    for number in range(150):
        draw = step(explorer, rows, seed=number)
        if number in (0, 1):
            assert (draw.novelty == 0).all()  # nothing was compared before the second lesson
        if number % 30 == 29:
            trusts.append(explorer.stats()["a"].trust)
    stats = explorer.stats()["a"]
    assert trusts[0] < trusts[-1] and 0.2 < trusts[-1] < 1 and stats.learning
    assert stats.trust == pytest.approx(1 - stats.error / stats.baseline, abs=1e-6)
    shallow, deep = taps(4, 999)
    explorer.predict(shallow, rows)
    direction = deep - explorer.prediction(rows)
    seeds, positions, params = rows.seeds, rows.positions.clone(), rows.params
    draw = explorer.sample(logits_of(explorer, deep), rows)
    scaled = params._replace(beta=params.beta * stats.trust)
    head = explorer.head
    assert head is not None
    want = sample.explore(logits_of(explorer, deep), scaled, seeds, positions, direction=deep - direction, head=head)
    assert torch.equal(draw.token_ids, want.token_ids)
    torch.testing.assert_close(draw.logprob, want.logprob, atol=1e-5, rtol=1e-5)


def test_each_group_has_its_own() -> None:
    explorer = make(DistillerConfig(rank=8, deep_scale=1.0, lr=0.3), max_groups=2)
    rows = explorer.open(["a", "a", "b", None], PARAMS)
    for number in range(100):
        shallow, deep = taps(4, number)
        deep[2] = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(number))  # which nothing foretells
        explorer.predict(shallow, rows)
        explorer.sample(logits_of(explorer, deep), rows)
        explorer.learn(deep, rows)
    stats = explorer.stats()
    assert stats["a"].trust > 0.2 and stats["b"].trust == 0.0
    explorer.close(rows)
    more = explorer.open(["c"], PARAMS)  # takes a slot over, and is not trusted for it
    assert explorer.stats()["c"].trust == 0.0 and math.isnan(explorer.stats()["c"].error)
    explorer.close(more)


def test_a_verdict_by_the_constant() -> None:
    """A loss that has fallen is no learning while a constant is better."""
    explorer = make(DistillerConfig(rank=4, deep_scale=1.0, lr=0.01, patience=20))
    rows = explorer.open(["a"] * 4, PARAMS)
    same = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
    for number in range(40):
        shallow, noise = taps(4, number)
        explorer.predict(shallow, rows)
        explorer.learn(2 * same + 0.01 * noise, rows)
    with pytest.warns(UserWarning, match="lately where a constant has"):
        stats = explorer.stats()["a"]
    assert stats.loss < stats.first_loss and not stats.learning


def test_a_saved_group_is_trusted_as_before(tmp_path: Any) -> None:
    config = DistillerConfig(rank=8, deep_scale=1.0, lr=0.3)
    explorer = make(config)
    rows = explorer.open(["a"] * 4, PARAMS, retain=True)
    for number in range(100):
        step(explorer, rows, seed=number)
    explorer.close(rows)
    explorer.save(tmp_path / "bank.safetensors")
    other = make(config)
    other.load(tmp_path / "bank.safetensors")
    assert other.stats()["a"][1:] == explorer.stats()["a"][1:] and other.stats()["a"].trust > 0.1


def test_a_state_without_a_gauge_is_refused() -> None:
    """A gated bank would not know whether to trust it; the other way round what was judged is left out."""
    gated, ungated = (make(DistillerConfig(rank=4, deep_scale=1.0, gate=gate)) for gate in (True, False))
    for explorer in (gated, ungated):
        explorer.close(explorer.open(["a"], PARAMS, retain=True))
    with pytest.raises(ArgumentError, match=r"state must hold the gate's tensors .* saved with gate=False"):
        make(DistillerConfig(rank=4, deep_scale=1.0)).load_state_dict(ungated.state_dict())
    other = make(DistillerConfig(rank=4, deep_scale=1.0, gate=False))
    other.load_state_dict(gated.state_dict())
    assert set(other.stats()) == {"a"}


def test_frozen_and_unjudged_would_never_explore() -> None:
    with pytest.raises(ArgumentError, match="gate must be False where lr is 0"):
        make(DistillerConfig(rank=4, lr=0.0))
    assert not DistillerConfig(target="choice").gated
    make(DistillerConfig(rank=4, lr=0.0, target="choice"))


def test_a_mixed_state_is_scaled_too() -> None:
    config = DistillerConfig(rank=8, deep_scale=1.0, lr=0.3)
    explorer = Explorer(None, HIDDEN, config, max_groups=2, max_rows=8, device="cpu")
    rows = explorer.open(["a"] * 4, PARAMS)
    for number in range(60):
        shallow, deep = taps(4, number)
        explorer.predict(shallow, rows)
        mixed = explorer.mix(deep, rows)
        explorer.learn(deep, rows)
        if number < 2:
            assert torch.equal(mixed, deep)
    trust = explorer.stats()["a"].trust
    shallow, deep = taps(4, 999)
    explorer.predict(shallow, rows)
    mixed = explorer.mix(deep, rows)
    beta = PARAMS.beta * trust
    assert trust > 0.05
    torch.testing.assert_close(mixed, (1 + beta) * deep - beta * explorer.prediction(rows), atol=1e-5, rtol=1e-5)
