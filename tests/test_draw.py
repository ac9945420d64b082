"""Draws: their distribution, their reported numbers, replay, and the general forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import poisson
from torch import Tensor

from esamp_core import reference
from esamp_core.reference import sampling
from esamp_core.sample import (
    Draw,
    Head,
    RowParams,
    SamplingParams,
    Status,
    explore,
    replay,
    reweight,
    row_seeds,
    score_candidates,
    select_candidates,
    transform_scores,
)
from tests.oracles import (
    NEG_INF,
    REPLAY_TOLERANCE,
    Exact,
    Setting,
    assert_near,
    chi_square_p_value,
    exact_head,
    exact_step,
    gumbel_float64,
    make_rows,
)

HIDDEN, VOCAB = 16, 48
SETTINGS = {
    "plain": Setting(),
    "beta 1, hot": Setting(temperature=1.5, beta=1.0),
    "vanilla": Setting(temperature=0.8, top_k=20, beta=0.0),
    "all filters": Setting(temperature=0.9, top_k=30, top_p=0.9, min_p=0.01, beta=0.5),
    "all filters, vllm order": Setting(temperature=0.9, top_k=30, top_p=0.9, min_p=0.02, beta=1.0, order="vllm"),
    "capped": Setting(temperature=1.3, beta=0.5, cap=8),
    "capped, vllm order, nucleus": Setting(temperature=1.2, top_p=0.97, beta=1.0, cap=5, order="vllm"),
    "capped, vanilla": Setting(temperature=1.2, beta=0.0, cap=4),
    "soft-capped head, edited logits": Setting(top_p=0.95, head=dict(softcap=5.0, scale=0.7), edited=True),
    "direction": Setting(beta=2.0, model_weight=0.0, cap=9, head=dict(clip=3.0), edited=True),
}
PER_TEST = 1e-4 / len(SETTINGS)  # false alarms: 1e-4 over all settings


def problem(setting: Setting, seed: int = 0) -> tuple[Tensor, Tensor, Head, Tensor | None]:
    """One row: logits [V], direction [H], head, model_logits [V] or None.  The direction is close to the model's."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, HIDDEN, generator=g) / 2
    bias = torch.randn(VOCAB, generator=g) / 4
    deep = torch.randn(HIDDEN, generator=g)
    head = Head(weight, bias=bias, **setting.head)
    if "clip" in setting.head:
        head = replace(head.centred(setting.head["clip"]), scale=2.0)
    logits = 1.5 * (weight @ deep) + bias
    model = logits.clone() if setting.edited else None
    if setting.edited:
        logits = logits - 0.5 * (torch.rand(VOCAB, generator=g) < 0.3).float()
        logits[3] = NEG_INF
    direction = deep + 0.7 * torch.randn(HIDDEN, generator=g)
    return logits, direction, head, model


def solve(setting: Setting, seed: int = 0) -> Exact:
    logits, direction, head, model = problem(setting, seed)
    return exact_step(logits, setting, exact_head(head, direction.double().numpy()), model)


def sampling_params(s: Setting) -> SamplingParams:
    return SamplingParams(s.temperature, s.top_k, s.top_p, s.min_p, s.beta)


def step(setting: Setting, seeds: Tensor, position: Tensor | int, codes: Tensor | None = None, seed: int = 0) -> Draw:
    """The same row for every row seed: views of stride 0, so that nothing can be read from elsewhere."""
    (logits, direction, head, model), rows = problem(setting, seed), len(seeds)
    return explore(
        logits.expand(rows, -1),
        sampling_params(setting),
        seeds,
        position,
        codes=codes,
        direction=direction.expand(rows, -1),
        head=head,
        model_logits=None if model is None else model.expand(rows, -1),
        model_weight=setting.model_weight,
        filter_order=setting.order,
        max_candidates=setting.cap,
    )


def run(setting: Setting, rows: int, seed: int = 0, request: int = 11) -> Draw:
    """One step of as many siblings, at several positions."""
    seeds = row_seeds(torch.full((rows,), request), torch.arange(rows))
    return step(setting, seeds, torch.arange(rows) % 7, seed=seed)


def assert_same(a: Draw, b: Draw) -> None:
    for name, x, y in zip(Draw._fields, a, b, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("name", SETTINGS)
def test_distribution_support_and_reported_numbers(name: str) -> None:
    setting, rows = SETTINGS[name], 12000
    exact, got = solve(setting), run(setting, rows)
    tokens = got.token_ids
    assert (tokens >= 0).all()
    assert (exact.probability[tokens.numpy()] > 0).all(), "a token of probability zero was drawn"
    # A token that expects 30 draws is missing from all of them once in 1e13.
    assert set(np.flatnonzero(exact.probability * rows > 30)) <= set(tokens.tolist())
    assert chi_square_p_value(tokens, exact.probability) > PER_TEST

    chosen = tokens.numpy()
    assert_near(got.logprob, exact.logprob[chosen], torch.float32, "logprob")
    assert_near(got.base_logprob, exact.base_logprob[chosen], torch.float32, "base_logprob")
    assert_near(got.novelty, exact.novelty[chosen], torch.float32, "novelty")
    assert_near(got.kl, np.full(rows, exact.kl), torch.float32, "kl")
    assert (got.count == exact.count).all()
    capped = Status.CAPPED if exact.count > setting.cap else Status(0)
    assert (got.status == capped).all()
    if exact.count > setting.cap:  # the settings are such that both parts of a capped row are drawn from
        assert 0.02 < exact.probability[~exact.scored].sum() < 0.98
        before = exact_step(problem(setting)[0], replace(setting, beta=0.0))
        mass = exact.probability[exact.scored].sum()
        assert mass == pytest.approx(before.probability[exact.scored].sum(), rel=1e-9)


def test_the_settings_can_tell_rules_apart() -> None:
    """A chi-square with 12,000 draws must notice the wrong formula; here, that the oracle's variants are far apart."""
    for name in ("plain", "beta 1, hot", "all filters", "capped", "direction"):
        right = solve(SETTINGS[name]).probability
        wrong = solve(replace(SETTINGS[name], beta=SETTINGS[name].beta / 2)).probability
        seen = right + wrong > 0
        assert 12000 * ((right - wrong)[seen] ** 2 / (right + wrong)[seen]).sum() > 60, name


def test_tail_wins_as_often_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token 18 logits above 2^17 others.  Two-sided false-alarm rate 1e-4.

    Only rows where the top token's own noise is -1.36..-1.30 are drawn, so that a win of the tail takes noise above
    16.64 (where the usual float32 Gumbel noise ends) and happens often enough to be counted.  The bits come from
    torch's generator: Philox at this size takes minutes, and is tested by itself.
    """
    tail, rows, batch, gap = 2**17, 1440, 4, 18.0
    g = torch.Generator().manual_seed(0)
    logits = torch.zeros(tail + 1)
    logits[1000] = gap
    top_bits = [int((1 - np.exp(-np.exp(-noise))) * 2**32) for noise in (-1.30, -1.36)]

    def whole_row(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
        return torch.randint(0, 2**32, (seed.shape[0], vocab), generator=g)

    def some_tokens(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
        bits = torch.randint(0, 2**32, ids.shape, generator=g)
        return torch.where(ids == 1000, position[:, None], bits)

    monkeypatch.setattr(sampling, "vocabulary_bits", whole_row)
    monkeypatch.setattr(sampling, "token_bits", some_tokens)
    top = torch.randint(top_bits[0], top_bits[1], (rows,), generator=g)
    params = RowParams.of(SamplingParams(beta=0), batch, "cpu")
    rows_of_logits = logits.expand(batch, -1)
    found = reference.select_candidates(rows_of_logits, params, max_candidates=16)
    vanilla = reference.reweight(found, torch.zeros_like(found.logits), params)
    wins = 0
    for part in top.split(batch):
        got = reference.draw(found, vanilla, rows_of_logits, params, part, part)
        wins += int((got.token_ids != 1000).sum())
    p = -np.expm1(-tail * np.exp(-gap - gumbel_float64(top.numpy())))
    low, high = poisson.ppf([5e-5, 1 - 5e-5], p.sum())  # of many small chances; the exact law is a little narrower
    assert low >= 1, "too few draws to notice a missing tail"
    assert low <= wins <= high


@pytest.mark.parametrize("cap", [4, 256])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_beta_zero_is_vanilla_bit_for_bit(cap: int, bad: float | None) -> None:
    logits = torch.cat([make_rows(kind, 8, 60) for kind in ("random", "ties", "nan", "pos_inf", "empty", "bf16")])
    rows, g = logits.shape[0], torch.Generator().manual_seed(0)
    direction = torch.randn(rows, HIDDEN, generator=g)
    if bad is not None:
        direction[:, ::3] = bad
    head = Head(torch.randn(60, HIDDEN, generator=g))
    params = SamplingParams(temperature=0.9, top_p=0.95, beta=0)
    seeds = row_seeds(torch.full((rows,), 5), torch.arange(rows))
    vanilla = explore(logits, params, seeds, 3, max_candidates=cap)
    assert (vanilla.novelty == 0).all() and (vanilla.kl == 0).all()
    assert_same(vanilla, explore(logits, params, seeds, 3, direction=direction, head=head, max_candidates=cap))
    # Through the separate ops as well.
    candidates = select_candidates(logits, params, max_candidates=cap)
    new = reweight(candidates, score_candidates(direction, head, candidates.token_ids), params)
    assert torch.equal(new.logits, candidates.logits) and torch.equal(new.status, candidates.status)
    # A beta of zero in one row and not in the next.
    mixed = RowParams.of(params, rows, "cpu")._replace(beta=torch.arange(rows).remainder(2).float())
    some = explore(logits, mixed, seeds, 3, direction=direction, head=head, max_candidates=cap)
    for a, b in zip(some, vanilla, strict=True):
        assert torch.equal(a[::2], b[::2])


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("cap", [6, 256])
def test_temperature_zero(beta: float, cap: int) -> None:
    for seed in range(5):
        setting = Setting(temperature=0.0, top_p=0.9, beta=beta, cap=cap)
        exact, got = solve(setting, seed), run(setting, 3, seed)
        best = int(exact.probability.argmax())
        assert got.token_ids.tolist() == [best] * 3
        assert got.logprob.tolist() == [0] * 3 and got.kl.tolist() == [0] * 3
        assert_near(got.novelty, np.full(3, exact.novelty[best]), torch.float32)
        assert_near(got.base_logprob, np.full(3, exact.base_logprob[best]), torch.float32)
    logits = torch.cat([make_rows(kind, 3, 200) for kind in ("random", "ties", "all_equal", "neg_inf", "bf16")])
    plain = explore(logits, SamplingParams(temperature=0, beta=0), 1, 2, max_candidates=cap)
    first = (logits == logits.max(-1, keepdim=True).values).int().argmax(-1)  # of equals the lowest id
    assert torch.equal(plain.token_ids, first)


@pytest.mark.parametrize("name", SETTINGS)
def test_replay(name: str) -> None:
    setting, rows = SETTINGS[name], 64
    logits, direction, head, model = problem(setting)
    got = run(setting, rows)
    scores = torch.from_numpy(exact_head(head, direction.double().numpy())).float()
    options = dict(
        model_weight=setting.model_weight, filter_order=setting.order, max_candidates=setting.cap,
        model_logits=None if model is None else model.expand(rows, -1),
    )  # fmt: skip
    inputs = [logits.expand(rows, -1).clone().requires_grad_(), scores.expand(rows, -1).clone().requires_grad_()]
    logprob = replay(*inputs, got.token_ids, sampling_params(setting), **options)
    # The head's dot products above are float64's, so their own rounding comes on top: |novelty| * 2^-20 or so.
    assert (logprob - got.logprob).abs().max() < 5 * REPLAY_TOLERANCE
    dots = score_candidates(direction.expand(rows, -1), head, torch.arange(VOCAB).expand(rows, -1))
    same = replay(logits.expand(rows, -1), dots, got.token_ids, sampling_params(setting), **options)
    assert (same - got.logprob).abs().max() <= REPLAY_TOLERANCE

    # The gradient, against autograd through the formula in float64.
    exact = solve(setting)
    kept = torch.from_numpy(np.isfinite(exact.new))
    x, d = (t.detach().double().requires_grad_() for t in inputs)
    raw = x if model is None else model.double().expand(rows, -1)
    scored = torch.from_numpy(exact.scored) & (setting.beta != 0)
    new = torch.where(scored, x + setting.beta * (setting.model_weight * raw - d), x)
    new, old = (t.masked_fill(~kept, NEG_INF) / setting.temperature for t in (new, x))
    if exact.count > setting.cap:
        shift = (t.masked_fill(~scored, NEG_INF).logsumexp(-1, keepdim=True) for t in (old, new))
        new = new + torch.where(scored, next(shift) - next(shift), 0.0) if scored.any() else new
    want = new.log_softmax(-1).gather(1, got.token_ids[:, None])[:, 0]
    assert_near(logprob, want.detach(), torch.float32)
    weights = torch.linspace(-1, 1, rows)
    actual = torch.autograd.grad((logprob * weights).sum(), inputs)
    expected = torch.autograd.grad((want * weights).sum(), (x, d), allow_unused=True, materialize_grads=True)
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b, torch.float32, "gradient")


@pytest.mark.parametrize("cap", [1, 3, 256])
def test_replay_of_what_could_not_be_drawn(cap: int) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0]] * 4 + [[NEG_INF] * 4, [float("nan")] * 4]).requires_grad_()
    distilled = torch.zeros(6, 4, requires_grad=True)
    tokens = torch.tensor([3, -1, 4, 2**40, 0, -1])
    logprob = replay(logits, distilled, tokens, SamplingParams(top_k=3), max_candidates=cap)
    assert logprob.tolist() == [NEG_INF] * 6
    tokens[0] = 0
    logprob = replay(logits, distilled, tokens, SamplingParams(top_k=3), max_candidates=cap)
    logprob[:1].sum().backward()
    assert torch.isfinite(logits.grad).all() and torch.isfinite(distilled.grad).all()
    greedy = replay(logits, distilled, tokens, SamplingParams(temperature=0), max_candidates=cap)
    assert greedy.tolist() == [0] * 6


@pytest.mark.parametrize("centred", [False, True])
def test_tensor_parallel_form(centred: bool) -> None:
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(50, 24, generator=g), torch.randn(50, generator=g)
    whole = Head(weight, bias=bias, scale=0.5, softcap=4.0)
    if centred:
        whole = whole.centred()
    direction = torch.randn(9, 24, generator=g)
    ids = torch.randint(-1, 50, (9, 13), generator=g)
    shards = [
        replace(whole, weight=weight[a:b], bias=None if whole.bias is None else bias[a:b], vocab_start=a)
        for a, b in ((0, 20), (20, 50))
    ]
    added = sum(score_candidates(direction, shard, ids, transform=False) for shard in shards)
    got, want = transform_scores(added, whole), score_candidates(direction, whole, ids)
    assert torch.equal(got, want)
    exact = np.stack([exact_head(whole, v.double().numpy()) for v in direction])
    there = ids >= 0
    assert_near(want[there], np.take_along_axis(exact, ids.clamp_min(0).numpy(), 1)[there.numpy()], torch.float32)
    assert (want[~there] == 0).all()


def test_centred_head() -> None:
    weight = torch.randn(31, 8, generator=torch.Generator().manual_seed(0))
    head = Head(weight, bias=torch.ones(31), softcap=2.0).centred()
    rows = weight.double() - weight.double().mean(0)
    unit = rows / rows.norm(dim=1).mean()
    direction = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)) * 4
    got = score_candidates(direction, head, torch.arange(31).expand(4, -1))
    assert_near(got, (direction.double() @ unit.T).clamp(-3, 3), torch.float32)
    assert (got.abs() == 3).any()


def test_mixed_parameters_are_each_rows_own() -> None:
    names, rows = [n for n in SETTINGS if not SETTINGS[n].edited and SETTINGS[n].order == "transformers"], 8
    settings = [replace(SETTINGS[n], cap=10) for n in names] * rows
    logits, direction, head, _ = problem(Setting())
    n = len(settings)
    got = explore(
        logits.expand(n, -1), [sampling_params(s) for s in settings], torch.arange(n), 5,
        direction=direction.expand(n, -1), head=head, max_candidates=10,
    )  # fmt: skip
    for i, setting in enumerate(settings):
        exact, token = solve(setting), int(got.token_ids[i])
        assert_near(got.logprob[i], exact.logprob[token], torch.float32)
        assert_near(got.novelty[i], exact.novelty[token], torch.float32)
        assert_near(got.kl[i], exact.kl, torch.float32)


def test_no_rows_and_inactive_rows() -> None:
    none = explore(torch.zeros(0, 9), SamplingParams(), 1, 2, direction=torch.zeros(0, 4), head=Head(torch.ones(9, 4)))
    assert all(field.shape == (0,) for field in none)
    got = explore(make_rows("random", 3, 9), SamplingParams(), 1, 2, active=torch.tensor([True, False, True]))
    assert got.token_ids[1] == -1 and got.status.tolist() == [0, Status.INACTIVE, 0] and got.count[1] == 0
    assert [float(f[1]) for f in (got.logprob, got.base_logprob, got.novelty, got.kl)] == [0, 0, 0, 0]
