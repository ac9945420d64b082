"""The study's samplers against transformers, and stratified siblings against what they promise."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import GenerationConfig

from bench.quality_decode import Batch, Run, Setting, Step, decode, request_seeds
from bench.quality_plan import BASE, BASE_PARAMS, choice, esamp, kernel, ridge, with_arithmetic, with_rounds
from bench.quality_tasks import CountdownTask, Source, disjoint_problems, load_source
from bench.samplers import ArithmeticDraw, Explored, Filter, Plain, forget
from esamp_core.sample import DistillerConfig, RowParams, SamplingParams, select_candidates


@pytest.fixture(scope="module")
def source() -> Source:
    return load_source("countdown")


def prompts_of(source: Source, count: int) -> list[list[int]]:
    return [source.encode(p.prompt) for p in disjoint_problems(CountdownTask(), "tune", count)]


def setting(source: Source, groups: int, n: int, seed: int = 0) -> Setting:
    return Setting(source, groups, n, request_seeds(seed, 0, groups), 78)


def step_of(setting: Setting, logits: torch.Tensor, index: int = 0) -> Step:
    rows = setting.groups * setting.siblings
    states = torch.zeros(rows, setting.source.parts.hidden_size)
    return Step(index, torch.arange(rows), torch.ones(rows, dtype=torch.bool), states, states, logits)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (Filter(temperature=0.8), {"temperature": 0.8}),
        (Filter(top_p=0.9), {"top_p": 0.9}),
        (Filter(temperature=1.5, min_p=0.05), {"temperature": 1.5, "min_p": 0.05}),
        (Filter(temperature=1.2, top_k=5, top_p=0.95), {"temperature": 1.2, "top_k": 5, "top_p": 0.95}),
        (Filter(temperature=1.2, top_h=0.4), {"temperature": 1.2, "top_h": 0.4}),
    ],
)
def test_filters_leave_the_distribution_that_generate_draws_from(
    source: Source, mine: Filter, theirs: dict[str, float]
) -> None:
    ids = torch.tensor(prompts_of(source, 3))
    config = GenerationConfig(
        do_sample=True, max_new_tokens=1, top_k=0, output_scores=True, output_logits=True, return_dict_in_generate=True
    )
    config.update(**theirs)
    out = source.model.generate(ids, generation_config=config, pad_token_id=source.pad_id)
    torch.testing.assert_close(mine(out.logits[0].float(), first=True), out.scores[0].float(), rtol=0, atol=0)


def test_top_n_sigma_keeps_what_lies_within_n_standard_deviations() -> None:
    logits = torch.tensor([[4.0, 3.0, 0.0, -1.0, 0.0]])
    # Standard deviation 2.17: at n = 1 the floor is 1.83.
    kept = Filter(top_n_sigma=1.0)(logits, first=False)
    assert torch.isfinite(kept).tolist() == [[True, True, False, False, False]]
    # Scaling logits and temperature together changes nothing, and neither does the temperature alone.
    hot = Filter(top_n_sigma=1.0, temperature=7.0)(logits, first=False)
    assert torch.isfinite(hot).equal(torch.isfinite(kept))


def test_p_less_keeps_what_is_as_likely_as_two_equal_draws() -> None:
    # .6 .3 .08 .02: two draws are equal with .4568; .3 .3 .2 .2: with .26.
    logits = torch.tensor([[0.6, 0.3, 0.08, 0.02], [0.3, 0.3, 0.2, 0.2]]).log()
    kept = Filter(p_less=True)(logits, first=False)
    assert torch.isfinite(kept).tolist() == [[True, False, False, False], [True, True, False, False]]


def test_fire_heats_the_first_token_alone() -> None:
    logits = torch.randn(2, 9)
    fire = Filter(first_temperature=4.0)
    torch.testing.assert_close(fire(logits, first=True), logits / 4)
    torch.testing.assert_close(fire(logits, first=False), logits)


def test_sharpening_acts_on_what_the_filters_left() -> None:
    logits = torch.randn(4, 30) * 3
    plain, sharp = BASE(logits, first=False), replace(BASE, sharpen=1.25)(logits, first=False)
    assert torch.isfinite(plain).equal(torch.isfinite(sharp))
    torch.testing.assert_close(sharp.softmax(-1), (1.25 * plain).softmax(-1))


def greedy(source: Source, prompts: list[list[int]], steps: int) -> Batch:
    cold = Plain("greedy", Filter(temperature=1e-3))  # noise is at most 23, gaps a thousandfold
    return decode(source, cold, prompts, 1, request_seeds(0, 0, len(prompts)), steps)


def test_the_loop_decodes_as_generate_does(source: Source) -> None:
    prompts = prompts_of(source, 6)
    steps = 60
    mine = greedy(source, prompts, steps).token_ids
    theirs = source.model.generate(
        torch.tensor(prompts), do_sample=False, max_new_tokens=steps, pad_token_id=source.pad_id
    )[:, len(prompts[0]) :]
    for row, expected in zip(mine.tolist(), theirs.tolist(), strict=True):
        drawn = [t for t in row if t >= 0]
        assert drawn == expected[: len(drawn)]
        assert drawn[-1] in source.stop_ids or len(drawn) == steps


def test_prompts_of_different_lengths_do_not_disturb_each_other(source: Source) -> None:
    short, long = prompts_of(source, 1)[0], prompts_of(source, 2)[1] + [11, 100]  # two words of an answer
    together, alone = greedy(source, [short, long], 12), greedy(source, [short], 12)
    assert together.token_ids[0, : alone.token_ids.shape[1]].equal(alone.token_ids[0])
    torch.testing.assert_close(together.base_logprob[0, :5], alone.base_logprob[0, :5], rtol=1e-4, atol=1e-4)


def test_entropy_and_logprob_are_the_models(source: Source) -> None:
    prompt = prompts_of(source, 1)[0]
    batch = decode(source, Plain("vanilla", Filter()), [prompt], 4, request_seeds(3, 0, 1), 5)
    row = [t for t in batch.token_ids[0].tolist() if t >= 0]
    logits = source.model(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1].float()
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(batch.entropy[0, : len(row)], expected.entropy(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        batch.base_logprob[0, : len(row)], expected.log_prob(torch.tensor(row)), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(batch.logprob, batch.base_logprob, atol=1e-5, rtol=1e-5)  # vanilla draws from it


@pytest.mark.parametrize("kind", ["esamp", "untrained", "choice", "vanilla", "arithmetic", "choice, arithmetic"])
def test_samplers_draw_what_the_explorer_draws(source: Source, kind: str) -> None:
    config = (
        DistillerConfig(target="choice", lr=0.3)
        if kind.startswith("choice")
        else DistillerConfig(lr=0.0 if kind == "untrained" else 0.3, gate=False)
    )
    beta = {"esamp": 0.25, "untrained": 0.25, "choice": 2.0, "choice, arithmetic": 2.0}.get(kind, 0.0)
    stratified = kind.endswith("arithmetic")
    mine = {
        "esamp": esamp(0.25),
        "untrained": esamp(0.25, lr=0.0),
        "choice": choice(2.0),
        "choice, arithmetic": with_arithmetic(choice(2.0)),
        "vanilla": Plain("vanilla", BASE),
        "arithmetic": Plain("arithmetic", BASE, arithmetic=True),
    }[kind]
    library = Explored("library", replace(BASE_PARAMS, beta=beta, stratified=stratified), config)
    prompts, seeds = prompts_of(source, 6), request_seeds(1, 0, 6)
    a, b = (decode(source, s, prompts, 8, seeds, 30) for s in (mine, library))
    width = min(a.token_ids.shape[1], b.token_ids.shape[1])
    same = (a.token_ids[:, :width] == b.token_ids[:, :width]).all(1)
    # One draw that hangs by rounding changes its siblings' lessons too: at most one group may differ.
    assert same.view(6, 8).all(1).sum() >= 5
    torch.testing.assert_close(a.logprob[:, :width][same], b.logprob[:, :width][same], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(a.novelty[:, :width][same], b.novelty[:, :width][same], atol=2e-2, rtol=2e-2)


def test_shares_in_the_order_of_embeddings(source: Source) -> None:
    """Siblings in the order of their codes have tokens in the order of the head's first principal component."""
    weight = source.parts.head.weight.double()
    rows = weight - weight.mean(0)
    along = rows @ torch.linalg.svd(rows, full_matrices=False).Vh[0]
    n = 12
    draw = ArithmeticDraw(setting(source, 1, n), by_embedding=True)
    codes = draw._codes[:, 0].clone()
    logits = torch.randn(1, len(weight), generator=torch.Generator().manual_seed(2)).expand(n, -1)
    tokens = draw(logits, torch.arange(n), 0)
    places = along[tokens[codes.argsort()]].diff()
    assert len(set(tokens.tolist())) > 6 and bool((places >= 0).all() or (places <= 0).all())


def arithmetic_draws(source: Source, logits: torch.Tensor, n: int, seeds: int, steps: int) -> np.ndarray:
    """Tokens [seeds, n, steps] at logits [steps, V], the same for every prefix."""
    runs = Setting(source, seeds, n, torch.arange(seeds) * 7919 + 1, steps)
    draw = ArithmeticDraw(runs)
    row = torch.arange(seeds * n)
    tokens = [draw(logits[t].expand(seeds * n, -1), row, t) for t in range(steps)]
    return torch.stack(tokens, -1).view(seeds, n, steps).numpy()


def test_each_stratified_sample_keeps_its_own_distribution(source: Source) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 6)
    chances = logits.double().softmax(-1).numpy()
    tokens = arithmetic_draws(source, logits, n=8, seeds=6000, steps=3)
    joint = np.einsum("a,b,c->abc", *chances).ravel()
    for sibling in (0, 3, 7):
        a, b, c = tokens[:, sibling].T
        counts = np.bincount(a * 36 + b * 6 + c, minlength=216)
        order = np.argsort(joint)  # merge rare cells, so that chi-square holds
        expected, observed = joint[order] * 6000, counts[order]
        cell = np.cumsum(expected) // 8
        _, inverse = np.unique(cell, return_inverse=True)
        p = stats.chisquare(np.bincount(inverse, observed), np.bincount(inverse, expected)).pvalue
        assert p > 1e-4


def test_every_prefix_is_drawn_floor_or_ceil_of_n_p_times(source: Source) -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 5)
    chances = logits.double().softmax(-1).numpy()
    n = 32
    for group in arithmetic_draws(source, logits, n, seeds=50, steps=4):
        for length in range(1, 5):
            counts = Counter(tuple(row[:length]) for row in group.tolist())
            for prefix in np.ndindex(*(5,) * length):
                p = math.prod(chances[t, token] for t, token in enumerate(prefix))
                assert math.floor(n * p - 1e-6) <= counts[prefix] <= math.ceil(n * p + 1e-6)


def test_a_code_lasts_for_long_texts(source: Source) -> None:
    """After hundreds of tokens the code must still be uniform: the bits used up are refilled."""
    logits = torch.full((1, 2), 0.0)
    tokens = arithmetic_draws(source, logits.expand(400, 2), n=2, seeds=200, steps=400)
    late = tokens[:, :, 300:]
    assert abs(late.mean() - 0.5) < 4 * 0.5 / math.sqrt(late.size)
    repeats = (late[..., 1:] == late[..., :-1]).mean()
    assert abs(repeats - 0.5) < 4 * 0.5 / math.sqrt(late[..., 1:].size)


def test_a_filtered_token_is_never_drawn(source: Source) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    tokens = arithmetic_draws(source, logits, n=4, seeds=500, steps=1)
    assert set(np.unique(tokens)) == {1, 3}


def run_of(sampler: Plain, source: Source, groups: int, n: int) -> tuple[Run, Setting]:
    chosen = setting(source, groups, n)
    return sampler.start(chosen), chosen


def kernel_by_hand(
    keys: list[torch.Tensor], tokens: list[int], key: torch.Tensor, gamma: float, vocab: int
) -> torch.Tensor:
    """The formula, one remembered token at a time."""
    weights = [math.exp((float(k @ key) - 1) / 0.05) for k in keys]
    scores = torch.zeros(vocab)
    for w, token in zip(weights, tokens, strict=True):
        scores[token] += w
    return gamma * scores / (1 + sum(weights))


@pytest.mark.parametrize(("window", "rounds"), [(4096, 1), (8, 1), (4096, 2)])
def test_kernel_memory_against_its_formula(source: Source, window: int, rounds: int) -> None:
    n, steps, gamma = 4, 5, 2.0
    sampler = with_rounds(kernel(gamma, window), rounds) if rounds > 1 else kernel(gamma, window)
    run, chosen = run_of(sampler, source, 1, n)
    vocab, hidden = source.parts.head.vocab_size, source.parts.hidden_size
    torch.manual_seed(5)
    keys: list[torch.Tensor] = []
    tokens: list[int] = []
    projection = torch.randn(hidden, 64, generator=torch.Generator().manual_seed(7))
    for index in range(steps):
        deep = torch.randn(n, hidden) * 0.1 + torch.randn(1, hidden)  # siblings alike, steps not
        logits = torch.randn(n, vocab)
        pick = run.draw(step_of(chosen, logits, index)._replace(deep=deep))
        normed = torch.nn.functional.layer_norm(deep, (hidden,)) @ projection
        mine = torch.nn.functional.normalize(normed, dim=-1)
        kept = slice(max(0, len(keys) - (window - n)), None)
        known_keys, known_tokens = keys[kept], tokens[kept]
        for r in range(rounds):
            for i in range(r, n, rounds):
                penalty = kernel_by_hand(known_keys, known_tokens, mine[i], gamma, vocab)
                token = int(pick.token_ids[i])
                assert pick.novelty is not None
                assert float(pick.novelty[i]) == pytest.approx(-float(penalty[token]), abs=1e-4)
                scores = BASE(logits[i : i + 1], False)[0] - penalty
                assert float(pick.logprob[i]) == pytest.approx(float(scores.log_softmax(-1)[token]), abs=1e-4)
            known_keys = known_keys + [mine[i] for i in range(r, n, rounds)]
            known_tokens = known_tokens + [int(pick.token_ids[i]) for i in range(r, n, rounds)]
        keys += list(mine)
        tokens += pick.token_ids.tolist()


def test_ridge_memory_against_least_squares(source: Source) -> None:
    """D is the solution of a least-squares problem with the ridge as extra rows, whatever way it is computed."""
    n, steps, gamma = 3, 4, 1.5
    run, chosen = run_of(ridge(gamma), source, 1, n)
    head = source.parts.head
    rows = head.weight - head.weight.mean(0)
    embedding = rows / rows.norm(dim=1).mean()
    hidden = head.hidden_size
    projection = torch.randn(hidden, 64, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(6)
    z_seen, y_seen = [math.sqrt(0.1) * torch.eye(65)], [torch.zeros(65, hidden)]
    for index in range(steps):
        shallow, logits = torch.randn(n, hidden), torch.randn(n, head.vocab_size)
        pick = run.draw(step_of(chosen, logits, index)._replace(shallow=shallow))
        z = torch.nn.functional.normalize(torch.nn.functional.layer_norm(shallow, (hidden,)) @ projection, dim=-1)
        z = torch.cat([z, torch.full((n, 1), 0.3)], 1)
        solution = torch.linalg.lstsq(torch.cat(z_seen).double(), torch.cat(y_seen).double()).solution.float()
        penalty = gamma * (z @ solution @ embedding.T).clamp(-3, 3)
        assert pick.novelty is not None
        torch.testing.assert_close(
            pick.novelty, -penalty.gather(1, pick.token_ids[:, None])[:, 0], atol=2e-3, rtol=2e-3
        )
        z_seen.append(z)
        y_seen.append(embedding[pick.token_ids])


def test_rows_that_have_finished_teach_nothing(source: Source) -> None:
    run, chosen = run_of(kernel(2.0, 4096), source, 1, 2)
    vocab, hidden = source.parts.head.vocab_size, source.parts.hidden_size
    deep = torch.ones(2, hidden) * torch.arange(hidden)  # the same key for both, at every step
    first = step_of(chosen, torch.zeros(2, vocab), 0)._replace(deep=deep, active=torch.tensor([True, False]))
    drawn = run.draw(first).token_ids
    alone = step_of(chosen, torch.zeros(2, vocab), 1)._replace(deep=deep)
    pick = run.draw(alone)
    # One remembered token of weight 1: the others lose nothing.
    penalties = torch.zeros(vocab)
    penalties[drawn[0]] = 2.0 * 1 / (1 + 1)
    expected = (-penalties).log_softmax(-1)[pick.token_ids]
    torch.testing.assert_close(pick.logprob, expected, atol=1e-5, rtol=1e-5)


def test_a_shared_distiller_goes_on_until_it_is_forgotten(source: Source) -> None:
    params = SamplingParams(min_p=0.05, beta=0.5)
    shared = Explored("shared", params, DistillerConfig(gate=False), shared=True)

    def drawn() -> torch.Tensor:
        return decode(source, shared, prompts_of(source, 2), 3, request_seeds(0, 0, 2), 20).logprob

    forget()
    first, second = drawn(), drawn()
    forget()
    assert torch.equal(drawn(), first) and not torch.equal(second, first)


def test_the_explorers_min_p_is_the_warpers() -> None:
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0)) * 3
    params = RowParams.of(SamplingParams(min_p=0.05), 16, "cpu")
    candidates = select_candidates(logits, params)
    kept = torch.isfinite(BASE(logits, first=False)).sum(-1)
    assert candidates.count.equal(kept)
