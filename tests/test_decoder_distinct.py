"""Distinct siblings in the decoder: caches, texts and numbers follow the rows when they change places."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from esamp_core.base.errors import ArgumentError
from esamp_core.bindings.hf import explore
from esamp_core.decoder import CacheKind, Decoder, Generation, generate
from esamp_core.models.parts import find_parts
from esamp_core.sample import PRESETS, DistillerConfig, Explorer, SamplingParams
from tests.test_decoder_models import MODELS, PROMPTS, SIZES, VOCAB, build, hybrid, one_thread  # noqa: F401
from tests.test_decoder_text import text_of, words

STOP = tuple(range(3, 30))
PLAIN = SamplingParams(seed=3, beta=0.0, top_k=12)
DISTINCT = replace(PLAIN, distinct=True)


def run(model: Any, **options: Any) -> list[Generation]:
    defaults: dict[str, Any] = {"n": 5, "params": DISTINCT, "max_new_tokens": 9, "stop_token_ids": STOP}
    decoder = Decoder(model, words(), **{k: options.pop(k) for k in ("config", "apply") if k in options})
    return decoder.generate(options.pop("prompts", PROMPTS), **(defaults | options))


def check_numbers(model: Any, generations: list[Generation]) -> None:
    """By a forward over every sample: a row whose cache did not follow it would have other logits."""
    for g in generations:
        ids = torch.tensor([[*g.prompt_token_ids, *g.token_ids]])
        logits = model(ids).logits[0, len(g.prompt_token_ids) - 1 : -1]
        at = torch.tensor(g.token_ids)[:, None]
        want = logits.log_softmax(-1).gather(-1, at)[:, 0]
        torch.testing.assert_close(torch.tensor(g.base_logprobs), want, atol=2e-4, rtol=1e-4)
        kept = logits.masked_fill(logits < logits.topk(12).values[:, -1:], -torch.inf)
        drawn = kept.log_softmax(-1).gather(-1, at)[:, 0]
        torch.testing.assert_close(torch.tensor(g.logprobs), drawn, atol=2e-4, rtol=1e-4)


def check_sets(generations: list[Generation], n: int) -> None:
    """All of a prompt's samples differ, none is the beginning of another, and they are in order."""
    for first in range(0, len(generations), n):
        found = generations[first : first + n]
        assert [g.sample_index for g in found] == list(range(n))
        tokens = [g.token_ids for g in found]
        assert len(set(tokens)) == n and all(g.copy_of is None for g in found)
        assert not any(a != b and a == b[: len(a)] for a in tokens for b in tokens)
        order = [g.perturbed_logprob or math.nan for g in found]
        assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_the_samples(name: str, cache: CacheKind) -> None:
    """Prompts of uneven lengths, rows that end at different steps; one batch, and a queue."""
    model = build(name)
    got = run(model, cache=cache)
    check_sets(got, 5)
    check_numbers(model, got)
    assert len({len(g.token_ids) for g in got}) > 4
    alone = run(model, cache=cache, n=1, params=PLAIN)
    assert [g.token_ids for g in got[::5]] == [g.token_ids for g in alone]
    assert [(g.token_ids, g.finish_reason) for g in run(model, cache=cache, max_batch_rows=5)] == [
        (g.token_ids, g.finish_reason) for g in got
    ]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_states_of_one_per_row_follow_too(cache: CacheKind) -> None:
    got = run(hybrid(), cache=cache)
    check_sets(got, 5)
    check_numbers(hybrid(), got)


@pytest.mark.parametrize("apply", ["candidates", "latent"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_with_exploration(apply: Any, cache: CacheKind) -> None:
    """The same samples in any batch; novelty is that of the tokens."""
    config = DistillerConfig(gate=False, deep_scale=1.0)
    params = replace(DISTINCT, beta=0.4)
    options: dict[str, Any] = {"config": config, "apply": apply, "cache": cache, "params": params}
    got = run(build("llama"), **options)
    check_sets(got, 5)
    assert [g.token_ids for g in run(build("llama"), **options, max_batch_rows=5)] == [g.token_ids for g in got]
    plain = run(build("llama"), cache=cache)
    assert [g.token_ids for g in got] != [g.token_ids for g in plain]
    if apply == "candidates":
        assert any(abs(value) > 0.01 for g in got for value in g.novelty)
        for g in got:
            ids = torch.tensor([[*g.prompt_token_ids, *g.token_ids]])
            logprob = build("llama")(ids).logits[0, len(g.prompt_token_ids) - 1 : -1].log_softmax(-1)
            want = logprob.gather(-1, torch.tensor(g.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(g.base_logprobs), want, atol=2e-4, rtol=1e-4)


def test_fewer_are_the_first_of_more() -> None:
    many = run(build("gpt2"), n=7)
    few = run(build("gpt2"), n=3)
    for prompt in range(len(PROMPTS)):
        assert [g.token_ids for g in few[3 * prompt :][:3]] == [g.token_ids for g in many[7 * prompt :][:3]]


def test_where_filters_leave_fewer_the_others_are_copies() -> None:
    """Of 2 tokens a step and 2 steps there are 4 samples, of 1 token there is one."""
    results: list[Generation] = []
    params = [replace(DISTINCT, top_k=2), replace(DISTINCT, top_k=1)]
    got = run(build("llama"), prompts=PROMPTS[:2], n=6, params=params, max_new_tokens=2, stop_token_ids=(),
              on_result=results.append)  # fmt: skip
    assert [g.copy_of for g in got] == [None] * 4 + [0, 1] + [None, 0, 0, 0, 0, 0]
    assert [g.sample_index for g in got] == [*range(6), *range(6)]
    assert len({g.token_ids for g in got[:4]}) == 4
    for g in got:
        if g.copy_of is not None:
            first = got[6 * g.prompt_index + g.copy_of]
            assert (g.token_ids, g.text, g.logprobs) == (first.token_ids, first.text, first.logprobs)
    assert sorted(results, key=lambda g: (g.prompt_index, g.sample_index)) == got


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_stop_token_and_a_stop_string_end_the_same_samples(cache: CacheKind) -> None:
    """The host finds strings; what it has ended does not go on in other rows."""
    stop = tuple(range(20, 50))
    tokens = run(build("llama"), stop_token_ids=stop, cache=cache)
    strings = run(build("llama"), stop_token_ids=(), stop_strings=[f"w{i}" for i in stop], cache=cache)
    assert [(g.token_ids, g.finish_reason, g.perturbed_logprob) for g in strings] == [
        (g.token_ids, g.finish_reason, g.perturbed_logprob) for g in tokens
    ]
    assert {g.finish_reason for g in strings} == {"stop", "length"}
    for g in strings:
        assert g.text == text_of([i for i in g.token_ids if i not in stop]) + " " * (
            g.finish_reason == "stop" and len(g.token_ids) > 1
        )


def test_prompts_that_are_drawn_otherwise_are_not_touched() -> None:
    params = [DISTINCT, PLAIN, replace(PLAIN, stratified=True), DISTINCT]
    mixed = run(build("llama"), params=params)
    for kind in (DISTINCT, PLAIN, replace(PLAIN, stratified=True)):
        same = run(build("llama"), params=[replace(kind, seed=p.seed) for p in params])
        for i, p in enumerate(params):
            if p == kind:
                assert [g.token_ids for g in mixed[5 * i : 5 * i + 5]] == [g.token_ids for g in same[5 * i : 5 * i + 5]]


def test_one_sample_is_an_ordinary_one() -> None:
    assert run(build("llama"), n=1) == run(build("llama"), n=1, params=PLAIN)


def test_an_explorer_that_is_given_is_left_in_order() -> None:
    parts = find_parts(build("llama"))
    explorer = Explorer(parts.head, parts.hidden_size, max_groups=2, max_rows=6)
    decoder = Decoder(build("llama"), explorer=explorer)
    decoder.generate(PROMPTS, n=3, params=DISTINCT, max_new_tokens=5)
    assert decoder.explorer is explorer and explorer.open_rows == 0


def test_the_default() -> None:
    """Siblings are distinct unless something says otherwise, which each of these does."""
    model = build("llama")
    small: dict[str, Any] = {"max_new_tokens": 1, "stop_token_ids": ()}
    found = Decoder(model).generate(PROMPTS[:1], n=12, **small)
    assert len({g.token_ids for g in found}) == min(12, found[0].count[0])
    said = replace(PRESETS["default"].params, seed=found[0].seed, distinct=True)
    assert [g.token_ids for g in run(model, n=12, params=said, prompts=PROMPTS[:1], **small)] == [
        g.token_ids for g in found
    ]
    other: list[dict[str, Any]] = [
        {"params": SamplingParams(seed=1, top_k=3, distinct=False)},
        {"params": SamplingParams(seed=1, temperature=0.0)},
        {"params": SamplingParams(seed=1, top_k=3, stratified=True)},
        {"params": SamplingParams(seed=1, top_k=3), "config": DistillerConfig(target="choice")},
        {"params": replace(PRESETS["paper"].params, seed=1, top_k=3)},
        {"params": replace(PRESETS["release"].params, seed=1, top_k=3)},
    ]
    for options in other:
        assert len({g.token_ids for g in run(model, n=12, **options, **small)[:12]}) < 12


def test_what_cannot_be_meant() -> None:
    model = build("llama")
    with pytest.raises(ArgumentError, match="distinct must be False with on_token"):
        run(model, on_token=print)
    with pytest.raises(ArgumentError, match="distinct must be None or False with target 'choice'"):
        run(model, config=DistillerConfig(target="choice"))
    with pytest.raises(ArgumentError, match=r"esamp_core\.generate draws distinct siblings"):
        explore(model, params=DISTINCT)
    generate(model, PROMPTS[:1], n=1, params=DISTINCT, max_new_tokens=2, on_token=lambda token: None)
    assert SIZES["vocab_size"] == VOCAB
