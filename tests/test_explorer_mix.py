"""The Explorer's verbs around mix: prediction, mix, sample after it, rows spread over an engine's batch, no head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from explorer_helpers import HIDDEN, PARAMS, logits_of, make, taps
from simulated_lane import SimulatedLane
from torch import Tensor

from esamp_core.base.errors import ArgumentError, StateError
from esamp_core.sample import DistillerConfig, Explorer, Head, SamplingParams
from tests.kernel_cases import equal_bits, quick_interpreter
from tests.test_mix import FLAG, same_bits

pytest.importorskip("triton")


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ESAMP_BACKEND", request.param)
    return str(request.param)


def mixing(lane: Any = None, config: DistillerConfig | None = None, **options: Any) -> Explorer:
    config = config or DistillerConfig(rank=4, deep_scale=1.0, gate=False)
    options = {"max_groups": 4, "max_rows": 32, "device": "cpu", "lane": lane} | options
    return Explorer(None, HIDDEN, config, **options)


def run_steps(explorer: Explorer, steps: int = 6, mixes: bool = True) -> tuple[list[Tensor], dict[str, Any]]:
    rows = explorer.open(["a", "a", "b", None], [PARAMS, PARAMS, SamplingParams(beta=0.0, seed=5), PARAMS])
    mixed = []
    for number in range(steps):
        shallow, deep = taps(4, number)
        explorer.predict(shallow, rows)
        if mixes:
            mixed.append(explorer.mix(deep, rows).clone())
            assert same_bits(mixed[-1][2:], deep[2:]) and rows.status.tolist() == [0] * 4
        explorer.learn(deep, rows)
    return mixed, explorer.state_dict()["tensors"]


def test_head_then_reweight_is_mix_then_head(backend: str) -> None:
    """Without filters, with all tokens scored: the same Distillers, and log-probabilities to rounding."""
    scored, mixes = make(max_candidates=50), mixing()
    given = SamplingParams(temperature=0.7, beta=0.8, seed=9)
    ours, theirs = scored.open(["a"] * 5, given), mixes.open(["a"] * 5, given)
    for number in range(8):
        shallow, deep = taps(5, number)
        for explorer, rows in ((scored, ours), (mixes, theirs)):
            explorer.predict(shallow, rows)
        draw = scored.sample(logits_of(scored, deep), ours)
        hidden = mixes.mix(deep, theirs)
        exact = (hidden.double() @ scored.head.weight.double().T / 0.7).log_softmax(-1)  # type: ignore[union-attr]
        got = exact.gather(1, draw.token_ids[:, None])[:, 0]
        torch.testing.assert_close(draw.logprob.double(), got, atol=2e-5, rtol=2e-5)
        scored.learn(deep, ours)
        mixes.learn(deep, theirs)
    a, b = scored.state_dict()["tensors"], mixes.state_dict()["tensors"]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_soft_cap_caps_what_was_mixed() -> None:
    """As documented: cap((1 + beta) x - beta x'), within the cap; the candidates form adds novelty to capped logits."""
    weight = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0)) * 3
    head = Head(weight, softcap=5.0)
    explorer = Explorer(head, HIDDEN, DistillerConfig(rank=4, deep_scale=1.0, gate=False), max_candidates=50)
    rows = explorer.open(["a", "a"], SamplingParams(beta=0.5, seed=1))
    shallow, deep = taps(2)
    explorer.predict(shallow, rows)
    prediction = explorer.prediction(rows).double()
    x, other = deep.double() @ weight.double().T, prediction @ weight.double().T
    capped = 5 * torch.tanh((explorer.mix(deep, rows).double() @ weight.double().T) / 5)
    torch.testing.assert_close(capped, 5 * torch.tanh((1.5 * x - 0.5 * other) / 5), atol=1e-4, rtol=1e-4)
    reweighted = 5 * torch.tanh(x / 5) + 0.5 * (5 * torch.tanh(x / 5) - 5 * torch.tanh(other / 5))
    assert (capped.abs() <= 5).all() and (reweighted.abs() > 5).any()


@pytest.mark.parametrize("seed", range(6))
def test_mixing_with_a_late_stream_is_the_serial_run(backend: str, seed: int) -> None:
    mixed, learned = run_steps(mixing())
    late_mixed, late_learned = run_steps(mixing(SimulatedLane(seed)))
    assert equal_bits(tuple(mixed), tuple(late_mixed))
    assert all(torch.equal(learned[name], late_learned[name]) for name in learned)


def test_learning_does_not_need_mix(backend: str) -> None:
    """The LayerNorm that is left to mix is then done when the target is staged: the same weights."""
    _, with_mix = run_steps(mixing())
    _, without = run_steps(mixing(), mixes=False)
    assert all(torch.equal(with_mix[name], without[name]) for name in with_mix)
    assert (with_mix["updates"] > 0).all()


def test_prediction(backend: str) -> None:
    scored, mixes = make(), mixing()
    shallow, deep = taps(3)
    seen: list[Tensor] = []
    for explorer in (scored, mixing(), mixes):  # mix does not keep what it mixes
        rows = explorer.open(["a", "a", None], PARAMS)
        with pytest.raises(StateError, match="prediction needs predict"):
            explorer.prediction(rows)
        explorer.predict(shallow, rows)
        if len(seen) == 2:
            explorer.mix(deep, rows)
        seen.append(explorer.prediction(rows).clone())
        explorer.learn(deep, rows)
        with pytest.raises(StateError, match="prediction needs predict"):
            explorer.prediction(rows)
        explorer.close(rows)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]) and (seen[0][2] == 0).all()
    # Fresh: s * LayerNorm(shallow / rms).
    exact = torch.nn.functional.layer_norm(shallow / shallow.square().mean(-1, keepdim=True).sqrt(), (HIDDEN,))
    torch.testing.assert_close(seen[0][:2], exact[:2], atol=1e-5, rtol=1e-5)


def test_before_the_scale_is_known_nothing_is_mixed() -> None:
    explorer = mixing(config=DistillerConfig(rank=4, gate=False))
    rows = explorer.open(["a", "a"], PARAMS)
    for number in range(2):
        shallow, deep = taps(2, number)
        explorer.predict(shallow, rows)
        if number == 0:
            with pytest.raises(StateError, match="scale is not known"):
                explorer.prediction(rows)
        mixed = explorer.mix(deep, rows)
        assert torch.equal(mixed, deep) == (number == 0) and rows.status.tolist() == [0, 0]
        explorer.learn(deep, rows)


def test_flags_stay_with_their_rows() -> None:
    explorer = mixing()
    rows = explorer.open(["a", "b"], PARAMS)
    for number in range(2):
        shallow, deep = taps(2, number)
        if number == 0:
            deep[1, 3] = float("nan")
        explorer.predict(shallow, rows)
        mixed = explorer.mix(deep, rows)
        assert same_bits(mixed[1], deep[1]) == (number == 0)
        explorer.learn(deep, rows)
    assert rows.status.tolist() == [0, FLAG]
    rows = rows.keep([1]) + explorer.open(["c"], PARAMS)
    assert rows.status.tolist() == [FLAG, 0]


def test_sample_after_mix_draws_from_the_logits_as_they_are() -> None:
    explorer = make()
    rows = explorer.open(["a"] * 3, SamplingParams(beta=2.0, seed=3))
    plain = explorer.open([None] * 3, SamplingParams(beta=0.0, seed=3))
    shallow, deep = taps(3)
    explorer.predict(shallow, rows)
    logits = logits_of(explorer, explorer.mix(deep, rows))
    draw = explorer.sample(logits, rows)
    explorer.learn(deep, rows)
    assert equal_bits(draw, explorer.sample(logits, plain))
    assert rows.positions.tolist() == [1, 1, 1]


def test_spread_rows_are_those_of_the_engines_batch(backend: str) -> None:
    """In another order, with strangers between, and several rows of one sequence; the Distillers learn the same."""

    def steps(places: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        explorer = mixing()
        opened = explorer.open(["a", "b", "a"], PARAMS)
        rows, index = opened.spread(places), torch.tensor(places)
        assert rows.groups == [None if p < 0 else opened.groups[p] for p in places]
        hidden = torch.zeros(3, HIDDEN)
        for number in range(4):
            shallow, deep = taps(3, number)
            elsewhere = torch.randn(len(places), HIDDEN, generator=torch.Generator().manual_seed(99))
            ours = (index >= 0)[:, None]
            shallow_here = torch.where(ours, shallow[index], elsewhere)
            deep_here = torch.where(ours, deep[index], elsewhere)
            explorer.predict(shallow_here, rows)
            mixed = explorer.mix(deep_here, rows)
            assert same_bits(mixed[index < 0], deep_here[index < 0])
            hidden[index[index >= 0]] = mixed[index >= 0]
            last = {place: i for i, place in enumerate(places)}  # of several rows of a sequence the last one teaches
            explorer.learn(deep_here, rows, teaches=torch.tensor([last[p] == i for i, p in enumerate(places)]))
        return hidden, explorer.state_dict()["tensors"]

    hidden, learned = steps([0, 1, 2])
    for places in ([2, -1, 0, 1, -1], [0, 0, 1, 2, 2, 2]):
        other, also = steps(places)
        torch.testing.assert_close(other, hidden, rtol=1e-5, atol=1e-5)  # the batch's size may change a product's tiles
        for name in learned:
            torch.testing.assert_close(also[name], learned[name], rtol=1e-5, atol=1e-5)


def test_spread_rows_follow_those_they_came_from() -> None:
    explorer = mixing()
    opened = explorer.open(["a", "b"], PARAMS)
    rows = opened.spread([1, -1, 0])
    for wrong in (lambda: rows.keep([0]), lambda: explorer.close(rows), lambda: rows + opened):
        with pytest.raises(StateError, match="spread from others"):
            wrong()
    for places in ([2], [-2], [True]):
        with pytest.raises(ArgumentError, match="places"):
            opened.spread(places)
    explorer.predict(taps(3)[0], rows)
    kept = opened.keep([0])
    with pytest.raises(StateError, match="replaced"):
        explorer.mix(taps(3)[1], rows)
    rows = kept.spread([0, -1])
    explorer.predict(taps(2)[0], rows)
    explorer.mix(taps(2)[1], rows)
    assert explorer.open_rows == 1


@pytest.mark.parametrize(
    ("make_wrong", "error", "match"),
    [
        (lambda: Explorer(None, 8), ArgumentError, "device must be given"),
        (lambda: mixing(config=DistillerConfig(target="choice")), ArgumentError, "head must be given"),
        (lambda: Explorer(Head(torch.zeros(3, 8)), 8, device="cpu"), ArgumentError, "device must be left out"),
        (lambda: mixing().warm_up(torch.int8), ArgumentError, "dtype must be one of"),
    ],
)
def test_explorer_without_a_head_is_asked_for_rightly(make_wrong: Any, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        make_wrong()


def test_wrong_order_of_calls() -> None:
    explorer = mixing()
    rows = explorer.open(["a", "a"], PARAMS)
    shallow, deep = taps(2)
    with pytest.raises(StateError, match="mix needs predict"):
        explorer.mix(deep, rows)
    explorer.predict(shallow, rows)
    with pytest.raises(StateError, match="this Explorer has none"):
        explorer.sample(torch.zeros(2, 5), rows)
    explorer.mix(deep, rows)
    with pytest.raises(StateError, match="mix was called after the step was mixed"):
        explorer.mix(deep, rows)
    with pytest.raises(ArgumentError, match="deep must be"):
        explorer.mix(deep[:1], rows)
    with pytest.raises(ArgumentError, match="other memory"):
        explorer.mix(deep, rows, out=deep)
    with pytest.raises(ArgumentError, match="teaches must be"):
        explorer.learn(deep, rows, teaches=torch.ones(3, dtype=torch.bool))
    explorer.learn(deep, rows)
    choice = make(DistillerConfig(rank=4, target="choice"))
    rows = choice.open(["a", "a"], PARAMS)
    choice.predict(shallow, rows)
    with pytest.raises(StateError, match='target "deep"'):
        choice.mix(deep, rows)


def test_warm_up_and_plain_rows() -> None:
    explorer = mixing()
    explorer.warm_up(torch.bfloat16)
    rows = explorer.open([None, None], SamplingParams(beta=0.0))
    deep = taps(2)[1]
    assert explorer.mix(deep, rows) is deep
    out = torch.empty_like(deep)
    assert explorer.mix(deep, rows, out) is out and torch.equal(out, deep)
