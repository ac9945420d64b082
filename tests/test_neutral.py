"""Entropy-neutral novelty: what is left of it after its regression on the logits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from explorer_helpers import PARAMS, logits_of, make, taps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esamp_core import reference, sample
from esamp_core.base.tensors import RowParams
from esamp_core.reference.sampling import FLAT
from esamp_core.sample import DistillerConfig
from tests.kernel_cases import (
    ROW_KINDS,
    close_call,
    make_head,
    make_params,
    make_rows,
    near_top_p,
    off,
    quick_interpreter,
    same_draw,
    to,
)

pytest.importorskip("triton")
from esamp_core.ops import triton_backend

VOCAB = 200


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


def reweighted(logits: Tensor, projection: Tensor, params: RowParams, neutral: bool) -> tuple[Tensor, Tensor, Tensor]:
    """float64 z = logits / T, float64 novelty and bool mask of the candidates, all [R, C]."""
    found = reference.select_candidates(logits, params, max_candidates=VOCAB)
    scores = projection.gather(1, found.token_ids.clamp_min(0))
    new = reference.reweight(found, scores, params, neutral=neutral)
    return (found.logits / params.temperature[:, None]).double(), new.novelty.double(), found.token_ids >= 0


def slope(z: Tensor, novelty: Tensor, present: Tensor, temperature: Tensor) -> Tensor:
    """float64 [R]: dH/dbeta at beta 0 of softmax(z + beta novelty / T), by central differences."""

    def entropy(beta: float) -> Tensor:
        p = (z + beta * novelty / temperature[:, None]).masked_fill(~present, float("-inf")).softmax(-1)
        return -torch.special.xlogy(p, p).sum(-1)

    return (entropy(1e-4) - entropy(-1e-4)) / 2e-4


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.3, 3.0]), top_k=st.sampled_from([2, 7, 0]))
def test_entropy_stands_still(seed: int, spread: float, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(5, VOCAB, generator=generator)
    projection = 0.5 * logits + torch.randn(5, VOCAB, generator=generator)
    params = off(5, temperature=0.7, top_k=top_k)
    z, novelty, present = reweighted(logits, projection, params, neutral=True)
    # Float32 rounds novelty to 2^-24 of its size, and the slope is a mean of products of it with z.
    scale = novelty.abs().amax(-1) * z.masked_fill(~present, 0.0).abs().amax(-1) + 1
    p = z.masked_fill(~present, float("-inf")).softmax(-1)
    x = z.masked_fill(~present, 0.0) * params.temperature[:, None]
    variance = (p * (x - (p * x).sum(-1, keepdim=True)).square()).sum(-1)
    flat = variance < 10 * FLAT  # as documented: without a slope to take out
    assert (flat | (slope(z, novelty, present, params.temperature).abs() <= 2e-5 * scale)).all()
    z, novelty, present = reweighted(logits, projection, params, neutral=False)
    assert (slope(z, novelty, present, params.temperature).abs() > 1e-3).any()  # which is what is taken out


def test_what_follows_the_logits_is_no_novelty() -> None:
    """A projection that says more or less of the same: the same draws.  Of itself alone: none."""
    generator = torch.Generator().manual_seed(4)
    logits, other = (torch.randn(3, VOCAB, generator=generator) for _ in range(2))
    params = off(3, temperature=0.9)
    _, plain, _ = reweighted(logits, other, params, neutral=True)
    _, more, _ = reweighted(logits, other + 0.8 * logits + 3, params, neutral=True)
    torch.testing.assert_close(plain, more, atol=2e-5, rtol=1e-4)
    _, nothing, _ = reweighted(logits, 0.3 * logits - 1, params, neutral=True)
    assert nothing.abs().max() < 1e-4


def test_rows_without_a_slope() -> None:
    """Equal logits, one candidate: novelty less its mean; a row that is greedy, as at temperature 1."""
    logits = torch.full((2, VOCAB), 1.5)
    projection = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(5))
    _, novelty, _ = reweighted(logits, projection, off(2), neutral=True)
    torch.testing.assert_close(novelty, (projection.mean(-1, keepdim=True) - projection).double(), atol=1e-5, rtol=1e-5)
    _, novelty, present = reweighted(torch.randn(2, VOCAB), projection, off(2, top_k=1), neutral=True)
    assert present.sum() == 2 and (novelty[present] == 0).all()
    logits, greedy = torch.randn(2, VOCAB), off(2, temperature=0.0)
    found = reference.select_candidates(logits, greedy)
    scores = projection.gather(1, found.token_ids.clamp_min(0))
    warm = reference.reweight(found, scores, off(2, temperature=1.0), neutral=True)
    assert torch.equal(reference.reweight(found, scores, greedy, neutral=True).novelty, warm.novelty)


@pytest.mark.parametrize("number", range(3))
@settings(max_examples=8)
@given(
    kinds=st.lists(st.sampled_from(ROW_KINDS), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    cap=st.sampled_from([1, 16, 64]),
)
def test_the_kernels_draw_what_the_reference_draws(
    device: str, number: int, kinds: list[str], seed: int, cap: int
) -> None:
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number]
    logits, params = make_rows(kinds, VOCAB, seed, dtype), make_params(seed, len(kinds), VOCAB)
    head, generator = make_head(VOCAB, 24, seed)
    direction = 2 * torch.randn(len(kinds), 24, generator=generator)
    seeds, positions = torch.randint(2**62, (len(kinds),), generator=generator), torch.arange(len(kinds))
    options = {"max_candidates": cap, "neutral": True}
    want = reference.explore(logits, params, seeds, positions, direction=direction, head=head, **options)
    on_device = to(device, logits, params, seeds, positions, direction, head.weight)
    got = triton_backend.explore(*on_device[:4], direction=on_device[4], head=sample.Head(on_device[5]), **options)
    found = reference.select_candidates(logits, params, max_candidates=cap)
    scores = reference.score_candidates(direction, head, found.token_ids)
    new = reference.reweight(found, scores, params, neutral=True)
    may_differ = near_top_p(logits, params, "transformers") | close_call(found, new.logits, params, seeds, positions)
    same_draw(got, want, may_differ)
    alone = triton_backend.reweight(*to(device, found, scores, params), neutral=True)
    assert torch.equal(alone.status.cpu(), new.status)
    same = new.status == 0
    torch.testing.assert_close(alone.novelty.cpu()[same], new.novelty[same], atol=1e-4, rtol=1e-4)


def test_a_trainer_finds_the_same_probability() -> None:
    generator = torch.Generator().manual_seed(7)
    logits, params = make_rows(["random", "clustered", "tie-heavy"], VOCAB, 7), off(3, temperature=0.8, min_p=0.01)
    head, _ = make_head(VOCAB, 24, 7)
    direction, seeds = torch.randn(3, 24, generator=generator), torch.arange(3)
    drawn = sample.explore(logits, params, seeds, 0, direction=direction, head=head, neutral=True)
    distilled = direction @ head.weight.T
    replayed = sample.replay(logits, distilled, drawn.token_ids, params, neutral=True)
    torch.testing.assert_close(replayed, drawn.logprob, atol=1e-4, rtol=1e-4)
    assert (sample.replay(logits, distilled, drawn.token_ids, params) - drawn.logprob).abs().max() > 1e-2


def test_an_explorer_of_it() -> None:
    shallow, deep = taps(4)
    draws = []
    for neutral in (True, False):
        explorer = make(DistillerConfig(rank=4, deep_scale=1.0, gate=False), neutral=neutral)
        rows = explorer.open(["a"] * 4, PARAMS)
        explorer.predict(shallow, rows)
        direction, params, position = explorer.prediction(rows), rows.params, rows.positions.clone()
        logits, head = logits_of(explorer, deep), explorer.head
        assert head is not None
        draws.append(explorer.sample(logits, rows))
        want = sample.explore(logits, params, rows.seeds, position, direction=direction, head=head, neutral=neutral)
        assert torch.equal(draws[-1].token_ids, want.token_ids) and torch.equal(draws[-1].logprob, want.logprob)
    assert not torch.equal(draws[0].novelty, draws[1].novelty)
