"""A step belongs to the rows of its predict: what other rows do in between is none of its business."""

from __future__ import annotations

import pytest
import torch
from explorer_helpers import PARAMS, logits_of, make, taps

from esamp_core.sample import DistillerConfig, Explorer, Rows, SamplingParams, StateError

PLAIN = SamplingParams(seed=2, temperature=3.0)


def other_rows_draw(explorer: Explorer, other: Rows) -> None:
    _, deep = taps(len(other), 99)
    explorer.sample(-logits_of(explorer, deep), other)
    explorer.mix(deep, other)


@pytest.mark.parametrize("others", [[None] * 3, [None], ["b"]])
def test_a_choice_is_that_of_the_rows_that_learn(others: list[str | None]) -> None:
    states = []
    for between in (False, True):
        explorer = make(DistillerConfig(rank=4, target="choice"))
        mine = explorer.open(["a"] * 3, PARAMS)
        plain = explorer.open(others, SamplingParams(seed=2, temperature=3.0, beta=0.0))
        for seed in range(5):
            shallow, deep = taps(3, seed)
            explorer.predict(shallow, mine)
            if between:
                explorer.sample(logits_of(explorer, taps(len(plain), 7)[1]), plain)
            explorer.sample(logits_of(explorer, deep), mine)
            if between:
                explorer.sample(-logits_of(explorer, taps(len(plain), 8)[1]), plain)
            explorer.learn(None, mine)
        saved = explorer.state_dict()
        states.append({name: tensor[0] for name, tensor in saved["tensors"].items()})
    for name, tensor in states[0].items():
        assert torch.equal(tensor.double().nan_to_num(-1), states[1][name].double().nan_to_num(-1)), name


@pytest.mark.parametrize("verb", ["sample", "branch"])
def test_a_step_is_drawn_once_whatever_other_rows_draw(verb: str) -> None:
    explorer = make()
    mine, plain = explorer.open(["a"] * 2, PARAMS), explorer.open([None], PLAIN)
    shallow, deep = taps(2)
    explorer.predict(shallow, mine)
    getattr(explorer, verb)(logits_of(explorer, deep), mine)
    other_rows_draw(explorer, plain)
    for again in (explorer.sample, explorer.branch):
        with pytest.raises(StateError, match="twice"):
            again(logits_of(explorer, deep), mine)
    with pytest.raises(StateError, match="after the step was sampled"):
        explorer.mix(deep, mine)
    explorer.learn(deep, mine)


def test_a_step_is_explored_once_whatever_other_rows_draw() -> None:
    """Mixed logits have exploration in them: sample must not add it again because other rows came between."""
    draws = []
    for between in (False, True):
        explorer = make()
        mine, plain = explorer.open(["a"] * 2, PARAMS), explorer.open([None], PLAIN)
        for seed in range(3):
            shallow, deep = taps(2, seed)
            explorer.predict(shallow, mine)
            mixed = explorer.mix(deep, mine)
            if between:
                other_rows_draw(explorer, plain)
            draw = explorer.sample(logits_of(explorer, mixed), mine)
            explorer.learn(deep, mine)
        assert draw.novelty.eq(0).all() and draw.kl.eq(0).all()
        draws.append(draw)
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))


def test_a_step_of_rows_that_are_gone_stands_in_nobodys_way() -> None:
    explorer = make()
    mine, other = explorer.open(["a"] * 2, PARAMS), explorer.open(["b"], PARAMS)
    explorer.predict(taps(2)[0], mine)
    with pytest.raises(StateError, match="again before learn"):
        explorer.predict(taps(1)[0], other)
    mine = mine.keep([1])
    explorer.predict(taps(1)[0], other)
    explorer.close(other)
    explorer.predict(taps(1)[0], mine)
    del mine  # an interrupt between two verbs, say
    assert explorer.open_rows == 0
    other = explorer.open(["b"], PARAMS)
    explorer.predict(taps(1)[0], other)
