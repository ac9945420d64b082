"""Candidate sets against transformers' own warpers, and the invariants of ``Candidates``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esamp_core import reference
from esamp_core.sample import ArgumentError, Candidates, RowParams, SamplingParams, Status, select_candidates
from tests.oracles import KINDS, NEG_INF, clean, make_rows, top_p_edges, warper_sets

ORDERS = ("transformers", "vllm")
# temperature, top_k, top_p, min_p
FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (0.8, 50, 0.9, 0.05),
    (1.3, 0, 0.95, 0.0),
    (0.7, 0, 1.0, 0.1),
    (2.0, 0, 0.5, 0.02),
    (1.0, 20, 0.3, 0.0),
    (1.0, 10**6, 0.999, 1e-6),
    (0.5, 5, 0.9, 1.0),
    (1.0, 0, 1e-6, 0.0),
    (0.0, 40, 0.9, 0.01),
]
SMALL_VOCABS = (1, 2, 127, 128, 129)


def kept_set(candidates: Candidates, scaled: Tensor) -> Tensor:
    """bool [R, V]: the set that threshold and tie_id describe."""
    ids = torch.arange(scaled.shape[1])
    threshold, tie_id = candidates.threshold[:, None], candidates.tie_id[:, None]
    return (scaled > threshold) | ((scaled == threshold) & (ids >= tie_id))


def check_rows(
    logits: Tensor, candidates: Candidates, temperature: Tensor, want: Tensor, edges: Tensor, cap: int
) -> int:
    """Everything ``Candidates`` says agrees with itself and, up to edge tokens, with the oracle's set.

    Returns how many tokens differ from the oracle's set.
    """
    x = clean(logits)
    scaled = x / torch.where(temperature > 0, temperature, 1.0)[:, None]
    kept = kept_set(candidates, scaled)
    wrong = (kept != want) & ~edges
    assert not wrong.any(), f"{int(wrong.sum())} tokens, first at {wrong.nonzero()[0].tolist()}"
    assert torch.equal(candidates.count, kept.sum(-1))
    assert (kept.any(-1) == (x > NEG_INF).any(-1)).all(), "a row with tokens kept none of them"

    width = min(cap, logits.shape[1])
    assert candidates.token_ids.shape == candidates.logits.shape == (logits.shape[0], width)
    assert candidates.token_ids.dtype == candidates.count.dtype == candidates.tie_id.dtype == torch.int64
    assert candidates.logits.dtype == candidates.threshold.dtype == torch.float32
    assert candidates.status.dtype == torch.int32
    # Stable descending sort: most likely first, of equals the lowest id.
    ranked = scaled.masked_fill(~kept, NEG_INF).sort(dim=-1, descending=True, stable=True).indices[:, :width]
    there = torch.arange(width) < kept.sum(-1, keepdim=True)
    assert torch.equal(candidates.token_ids, ranked.masked_fill(~there, -1))
    assert torch.equal(candidates.logits, x.gather(1, ranked).masked_fill(~there, NEG_INF))
    assert not torch.signbit(candidates.logits[candidates.logits == 0]).any(), "-0.0 came through"

    flags = torch.isnan(logits).any(-1) * Status.NAN_LOGITS | (logits == float("inf")).any(-1) * Status.POS_INF_LOGITS
    flags |= (x == NEG_INF).all(-1) * Status.EMPTY | (candidates.count > width) * Status.CAPPED
    assert candidates.status.tolist() == flags.tolist()
    return int((kept != want).sum())


def compare(
    logits: Tensor, filters: tuple[float, int, float, float], order: str, cap: int, dtype: torch.dtype = torch.float32
) -> int:
    t, k, p, m = filters
    params = SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
    candidates = select_candidates(logits, params, filter_order=order, max_candidates=cap)
    want, edges = warper_sets(logits, t, k, p, m, order, dtype), top_p_edges(logits, t, k, p, m, order)
    temperature = torch.full((logits.shape[0],), t)
    return check_rows(logits, candidates, temperature, want, edges, cap)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("vocab", SMALL_VOCABS)
def test_small_vocabularies(vocab: int, order: str) -> None:
    logits = torch.cat([make_rows(kind, 4, vocab) for kind in (*KINDS, "pos_inf")])
    # A one-token nucleus has no mass to round, and a small vocabulary has next to no token at the edge.
    differing = sum(max(compare(logits, filters, order, cap) for cap in (1, 16, 256)) for filters in FILTERS)
    assert differing <= 3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("vocab", "filters"), [(32000, f) for f in FILTERS[1:8]] + [(152064, f) for f in FILTERS[1:5]])
def test_large_vocabularies(vocab: int, filters: tuple[float, int, float, float], order: str) -> None:
    logits = torch.cat([make_rows(kind, 1, vocab) for kind in KINDS])
    # Where every token weighs 1 / 152064, three tokens share the 2e-5 around the threshold.  The warpers run in
    # float64: on a clustered row this long their float32 softmax sums to 1 + 1.8e-5, past any edge of 1e-5.
    assert compare(logits, filters, order, 256, torch.float64) <= 3 * len(KINDS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(dtype: torch.dtype, order: str) -> None:
    logits = torch.cat([make_rows(kind, 2, 3000) for kind in KINDS]).to(dtype)
    wide = torch.full((logits.shape[0], 3500), float("nan"), dtype=dtype)
    wide[:, 100:3100] = logits
    strided, transposed = wide[:, 100:3100], logits.T.contiguous().T
    assert strided.stride() == (3500, 1) and transposed.stride(0) == 1
    for filters in FILTERS[1:4]:
        compare(logits, filters, order, 64)
        t, k, p, m = filters
        params = SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
        whole = select_candidates(logits, params, filter_order=order, max_candidates=64)
        for view in (strided, transposed):
            got = select_candidates(view, params, filter_order=order, max_candidates=64)
            assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    same_row = logits[:1].expand(5, -1)  # stride 0
    got = select_candidates(same_row, SamplingParams(top_k=9), filter_order=order)
    assert (got.token_ids == got.token_ids[0]).all()


def test_orders_differ_and_are_honoured() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.16, 0.08, 0.06]]))
    params = SamplingParams(top_p=0.8, min_p=0.2)
    # transformers: the nucleus is .5 .2 .16, all above .2 * .5.  vllm: of the three left, .5 .2 are 81 %.
    assert select_candidates(logits, params, filter_order="transformers").count.tolist() == [3]
    assert select_candidates(logits, params, filter_order="vllm").count.tolist() == [2]
    params = SamplingParams(top_k=2, top_p=0.6)  # .5 / .7 of the top two is past 60 %, .5 of all is not
    assert select_candidates(logits, params).count.tolist() == [1]


@given(
    rows=st.lists(st.lists(st.integers(-4, 4), min_size=7, max_size=7), min_size=1, max_size=4),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([0.1, 0.35, 0.61, 0.83, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    order=st.sampled_from(ORDERS),
    cap=st.integers(1, 8),
)
def test_ties(
    rows: list[list[int]], temperature: float, top_k: int, top_p: float, min_p: float, order: str, cap: int
) -> None:
    compare(torch.tensor(rows).float(), (temperature, top_k, top_p, min_p), order, cap)


def test_documented_tie_rules() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0, 1.0]])
    assert select_candidates(logits, SamplingParams(top_k=2)).token_ids[0].tolist() == [0, 1, 2, 4, -1]
    # e^2 / (e^2 + 3 e + 1) = .447, each tie adds .164; .7 needs two of the three, and the lowest id goes first.
    assert select_candidates(logits, SamplingParams(top_p=0.7)).token_ids[0].tolist() == [0, 2, 4, -1, -1]


def test_infinities_follow_the_rule() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor(
        [[1.0, inf, nan, inf], [nan] * 4, [NEG_INF] * 4, [NEG_INF, -inf, -5.0, nan], [-0.0, 0, 0, -1]]
    )
    got = select_candidates(logits, SamplingParams())
    assert got.token_ids.tolist() == [[1, 3, -1, -1], [-1] * 4, [-1] * 4, [2, -1, -1, -1], [0, 1, 2, 3]]
    assert got.count.tolist() == [2, 0, 0, 1, 4]
    both = Status.NAN_LOGITS | Status.POS_INF_LOGITS
    assert got.status.tolist() == [both, Status.NAN_LOGITS | Status.EMPTY, Status.EMPTY, Status.NAN_LOGITS, 0]
    assert got.logits[0].tolist() == [0, 0, NEG_INF, NEG_INF]


def test_logits_that_overflow_when_divided() -> None:
    logits = torch.tensor([[3e38, 1e38, -3e38, 0.0], [-3e38, -2e38, -3.1e38, NEG_INF]])
    got = select_candidates(logits, SamplingParams(temperature=0.01))
    assert got.count.tolist() == [4, 3]  # finite logits stay candidates, whatever the temperature does to them
    assert torch.isfinite(got.threshold).all()


@pytest.mark.parametrize("order", ORDERS)
def test_every_row_has_its_own_parameters(order: str) -> None:
    vocab, cap = 700, 32
    logits = torch.cat([make_rows(kind, len(FILTERS), vocab, seed=3) for kind in ("random", "ties", "nan", "bf16")])
    mixed = FILTERS * 4
    params = [SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in mixed]
    got = select_candidates(logits, params, filter_order=order, max_candidates=cap)
    want = torch.cat([warper_sets(x[None], *f, order) for x, f in zip(logits, mixed, strict=True)])
    edges = torch.cat([top_p_edges(x[None], *f, order) for x, f in zip(logits, mixed, strict=True)])
    temperature = torch.tensor([f[0] for f in mixed])
    assert check_rows(logits, got, temperature, want, edges, cap) <= 3
    as_tensors = select_candidates(
        logits, RowParams.of(params, len(params), "cpu"), filter_order=order, max_candidates=cap
    )
    assert all(torch.equal(a, b) for a, b in zip(got, as_tensors, strict=True))


@pytest.mark.parametrize("vocab", [1, 7, 129, 5000])
@pytest.mark.parametrize("order", ORDERS)
def test_independent_of_batchmates(vocab: int, order: str) -> None:
    logits = torch.cat([make_rows(kind, 2, vocab, seed=5) for kind in (*KINDS, "pos_inf")])
    rows = logits.shape[0]
    params = RowParams.of([SamplingParams(*f) for f in (FILTERS * 3)[:rows]], rows, "cpu")
    whole = select_candidates(logits, params, filter_order=order, max_candidates=20)
    places = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    parts = [*places.split(1), *places.split(5), places]
    for part in parts:
        got = select_candidates(logits[part], params.take(part), filter_order=order, max_candidates=20)
        for name, a, b in zip(Candidates._fields, got, whole, strict=True):
            assert torch.equal(a, b[part]), f"{name} of rows {part.tolist()}"


@pytest.mark.parametrize("vocab", [1, 300])
def test_no_rows(vocab: int) -> None:
    got = select_candidates(torch.zeros(0, vocab), SamplingParams(top_k=3, top_p=0.9, min_p=0.1), max_candidates=50)
    assert got.token_ids.shape == got.logits.shape == (0, min(50, vocab))
    assert all(field.shape[0] == 0 for field in got)
    assert select_candidates(torch.zeros(0, vocab), []).count.shape == (0,)


def test_inactive_rows() -> None:
    logits = torch.cat([make_rows(kind, 1, 50) for kind in ("random", "nan", "pos_inf", "random", "empty")])
    active = torch.tensor([True, False, False, True, False])
    got = select_candidates(logits, SamplingParams(top_p=0.9), active=active, max_candidates=5)
    alone = select_candidates(logits[active], SamplingParams(top_p=0.9), max_candidates=5)
    assert all(torch.equal(a[active], b) for a, b in zip(got, alone, strict=True))
    assert got.status[~active].tolist() == [Status.INACTIVE] * 3
    assert got.count[~active].tolist() == [0] * 3
    assert (got.token_ids[~active] == -1).all() and (got.logits[~active] == NEG_INF).all()


INVALID = [
    ("temperature", -1.0),
    ("temperature", 1e-4),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_k", -1),
    ("top_k", -(2**62)),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_p", float("nan")),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("min_p", float("nan")),
    ("beta", float("nan")),
    ("beta", float("-inf")),
]


@pytest.mark.parametrize(("name", "value"), INVALID)
@pytest.mark.parametrize("rows", [1, 3])
def test_invalid_parameter_tensors(name: str, value: float, rows: int) -> None:
    logits = make_rows("random", rows, 40)
    params = RowParams.of(SamplingParams(top_k=4, top_p=0.9, min_p=0.01), rows, "cpu")
    bad = getattr(params, name).clone()
    bad[-1] = value
    params = params._replace(**{name: bad})
    with pytest.raises(ArgumentError, match=rf"params of row {rows - 1} .*{name}"):
        select_candidates(logits, params)
    # Where a check would have to wait for the device, the row is flagged instead, and only that row.
    got = reference.select_candidates(logits, params)
    assert got.status.tolist() == [0] * (rows - 1) + [Status.INVALID_PARAMS]
    assert got.count[-1] == 0 and (got.token_ids[-1] == -1).all()
    good = RowParams.of(SamplingParams(top_k=4, top_p=0.9, min_p=0.01), rows, "cpu")
    want = reference.select_candidates(logits, good)
    assert all(torch.equal(a[:-1], b[:-1]) for a, b in zip(got, want, strict=True))


def test_limits_of_valid_parameters() -> None:
    smallest = SamplingParams(temperature=1e-3, top_k=2**31 - 1, top_p=1e-6, min_p=1.0)
    got = select_candidates(make_rows("random", 2, 30), smallest)
    assert got.status.tolist() == [0, 0] and got.count.tolist() == [1, 1]
    assert not reference.invalid_params(RowParams.of(smallest, 2, "cpu")).any()
