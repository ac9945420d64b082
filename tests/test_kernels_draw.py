"""score, reweight, tail, draw and the fused op against the reference: the same tokens on the same seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esamp_core import reference
from esamp_core.base import philox as reference_philox
from esamp_core.base.tensors import Candidates, Head, Reweighted, RowParams
from tests.kernel_cases import (
    EXAMPLES,
    NUMBERS,
    ROW_KINDS,
    close_call,
    equal_bits,
    make_head,
    make_params,
    make_rows,
    near_top_p,
    off,
    quick_interpreter,
    same_draw,
    some_of,
    to,
)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from esamp_core.kernels.philox import gumbel, tile_bits, token_bits  # noqa: E402
from esamp_core.ops import triton_backend  # noqa: E402

HIDDEN = 24
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "choice": {"scale": 2.0, "clip": 1.5, "center": "random"},
    "bias": {"bias": "random", "scale": 0.5, "softcap": 5.0},
}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


def head_and_direction(kind: str, vocab: int, rows: int, seed: int) -> tuple[Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    extra = dict(HEADS[kind])
    for name, size in (("bias", vocab), ("center", HIDDEN)):
        if extra.get(name) == "random":
            extra[name] = torch.randn(size, generator=generator)
    head, generator = make_head(vocab, HIDDEN, seed, **extra)
    return head, 3 * torch.randn(rows, HIDDEN, generator=generator)


def head_to(device: str, head: Any) -> Any:
    from dataclasses import replace

    weight, bias, center = to(device, head.weight, head.bias, head.center)
    return replace(head, weight=weight, bias=bias, center=center)


def seeds_of(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return seeds, torch.randint(0, 2**40, (rows,), generator=generator)


class Differences:
    """Rows whose token differed in a call too close for float32: allowed, but they must be rare."""

    rows = differed = 0


@pytest.fixture(autouse=True, scope="module")
def _few_rows_differed() -> Iterator[None]:
    """Of those that were compared in this process."""
    yield
    assert Differences.differed <= max(2, Differences.rows // 50), (Differences.differed, Differences.rows)


def compare(
    logits: torch.Tensor, params: RowParams, device: str, seed: int, *, head_kind: str = "plain",
    model_logits: torch.Tensor | None = None, cap: int = 16, filter_order: str = "transformers", explored: bool = True,
    active: torch.Tensor | None = None,
) -> None:  # fmt: skip
    rows, vocab = logits.shape
    head, direction = head_and_direction(head_kind, vocab, rows, seed)
    seeds, positions = seeds_of(rows, seed)
    options = {"model_weight": 0.7, "filter_order": filter_order, "max_candidates": cap}
    shared = {"direction": direction, "model_logits": model_logits, "active": active}
    if not explored:
        shared["direction"], head = None, None
    want = reference.explore(logits, params, seeds, positions, head=head, **shared, **options)
    on_device = dict(zip(shared, to(device, *shared.values()), strict=True))
    got = triton_backend.explore(
        *to(device, logits, params, seeds, positions), head=head and head_to(device, head), **on_device, **options
    )
    found = reference.select_candidates(logits, params, filter_order=filter_order, max_candidates=cap, active=active)
    new = found.logits
    if head is not None:
        original = None if model_logits is None else model_logits.gather(-1, found.token_ids.clamp_min(0)).float()
        projection = reference.score_candidates(direction, head, found.token_ids)
        new = reference.reweight(found, projection, params, model_logits=original, model_weight=0.7).logits
    may_differ = near_top_p(logits, params, filter_order) | close_call(found, new, params, seeds, positions)
    Differences.rows += rows
    Differences.differed += same_draw(got, want, may_differ)


@pytest.mark.parametrize("number", range(NUMBERS))
@settings(max_examples=max(1, EXAMPLES // NUMBERS))
@given(
    data=st.data(),
    kinds=st.lists(st.sampled_from(ROW_KINDS), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    with_model=st.booleans(),
)
def test_draws(device: str, number: int, data: st.DataObject, kinds: list[str], seed: int, with_model: bool) -> None:
    vocab = data.draw(st.sampled_from(some_of((1, 2, 127, 128, 129, 1000), number)), "vocab")
    cap = data.draw(st.sampled_from(some_of((1, 4, 16, 64), number)), "cap")
    head_kind = data.draw(st.sampled_from(some_of(sorted(HEADS), number)), "head")
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
    filter_order = ("transformers", "vllm")[number // 3]
    logits = make_rows(kinds, vocab, seed, dtype)
    model = make_rows(kinds[::-1], vocab, seed + 1, dtype) if with_model else None
    params = make_params(seed, len(kinds), vocab)
    compare(logits, params, device, seed, head_kind=head_kind, model_logits=model, cap=cap, filter_order=filter_order)


@pytest.mark.parametrize("explored", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_capped_rows(device: str, temperature: float, explored: bool) -> None:
    """The tail takes part, and the scored set keeps its mass."""
    logits = make_rows(["random", "all-equal", "clustered", "bfloat16", "+inf", "tie-heavy"], 3000, 4)
    compare(logits, off(6, temperature=temperature), device, 4, cap=4, explored=explored)


@pytest.mark.parametrize("head_kind", sorted(HEADS))
def test_scores(device: str, head_kind: str) -> None:
    head, direction = head_and_direction(head_kind, 50, 3, 1)
    ids = torch.tensor([[0, 49, 7, -1, 50], [3, 2, 1, 2**40, -(2**40)], [-1, -1, -1, -1, -1]])
    for transform in (True, False):
        want = reference.score_candidates(direction, head, ids, transform=transform)
        got = triton_backend.score_candidates(
            *to(device, direction), head_to(device, head), *to(device, ids), transform=transform
        )
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    shard = type(head)(head.weight[10:30], vocab_start=10)
    want = reference.score_candidates(direction, shard, ids + 15)
    got = triton_backend.score_candidates(*to(device, direction), head_to(device, shard), *to(device, ids + 15))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


def test_scores_of_wide_heads(device: str) -> None:
    """More than one step along H, an odd H, a transposed weight, bfloat16."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1300, 40, generator=generator).bfloat16().T
    direction, ids = torch.randn(2, 1300, generator=generator), torch.randint(0, 40, (2, 11), generator=generator)
    head = Head(weight)
    want = reference.score_candidates(direction, head, ids)
    got = triton_backend.score_candidates(*to(device, direction), head_to(device, head), *to(device, ids))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


def test_unfused_is_fused(device: str) -> None:
    """The four ops with given scores, as tensor-parallel shards use them, draw what the fused op draws."""
    kinds = ["random", "clustered", "tie-heavy", "+inf", "random", "all -inf"]
    logits, params = make_rows(kinds, 500, 9), make_params(9, 6, 500, beta=0.5)
    head, direction = head_and_direction("softcap", 500, 6, 9)
    logits, params, direction, seeds, positions = to(device, logits, params, direction, *seeds_of(6, 9))
    head = head_to(device, head)
    found: Candidates = triton_backend.select_candidates(logits, params, max_candidates=8)
    projection = triton_backend.score_candidates(direction, head, found.token_ids)
    new: Reweighted = triton_backend.reweight(found, projection, params)
    drawn = triton_backend.draw(found, new, logits, params, seeds, positions)
    fused = triton_backend.explore(logits, params, seeds, positions, direction=direction, head=head, max_candidates=8)
    assert equal_bits(drawn, fused)
    want = reference.reweight(*to("cpu", found, projection, params))
    torch.testing.assert_close(new.logits.cpu(), want.logits)
    torch.testing.assert_close(new.novelty.cpu(), want.novelty)
    assert torch.equal(new.status.cpu(), want.status)


def test_novelty_that_is_not_finite(device: str) -> None:
    logits, params = make_rows(["random"] * 3, 100, 1), off(3, top_k=5)
    found = reference.select_candidates(logits, params)
    projection = torch.zeros_like(found.logits)
    projection[0, 2], projection[1, 90], projection[2, 0] = float("nan"), float("nan"), float("inf")
    want = reference.reweight(found, projection, params)
    got = triton_backend.reweight(*to(device, found, projection, params))
    assert torch.equal(got.status.cpu(), want.status) and got.status.cpu().tolist() == [32, 0, 32]
    torch.testing.assert_close(got.logits.cpu(), want.logits)


def test_beta_zero_is_vanilla(device: str) -> None:
    logits, params = make_rows(ROW_KINDS, 300, 2), make_params(2, len(ROW_KINDS), 300, beta=0.0)
    head, direction = head_and_direction("plain", 300, len(ROW_KINDS), 2)
    direction[:] = float("nan")
    arguments = to(device, logits, params, *seeds_of(len(ROW_KINDS), 2))
    vanilla = triton_backend.explore(*arguments, max_candidates=8)
    explored = triton_backend.explore(
        *arguments, direction=direction.to(device), head=head_to(device, head), max_candidates=8
    )
    assert equal_bits(vanilla, explored)


def test_batchmates_do_not_matter(device: str) -> None:
    rows = len(ROW_KINDS)
    logits, params = make_rows(ROW_KINDS, 700, 21), make_params(21, rows, 700)
    head, direction = head_and_direction("plain", 700, rows, 21)
    logits, params, direction, seeds, positions = to(device, logits, params, direction, *seeds_of(rows, 21))
    head = head_to(device, head)

    def run(chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        chosen = chosen.to(device)
        return triton_backend.explore(
            logits[chosen], params.take(chosen), seeds[chosen], positions[chosen], direction=direction[chosen],
            head=head, max_candidates=8,
        )  # fmt: skip

    everyone = torch.arange(rows)
    whole = run(everyone)
    assert equal_bits(whole, run(everyone))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    assert equal_bits(run(order), tuple(t[order.to(device)] for t in whole))
    for row in (0, 3, 6):
        assert equal_bits(run(everyone[row : row + 1]), tuple(t[row : row + 1] for t in whole))


def test_active_mask(device: str) -> None:
    active = torch.tensor([True, False, True, False])
    compare(make_rows(["random", "nan", "+inf", "random"], 200, 5), off(4), device, 5, cap=4, active=active)


def test_no_rows(device: str) -> None:
    none = torch.empty(0, dtype=torch.int64)
    got = triton_backend.explore(*to(device, torch.empty(0, 50), off(0), none, none))
    assert all(t.shape == (0,) for t in got)


@pytest.mark.slow
def test_full_size(device: str) -> None:
    logits = make_rows(["random", "bfloat16"], 152064, 7, torch.bfloat16)
    params = RowParams(*(torch.cat(c) for c in zip(off(1, min_p=0.05), off(1, temperature=0.9), strict=True)))
    compare(logits, params, device, 7, cap=64)


@triton.jit
def _noise_kernel(bits_ptr, tile_ptr, noise_ptr, seed_ptr, position_ptr, first, N: tl.constexpr):
    seed, position = tl.load(seed_ptr), tl.load(position_ptr)
    ids = first + tl.arange(0, N)
    tl.store(bits_ptr + tl.arange(0, N), token_bits(ids, seed, position).to(tl.int64))
    tl.store(tile_ptr + tl.arange(0, N), tile_bits(first, seed, position, N).to(tl.int64))
    tl.store(noise_ptr + tl.arange(0, N), gumbel(token_bits(ids, seed, position)))


def test_noise(device: str) -> None:
    """The kernel's bits are the reference's; its noise too, to the last bits of a logarithm."""
    for seed, position, first in ((0, 0, 0), (-1, 2**33 + 5, 1024), (2**62 + 12345, 7, 2**31 - 4096)):
        numbers = [torch.empty(256, dtype=torch.int64, device=device) for _ in range(2)]
        noise = torch.empty(256, device=device)
        _noise_kernel[(1,)](*numbers, noise, *to(device, torch.tensor([seed]), torch.tensor([position])), first, N=256)
        ids = torch.arange(first, first + 256)[None]
        want = reference_philox.token_bits(torch.tensor([seed]), torch.tensor([position]), ids)[0]
        assert torch.equal(numbers[0].cpu(), want) and torch.equal(numbers[1].cpu(), want)
        torch.testing.assert_close(noise.cpu(), reference_philox.gumbel(want), rtol=2e-6, atol=2e-6)
