"""The four verbs: rows join and leave, and every misuse is an error instead of a silent no-op."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from explorer_helpers import HIDDEN, PARAMS, VOCAB, logits_of, make, step, taps

from esamp_core.sample import (
    ArgumentError,
    CapacityError,
    DistillerConfig,
    Draw,
    Explorer,
    Head,
    SamplingParams,
    StateError,
    explore,
    row_seeds,
)


def test_sample_without_predict() -> None:
    explorer = make()
    rows = explorer.open(["a"], PARAMS)
    with pytest.raises(StateError, match="sample needs predict"):
        explorer.sample(torch.zeros(1, VOCAB), rows)


def test_predict_without_learn() -> None:
    explorer = make()
    rows = explorer.open(["a"], PARAMS)
    shallow, deep = taps(1)
    explorer.predict(shallow, rows)
    explorer.sample(logits_of(explorer, deep), rows)
    with pytest.raises(StateError, match="again before learn"):
        explorer.predict(shallow, rows)


def test_frozen_needs_no_learn() -> None:
    explorer = make(DistillerConfig(rank=4, deep_scale=1.0, lr=0.0, gate=False))
    rows = explorer.open(["a"], PARAMS)
    shallow, deep = taps(1)
    for _ in range(3):
        explorer.predict(shallow, rows)
        explorer.sample(logits_of(explorer, deep), rows)
    assert explorer.stats()["a"].updates == 0


def test_learn_without_predict_and_sample_twice() -> None:
    explorer = make()
    rows = explorer.open(["a"], PARAMS)
    shallow, deep = taps(1)
    with pytest.raises(StateError, match="learn needs predict"):
        explorer.learn(deep, rows)
    explorer.predict(shallow, rows)
    explorer.sample(logits_of(explorer, deep), rows)
    with pytest.raises(StateError, match="twice"):
        explorer.sample(logits_of(explorer, deep), rows)


def test_outdated_and_closed_rows() -> None:
    explorer = make()
    old = explorer.open(["a", "a"], PARAMS)
    kept = old.keep([1])
    for use in (
        lambda: explorer.predict(taps(2)[0], old),
        lambda: old.keep([0]),
        lambda: old + kept,
        lambda: explorer.close(old),
    ):
        with pytest.raises(StateError, match="use the newest Rows"):
            use()
    explorer.close(kept)
    with pytest.raises(StateError, match="closed"):
        explorer.predict(taps(1)[0], kept)


def test_rows_changed_between_predict_and_sample() -> None:
    explorer = make()
    rows = explorer.open(["a", "a"], PARAMS)
    shallow, deep = taps(2)
    explorer.predict(shallow, rows)
    kept = rows.keep([0])
    with pytest.raises(StateError, match="sample needs predict"):
        explorer.sample(logits_of(explorer, deep[:1]), kept)


def test_rows_of_another_explorer() -> None:
    rows = make().open(["a"], PARAMS)
    with pytest.raises(ArgumentError, match="come from this Explorer"):
        make().predict(taps(1)[0], rows)
    with pytest.raises(ArgumentError, match="of one Explorer"):
        rows + make().open(["a"], PARAMS)


@pytest.mark.parametrize("shape", [(2, HIDDEN), (1, HIDDEN + 1), (HIDDEN,)])
def test_taps_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    explorer = make()
    rows = explorer.open(["a"], PARAMS)
    with pytest.raises(ArgumentError, match=rf"shallow must be .*\[1, {HIDDEN}\].*got float32"):
        explorer.predict(torch.zeros(shape), rows)
    explorer.predict(taps(1)[0], rows)
    with pytest.raises(ArgumentError, match="deep must be"):
        explorer.learn(torch.zeros(shape), rows)
    with pytest.raises(ArgumentError, match="logits must be"):
        explorer.sample(torch.zeros(3, VOCAB), rows)


@pytest.mark.parametrize("which", [[True], [0, 0], [2], [-1], [0.5], torch.zeros(2, device="meta")])
def test_keep_refuses_nonsense(which: object) -> None:
    with pytest.raises(ArgumentError, match="which must"):
        make().open(["a", "a"], PARAMS).keep(which)  # type: ignore[arg-type]


def test_open_refuses_nonsense_and_opens_nothing() -> None:
    explorer = make(max_groups=2)
    for name in ("groups", "sets"):
        for entry in (
            "p0",
            b"p0",
            {"a", "b"},
            {"a": 1, "b": 2},
            7,
            torch.zeros(2, 1),
            [["a"], ["b"]],
            [torch.ones(1)] * 2,
        ):
            # A text is not a list of groups with names of one letter, and a tensor is hashed by identity.
            with pytest.raises(ArgumentError, match=rf"{name}(\[0\])? must"):
                explorer.open(**{"groups": ["a", "b"], name: entry})  # type: ignore[arg-type]
    for bad in (
        lambda: explorer.open(["a"], [PARAMS, PARAMS]),
        lambda: explorer.open(["a"], sample_index=[0, 1]),
        lambda: explorer.open(["a"], position=-1),
        lambda: explorer.open(["a"], ["hot"]),  # type: ignore[list-item]
    ):
        with pytest.raises(ArgumentError):
            bad()
    with pytest.raises(CapacityError, match=r"all 2 \(max_groups\) are held by 'a', 'b'"):
        explorer.open(["a", "b", "c"], PARAMS)
    with pytest.raises(CapacityError, match="max_rows=32"):
        explorer.open(["a"] * 33, PARAMS)
    assert explorer.stats() == {}
    assert "0/2 groups, 0/32 rows" in repr(explorer)


def test_groups_may_come_as_numbers() -> None:
    explorer = make()
    for groups in (torch.tensor([3, 5, 3]), np.array([3, 5, 3]), range(3, 6), (g for g in (3, None, "x"))):
        rows = explorer.open(groups, PARAMS)  # type: ignore[arg-type]
        assert len(rows) == 3 and rows.groups[0] == 3 and explorer.stats().keys() == set(rows.groups) - {None}
        explorer.close(rows)


def test_close_after_an_exception_in_a_step() -> None:
    explorer = make()
    rows = explorer.open(["a"], PARAMS)
    step(explorer, rows)
    explorer.predict(taps(1)[0], rows)
    explorer.close(rows)  # as a `finally` would
    assert explorer.stats() == {}
    step(explorer, explorer.open(["b"], PARAMS))


def test_row_without_a_group_is_plain_sampling() -> None:
    explorer = make()
    rows = explorer.open([None, "a", None], PARAMS)
    _, deep = taps(3)
    logits = logits_of(explorer, deep)
    draw = step(explorer, rows)
    seeds = row_seeds(torch.tensor([5, 5, 5]), torch.tensor([0, 0, 1]))
    plain = explore(logits, dataclasses.replace(PARAMS, beta=0.0), seeds, 0)
    for field, got, want in zip(Draw._fields, draw, plain, strict=True):
        assert torch.equal(got[[0, 2]], want[[0, 2]]), field
    assert draw.novelty[1] != 0
    assert set(explorer.stats()) == {"a"}


def test_only_plain_rows_need_no_predict() -> None:
    explorer = make()
    rows = explorer.open([None] * 3, PARAMS)
    assert (explorer.sample(torch.randn(3, VOCAB), rows).token_ids >= 0).all()
    assert rows.positions.tolist() == [1, 1, 1]


def test_mixed_beta_in_one_batch() -> None:
    explorer = make()
    params = [dataclasses.replace(PARAMS, beta=b) for b in (0.0, 0.5, 0.0, 1.0)]
    rows = explorer.open(["a"] * 4, params)
    draw = step(explorer, rows)
    assert (draw.novelty != 0).tolist() == [False, True, False, True]
    assert (draw.kl[[0, 2]] == 0).all() and draw.kl[1] > 0
    assert explorer.stats()["a"].updates == 1


def test_siblings_differ_and_seeds_repeat() -> None:
    explorer = make()
    rows = explorer.open(["a"] * 3 + ["b"] * 2, SamplingParams(seed=1))
    assert rows.sample_index == [0, 1, 2, 0, 1]
    assert len(set(rows.seeds[:3].tolist())) == 3
    more = explorer.open(["a"], SamplingParams(seed=1))
    assert more.sample_index == [3]
    fresh = [explorer.open([None], SamplingParams()).seeds.item() for _ in range(2)]
    assert fresh[0] != fresh[1]
    again = make().open(["z"] * 3, SamplingParams(seed=1))
    assert torch.equal(again.seeds, rows.seeds[:3])


def test_inactive_rows_do_not_draw_teach_or_advance() -> None:
    explorer, other = make(), make()
    rows = explorer.open(["a", "a"], PARAMS)
    rows.active[1] = False
    draw = step(explorer, rows)
    assert draw.token_ids[1] == -1
    assert rows.positions.tolist() == [1, 0]
    alone = other.open(["a"], PARAMS)
    shallow, deep = (t[:1] for t in taps(2))
    other.predict(shallow, alone)
    other.sample(logits_of(other, deep), alone)
    other.learn(deep, alone)
    assert explorer.stats()["a"].loss == pytest.approx(other.stats()["a"].loss, rel=1e-6)


def test_model_logits_are_what_novelty_uses() -> None:
    explorer = make()
    rows = explorer.open(["a"], dataclasses.replace(PARAMS, min_p=0.0))
    shallow, deep = taps(1)
    model_logits = logits_of(explorer, deep)
    edited = model_logits.clone()
    edited[0, ::2] -= 50.0  # a penalty that must not be amplified
    explorer.predict(shallow, rows)
    draw = explorer.sample(edited, rows, model_logits=model_logits)
    assert draw.token_ids.item() % 2 == 1
    assert draw.novelty.abs().item() < 20.0
    base = torch.log_softmax(model_logits.double(), -1)[0, draw.token_ids.item()]
    assert draw.base_logprob.item() == pytest.approx(base.item(), abs=1e-5)


def test_the_error_falls() -> None:
    explorer = make(DistillerConfig(rank=8, deep_scale=1.0))
    rows = explorer.open(["a"] * 4, PARAMS)
    for t in range(200):
        step(explorer, rows, seed=t)
    stats = explorer.stats()["a"]
    assert stats.updates == 200 and stats.learning
    assert stats.loss < 0.7 * stats.first_loss


def test_unknown_scale_is_measured_once_and_first_step_is_vanilla() -> None:
    explorer = make(DistillerConfig(rank=4, gate=False))
    rows = explorer.open(["a", "a"], PARAMS)
    assert math.isnan(explorer._bank.scale)
    first = step(explorer, rows)
    assert (first.novelty == 0).all() and (first.kl == 0).all()
    second = step(explorer, rows, seed=1)
    _, deep = taps(2)
    scale = deep.square().mean().sqrt()
    assert torch.allclose(explorer._bank.scale, scale)
    assert (second.novelty != 0).all()
    step(explorer, rows, seed=2)
    explorer.stats()
    assert torch.allclose(explorer._bank.scale, scale)


def test_a_poisoned_row_harms_nobody_else() -> None:
    explorer = make()
    rows = explorer.open(["a", "b"], PARAMS)
    step(explorer, rows)
    shallow, deep = taps(2, seed=1)
    deep[0] = float("nan")
    explorer.predict(shallow, rows)
    explorer.sample(logits_of(explorer, deep), rows)
    explorer.learn(deep, rows)
    with pytest.warns(UserWarning, match="group 'a' does not learn well"):
        stats = explorer.stats()
    assert (stats["a"].updates, stats["a"].nonfinite) == (1, 1)
    assert (stats["b"].updates, stats["b"].nonfinite) == (2, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explorer.stats()  # warned once


def test_a_loss_that_does_not_fall_is_reported() -> None:
    explorer = make(DistillerConfig(rank=4, deep_scale=1.0, lr=1e-9, patience=3))
    rows = explorer.open(["a"], PARAMS)
    for t in (0, 5, 5, 5):
        step(explorer, rows, seed=t)
    stats = explorer._bank.state
    stats.first_loss[0] = stats.loss[0]  # as of a loss that stands still
    with pytest.warns(UserWarning, match="check the taps"):
        assert not explorer.stats()["a"].learning


def test_choice_learns_what_siblings_draw() -> None:
    explorer = make(DistillerConfig(rank=4, target="choice"))
    rows = explorer.open(["a"] * 4, dataclasses.replace(PARAMS, beta=1.0, min_p=0.0))
    shallow = taps(1)[0].expand(4, -1)
    logits = torch.zeros(4, VOCAB)
    logits[:, 7] = 4.0  # one clear favourite
    projections = []
    for _ in range(100):
        explorer.predict(shallow, rows)
        projections.append(explorer._learner.prediction()[0] @ (explorer.head.weight[7] - explorer.head.weight.mean(0)))
        explorer.sample(logits, rows)
        explorer.learn(None, rows)
    assert projections[0] == 0.0  # nothing was chosen yet, so nothing is penalised
    assert projections[-1] > 0.0


@pytest.mark.parametrize("target", ["deep", "choice"])
def test_a_model_that_requires_grad_leaves_no_graph_behind(target: str) -> None:
    weight = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0)))
    config = DistillerConfig(rank=4, deep_scale=1.0, target=target)  # type: ignore[arg-type]
    explorer = Explorer(Head(weight), HIDDEN, config, max_groups=2, max_rows=8)
    rows = explorer.open(["a", "a"], PARAMS)
    shallow, deep = (t.requires_grad_() for t in taps(2))
    for _ in range(3):
        explorer.predict(shallow, rows)
        draw = explorer.sample(deep @ weight.T, rows)
        explorer.learn(deep, rows)
    explorer.close(rows)
    state = explorer.state_dict()["tensors"]
    assert not any(t.requires_grad for t in (*draw, *state.values(), *explorer._bank.state.weights))
