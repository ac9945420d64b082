"""Draws: rows do not depend on each other, and bad numbers stay where they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from esamp_core.sample import (
    Draw,
    Head,
    RowParams,
    SamplingParams,
    Status,
    explore,
    row_seeds,
)
from tests.oracles import (
    NEG_INF,
    make_rows,
)


def assert_same(a: Draw, b: Draw) -> None:
    for name, x, y in zip(Draw._fields, a, b, strict=True):
        assert torch.equal(x, y), name


def mixed_batch(vocab: int = 333) -> tuple[Tensor, RowParams, Tensor, Tensor, Tensor, Head]:
    """Rows of every kind, parameters of every kind; some directions broken."""
    kinds = ("random", "ties", "nan", "pos_inf", "empty", "bf16", "neg_inf", "clustered")
    logits = torch.cat([make_rows(kind, 4, vocab, seed=2) for kind in kinds])
    rows, g = logits.shape[0], torch.Generator().manual_seed(4)
    each = [
        SamplingParams(0.7, 50, 0.9, 0.0, 0.25),
        SamplingParams(1.2, 0, 1.0, 0.0, 1.0),
        SamplingParams(0.0, 0, 0.8, 0.0, 0.5),
        SamplingParams(1.0, 0, 1.0, 0.05, 0.0),
        SamplingParams(1.0, 7, 1.0, 0.0, -0.5),
    ]
    params = RowParams.of([each[i % 5] for i in range(rows)], rows, "cpu")
    direction = torch.randn(rows, 37, generator=g)
    direction[5, 3], direction[9] = float("nan"), 3e38
    seeds = row_seeds(torch.full((rows,), 77), torch.arange(rows))
    return logits, params, seeds, torch.arange(rows) * 2**33, direction, Head(torch.randn(vocab, 37, generator=g))


@pytest.mark.parametrize("cap", [5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_independent_of_batchmates(cap: int, dtype: torch.dtype) -> None:
    logits, params, seeds, position, direction, head = mixed_batch()
    logits, rows = logits.to(dtype), logits.shape[0]

    def go(part: Tensor) -> Draw:
        return explore(
            logits[part], params.take(part), seeds[part], position[part],
            direction=direction[part], head=head, model_logits=logits[part], max_candidates=cap,
        )  # fmt: skip

    whole = go(torch.arange(rows))
    assert whole.status.unique().numel() >= 5  # the batch has every kind of trouble in it
    for value in (whole.logprob, whole.base_logprob, whole.novelty, whole.kl):
        assert torch.isfinite(value).all()
    places = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    for part in [*places.split(1), *places.split(7), places]:
        assert_same(go(part), Draw(*(field[part] for field in whole)))


@pytest.mark.parametrize("seed", range(3))
def test_capped_rows_are_independent_of_how_many_there_are(seed: int) -> None:
    """More of them than any vector register holds: what is left over is computed one by one, perhaps by other code."""
    rows, vocab = 70, 40
    g = torch.Generator().manual_seed(seed)
    logits, direction = torch.randn(rows, vocab, generator=g), torch.randn(rows, 8, generator=g)
    params, head = RowParams.of(SamplingParams(beta=0.5), rows, "cpu"), Head(torch.randn(vocab, 8, generator=g))
    seeds = row_seeds(torch.full((rows,), seed), torch.arange(rows))

    def go(part: Tensor) -> Draw:
        return explore(
            logits[part], params.take(part), seeds[part], 0, direction=direction[part], head=head, max_candidates=5
        )

    whole = go(torch.arange(rows))
    assert (whole.status == Status.CAPPED).all()
    for part in torch.arange(rows).split(1):
        assert_same(go(part), Draw(*(field[part] for field in whole)))


@pytest.mark.parametrize("cap", [3, 256])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), NEG_INF])
def test_bad_numbers_stay_in_their_row(cap: int, poison: float) -> None:
    logits, direction = torch.randn(6, 30, generator=torch.Generator().manual_seed(0)), torch.ones(6, 4)
    head = Head(torch.randn(30, 4, generator=torch.Generator().manual_seed(1)))
    seeds = row_seeds(torch.zeros(6, dtype=torch.long), torch.arange(6))
    good = explore(logits, SamplingParams(), seeds, 0, direction=direction, head=head, max_candidates=cap)
    for where in (logits, direction):
        where[2], where[4, 1] = poison, poison
    got = explore(logits, SamplingParams(), seeds, 0, direction=direction, head=head, max_candidates=cap)
    others = torch.tensor([0, 1, 3, 5])
    assert_same(Draw(*(f[others] for f in got)), Draw(*(f[others] for f in good)))
    for value in (got.logprob, got.base_logprob, got.novelty, got.kl):
        assert torch.isfinite(value).all()
    if poison == float("inf"):
        assert got.token_ids[4] == 1 and got.status[4] == Status.POS_INF_LOGITS
        assert got.novelty[2] == 0 and got.base_logprob[2].item() == pytest.approx(-np.log(30))
    else:
        assert got.token_ids[2] == -1 and got.status[2] & Status.EMPTY
        assert got.status[4] & Status.NONFINITE_NOVELTY and got.token_ids[4] not in (-1, 1)


@pytest.mark.parametrize("cap", [2, 256])
@pytest.mark.parametrize("size", [1e30, 1e36, 3e38, -3e38, float("nan")])
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0, 10.0])
def test_novelty_that_is_not_finite_falls_back_to_vanilla(cap: int, size: float, temperature: float) -> None:
    logits = make_rows("random", 5, 12)
    head, direction = Head(torch.randn(12, 3, generator=torch.Generator().manual_seed(0))), torch.full((5, 3), size)
    params = SamplingParams(temperature=temperature)
    seeds = torch.arange(5)
    got = explore(logits, params, seeds, 0, direction=direction, head=head, max_candidates=cap)
    vanilla = explore(logits, params, seeds, 0, max_candidates=cap)
    broken = (got.status & Status.NONFINITE_NOVELTY) != 0
    assert (got.token_ids >= 0).all() and (got.token_ids < 12).all()
    for a, b in zip(got[:-1], vanilla[:-1], strict=True):
        assert torch.equal(a[broken], b[broken])
    for value in (got.logprob, got.base_logprob, got.novelty, got.kl):
        assert torch.isfinite(value).all()
    if size == 1e30:
        assert not broken.any()
    if not abs(size) < 3e38:
        assert broken.all()


def test_raw_logits_of_the_engine_may_be_anything() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.zeros(4, 3)
    raw = torch.tensor([[nan, 0, 0], [NEG_INF] * 3, [inf, 0, 0], [NEG_INF, 0, 0]])
    got = explore(
        logits, SamplingParams(), 1, 0, model_logits=raw, direction=torch.ones(4, 2), head=Head(torch.ones(3, 2))
    )
    assert (got.token_ids >= 0).all()
    assert (got.status == Status.NONFINITE_NOVELTY).all()
    assert not torch.isnan(got.base_logprob).any()
