"""block_max, select, finalise and beyond against the reference: the same candidates, exactly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esamp_core import reference
from esamp_core.base.tensors import RowParams, Status
from tests.kernel_cases import (
    EXAMPLES,
    INTERPRETED,
    NUMBERS,
    ROW_KINDS,
    equal_bits,
    make_params,
    make_rows,
    near_top_p,
    off,
    quick_interpreter,
    same_candidates,
    some_of,
    to,
)

triton_backend = pytest.importorskip("esamp_core.ops.triton_backend")
VOCABULARIES = (1, 2, 127, 128, 129, 1000, 32003)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDERS = ("transformers", "vllm")


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


def compare(
    logits: torch.Tensor,
    params: RowParams,
    filter_order: str,
    cap: int,
    device: str,
    active: torch.Tensor | None = None,
) -> int:
    want = reference.select_candidates(logits, params, filter_order=filter_order, max_candidates=cap, active=active)
    got = triton_backend.select_candidates(
        *to(device, logits, params), filter_order=filter_order, max_candidates=cap, active=to(device, active)[0]
    )
    return same_candidates(got, want, near_top_p(logits, params, filter_order))


class Differences:
    """Rows that differed because top-p was within 1e-5 of a cumulative mass: allowed, but they must be rare."""

    rows = differed = 0


@pytest.fixture(autouse=True, scope="module")
def _few_rows_differed() -> Iterator[None]:
    """Of those that were compared in this process."""
    yield
    assert Differences.differed <= max(2, Differences.rows // 50), (Differences.differed, Differences.rows)


@pytest.mark.parametrize("number", range(NUMBERS))
@settings(max_examples=max(1, EXAMPLES // NUMBERS))
@given(
    data=st.data(),
    kinds=st.lists(st.sampled_from(ROW_KINDS), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_candidates(device: str, number: int, data: st.DataObject, kinds: list[str], seed: int) -> None:
    vocab = data.draw(st.sampled_from(some_of(VOCABULARIES[:6], number)), "vocab")
    cap = data.draw(st.sampled_from(some_of((1, 2, 7, 16, 64), number)), "cap")
    dtype, filter_order = DTYPES[number % 3], ORDERS[number // 3]
    logits = make_rows(kinds, vocab, seed, dtype)
    params = make_params(seed, len(kinds), vocab)
    Differences.rows += len(kinds)
    Differences.differed += compare(logits, params, filter_order, cap, device)


@pytest.mark.parametrize("filter_order", ORDERS)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_every_kind(device: str, kind: str, filter_order: str) -> None:
    logits = make_rows([kind] * 4, 1000, seed=len(kind))
    compare(logits, make_params(len(kind), 4, 1000), filter_order, 16, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_vocabulary(device: str, dtype: torch.dtype) -> None:
    kinds = ["random", "clustered", "tie-heavy", "all-equal"]
    compare(make_rows(kinds, 32003, 3, dtype), make_params(11, 4, 32003), "transformers", 64, device)


FILTERS = {
    "top-k": {"top_k": 50},
    "top-k, clustered ties": {"top_k": 50, "min_p": 0.02},
    "top-p": {"top_p": 0.95, "temperature": 0.8},
    "flat top-p": {"top_p": 0.99, "temperature": 1.5},
    "min-p": {"min_p": 0.05},
    "nothing": {},
}


@pytest.mark.slow
def test_full_size(device: str) -> None:
    rows = [off(1, **values) for values in FILTERS.values()]
    params = RowParams(*(torch.cat(column) for column in zip(*rows, strict=True)))
    kinds = ["random", "clustered", "bfloat16", "random", "tie-heavy", "bfloat16"]
    compare(make_rows(kinds, 152064, 5, torch.bfloat16), params, "transformers", 64, device)


@pytest.mark.parametrize("filter_order", ORDERS)
@pytest.mark.parametrize("values", [{}, {"top_p": 0.5}, {"top_k": 300, "top_p": 0.5}, {"top_k": 3}, {"min_p": 0.9}])
def test_everything_ties(device: str, values: dict[str, float], filter_order: str) -> None:
    """More ties than can be sorted: the lowest kept ids are listed, and top-p drops the lowest."""
    logits = make_rows(["all-equal", "zeros of both signs"], 700, 1)
    compare(logits, off(2, **values), filter_order, 8, device)


def test_more_candidates_than_blocks(device: str) -> None:
    logits = make_rows(["random", "clustered"], 1000, 2)
    compare(logits, off(2, top_k=300), "transformers", 512, device)


def test_most_candidates(device: str) -> None:
    compare(make_rows(["random"], 5000, 2), off(1, top_p=0.97), "transformers", 1024, device)


def test_survivors_are_refined(device: str) -> None:
    """One block holds far more than can be sorted above the bound that block maxima give."""
    logits = make_rows(["random"], 4000, 2)
    logits[0, 256:512] += 20
    compare(logits, off(1, top_k=8, top_p=0.9), "transformers", 16, device)


@pytest.mark.parametrize("step", [3, 128])
def test_strided_rows(device: str, step: int) -> None:
    wide = make_rows(["random"] * 3, 128 + step, 8)
    compare(wide[:, :128], off(3, top_k=5), "transformers", 16, device)
    compare(wide[::2, step : step + 100], off(2, min_p=0.1), "transformers", 16, device)
    compare(wide.T.contiguous().T[:, :99], off(3, top_p=0.8), "transformers", 16, device)


def test_active_and_invalid_rows(device: str) -> None:
    logits = make_rows(["random", "nan", "all -inf", "random", "+inf", "random"], 300, 4)
    params = off(6, top_k=10)
    nan = float("nan")
    params = params._replace(
        temperature=torch.tensor([1.0, nan, 1.0, -1.0, float("inf"), 1e-5]), top_p=torch.tensor([1.0, 0.9, 1, 1, 2, 1])
    )
    compare(logits, params, "vllm", 8, device)
    for name, values in {
        "top_k": torch.tensor([-1, 0, 0, -(2**62), 2**62, 1]),
        "top_p": torch.tensor([0.0, -1.0, nan, 1.5, 1.0, 0.3]),
        "min_p": torch.tensor([-0.1, 1.1, nan, 1.0, 0.0, 0.5]),
        "beta": torch.tensor([nan, float("inf"), 0.0, 1.0, -1.0, 0.0]),
    }.items():
        compare(logits, off(6)._replace(**{name: values}), "transformers", 8, device)
    active = torch.tensor([False, False, False, True, True, True])
    compare(logits, off(6, top_p=0.9), "transformers", 8, device, active)


def test_no_rows(device: str) -> None:
    got = triton_backend.select_candidates(*to(device, torch.empty(0, 50), off(0)), max_candidates=8)
    assert [tuple(t.shape) for t in got] == [(0, 8), (0, 8), (0,), (0,), (0,), (0,)]


@pytest.mark.slow
def test_many_rows(device: str) -> None:
    """The interpreter runs one program after the other, 10 ms each: fewer rows there, every 16th of which is active."""
    rows = 1024 if INTERPRETED else 4096
    kinds = [ROW_KINDS[i % len(ROW_KINDS)] for i in range(rows)]
    active = (torch.arange(rows) % 16 == 5) | torch.tensor(not INTERPRETED)
    compare(make_rows(kinds, 128, 6), make_params(6, rows, 128), "transformers", 4, device, active)


def test_batchmates_do_not_matter(device: str) -> None:
    kinds = list(ROW_KINDS)
    logits, params = make_rows(kinds, 1000, 12), make_params(12, len(kinds), 1000)

    def run(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return triton_backend.select_candidates(*to(device, logits[rows], params.take(rows)), max_candidates=16)

    everyone = torch.arange(len(kinds))
    whole = run(everyone)
    assert equal_bits(whole, run(everyone))
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(0))
    assert equal_bits(run(order), tuple(t[order.to(t.device)] for t in whole))
    for row in (0, 3, 7):
        assert equal_bits(run(everyone[row : row + 1]), tuple(t[row : row + 1] for t in whole))


@pytest.mark.interpreter
def test_with_the_interpreters_own_sort() -> None:
    import triton.language as tl

    quick = tl.sort
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tl, "sort", tl.standard.sort)
        assert tl.sort is not quick
        compare(make_rows(["random", "all-equal"], 200, 3), off(2, top_p=0.6), "transformers", 20, "cpu")


@pytest.mark.parametrize("kind", ["all -inf", "+inf"])
def test_flags(device: str, kind: str) -> None:
    got = triton_backend.select_candidates(*to(device, make_rows([kind], 200, 1), off(1)), max_candidates=8)
    wanted = {"all -inf": Status.EMPTY, "+inf": Status.POS_INF_LOGITS}[kind]
    assert int(got.status) & wanted
