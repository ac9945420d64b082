"""The kernels' candidate sets against transformers' own warpers: an oracle that shares no code with the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernel_cases import quick_interpreter
from tests.oracles import KINDS, make_rows
from tests.test_candidates import FILTERS, ORDERS, compare

pytest.importorskip("triton")


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


@pytest.mark.interpreter  # compiled kernels are compared with the reference, which is compared with the warpers
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("vocab", [2, 129])
def test_candidate_sets_equal_the_warpers(vocab: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESAMP_BACKEND", "triton")
    kinds = (*KINDS, "pos_inf")
    logits = torch.cat([make_rows(kind, 1, vocab) for kind in kinds])
    differing = sum(compare(logits, filters, order, 64) for filters in FILTERS[1::2])
    assert differing <= 3
