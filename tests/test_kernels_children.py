"""children against the reference, and against a float64 sort of z + noise over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esamp_core import reference
from esamp_core.base.tensors import Candidates, Children, Draw, Reweighted, RowParams, Status
from tests.kernel_cases import (
    EXAMPLES,
    NUMBERS,
    ROW_KINDS,
    equal_bits,
    make_head,
    make_params,
    make_rows,
    off,
    padded,
    quick_interpreter,
    some_of,
    stepped,
    to,
)
from tests.oracles import Setting, exact_head, exact_step, gumbel_float64, philox_numpy

pytest.importorskip("triton")

from esamp_core.kernels.sampling import ops
from esamp_core.ops import triton_backend

HIDDEN = 16
CLOSE = 1e-4  # perturbed scores that are nearer to each other may change places


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


class Differences:
    """Rows whose tokens differed in a call too close for float32: allowed, but they must be rare."""

    rows = differed = 0


@pytest.fixture(autouse=True, scope="module")
def _few_rows_differed() -> Iterator[None]:
    """Of those that were compared in this process."""
    yield
    assert Differences.differed <= max(2, Differences.rows // 50), (Differences.differed, Differences.rows)


def seeds_of(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return seeds, torch.randint(0, 2**40, (rows,), generator=generator)


def prepared(
    logits: torch.Tensor, params: RowParams, seed: int, cap: int, filter_order: str = "transformers",
    active: torch.Tensor | None = None,
) -> tuple[Candidates, Reweighted, torch.Tensor, RowParams, torch.Tensor, torch.Tensor, Draw]:  # fmt: skip
    """What the reference gives of made-up projections; the arguments of `children` but for its width."""
    seeds, positions = seeds_of(len(logits), seed)
    found = reference.select_candidates(logits, params, filter_order=filter_order, max_candidates=cap, active=active)
    projection = found.logits * 0.5 + torch.randn(found.logits.shape, generator=torch.Generator().manual_seed(seed))
    new = reference.reweight(found, projection, params)
    drawn = reference.draw(found, new, logits, params, seeds, positions)
    return found, new, logits, params, seeds, positions, drawn


def same_children(got: Children, want: Children, next_best: torch.Tensor, tolerance: float = 2e-5) -> None:
    """next_best: perturbed of what comes after the last of each row."""
    got = Children(*to("cpu", *got))
    for name, a, b in zip(Children._fields, got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
    none = want.token_ids < 0
    assert torch.equal(got.token_ids < 0, none), (got.token_ids, want.token_ids)
    for name, absent in (("logprob", float("-inf")), ("perturbed", float("-inf")), ("novelty", 0.0)):
        assert (getattr(got, name)[none] == absent).all(), name
    gaps = torch.cat([want.perturbed, next_best[:, None]], 1).diff(dim=1)
    close = (gaps > -CLOSE).any(1)  # infinite and NaN where there are none
    differs = (got.token_ids != want.token_ids).any(1)
    assert not (differs & ~close).any(), (got.token_ids[differs], want.token_ids[differs])
    Differences.rows += len(close)
    Differences.differed += int(differs.sum())
    torch.testing.assert_close(got.perturbed, want.perturbed, rtol=tolerance, atol=CLOSE)
    for name in ("logprob", "perturbed", "novelty"):
        a, b = getattr(got, name)[~differs], getattr(want, name)[~differs]
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    for row in got.token_ids:
        assert len(row[row >= 0].unique()) == (row >= 0).sum()


def compare(
    logits: torch.Tensor, params: RowParams, device: str, seed: int, width: int, *, cap: int = 16,
    filter_order: str = "transformers", active: torch.Tensor | None = None,
) -> Children:  # fmt: skip
    arguments = prepared(logits, params, seed, cap, filter_order, active)
    more = reference.children(*arguments, width + 1)
    want = Children(*(column[:, :width] for column in more))
    got: Children = triton_backend.children(*to(device, *arguments), width)
    same_children(got, want, more.perturbed[:, width])
    return got


@pytest.mark.parametrize("number", range(NUMBERS))
@settings(max_examples=max(1, EXAMPLES // NUMBERS))
@given(
    data=st.data(),
    kinds=st.lists(st.sampled_from(ROW_KINDS), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_children(device: str, number: int, data: st.DataObject, kinds: list[str], seed: int) -> None:
    vocab = data.draw(st.sampled_from(some_of((1, 2, 127, 128, 129, 1000), number)), "vocab")
    cap = data.draw(st.sampled_from(some_of((1, 4, 16, 64), number)), "cap")
    width = data.draw(st.sampled_from(some_of((1, 2, 3, 16, 17, 40), number)), "width")
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
    filter_order = ("transformers", "vllm")[number // 3]
    logits = make_rows(kinds, vocab, seed, dtype)
    compare(logits, make_params(seed, len(kinds), vocab), device, seed, width, cap=cap, filter_order=filter_order)


@pytest.mark.parametrize("beta", [0.0, 0.25])
@pytest.mark.parametrize(("vocab", "cap", "width"), [(5000, 4, 8), (5000, 40, 5), (2048, 1, 3), (4097, 3, 33)])
def test_capped_rows(device: str, vocab: int, cap: int, width: int, beta: float) -> None:
    """Several tiles, and tails with much and with little to say."""
    kinds = ["random", "all-equal", "clustered", "one-hot", "+inf", "nan", "huge", "tie-heavy"]
    params = off(len(kinds), beta=beta)._replace(temperature=torch.tensor([1.0, 1.0, 0.3, 2.0, 1.0, 5.0, 1.0, 0.0]))
    logits = make_rows(kinds, vocab, 4)
    got = compare(logits, params, device, 4, width, cap=cap)
    assert (got.token_ids[:7] >= 0).all() and (got.token_ids[7, 1:] == -1).all()


def test_more_than_are_kept(device: str) -> None:
    """The places beyond what the filters keep are empty, with and without a tail."""
    logits = make_rows(ROW_KINDS, 300, 5)
    for cap in (2, 64):
        got = compare(logits, off(len(ROW_KINDS), top_k=7), device, 5, 40, cap=cap)
        assert (got.token_ids[0].cpu() >= 0).sum() == 7
    got = compare(logits[:, :3], off(len(ROW_KINDS)), device, 5, 70)
    assert (got.token_ids >= 0).sum(1).max() <= 3


def test_sizes(device: str) -> None:
    """More candidates than children, and more children than candidates, each of several per thread."""
    logits = make_rows(["random", "clustered"], 3000, 6)
    for cap, width in ((1024, 4), (1024, 600), (8, 300)):
        compare(logits, off(2, temperature=1.5), device, 6, width, cap=cap)


def test_rows_that_draw_nothing(device: str) -> None:
    logits = make_rows(["random", "nan", "all -inf", "random", "random"], 200, 5)
    params = off(5)._replace(temperature=torch.tensor([1.0, 0.0, 1.0, -1.0, float("nan")]))
    active = torch.tensor([False, False, True, True, True])
    got = compare(logits, params, device, 5, 4, cap=4, active=active)
    assert (got.token_ids == -1).all()


def test_novelty_that_is_not_finite(device: str) -> None:
    """A reweighted logit of -inf is no child; nothing else of the row changes."""
    found, new, *rest = prepared(make_rows(["random"] * 2, 100, 1), off(2, top_k=6), 1, 16)
    logits = new.logits.clone()
    logits[0, 3], logits[1, :5] = float("-inf"), float("-inf")
    arguments = (found, new._replace(logits=logits), *rest)
    want = reference.children(*arguments, 8)
    got = triton_backend.children(*to(device, *arguments), 8)
    same_children(got, want, torch.full((2,), float("-inf")))
    assert (got.token_ids >= 0).sum(1).tolist() == [5, 1]


def test_logits_that_scale_to_one_number(device: str) -> None:
    """The lowest id is listed, and a larger logit in the tail is as good as it."""
    logits = torch.zeros(1, 300)
    logits[0, 5], logits[0, 7], logits[0, 290] = 2e38, 2e38, 3e38
    got = compare(logits, off(1, temperature=0.1), device, 1, 4, cap=1)
    assert sorted(got.token_ids[0].tolist()) == [-1, 5, 7, 290]


@pytest.mark.parametrize("layout", [padded, stepped])
def test_strides(device: str, layout: object) -> None:
    logits = make_rows(["random", "nan", "+inf"], 333, 8).bfloat16().float()
    found, new, _, *rest = to(device, *prepared(logits, off(3), 8, 4))
    strided = layout(logits.to(device))  # type: ignore[operator]
    plain = triton_backend.children(found, new, logits.to(device), *rest, 9)
    assert equal_bits(plain, triton_backend.children(found, new, strided, *rest, 9))
    wide = Reweighted(*(torch.cat([t, t + 1], 1)[:, : t.shape[1]] for t in new[:2]), new.status)
    assert equal_bits(plain, triton_backend.children(found, wide, strided, *rest, 9))


def test_batchmates_do_not_matter(device: str) -> None:
    rows = len(ROW_KINDS)
    arguments = to(device, *prepared(make_rows(ROW_KINDS, 700, 21), make_params(21, rows, 700), 21, 8))

    def run(chosen: torch.Tensor) -> Children:
        chosen = chosen.to(device)
        some = (type(a)(*(t[chosen] for t in a)) if isinstance(a, tuple) else a[chosen] for a in arguments)
        result: Children = triton_backend.children(*some, 12)
        return result

    whole = run(torch.arange(rows))
    assert equal_bits(whole, run(torch.arange(rows)))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    assert equal_bits(run(order), tuple(t[order.to(device)] for t in whole))
    for row in (0, 3, 6):
        assert equal_bits(run(torch.tensor([row])), tuple(t[row : row + 1] for t in whole))


def test_no_rows(device: str) -> None:
    arguments = to(device, *prepared(make_rows(["random"], 50, 1), off(1), 1, 4))
    none = [type(a)(*(t[:0] for t in a)) if isinstance(a, tuple) else a[:0] for a in arguments]
    got = triton_backend.children(*none, 6)
    assert all(t.shape == (0, 6) for t in got) and [t.dtype for t in got] == [torch.int64] + [torch.float32] * 3


@pytest.mark.parametrize("cap", [4, 64])
def test_the_first_is_drawn(device: str, cap: int) -> None:
    """All on the kernels: bit for bit, whichever of their programs made the noise."""
    kinds = [kind for kind in ROW_KINDS if kind != "all -inf"] * 2
    logits, params, seeds, positions = to(
        device, make_rows(kinds, 2500, 7), off(len(kinds), temperature=1.5), *seeds_of(len(kinds), 7)
    )
    found = triton_backend.select_candidates(logits, params, max_candidates=cap)
    new = triton_backend.reweight(found, found.logits * 0.9, params)
    drawn = triton_backend.draw(found, new, logits, params, seeds, positions)
    got = triton_backend.children(found, new, logits, params, seeds, positions, drawn, 3)
    assert torch.equal(got.token_ids[:, 0], drawn.token_ids)
    assert equal_bits((got.logprob[:, 0], got.novelty[:, 0]), (drawn.logprob, drawn.novelty))
    if cap == 4:
        assert not (found.token_ids == drawn.token_ids[:, None]).any(1).all()  # some from a tail


def noise_float64(seed: int, position: int, vocab: int) -> np.ndarray:
    blocks = np.arange(-(-vocab // 4))
    high, low = position // 2**32 % 2**32, position % 2**32
    counter = np.stack([blocks, 0 * blocks, 0 * blocks + low, 0 * blocks + high], -1).astype(np.uint64)
    key = np.array([seed % 2**32, seed // 2**32 % 2**32], dtype=np.uint64)
    return gumbel_float64(philox_numpy(counter, np.broadcast_to(key, (len(blocks), 2))).reshape(-1)[:vocab])


@pytest.mark.parametrize(
    "setting",
    [
        Setting(cap=64, min_p=0.01),
        Setting(cap=8, temperature=0.7),
        Setting(cap=8, temperature=2.0, top_k=500, beta=0.0),
        Setting(cap=16, temperature=1.3, top_p=0.9, order="vllm", beta=0.5),
        Setting(cap=4, temperature=0.0),
    ],
    ids=str,
)
def test_a_sort_of_everything(device: str, setting: Setting) -> None:
    """In float64, of all that the filters keep: z + noise, largest first."""
    s, rows, vocab, width = setting, 4, 3001, 10
    logits = make_rows(["random", "bfloat16", "nan", "-inf"], vocab, 3)
    head, generator = make_head(vocab, HIDDEN, 3)
    direction = torch.randn(rows, HIDDEN, generator=generator)
    seeds, positions = seeds_of(rows, 3)
    params = off(rows, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, beta=s.beta)
    x, weight, v, on_device, *numbers = to(device, logits, head.weight, direction, params, seeds, positions)
    found = triton_backend.select_candidates(x, on_device, filter_order=s.order, max_candidates=s.cap)
    projection = triton_backend.score_candidates(v, type(head)(weight), found.token_ids)
    new = triton_backend.reweight(found, projection, on_device)
    drawn = triton_backend.draw(found, new, x, on_device, *numbers)
    got = to("cpu", triton_backend.children(found, new, x, on_device, *numbers, drawn, width))[0]
    if s.cap < 64 and s.temperature > 0:
        assert (found.status & Status.CAPPED != 0).all()
    for row in range(rows):
        exact = exact_step(logits[row], s, exact_head(head, direction[row].double().numpy()))
        perturbed = exact.logprob + noise_float64(int(seeds[row]), int(positions[row]), vocab)
        if s.temperature == 0:
            perturbed = np.where(exact.probability > 0, 0.0, -np.inf)
        best = np.lexsort((np.arange(vocab), -perturbed))[: width + 1]
        best = best[perturbed[best] > -np.inf]
        assert (-np.diff(perturbed[best]) > CLOSE).all(), "take another seed"
        best = best[:width]
        assert got.token_ids[row].tolist() == best.tolist() + [-1] * (width - len(best))
        for name, value in (("logprob", exact.logprob), ("perturbed", perturbed), ("novelty", exact.novelty)):
            mine = getattr(got, name)[row, : len(best)].double().numpy()
            np.testing.assert_allclose(mine, value[best], rtol=1e-5, atol=5e-5, err_msg=name)


@pytest.fixture
def arguments(device: str) -> tuple[object, ...]:
    found, new, logits, params, seeds, positions, drawn = to(
        device, *prepared(make_rows(["random", "clustered"], 130, 1), off(2), 1, 8)
    )
    return (
        found.token_ids, found.logits, found.threshold, found.tie_id, found.status, new.logits, new.novelty, logits,
        params.temperature, seeds, positions, drawn.token_ids, drawn.logprob, drawn.novelty, 5,
    )  # fmt: skip


@pytest.mark.traced
def test_opcheck(arguments: tuple[object, ...]) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.children_op, arguments, test_utils=checks)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    arguments = to("cuda", *prepared(make_rows(ROW_KINDS, 140, 2), off(len(ROW_KINDS)), 2, 8))
    triton_backend.children(*arguments, 4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_backend.children(*arguments, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
