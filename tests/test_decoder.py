"""What decoder.generate promises: seeds, ends, numbers and learning."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from esamp_core.base.seeds import prompt_seed
from esamp_core.decoder import Decoder, Generation, Token, generate
from esamp_core.models.parts import find_parts
from esamp_core.sample import PRESETS, DistillerConfig, Draw, Explorer, Rows, SamplingParams, Status
from tests.test_decoder_models import (  # noqa: F401
    PROMPTS,
    SIZES,
    VOCAB,
    build,
    expected_greedy,
    greedy,
    one_thread,
    plain_forward,
    seed_of,
    spy_on,
)
from tests.test_decoder_text import draws, text_of, words

STOP = tuple(range(3, 15))


@functools.cache
def explored(cache: str = "dynamic", rows: int = 64, seed: int = 5, n: int = 3) -> tuple[Generation, ...]:
    params = SamplingParams(seed=seed, beta=0.5, distinct=False)
    options: dict[str, Any] = {"cache": cache, "max_batch_rows": rows, "stop_token_ids": STOP}
    return tuple(Decoder(build("llama")).generate(PROMPTS, n=n, params=params, max_new_tokens=12, **options))


def test_same_seed_same_result() -> None:
    explored.cache_clear()
    first = explored()
    explored.cache_clear()
    assert explored() == first


@pytest.mark.parametrize(("cache", "rows"), [("dynamic", 3), ("dynamic", 7), ("static", 64), ("static", 4)])
def test_draws_do_not_depend_on_the_schedule(cache: str, rows: int) -> None:
    assert draws(list(explored(cache, rows))) == draws(list(explored()))


def test_samples_prompts_and_seeds_differ() -> None:
    assert len(set(draws(list(explored())))) == 12
    assert draws(list(explored(seed=6))) != draws(list(explored()))
    twice = generate(build("llama"), [PROMPTS[0]] * 2, params=SamplingParams(seed=1, distinct=False), max_new_tokens=8)
    assert twice[0].token_ids != twice[1].token_ids


def test_reported_seed_repeats_the_prompt_alone() -> None:
    for index in (0, 2):
        want = [g for g in explored() if g.prompt_index == index]
        assert {g.seed for g in want} == {prompt_seed(5, index)}
        params = SamplingParams(seed=want[0].seed, beta=0.5, distinct=False)
        got = generate(build("llama"), [PROMPTS[index]], n=3, params=params, max_new_tokens=12, stop_token_ids=STOP)
        assert draws(got) == draws(want)


def test_prompts_of_neighbouring_seeds_share_no_sample() -> None:
    def samples(seed: int) -> set[tuple[int, ...]]:
        params = SamplingParams(seed=seed, beta=0.0, distinct=False)
        got = generate(build("llama"), PROMPTS[:1] * 4, n=2, params=params, max_new_tokens=20, stop_token_ids=())
        return {g.token_ids for g in got}

    runs = [samples(seed) for seed in (2**64 - 1, 0, 1)]
    assert len(set.union(*runs)) == 24


def test_prompt_seeds_are_64_bits_and_apart() -> None:
    seeds = {prompt_seed(seed, i) for seed in (-1, 0, 1, 2**64 - 1, 2**63) for i in range(1000)}
    assert len(seeds) == 4 * 1000  # -1 is 2^64 - 1
    assert all(0 <= prompt_seed(seed, i) < 2**63 for seed in (-1, 5) for i in range(1, 100))
    assert [prompt_seed(seed, 0) for seed in (-1, 7)] == [2**64 - 1, 7]


def test_no_seed_is_drawn_from_torch_and_reported() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(generate(build("llama"), PROMPTS[:2], max_new_tokens=4))
    assert runs[0] == runs[1] and runs[0][1].seed == prompt_seed(runs[0][0].seed, 1)
    same = replace(PRESETS["default"].params, seed=runs[0][0].seed)  # what generate takes when it is given none
    assert generate(build("llama"), PROMPTS[:2], params=same, max_new_tokens=4) == runs[0]


def test_params_per_prompt_are_used_as_they_are() -> None:
    params = [
        SamplingParams(temperature=0.0, beta=0.0, seed=9),
        SamplingParams(seed=9, distinct=False),
        SamplingParams(),
    ]
    got = generate(build("llama"), PROMPTS[:3], params=params, max_new_tokens=6, stop_token_ids=())
    assert got[0].token_ids == tuple(expected_greedy("llama", 6)[0])
    assert [g.seed for g in got[:2]] == [9, 9]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_length(cache: Any) -> None:
    for new in (1, 2, 5):
        got = generate(build("gpt2"), PROMPTS, n=2, max_new_tokens=new, stop_token_ids=(), cache=cache)
        assert [(len(g.token_ids), g.finish_reason, g.stop_reason) for g in got] == [(new, "length", None)] * 8


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_context_ends_a_sample(cache: Any) -> None:
    # GPT-2's positions are a table: a step too far would raise.
    prompts = [[5] * 60, [6] * 63, [7] * 3]
    got = generate(build("gpt2"), prompts, n=2, max_new_tokens=20, stop_token_ids=(), cache=cache)
    assert [len(g.token_ids) for g in got] == [4, 4, 1, 1, 20, 20]
    assert {g.finish_reason for g in got} == {"length"}


def test_stop_tokens() -> None:
    free = generate(
        build("llama"), PROMPTS, params=SamplingParams(seed=2, distinct=False), max_new_tokens=12, stop_token_ids=()
    )
    got = generate(
        build("llama"), PROMPTS, params=SamplingParams(seed=2, distinct=False), max_new_tokens=12, stop_token_ids=STOP
    )
    ended = 0
    for whole, cut in zip(free, got, strict=True):
        end = next((i + 1 for i, token in enumerate(whole.token_ids) if token in STOP), None)
        assert cut.token_ids == whole.token_ids[:end]
        assert (cut.finish_reason, cut.stop_reason) == (
            ("length", None) if end is None else ("stop", cut.token_ids[-1])
        )
        ended += end is not None
    assert ended


def test_default_stop_tokens_are_the_models() -> None:
    model = build("llama")
    assert model.generation_config.eos_token_id == 2
    want = expected_greedy("llama", 6)[0]
    old = model.generation_config.eos_token_id
    try:
        for eos in (want[2], [want[2], VOCAB - 1]):
            model.generation_config.eos_token_id = eos
            got = generate(model, PROMPTS[:1], params=greedy(), max_new_tokens=6)[0]
            assert list(got.token_ids) == want[: want.index(want[2]) + 1] and got.stop_reason == want[2]
    finally:
        model.generation_config.eos_token_id = old


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("rows", [64, 2])
def test_stop_strings(cache: Any, rows: int) -> None:
    options: dict[str, Any] = {"n": 2, "params": SamplingParams(seed=4, beta=0.5, distinct=False), "max_new_tokens": 12}
    options |= {"stop_token_ids": (), "cache": cache, "max_batch_rows": rows}
    free = generate(build("llama"), PROMPTS, words(), **options)
    # Spans two tokens; nothing else than where a sample ends may change for samples that end by length or alone.
    stop = [text_of(free[0].token_ids[3:5]), text_of(free[5].token_ids[:1]) + " "]
    got = generate(build("llama"), PROMPTS, words(), stop_strings=stop, **options)
    assert (got[0].finish_reason, got[0].stop_reason) == ("stop", stop[0])
    assert got[0].token_ids == free[0].token_ids[:5]
    assert got[0].text == text_of(free[0].token_ids[:3]) + " "
    assert (got[5].text, got[5].stop_reason) == ("", stop[1])
    assert got[5].token_ids == free[5].token_ids[:2]  # the space came with the second token
    for generation in got:
        assert len(generation.logprobs) == len(generation.token_ids) == len(generation.novelty)
        if generation.finish_reason == "length":
            assert generation.text == text_of(generation.token_ids)
        assert not any(s in (generation.text or "") for s in stop)


def test_empty() -> None:
    """A model that gives no token a finite logit ends the row, and only that row."""
    model = build("llama")

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        logits = output.logits.clone()
        logits[:, -1][logits[:, -1].argmax(-1) == spoiled] = float("nan")
        output.logits = logits
        return output

    want = expected_greedy("llama", 6)
    spoiled = want[1][2]
    handle = model.register_forward_hook(spoil)
    try:
        with pytest.warns(UserWarning, match="logits that are NaN"):
            got = generate(model, PROMPTS, words(), params=greedy(), max_new_tokens=6, stop_token_ids=())
    finally:
        handle.remove()
    assert got[1].finish_reason == "empty" and list(got[1].token_ids) == want[1][: want[1].index(spoiled)]
    assert got[1].text == text_of(got[1].token_ids)
    for i in (0, 2, 3):
        if spoiled not in want[i]:
            assert list(got[i].token_ids) == want[i]


def test_numbers_that_are_not_finite_are_kept_and_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Explorer.sample

    def spoiled(self: Explorer, logits: Tensor, rows: Rows) -> Draw:
        for i, (index, position) in enumerate(zip(rows.sample_index, rows.positions.tolist(), strict=True)):
            if position == 1 and index == 0:
                logits[i, 7] = float("nan")
            if position == 1 and index == 2:
                logits[i] = -float("inf")
        return original(self, logits, rows)

    monkeypatch.setattr(Explorer, "sample", spoiled)
    options: dict[str, Any] = {
        "n": 3,
        "params": SamplingParams(seed=1, distinct=False),
        "max_new_tokens": 3,
        "stop_token_ids": (),
    }
    message = "of 3 samples 1 had logits that are NaN, .*; 1 had no logit above -inf, and ended"
    with pytest.warns(UserWarning, match=message):
        nan, plain, empty = generate(build("llama"), PROMPTS[:1], **options)
    assert nan.status == (0, Status.NAN_LOGITS, 0) and plain.status == (0, 0, 0)
    assert empty.status == (0,) and empty.finish_reason == "empty"


def test_numbers_are_those_of_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field of every token, with rows that join and leave; what the numbers are, test_draw holds."""
    drawn: dict[tuple[Any, int], list[tuple[Any, ...]]] = {}
    original = Explorer.sample

    def noted(self: Explorer, logits: Tensor, rows: Rows) -> Draw:
        draw = original(self, logits, rows)
        for group, index, *fields in zip(rows.groups, rows.sample_index, *(t.tolist() for t in draw), strict=True):
            if fields[0] >= 0:
                drawn.setdefault((group, index), []).append(tuple(fields))
        return draw

    monkeypatch.setattr(Explorer, "sample", noted)
    params = SamplingParams(seed=5, beta=0.5, top_k=7, distinct=False)
    options: dict[str, Any] = {"n": 3, "max_new_tokens": 9, "stop_token_ids": STOP, "max_batch_rows": 6}
    got = generate(build("llama"), PROMPTS, params=params, config=DistillerConfig(gate=False), **options)
    for g in got:
        columns = (g.token_ids, g.logprobs, g.base_logprobs, g.novelty, g.kl, g.count, g.status)
        assert list(zip(*columns, strict=True)) == drawn[("prompt", g.prompt_index), g.sample_index]
    assert {n for g in got for n in g.count} == {7} and any(kl > 0 for g in got for kl in g.kl)


def test_logprobs_are_those_of_a_full_forward() -> None:
    params = SamplingParams(temperature=0.7, top_k=20, beta=0.0, seed=8, distinct=False)
    got = generate(
        build("llama"), PROMPTS, n=2, params=params, max_new_tokens=10, stop_token_ids=STOP, max_batch_rows=3
    )
    for g in got:
        drawn = torch.tensor(g.token_ids)
        logits = plain_forward("llama", [*g.prompt_token_ids, *g.token_ids])["logits"]
        logits = logits[len(g.prompt_token_ids) - 1 : -1].float()
        base = logits.log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
        kept = logits.masked_fill(logits < logits.topk(20).values[:, -1:], float("-inf")) / 0.7
        sampled = kept.log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(g.base_logprobs), base, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(g.logprobs), sampled, atol=1e-4, rtol=1e-4)
        assert set(g.novelty) == {0.0}


def test_exploration_changes_draws_and_reports_novelty() -> None:
    """A gated Distiller of a random model is never trusted, so the gate is open here."""
    vanilla, exploring = (
        generate(
            build("llama"), PROMPTS, n=3, params=SamplingParams(seed=5, beta=beta, distinct=False), max_new_tokens=12,
            stop_token_ids=STOP, config=DistillerConfig(gate=False),
        )
        for beta in (0.0, 0.5)
    )  # fmt: skip
    assert draws(vanilla) != draws(exploring)
    assert all(any(value != 0 for value in g.novelty) for g in exploring)
    assert draws(vanilla) == draws(list(explored()))


def test_choice_target_runs() -> None:
    config = DistillerConfig(target="choice")
    got = generate(build("llama"), PROMPTS, n=2, config=config, max_new_tokens=5, stop_token_ids=())
    assert all(len(g.token_ids) == 5 for g in got)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_learns_while_it_runs(cache: Any) -> None:
    decoder, stats = Decoder(build("llama")), {}

    def note(generation: Generation) -> None:
        assert decoder.explorer is not None
        stats[generation.prompt_index] = decoder.explorer.stats()[("prompt", generation.prompt_index)]

    got = decoder.generate(
        PROMPTS[:1], n=3, params=SamplingParams(seed=2, distinct=False), max_new_tokens=30, stop_token_ids=STOP,
        cache=cache, on_result=note,
    )  # fmt: skip
    assert stats[0].updates == max(len(g.token_ids) for g in got)  # and not one more with nobody left
    assert decoder.explorer is not None and decoder.explorer.stats() == {}  # the slot was given back


def test_finished_rows_do_not_teach() -> None:
    """In a static batch they keep running; what the others learn and draw must not notice."""
    for cache in ("static", "dynamic"):
        decoder, spy = spy_on("llama")
        got = decoder.generate(
            PROMPTS[:2],
            n=4,
            params=SamplingParams(seed=2, distinct=False),
            max_new_tokens=12,
            stop_token_ids=STOP,
            cache=cache,
        )
        taught = sum("deep" in step for step in spy.steps.values())
        assert taught == len(spy.steps) == sum(len(g.token_ids) for g in got)
        assert spy.idle > 0


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_stop_string_ends_a_row_one_step_late(cache: Any) -> None:
    """The host finds it while the next step runs already; that one step draws and teaches, and no other."""
    decoder, spy = spy_on("llama")
    decoder.tokenizer = words()
    options: dict[str, Any] = {
        "n": 3,
        "params": SamplingParams(seed=2, distinct=False),
        "max_new_tokens": 12,
        "stop_token_ids": (),
    }
    first = decoder.generate(PROMPTS[:1], cache=cache, **options)[0]
    spy.steps.clear()
    got = decoder.generate(PROMPTS[:1], stop_strings=text_of(first.token_ids[2:4]), cache=cache, **options)
    assert [len(g.token_ids) for g in got] == [4, 12, 12]
    ran = {g.sample_index: sum(seed == seed_of(g) for seed, _ in spy.steps) for g in got}
    assert ran == {0: 5, 1: 12, 2: 12}


def test_without_exploration_and_learning_the_distiller_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("predict was called")

    monkeypatch.setattr(Explorer, "predict", fail)
    got = generate(
        build("llama"), PROMPTS, params=greedy(), config=DistillerConfig(lr=0.0, gate=False), max_new_tokens=3
    )
    assert len(got) == 4
    with pytest.raises(AssertionError, match="predict was called"):
        generate(
            build("llama"),
            PROMPTS,
            params=SamplingParams(beta=0.1, distinct=False),
            config=DistillerConfig(lr=0.0, gate=False),
        )


def test_given_explorer_keeps_no_rows_after_an_error() -> None:
    parts = find_parts(build("llama"))
    explorer = Explorer(parts.head, parts.hidden_size, max_groups=2, max_rows=4)
    decoder = Decoder(build("llama"), explorer=explorer)

    def stop(token: Token) -> None:
        if token.prompt_index == 2:
            raise KeyboardInterrupt

    hooks = len(parts.block._forward_hooks), len(parts.head_module._forward_pre_hooks)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            params = SamplingParams(distinct=False)
            decoder.generate(PROMPTS, n=2, params=params, max_new_tokens=4, stop_token_ids=(), on_token=stop)
        assert explorer.stats() == {} and repr(explorer).count("0/4 rows")
        assert (len(parts.block._forward_hooks), len(parts.head_module._forward_pre_hooks)) == hooks
    assert len(decoder.generate(PROMPTS, n=2, max_new_tokens=4)) == 8  # two groups at a time


def test_inside_inference_mode() -> None:
    with torch.inference_mode():
        params = SamplingParams(seed=5, beta=0.5, distinct=False)
        got = Decoder(build("llama")).generate(PROMPTS, n=3, params=params, max_new_tokens=12, stop_token_ids=STOP)
    assert draws(got) == draws(list(explored()))


def test_bfloat16_model() -> None:
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).to(torch.bfloat16).eval()
    got: list[Generation] = generate(model, PROMPTS, n=2, max_new_tokens=5, stop_token_ids=())
    assert all(len(g.token_ids) == 5 for g in got)
    values: Tensor = torch.tensor([g.base_logprobs for g in got])
    assert torch.isfinite(values).all()
