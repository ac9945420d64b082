"""Distinct siblings: drawn without replacement, exactly; the ops, and the Explorer's verb."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esamp_core.base.errors import ArgumentError, StateError
from esamp_core.sample import (
    Children,
    DistillerConfig,
    RowParams,
    SamplingParams,
    Status,
    Tree,
    draw,
    explore,
    explore_children,
    grow,
    reweight,
    root_noise,
    row_seeds,
    select_candidates,
)
from tests.explorer_helpers import PARAMS, logits_of, make, taps
from tests.oracles import chi_square_p_value

FALSE_ALARM = 1e-5
DISTINCT = replace(PARAMS, distinct=True, beta=0.0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.integers(2, 300),
    width=st.integers(1, 40),
    cap=st.integers(1, 64),
    top_k=st.sampled_from([0, 5, 50]),
    min_p=st.sampled_from([0.0, 0.05]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    beta=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**31),
)
def test_children_are_what_the_draw_gives_when_those_before_are_banned(
    rows: int, vocab: int, width: int, cap: int, top_k: int, min_p: float, temperature: float, beta: float, seed: int
) -> None:
    """By the draw's own op, one after the other, over everything that the filters kept."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float32) * 3
    params = SamplingParams(temperature=temperature, top_k=top_k, min_p=min_p, beta=beta)
    seeds, position = row_seeds(torch.full((rows,), seed), torch.arange(rows)), torch.full((rows,), 3)
    options: dict[str, Any] = {"max_candidates": cap}
    got, children = explore_children(logits, params, seeds, position, width, **options)
    plain = explore(logits, replace(params, beta=0.0), seeds, position, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))

    candidates = select_candidates(logits, params, max_candidates=1024)  # all of them
    kept = torch.full_like(logits, -torch.inf)
    for row in range(rows):
        ids = candidates.token_ids[row][candidates.token_ids[row] >= 0]
        kept[row, ids] = logits[row, ids]
    whole = (kept / temperature).log_softmax(-1)
    for place in range(width):
        next_one = explore(kept, SamplingParams(temperature=temperature), seeds, position)
        token = children.token_ids[:, place]
        assert torch.equal(token, next_one.token_ids)
        here = token >= 0
        want = whole.gather(-1, token.clamp_min(0)[:, None])[:, 0]
        torch.testing.assert_close(children.logprob[here, place], want[here], atol=1e-5, rtol=1e-5)
        assert torch.equal(children.perturbed[~here, place], torch.full((int((~here).sum()),), -torch.inf))
        kept[here, token[here]] = -torch.inf
    gumbel = children.perturbed - children.logprob
    falls = children.perturbed[:, :-1] >= children.perturbed[:, 1:]
    assert bool(falls.all()) and bool((gumbel[children.token_ids >= 0] < 23).all())


def test_children_of_explored_rows_have_the_reweighted_probabilities() -> None:
    explorer = make()
    deep = taps(3)[1]
    logits, direction = logits_of(explorer, deep), torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    params, seeds, position = replace(PARAMS, beta=0.7), torch.arange(3), torch.zeros(3, dtype=torch.int64)
    options: dict[str, Any] = {"direction": direction, "head": explorer.head}
    got, children = explore_children(logits, params, seeds, position, 6, **options)
    candidates = select_candidates(logits, params)
    distilled = direction @ explorer.head.weight.T  # type: ignore[union-attr]
    new = reweight(candidates, distilled.gather(-1, candidates.token_ids.clamp_min(0)), params)
    logprob = (new.logits / params.temperature).log_softmax(-1)
    for row in range(3):
        for place, token in enumerate(children.token_ids[row].tolist()):
            if token < 0:
                assert place >= int(candidates.count[row])
                continue
            (at,) = (candidates.token_ids[row] == token).nonzero().flatten().tolist()
            assert children.logprob[row, place] == pytest.approx(float(logprob[row, at]), abs=1e-5)
            assert children.novelty[row, place] == pytest.approx(float(new.novelty[row, at]), abs=1e-5)
    again = draw(candidates, new, logits, params, seeds, position)
    assert torch.equal(got.token_ids, again.token_ids)


def test_children_of_rows_without_choice() -> None:
    logits = torch.full((4, 9), -torch.inf)
    logits[1, 4], logits[2, [2, 7]], logits[3] = 1.0, torch.tensor([math.inf, math.inf]), torch.arange(9.0)
    params = [SamplingParams(), SamplingParams(), SamplingParams(), SamplingParams(temperature=0.0)]
    got, children = explore_children(logits, params, torch.arange(4), 0, 3)
    assert children.token_ids.tolist()[:2] == [[-1, -1, -1], [4, -1, -1]]
    assert set(children.token_ids[2, :2].tolist()) == {2, 7} and children.token_ids[2, 2] == -1
    assert children.token_ids[3].tolist() == [8, -1, -1]
    assert (got.status[0] & Status.EMPTY) and got.token_ids[0] == -1
    torch.testing.assert_close(children.logprob[2, :2], torch.tensor([0.5, 0.5]).log())


# A language of four words: 3 ends a text, no text has more than three.
WORDS, LONGEST, END = 4, 3, 3


@functools.cache
def words_after(text: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum((word + 1) * 7**i for i, word in enumerate(text)))
    return torch.randn(WORDS, generator=generator, dtype=torch.float32) * 1.5


def texts(text: tuple[int, ...] = (), p: float = 1.0) -> dict[tuple[int, ...], float]:
    """Every text and its probability."""
    if len(text) == LONGEST or END in text:
        return {text: p}
    chances = words_after(text).double().softmax(-1).tolist()
    return {t: q for word in range(WORDS) for t, q in texts((*text, word), p * chances[word]).items()}


def spoken(n: int, sets: int, first_seed: int, cap: int = 256) -> list[list[tuple[int, ...]]]:
    """Texts of sets of n distinct siblings, in their order, by the ops alone."""
    rows = n * sets
    seed = row_seeds(torch.arange(first_seed, first_seed + sets).repeat_interleave(n), torch.arange(n).repeat(sets))
    active = (torch.arange(rows) % n) == 0
    tree = Tree(torch.zeros(rows, dtype=torch.float64), root_noise(seed).masked_fill(~active, -torch.inf))
    families, position = torch.arange(rows).view(sets, n), torch.zeros(rows, dtype=torch.int64)
    said: list[tuple[int, ...]] = [()] * rows
    for _ in range(LONGEST):
        logits = torch.stack([words_after(text) for text in said])
        _, children = explore_children(
            logits, SamplingParams(beta=0.0), seed, position, n, active=active, max_candidates=cap
        )
        growth = grow(children, tree, families, active, seed, position)
        token = children.token_ids[growth.parent].gather(-1, growth.child.clamp_min(0)[:, None])[:, 0]
        goes = growth.child >= 0
        said = [
            said[parent] + ((word,) if on else ())
            for parent, word, on in zip(growth.parent.tolist(), token.tolist(), goes.tolist(), strict=True)
        ]
        active = goes & (token != END)
        position, tree, seed = position[growth.parent] + goes, growth.tree, growth.seed
    chances = texts()
    for text, logprob, value in zip(said, tree.logprob.tolist(), tree.perturbed.tolist(), strict=True):
        assert value == -math.inf or math.exp(logprob) == pytest.approx(chances[text], rel=1e-5)
    found = []
    for number in range(sets):
        members = sorted(range(number * n, number * n + n), key=lambda row: -float(tree.perturbed[row]))
        found.append([said[row] for row in members if tree.perturbed[row] > -math.inf])
    return found


@pytest.mark.parametrize("cap", [256, 2])
def test_whole_texts_are_drawn_without_replacement(cap: int) -> None:
    """The first has the distribution of a sample, the second that of one of what is left, and none comes twice."""
    chances = texts()
    assert sum(chances.values()) == pytest.approx(1.0, abs=1e-6)
    found = spoken(4, 3000, 11, cap)
    assert all(len(set(sample)) == 4 for sample in found)
    pairs = {(a, b): p * q / (1 - p) for a, p in chances.items() for b, q in chances.items() if a != b}
    for drawn, probability in (([s[0] for s in found], chances), ([(s[0], s[1]) for s in found], pairs)):
        places: dict[Any, int] = {name: place for place, name in enumerate(probability)}
        tokens = torch.tensor([places[name] for name in drawn])
        assert chi_square_p_value(tokens, np.array(list(probability.values()))) > FALSE_ALARM


def test_fewer_siblings_are_the_first_of_more() -> None:
    """The noise after a beginning is a function of the beginning alone."""
    five = spoken(5, 60, 4)
    for n in (2, 3):
        assert spoken(n, 60, 4) == [sample[:n] for sample in five]


def test_all_texts_and_no_more() -> None:
    (sample,) = spoken(64, 1, 3)
    assert sorted(sample) == sorted(texts())


def test_a_finished_sample_gives_way_to_better_ones_and_stays_otherwise() -> None:
    """By hand: row 0 has finished, row 1 goes on in both of its children, row 2 holds nothing."""
    children = Children(
        torch.tensor([[-1, -1, -1], [7, 9, 5], [-1, -1, -1]]),
        torch.tensor([[-math.inf] * 3, [-1.0, -1.0, -3.0], [-math.inf] * 3]),
        torch.tensor([[-math.inf] * 3, [1.0, 0.9, -2.0], [-math.inf] * 3]),
        torch.zeros(3, 3),
    )
    active, families = torch.tensor([False, True, False]), torch.tensor([[0, 1, 2]])
    seed, position = torch.tensor([3, 4, 5]), torch.tensor([2, 2, 0])

    def grown(finished: float) -> tuple[list[int], list[int], Tree, Tensor]:
        tree = Tree(torch.tensor([-2.0, -4.0, 0.0]).double(), torch.tensor([finished, 1.0, -math.inf]).double())
        growth = grow(children, tree, families, active, seed, position)
        return growth.parent.tolist(), growth.child.tolist(), growth.tree, growth.seed

    parent, child, tree, seeds = grown(5.0)
    assert (parent, child) == ([0, 1, 1], [-1, 0, 1])
    assert seeds[0] == 3 and seeds[1] == 4 and seeds[2] not in (3, 4, 5)
    assert tree.logprob.tolist() == [-2.0, -5.0, -5.0]
    # -log(exp(-1) - exp(-(-4 + 1)) + exp(-(-4 + .9))), by the formula
    second = -math.log(math.exp(-1.0) - math.exp(3.0) + math.exp(3.1))
    assert tree.perturbed.tolist() == pytest.approx([5.0, 1.0, second], rel=1e-6)
    parent, child, tree, _ = grown(-50.0)  # the third child is better than what has finished
    assert (parent, child) == ([1, 1, 1], [1, 0, 2])
    assert float(tree.perturbed[2]) > -50.0


def test_rows_beside_families_go_on_by_themselves() -> None:
    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    seeds, position = torch.arange(7) + 100, torch.arange(7)
    active = torch.tensor([True, True, False, True, False, True, False])
    _, children = explore_children(logits, SamplingParams(), seeds, position, 3, active=active)
    tree = Tree(torch.zeros(7).double(), torch.tensor([0.0, 1.0, -math.inf, 0.0, 0.0, 2.0, -math.inf]).double())
    families = torch.tensor([[1, 2, -1], [3, 5, 6]])
    growth = grow(children, tree, families, active, seeds, position)
    assert growth.parent[[0, 4]].tolist() == [0, 4] and growth.child[[0, 4]].tolist() == [0, -1]
    assert growth.parent[1] == 1 and growth.parent[2] == 1 and growth.child[2] == 1
    assert set(growth.parent[[3, 5, 6]].tolist()) <= {3, 5}
    alone = grow(Children(*(c[3:] for c in children)), Tree(*(c[3:] for c in tree)), families[1:] - 3, active[3:],
                 seeds[3:], position[3:])  # fmt: skip
    at = torch.tensor([0, 2, 3])
    assert torch.equal(alone.parent[at] + 3, growth.parent[at + 3]) and torch.equal(
        alone.child[at], growth.child[at + 3]
    )
    assert torch.equal(alone.tree.perturbed[at], growth.tree.perturbed[at + 3])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_verb_in_a_batch_of_all_kinds(beta: float) -> None:
    """Distinct, stratified and plain rows: the others draw what they draw without the distinct ones."""
    distinct = replace(PARAMS, distinct=True, beta=beta)
    others = [replace(PARAMS, stratified=True, beta=beta)] * 3 + [replace(PARAMS, beta=beta)] * 2
    both, alone = make(), make()
    rows = both.open(["d"] * 4 + ["s"] * 3 + ["p"] * 2, [distinct] * 4 + others)
    other = alone.open(["s"] * 3 + ["p"] * 2, others)
    said: list[tuple[int, ...]] = [()] * 4
    for step in range(5):
        shallow, deep = taps(9, step)
        both.predict(shallow, rows)
        active = rows.active.clone()
        got, parent = both.branch(logits_of(both, deep), rows)
        both.learn(deep, rows)
        alone.predict(shallow[4:], other)
        want = alone.sample(logits_of(alone, deep[4:]), other)
        alone.learn(deep[4:], other)
        assert all(torch.equal(a[4:], b) for a, b in zip(got, want, strict=True))
        assert parent[4:].tolist() == [4, 5, 6, 7, 8] and bool((parent[:4] < 4).all())
        assert active[0] and (step > 0 or active[:4].tolist() == [True, False, False, False])
        said = [(*said[p], token) for p, token in zip(parent[:4].tolist(), got.token_ids[:4].tolist(), strict=True)]
        assert len(set(said)) == 4
    assert rows.positions[:4].tolist() == [5] * 4


def test_the_first_of_distinct_siblings_is_the_ordinary_sample() -> None:
    """Without a Distiller that its siblings teach."""
    one, other = make(), make()
    distinct, plain = (
        one.open([None] * 3, DISTINCT, sets=["a"] * 3),
        other.open([None], replace(DISTINCT, distinct=False)),
    )
    for step in range(6):
        deep = taps(3, step)[1][:1]
        got, parent = one.branch(logits_of(one, deep.expand(3, -1)), distinct)
        want = other.sample(logits_of(other, deep), plain)
        assert parent[0] == 0
        assert all(torch.equal(a[:1], b) for a, b in zip(got, want, strict=True))


def test_base_logprob_is_that_of_the_token_that_is_taken() -> None:
    """Of the raw logits, or of those that are given as the model's."""
    for edited in (False, True):
        explorer = make()
        rows = explorer.open([None] * 6, DISTINCT, sets=["a"] * 6)
        raw = torch.randn(1, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float32).expand(6, -1)
        logits = raw.clone()
        if edited:
            logits[:, 7:30] -= 2.0
        got, parent = explorer.branch(logits, rows, model_logits=raw if edited else None)
        assert parent.tolist() == [0] * 6 and len(set(got.token_ids.tolist())) == 6
        want = raw.log_softmax(-1).gather(-1, got.token_ids[:, None])[:, 0]
        torch.testing.assert_close(got.base_logprob, want, atol=1e-5, rtol=1e-5)


def test_sets_leave_join_and_end_whole() -> None:
    explorer = make()
    first = explorer.open(["a"] * 3, DISTINCT)
    rows = first + explorer.open(["b"] * 2 + ["c"], DISTINCT)
    assert rows.families is not None and sorted(map(sorted, rows.families.tolist())) == [[-1, 3, 4], [0, 1, 2]]
    with pytest.raises(ArgumentError, match="all rows of a set of distinct siblings or none"):
        rows.keep([0, 1, 3, 4, 5])
    explorer.predict(taps(6)[0], rows)
    explorer.branch(logits_of(explorer, taps(6)[1]), rows)
    explorer.learn(taps(6)[1], rows)
    kept = rows.keep([4, 3, 5])
    assert kept.families is not None and kept.families.tolist() == [[0, 1]]
    assert torch.equal(kept.tree.perturbed, rows.tree.perturbed[[4, 3, 5]])
    with pytest.raises(ArgumentError, match="distinct siblings"):
        kept.spread([0, 1])
    explorer.close(kept)


def test_what_cannot_be_meant() -> None:
    for wrong in (
        {"temperature": 0.0, "distinct": True}, {"stratified": True, "distinct": True}, {"distinct": 1},
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match="distinct"):
            SamplingParams(**wrong)  # type: ignore[arg-type]
    explorer = make()
    with pytest.raises(ArgumentError, match="position must be 0"):
        explorer.open(["a"] * 2, DISTINCT, position=1)
    with pytest.raises(ArgumentError, match="params must be equal"):
        explorer.open(["a"] * 2, [DISTINCT, replace(DISTINCT, min_p=0.2)])
    with pytest.raises(ArgumentError, match=r"params\.distinct"):
        make(DistillerConfig(rank=4, target="choice")).open(["a"] * 2, DISTINCT)
    assert explorer.open_rows == 0
    rows = explorer.open(["a"] * 2, DISTINCT)
    logits = logits_of(explorer, taps(2)[1])
    with pytest.raises(StateError, match="call branch"):
        explorer.sample(logits, rows)
    explorer.branch(logits, rows)
    plain = explorer.open([None] * 2, replace(DISTINCT, distinct=None))
    drawn, parent = explorer.branch(logits, plain)
    assert parent.tolist() == [0, 1] and drawn.token_ids.shape == (2,)


def test_arguments_of_the_ops() -> None:
    logits, seeds = torch.zeros(2, 5), torch.arange(2)
    _, children = explore_children(logits, SamplingParams(), seeds, 0, 2)
    tree, active = Tree(torch.zeros(2).double(), torch.zeros(2).double()), torch.ones(2, dtype=torch.bool)
    families = torch.tensor([[0, 1]])
    with pytest.raises(ArgumentError, match="width must be an integer >= 1"):
        explore_children(logits, SamplingParams(), seeds, 0, 0)
    with pytest.raises(ArgumentError, match="families must be at most 2 wide"):
        grow(children, tree, torch.tensor([[0, 1, -1]]), active, seeds, 0)
    with pytest.raises(ArgumentError, match="tree"):
        grow(children, Tree(tree.logprob[:1], tree.perturbed), families, active, seeds, 0)
    with pytest.raises(ArgumentError, match="active"):
        grow(children, tree, families, active.long(), seeds, 0)
    with pytest.raises(ArgumentError, match="children must be Children"):
        grow(tuple(children), tree, families, active, seeds, 0)  # type: ignore[arg-type]
    assert RowParams.of(SamplingParams(), 2, "cpu").beta.shape == (2,)
