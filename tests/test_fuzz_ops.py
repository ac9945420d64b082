"""The sampling ops on finite logits of any size, both backends, against a float64 oracle with derived error bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from esamp_core import reference
from esamp_core.base.config import SamplingParams
from esamp_core.base.seeds import root_noise
from esamp_core.base.tensors import Candidates, Children, Draw, Head, Reweighted, RowParams, Status, Tree
from esamp_core.ops import siblings
from tests.fuzz_oracle import LARGEST, Bounded, Row, U, can_win, exact_row, noise, supports
from tests.fuzz_problems import Problem, problems
from tests.kernel_cases import EXAMPLES, quick_interpreter, same_candidates
from tests.oracles import GUMBEL_TOLERANCE, NEG_INF

pytest.importorskip("triton")
from esamp_core.ops import triton_backend

pytestmark = pytest.mark.interpreter
BACKENDS: dict[str, Any] = {"reference": reference, "triton": triton_backend}
WIDTH = 3  # children of a row, at least as many as rows


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


def near(got: Tensor, want: float, error: float, what: str) -> None:
    value = float(got)
    assert np.isfinite(value) or value == want, f"{what}: {value}, not {want}"
    # Half a unit of the last place for `want`, which is no float32.
    assert value == want or abs(value - want) <= error + U * abs(want), f"{what}: {value}, not {want} +- {error}"


def check_candidates(row: Row, found: Candidates, i: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """The kept tokens, the listed ones in order, and whether there was only one way to choose them."""
    must, may = supports(row)
    s, ids = row.scaled, np.arange(len(row.x))
    threshold, tie_id = float(found.threshold[i]), int(found.tie_id[i])
    kept = ((s > threshold) | ((s == threshold) & (ids >= tie_id))) & (s > NEG_INF)
    assert (kept >= must).all() and (kept <= may).all(), ("kept", kept.sum(), must.sum(), may.sum())
    assert int(found.count[i]) == kept.sum()
    listed = np.array([c for c in np.lexsort((ids, -s)) if kept[c]][: row.cap], dtype=np.int64)
    width = found.token_ids.shape[1]
    want = np.pad(listed, (0, width - len(listed)), constant_values=-1)
    assert found.token_ids[i].tolist() == want.tolist()
    assert found.logits[i, : len(listed)].tolist() == row.x[listed].tolist()
    if kept.any():
        assert threshold == s[kept].min() and tie_id == ids[kept & (s == threshold)].min()
    return kept, listed, bool((must == may).all())


def check_draw(row: Row, exact: Bounded, kept: np.ndarray, got: Draw, i: int, seed: int) -> np.ndarray:
    """The tokens that could be drawn."""
    winners = can_win(exact, row, kept, noise(seed, 3, len(row.x)))
    token = int(got.token_ids[i])
    assert token >= 0 and winners[token], (token, np.flatnonzero(winners))
    near(got.novelty[i], exact.novelty[token], exact.novelty_error[token], "novelty")
    near(got.base_logprob[i], exact.base_logprob[token], exact.base_logprob_error[token], "base_logprob")
    greedy = row.temperature == 0
    near(got.logprob[i], 0 if greedy else exact.logprob[token], 0 if greedy else exact.logprob_error[token], "logprob")
    near(got.kl[i], 0 if greedy else exact.kl, 0 if greedy else exact.kl_error, "kl")
    assert got.kl[i] >= 0
    return winners


def check_children(row: Row, exact: Bounded, kept: np.ndarray, got: Children, drawn: Draw, i: int, seed: int) -> None:
    ids = got.token_ids[i].numpy()
    n = int((ids >= 0).sum())
    if row.temperature == 0:
        assert n == 1
    else:
        assert min(WIDTH, exact.reached.sum()) <= n <= min(WIDTH, (kept & ~exact.beyond).sum())
    assert ids[0] == drawn.token_ids[i] and len(set(ids[:n])) == n and kept[ids[:n]].all()
    assert (ids[n:] == -1).all() and (got.logprob[i, n:] == NEG_INF).all() and (got.perturbed[i, n:] == NEG_INF).all()
    for child, token in enumerate(ids[:n]):
        near(got.novelty[i, child], exact.novelty[token], exact.novelty_error[token], "child's novelty")
    if row.temperature == 0:
        return
    perturbed, g = got.perturbed[i, :n].double().numpy(), noise(seed, 3, len(row.x))
    assert np.isfinite(perturbed).all() and (np.diff(perturbed) <= 0).all()
    size = np.abs(np.where(kept, exact.z, 0))
    error = exact.z_error + exact.z_error[ids[0]] + exact.logprob_error + exact.logprob_error[ids[0]]
    error = error + 4 * U * (size + size[ids[0]] + np.abs(np.where(kept, exact.logprob, 0)) + 30) + GUMBEL_TOLERANCE
    for child, token in enumerate(ids[:n]):
        near(got.logprob[i, child], exact.logprob[token], error[token], "child's logprob")
        near(got.perturbed[i, child], exact.logprob[token] + g[token], error[token], "child's perturbed")
    others = kept.copy()
    others[ids[:n]] = False
    score = np.where(kept, exact.logprob, NEG_INF) + g
    assert not others.any() or (score - error)[others].max() <= (score + error)[ids[:n]].min()


def check(problem: Problem) -> None:
    rows, vocab = len(problem.logits), problem.vocab
    logits = torch.stack([n.make(vocab, problem.dtype) for n in problem.logits])
    model = None if problem.model is None else problem.model.make(vocab, problem.dtype).expand(rows, -1).contiguous()
    params, options = problem.params(), {"filter_order": problem.order, "max_candidates": problem.cap}
    head = direction = None
    if problem.projection is not None:  # a head of one number: its products with 1 are exact
        head = Head(problem.projection.make(vocab, torch.float32, finite=True)[:, None].clone())
        direction = torch.ones(rows, 1)
    seeds, position = torch.arange(rows) + problem.seed, torch.full((rows,), 3)
    form = {"model_weight": problem.model_weight, "neutral": problem.neutral}
    found, drawn, children = {}, {}, {}
    for name, ops in BACKENDS.items():
        chosen = found[name] = ops.select_candidates(logits, params, **options)
        new = Reweighted(chosen.logits, torch.zeros_like(chosen.logits), chosen.status)
        if head is not None:
            scores = ops.score_candidates(direction, head, chosen.token_ids)
            own = None if model is None else model.gather(-1, chosen.token_ids.clamp_min(0)).float()
            new = ops.reweight(chosen, scores, params, model_logits=own, **form)
        drawn[name] = ops.draw(chosen, new, logits, params, seeds, position, model_logits=model)
        children[name] = ops.children(chosen, new, logits, params, seeds, position, drawn[name], WIDTH)
        if problem.seed % 2:  # the interpreter takes long
            continue
        fused = ops.explore(
            logits, params, seeds, position, direction=direction, head=head, model_logits=model, **form, **options
        )
        assert all(torch.equal(a, b) for a, b in zip(fused, drawn[name], strict=True)), (name, fused, drawn[name])
    check_replay(logits, model, head, drawn["reference"], params, form | options)

    one_way, same_token, exacts = [], [], {}
    for i in range(rows):
        t, k, p, m, beta = (float(column[i]) for column in params)
        projection = None if head is None else head.weight[:, 0].numpy()
        row = Row(
            logits[i].float().numpy(), t, int(k), p, m, beta, problem.order, problem.cap, projection,
            None if model is None else model[i].float().numpy(), problem.model_weight, problem.neutral,
        )  # fmt: skip
        one_way.append(True)
        same_token.append(True)
        for name in BACKENDS:
            kept, listed, certain = check_candidates(row, found[name], i)
            one_way[i] &= certain
            got, status = drawn[name], int(drawn[name].status[i])
            assert int(got.count[i]) == kept.sum()
            if not kept.any():
                assert int(got.token_ids[i]) == -1 and status == Status.EMPTY
                continue
            exact = exact_row(row, kept, listed)
            flagged = bool(status & Status.NONFINITE_NOVELTY)
            assert exact.flag is None or exact.flag == flagged, ("NONFINITE_NOVELTY", flagged)
            same_token[i] &= exact.flag is not None
            assert status & ~Status.NONFINITE_NOVELTY == (Status.CAPPED if kept.sum() > problem.cap else 0)
            if flagged:
                exact = exact_row(replace(row, projection=None), kept, listed)
            exacts[name, i] = exact
            winners = check_draw(row, exact, kept, got, i, int(seeds[i]))
            same_token[i] &= bool(winners.sum() == 1)
            check_children(row, exact, kept, children[name], got, i, int(seeds[i]))
    same_candidates(found["triton"], found["reference"], ~torch.tensor(one_way))
    same = torch.tensor(one_way) & torch.tensor(same_token)
    for name in ("token_ids", "count", "status"):
        a, b = (getattr(drawn[backend], name) for backend in BACKENDS)
        assert torch.equal(a[same], b[same]), name
    for name in BACKENDS:
        check_growth(logits, model, drawn[name], children[name], seeds, position, exacts, name)


def check_replay(
    logits: Tensor, model: Tensor | None, head: Head | None, drawn: Draw, params: RowParams, options: dict[str, Any]
) -> None:
    """The same log-probability to the bit, since the products are exact, and a gradient that is finite."""
    logits = logits.float().clone().requires_grad_()
    distilled = (torch.zeros(logits.shape[1]) if head is None else head.weight[:, 0]).expand(len(logits), -1)
    if head is None:
        params = params._replace(beta=torch.zeros_like(params.beta))
    with torch.enable_grad():
        again = reference.replay(logits, distilled, drawn.token_ids, params, model_logits=model, **options)
        there = drawn.token_ids >= 0
        assert torch.equal(again[there], drawn.logprob[there])
        again[there].sum().backward()
    given = [x.detach().float() for x in (logits, distilled, model) if x is not None]
    huge = max(float(x.clamp_min(-LARGEST).abs().max()) for x in given)
    if not options["neutral"] or huge < 1e9:  # whose gradient holds products of three of them
        assert logits.grad is not None and torch.isfinite(logits.grad).all(), "gradient"


def check_growth(
    logits: Tensor, model: Tensor | None, drawn: Draw, children: Children, seeds: Tensor, position: Tensor,
    exacts: dict[tuple[str, int], Bounded], name: str,
) -> None:  # fmt: skip
    """The rows as one family that has just begun, then as one that all have something."""
    rows = len(logits)
    family = torch.arange(rows)[None]
    begun = Tree(torch.zeros(rows, dtype=torch.float64), root_noise(seeds))
    first = Tree(begun.logprob, torch.where(torch.arange(rows) == 0, begun.perturbed, NEG_INF))
    for tree in (first, begun):
        growth = reference.grow(children, tree, family, torch.ones(rows, dtype=torch.bool), seeds, position)
        assert not growth.tree.perturbed.isnan().any() and not growth.tree.logprob.isnan().any()
        assert (growth.tree.perturbed < torch.inf).all() and (growth.tree.logprob > NEG_INF).all()
        if tree is first:
            held = int((growth.tree.perturbed > NEG_INF).sum())
            assert held == min(rows, int((children.token_ids[0] >= 0).sum())) or children.token_ids[0, 0] < 0
        took = siblings.taken(growth, drawn, children, logits, model)
        for i in range(rows):
            token, parent = int(took.token_ids[i]), int(growth.parent[i])
            if token < 0:
                continue
            exact, known = exacts[name, parent], abs(float(drawn.base_logprob[parent]))
            assert took.base_logprob[i] <= 0 or known < 1e3
            if known < LARGEST:  # beyond, what it was is lost
                error = exact.base_logprob_error[token] + exact.base_logprob_error[int(drawn.token_ids[parent])]
                near(took.base_logprob[i], exact.base_logprob[token], error + 2 * U * known, "taken base_logprob")
            assert np.isfinite(float(took.logprob[i])) and np.isfinite(float(took.novelty[i]))


@given(problem=problems())
@settings(max_examples=max(1, 2 * EXAMPLES // 5))
def test_any_finite_logits(problem: Problem) -> None:
    check(problem)


# What such problems found, as small as it gets, with the right values.


@dataclass(frozen=True)
class Found:
    """Two tokens, both kept.  The values are those of token 1 unless ``token`` says otherwise."""

    logits: tuple[float, ...]
    projection: tuple[float, ...] | None
    logprob: float
    base_logprob: float
    novelty: float
    kl: float
    temperature: float = 1.0
    beta: float = 1.0
    neutral: bool = False
    model: tuple[float, ...] | None = None
    dtype: torch.dtype = torch.float32
    tokens: tuple[int, ...] = (0, 1)  # that seeds give


HALF = float(np.log(2))
FOUND = {
    # Was inf: their difference is more than float32 holds, a half of it is not.
    "kl": Found(
        (2.0**127, -(2.0**127)), (2.0**127, -1.5 * 2.0**127), -HALF, -LARGEST, 2.0**126, 2.0**126,
        temperature=2.0, beta=4.0,
    ),
    # Was token 0 always, logprob 0 and kl 1e9: what both have in common swallowed noise and log sum exp.
    "common novelty": Found((0.0, 0.0), (-1e9, -1e9), -HALF, -HALF, 1e9, 0.0),
    # Was 0, for the same reason.
    "base_logprob": Found((1e9, 1e9), None, -HALF, -HALF, 0.0, 0.0),
    # Was -inf.
    "base_logprob of edited logits": Found((0.0, 0.0), None, -HALF, -LARGEST, 0.0, 0.0, model=(LARGEST, -LARGEST)),
    # Was flagged and unexplored, because a token that is masked by the least number left float32.
    "mask": Found((-LARGEST, 1.0), (0.0, 0.0), 0.0, 0.0, 1.0, 0.0, beta=0.5, tokens=(1,)),
    "mask of a cold row": Found((-LARGEST, 1.0), (0.0, 0.5), 0.0, 0.0, 0.5, 0.0, temperature=0.5, tokens=(1,)),
    # Was flagged by the reference alone: 0 times the square of 1e20.
    "neutral": Found((-1e20, 0.0), (0.0, 1.0), 0.0, 0.0, 0.0, 0.0, neutral=True, tokens=(1,)),
    # Was some 1e31: the mean of equal numbers is not that number.
    "neutral common novelty": Found((LARGEST,) * 3, (5.0, 2.0, 0.0), -np.log(3), -np.log(3), 0, 0, neutral=True),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", FOUND)
def test_what_was_found(what: str, backend: str) -> None:
    f, n = FOUND[what], 12
    logits = torch.tensor([f.logits], dtype=f.dtype).expand(n, -1)
    form: dict[str, Any] = {"neutral": f.neutral}
    if f.projection is not None:
        form |= {"direction": torch.ones(n, 1), "head": Head(torch.tensor(f.projection)[:, None])}
    if f.model is not None:
        form["model_logits"] = torch.tensor([f.model], dtype=f.dtype).expand(n, -1)
    params = RowParams.of(SamplingParams(temperature=f.temperature, beta=f.beta), n, "cpu")
    got = BACKENDS[backend].explore(logits, params, torch.arange(n), torch.zeros(n, dtype=torch.int64), **form)
    assert (got.status == 0).all() and set(got.token_ids.tolist()) >= set(f.tokens)
    at = got.token_ids == 1
    for name in ("logprob", "base_logprob", "novelty", "kl"):
        want = torch.full((int(at.sum()),), getattr(f, name), dtype=torch.float32)
        torch.testing.assert_close(
            getattr(got, name)[at], want, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [1, 2, 3, 5, 127])
def test_the_least_bfloat16(backend: str, number: int) -> None:
    """Were other numbers, or 0 and so a tie, in Triton's interpreter."""
    x = torch.tensor([[0, number, number + 1, 32768 + number]], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    params = RowParams.of(SamplingParams(top_k=1), 1, "cpu")
    found = BACKENDS[backend].select_candidates(x, params)
    assert found.token_ids[0].tolist() == [2, -1, -1, -1] and found.count.tolist() == [1]
    assert found.logits[0, 0].item() == x[0, 2].item() > 0 and found.threshold.item() == x[0, 2].item()


@pytest.mark.parametrize("empty", [False, True])
def test_rows_that_give_nothing_leave_the_family_its_places(empty: bool) -> None:
    """Two tokens.  What rows without a token, or without a beginning, had to offer was NaN, and came first."""
    logits = torch.zeros(3, 2)
    logits[1] = NEG_INF if empty else 0.0
    seeds, position = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    drawn, children = siblings.explore_children(logits, SamplingParams(beta=0.0), seeds, position, 3)
    begun = root_noise(seeds) if empty else torch.where(seeds == 0, root_noise(seeds), NEG_INF)
    tree, active = Tree(torch.zeros(3, dtype=torch.float64), begun), torch.ones(3, dtype=torch.bool)
    growth = siblings.grow(children, tree, torch.arange(3)[None], active, seeds, position)
    if empty:  # as if it had ended
        active[1] = False
        want = siblings.grow(children, tree, torch.arange(3)[None], active, seeds, position)
        assert torch.equal(growth.parent, want.parent) and torch.equal(growth.tree.perturbed, want.tree.perturbed)
        assert torch.equal(growth.child[::2], want.child[::2]) and (growth.child[::2] >= 0).all()
        return
    assert growth.parent[:2].tolist() == [0, 0] and (growth.child >= 0).tolist() == [True, True, False]
    assert sorted(siblings.taken(growth, drawn, children, logits).token_ids.tolist()) == [-1, 0, 1]


@pytest.mark.parametrize("edited", [False, True])
def test_base_logprob_of_other_children(edited: bool) -> None:
    """Was NaN or -inf: the drawn token's and the child's are further apart than float32 reaches."""
    f, first = FOUND["kl"], set()
    logits, head = torch.tensor([f.logits] * 2), Head(torch.tensor(f.projection)[:, None])
    params, position = SamplingParams(temperature=f.temperature, beta=f.beta), torch.zeros(2, dtype=torch.int64)
    for seed in range(8):
        seeds = torch.arange(2) + 10 * seed
        form = {"direction": torch.ones(2, 1), "head": head, "model_logits": logits if edited else None}
        drawn, children = siblings.explore_children(logits, params, seeds, position, 2, **form)
        begun = torch.tensor([0.0, NEG_INF], dtype=torch.float64)
        tree = Tree(torch.zeros(2, dtype=torch.float64), begun)
        growth = siblings.grow(children, tree, torch.arange(2)[None], torch.tensor([True, True]), seeds, position)
        took = siblings.taken(growth, drawn, children, logits, form["model_logits"])
        first.add(int(took.token_ids[0]))
        assert took.base_logprob[took.token_ids.argsort()].tolist() == [0.0, -LARGEST]
    assert first == {0, 1}
