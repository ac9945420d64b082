"""Stratified siblings: each keeps its distribution, together they divide it; on both backends and in the Explorer."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from esamp_core import reference
from esamp_core.base.errors import ArgumentError
from esamp_core.base.philox import CODE_BELOW, code_uniform
from esamp_core.countdown import load
from esamp_core.decoder import CacheKind, generate
from esamp_core.sample import (
    DistillerConfig,
    Draw,
    Explorer,
    Head,
    SamplingParams,
    draw,
    explore,
    reweight,
    row_seeds,
    select_candidates,
    stratified_codes,
)
from tests import kernel_cases
from tests.oracles import chi_square_p_value, philox_numpy
from tests.test_draw import SETTINGS, assert_same, problem, sampling_params, solve, step

PER_TEST = 1e-4 / len(SETTINGS)  # false alarms: 1e-4 over all settings


def lonely_codes(rows: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Row seeds and the codes of rows without siblings: independent."""
    seeds, one = row_seeds(torch.full((rows,), seed), torch.arange(rows)), torch.ones(rows, dtype=torch.int64)
    return seeds, stratified_codes(seeds, torch.zeros_like(one), one)


def sibling_codes(siblings: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    seeds = row_seeds(torch.full((siblings,), seed), torch.arange(siblings))
    return seeds, stratified_codes(seeds[:1].expand(siblings), torch.arange(siblings), torch.tensor(siblings))


def test_code_noise_against_the_specification() -> None:
    """53 bits of the first two words of the block (0, 3, position low, position high), key seed."""
    for seed, position in ((0, 0), (-1, 2**40 + 5), (2**62 + 7, -1)):
        place = position & (2**64 - 1)
        counter = np.array([[0, 3, place & 0xFFFFFFFF, place >> 32]], dtype=np.uint64)
        words = philox_numpy(counter, np.array([[seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]], dtype=np.uint64))[0]
        want = ((int(words[0]) << 21) | (int(words[1]) >> 11)) / 2**53
        assert code_uniform(torch.tensor([seed]), torch.tensor([position])).item() == want


@pytest.mark.parametrize("siblings", [1, 2, 7, 32])
def test_one_code_lies_in_each_nth_of_the_unit_interval(siblings: int) -> None:
    for seed in range(50):
        codes, expected = sibling_codes(siblings, seed)[1].unbind(1)
        assert (expected == siblings).all()
        assert sorted((codes * siblings).floor().int().tolist()) == list(range(siblings))
        assert ((codes >= 0) & (codes <= CODE_BELOW)).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_each_sample_keeps_its_distribution(name: str) -> None:
    rows = 12000
    seeds, codes = lonely_codes(rows)
    codes[: rows // 2, 1] = 1e9  # half of the rows go on with what is left of their codes, half get fresh ones
    got, exact = step(SETTINGS[name], seeds, 0, codes), solve(SETTINGS[name])
    assert chi_square_p_value(got.token_ids, exact.probability) > PER_TEST
    code, expected = codes.unbind(1)
    assert (code >= 0).all() and (code <= CODE_BELOW).all()
    # The new code is as uniform as the old one was, whatever was drawn with it.
    common = torch.tensor(int(np.argmax(exact.probability)))
    for half in (slice(0, rows // 2), slice(rows // 2, rows)):
        assert kstest(code[half].numpy(), "uniform").pvalue > PER_TEST
        assert kstest(code[half][got.token_ids[half] == common].numpy(), "uniform").pvalue > PER_TEST
    listed = torch.as_tensor(exact.scored)[got.token_ids] | (exact.count <= SETTINGS[name].cap)
    share = torch.where(torch.arange(rows) < rows // 2, expected / 1e9, expected)
    want = torch.as_tensor(exact.probability)[got.token_ids]
    torch.testing.assert_close(share[listed], want[listed], rtol=1e-4, atol=1e-6)
    # All that a draw reports of a token is what the independent draw reports of it.
    plain = step(SETTINGS[name], seeds, 0)
    for token in set(got.token_ids.tolist()) & set(plain.token_ids.tolist()):
        i, j = ((d.token_ids == token).nonzero()[0, 0] for d in (got, plain))
        for field, a, b in zip(Draw._fields, got, plain, strict=True):
            assert a[i] == b[j], (field, token)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("siblings", [5, 64])
def test_siblings_divide_the_distribution(name: str, siblings: int) -> None:
    exact = solve(SETTINGS[name])
    for seed in range(10):
        seeds, codes = sibling_codes(siblings, seed)
        tokens = step(SETTINGS[name], seeds, 0, codes).token_ids
        count = np.bincount(tokens.numpy(), minlength=len(exact.probability))
        n_p = siblings * exact.probability
        edge = 1e-4  # float32: of reweighted logits, and of the tail's mass
        if exact.count > SETTINGS[name].cap:  # the tail is one share, within which the draws are independent
            tail = ~exact.scored
            n_p, count = np.append(n_p[~tail], n_p[tail].sum()), np.append(count[~tail], count[tail].sum())
        assert (count >= np.floor(n_p - edge)).all() and (count <= np.ceil(n_p + edge)).all()


def test_prefixes_are_divided_too() -> None:
    """A model of three tokens whose logits are a function of the prefix; five steps, against softmax in float64."""
    siblings, steps = 96, 5

    def logits_of(prefix: tuple[int, ...]) -> Tensor:
        return torch.randn(3, generator=torch.Generator().manual_seed(hash(prefix) & 0xFFFF))

    seeds, codes = sibling_codes(siblings)
    prefixes: list[tuple[int, ...]] = [()] * siblings
    chance: dict[tuple[int, ...], float] = {(): 1.0}
    for position in range(steps):
        for prefix in set(prefixes):
            for token, p in enumerate(logits_of(prefix).double().softmax(-1).tolist()):
                chance[(*prefix, token)] = chance[prefix] * p
        logits = torch.stack([logits_of(p) for p in prefixes])
        tokens = explore(logits, SamplingParams(beta=0.0, stratified=True), seeds, position, codes=codes).token_ids
        prefixes = [(*p, t) for p, t in zip(prefixes, tokens.tolist(), strict=True)]
        seen = Counter(prefixes)
        for prefix, p in chance.items():
            if len(prefix) == position + 1:
                assert np.floor(siblings * p - 1e-4) <= seen[prefix] <= np.ceil(siblings * p + 1e-4)
    assert len(set(prefixes)) > 50  # the division was not trivial


def test_codes_last_for_long_texts() -> None:
    """After 200 draws each next one is still uniform, and no two siblings have one code."""
    rows, position = 2000, 0
    seeds, codes = lonely_codes(rows)
    logits = torch.tensor([2.0, 0.0, 1.0, -3.0]).expand(rows, -1)
    probability = logits[0].double().softmax(-1).numpy()
    for position in range(200):
        tokens = explore(logits, SamplingParams(beta=0.0), seeds, position, codes=codes).token_ids
        if position % 40 == 39:
            assert chi_square_p_value(tokens, probability) > 1e-5
    assert len(codes[:, 0].unique()) == rows and kstest(codes[:, 0].numpy(), "uniform").pvalue > 1e-4


def test_rounding_does_not_grow() -> None:
    """Logits that differ by rounding, as they do in batches of other sizes, give the same long texts."""
    siblings, vocab, generator = 64, 40, torch.Generator().manual_seed(0)
    seeds, codes = sibling_codes(siblings)
    again, same, texts = codes.clone(), torch.ones(siblings, dtype=torch.bool), torch.zeros(siblings)
    for position in range(100):
        logits = torch.randn(vocab, generator=generator) + 0.1 * texts[:, None]
        params = SamplingParams(beta=0.0)
        one = explore(logits, params, seeds, position, codes=codes).token_ids
        noise = 1e-6 * torch.randn(siblings, vocab, generator=generator)
        two = explore(logits + noise, params, seeds, position, codes=again).token_ids
        same &= one == two
    assert same.sum() >= siblings - 2


def test_negative_codes_greedy_and_empty_rows_draw_as_without() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    logits[3] = float("-inf")
    params = [SamplingParams(temperature=t) for t in (1.0, 1.0, 0.0, 1.0)]
    seeds = row_seeds(torch.zeros(4, dtype=torch.int64), torch.arange(4))
    codes = torch.tensor([[-1.0, -1.0], [0.5, 9.0], [0.5, 9.0], [0.5, 9.0]], dtype=torch.float64)
    plain, got = explore(logits, params, seeds, 0), explore(logits, params, seeds, 0, codes=codes)
    others = [0, 2, 3]
    assert_same(Draw(*(f[others] for f in got)), Draw(*(f[others] for f in plain)))
    assert codes[others].tolist() == [[-1.0, -1.0], [0.5, 9.0], [0.5, 9.0]] and (codes[1] != 0.5).all()
    assert got.token_ids[3] == -1


def test_the_ops_one_by_one_are_the_fused_op() -> None:
    name = "capped, vllm order, nucleus"
    setting = SETTINGS[name]
    logits, _, _, _ = problem(setting)
    seeds, codes = sibling_codes(16)
    logits, again, params = logits.expand(16, -1), codes.clone(), sampling_params(setting)
    fused = explore(
        logits, params, seeds, 3, codes=codes, filter_order=setting.order, max_candidates=setting.cap
    )  # beta without a direction explores nothing
    found = select_candidates(logits, params, filter_order=setting.order, max_candidates=setting.cap)
    new = reweight(found, torch.zeros_like(found.logits), replace(params, beta=0.0))
    assert_same(draw(found, new, logits, replace(params, beta=0.0), seeds, 3, codes=again), fused)
    assert torch.equal(codes, again)


def test_misuse_is_refused() -> None:
    logits, stratified = torch.zeros(2, 5), SamplingParams(stratified=True)
    for params in (stratified, [SamplingParams(), stratified]):
        with pytest.raises(ArgumentError, match="codes must be given for stratified params"):
            explore(logits, params, 0, 0)
    for codes in (
        torch.zeros(2, 2),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, 4, dtype=torch.float64)[:, ::2],
    ):
        with pytest.raises(ArgumentError, match="codes must be"):
            explore(logits, SamplingParams(), 0, 0, codes=codes)
    with pytest.raises(ArgumentError, match="stratified must be True or False"):
        SamplingParams(stratified=1)  # type: ignore[arg-type]


@settings(max_examples=int(os.environ.get("KERNEL_EXAMPLES", "40")))
@given(
    kinds=st.lists(st.sampled_from(kernel_cases.ROW_KINDS), min_size=1, max_size=4),
    vocab=st.sampled_from((1, 2, 127, 129, 1000)),
    seed=st.integers(0, 2**31),
    cap=st.sampled_from((1, 4, 16, 64)),
    order=st.sampled_from(("transformers", "vllm")),
)
def test_the_kernel_draws_what_the_reference_draws(
    device: str, kinds: list[str], vocab: int, seed: int, cap: int, order: str
) -> None:
    pytest.importorskip("triton")
    from esamp_core.ops import triton_backend

    rows, generator = len(kinds), torch.Generator().manual_seed(seed)
    logits, params = kernel_cases.make_rows(kinds, vocab, seed), kernel_cases.make_params(seed, rows, vocab)
    seeds, codes = torch.arange(rows) + seed, torch.rand(rows, 2, generator=generator, dtype=torch.float64)
    codes[:, 1] = 10 ** (4 * codes[:, 1])  # siblings, 1 to 10,000
    codes[torch.rand(rows, generator=generator) < 0.2] = -1.0
    head, _ = kernel_cases.make_head(vocab, 8, seed)
    direction = torch.randn(rows, 8, generator=generator)

    def by_reference(shift: float) -> tuple[Draw, Tensor]:
        moved = codes.clone()
        moved[:, 0] = torch.where(codes[:, 0] >= 0, (codes[:, 0] + shift).clamp(0, CODE_BELOW), codes[:, 0])
        drawn = reference.explore(
            logits, params, seeds, seeds, codes=moved, direction=direction, head=head, filter_order=order,
            max_candidates=cap,
        )  # fmt: skip
        return drawn, moved

    (low, low_codes), (want, left), (high, high_codes) = (by_reference(s) for s in (-1e-5, 0.0, 1e-5))
    with kernel_cases.quick_interpreter():
        got_codes, on_device = codes.to(device), kernel_cases.to(device, logits, params, seeds, direction)
        got = triton_backend.explore(
            *on_device[:3], on_device[2], codes=got_codes, direction=on_device[3],
            head=Head(head.weight.to(device)), filter_order=order, max_candidates=cap,
        )  # fmt: skip
    # A code within 1e-5 of the edge of a share may fall on either side of it; a coded tail draws by noise within.
    edge = (low.token_ids != want.token_ids) | (high.token_ids != want.token_ids)
    found = reference.select_candidates(logits, params, filter_order=order, max_candidates=cap)
    projection = reference.score_candidates(direction, head, found.token_ids)
    new = reference.reweight(found, projection, params).logits
    close = kernel_cases.close_call(found, new, params, seeds, seeds)
    may_differ = edge | close | kernel_cases.near_top_p(logits, params, order)
    kernel_cases.same_draw(got, want, may_differ)
    got_codes = got_codes.cpu()
    torch.testing.assert_close(got_codes[~may_differ, 1], left[~may_differ, 1], rtol=1e-4, atol=1e-6)
    may_differ |= (left[:, 1] - 1).abs() < 1e-4  # whether the code is fresh hangs by rounding
    room = torch.maximum((low_codes - left).abs(), (high_codes - left).abs())[:, 0] + 1e-9
    assert (((got_codes - left)[:, 0].abs() <= room) | may_differ).all(), (got_codes, left)


def explorer(**options: int) -> Explorer:
    return Explorer(Head(torch.randn(40, 8, generator=torch.Generator().manual_seed(0))), 8, **options)


def test_siblings_that_are_opened_together_are_one_set() -> None:
    e = explorer(max_rows=64)
    plain, stratified = SamplingParams(seed=1), SamplingParams(seed=1, stratified=True)
    rows = e.open(["a", "b", "a", None, "a", "b", None], [*[stratified] * 4, plain, *[stratified] * 2])
    codes = rows.codes[:, 0]
    assert codes[4] == -1 and (codes >= 0).sum() == 6
    assert ((codes[0] - codes[2]).abs() - 0.5).abs() < 1e-12 and ((codes[1] - codes[5]).abs() - 0.5).abs() < 1e-12
    by_set = e.open([None] * 4, stratified, sets=["x", None, "x", "y"]).codes[:, 0]
    assert ((by_set[0] - by_set[2]).abs() - 0.5).abs() < 1e-12 and len(by_set.unique()) == 4
    with pytest.raises(ArgumentError, match="sets must have one entry per row"):
        e.open(["a"], stratified, sets=[])
    later = e.open(["a"] * 3, stratified)  # a set of its own, with an offset of its own
    assert not set(later.codes[:, 0].tolist()) & set(codes.tolist())
    assert sorted((later.codes[:, 0] * 3).floor().tolist()) == [0, 1, 2]
    assert later.codes[:, 1].tolist() == [3.0] * 3 and rows.codes[:, 1].tolist() == [2.0, 2.0, 2.0, 1.0, -1.0, 2.0, 1.0]
    both = rows + later
    assert torch.equal(both.codes, torch.cat([rows.codes, later.codes]))
    assert torch.equal(both.keep([8, 0, 4]).codes, torch.stack([later.codes[1], rows.codes[0], rows.codes[4]]))


def test_stratified_rows_cannot_be_resumed() -> None:
    with pytest.raises(ArgumentError, match="position must be 0 for stratified rows"):
        explorer().open(["a", "a"], SamplingParams(stratified=True), position=[0, 3])


def test_rows_that_are_not_stratified_draw_the_same_beside_those_that_are() -> None:
    generator = torch.Generator().manual_seed(4)
    shallow, logits = torch.randn(4, 8, generator=generator), torch.randn(4, 40, generator=generator)

    def go(which: list[int], flags: list[bool]) -> Draw:
        e = explorer()
        params = [SamplingParams(seed=7, stratified=f, beta=1.0) for f in flags]
        rows = e.open([f"group {i}" for i in which], params)
        e.predict(shallow[which], rows)
        return e.sample(logits[which], rows)

    mixed, alone = go([0, 1, 2, 3], [True, False, True, False]), go([1, 3], [False, False])
    assert_same(Draw(*(f[[1, 3]] for f in mixed)), alone)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_divides_the_first_token_and_repeats_itself(cache: CacheKind) -> None:
    """On the embedded model; the shares are those of transformers' own forward, in float64."""
    model, tokenizer = load()
    prompt, n = "3 7 3 5 -> 41 :", 32
    params = SamplingParams(beta=0.0, seed=9, stratified=True)

    def tokens(p: SamplingParams) -> list[list[int]]:
        options = {"n": n, "params": p, "config": DistillerConfig(gate=False), "max_new_tokens": 8, "cache": cache}
        return [g.token_ids for g in generate(model, [prompt], tokenizer, **options)]

    drawn = tokens(params)
    assert drawn == tokens(params) != tokens(replace(params, beta=1.0))
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    n_p = n * logits.double().softmax(-1).numpy()
    count = np.bincount([t[0] for t in drawn], minlength=len(n_p))
    assert (count >= np.floor(n_p - 1e-3)).all() and (count <= np.ceil(n_p + 1e-3)).all()
