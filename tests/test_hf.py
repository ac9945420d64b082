"""The transformers binding: plain generate() explores as the decoder does, whatever it was asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from esamp_core.bindings.hf import Exploration, explore
from esamp_core.decoder import Decoder
from esamp_core.models.parts import find_parts
from esamp_core.sample import DistillerConfig, Draw, SamplingParams, Status
from tests.test_decoder_models import MODELS, PROMPTS, SIZES, VOCAB, Spy, build, one_thread, plain_forward  # noqa: F401

STOP = tuple(range(3, 27))
GREEDY = SamplingParams(temperature=0.0, seed=3)
# No token's cumulative mass is within 1e-4 of this top-p where it is used: at 0.95 one came within 2e-7, and rounding,
# which differs between two ways to run a model and between CPUs, would have decided.
SAMPLED = SamplingParams(temperature=1.2, top_k=40, top_p=0.9, min_p=0.01, seed=5, distinct=False)


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """What a tokenizer gives with padding on the left."""
    length = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (length - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]),
    }


def repeated(prompts: list[list[int]], n: int) -> list[list[int]]:
    return [p for p in prompts for _ in range(n)]


def run(exploration: Exploration, model: Any, prompts: list[list[int]] = PROMPTS, **options: Any) -> Tensor:
    """The new tokens [rows, steps] of generate."""
    inputs = padded(prompts)
    stop = {"eos_token_id": list(STOP), "pad_token_id": 0, "max_new_tokens": 12}
    out = model.generate(**inputs, **{**stop, **options}, logits_processor=exploration.logits_processor)
    return out[:, inputs["input_ids"].shape[1] :]


def generated(model: Any, prompts: list[list[int]] = PROMPTS, **options: Any) -> tuple[Tensor, Draw]:
    own = ("beta", "seed", "params", "groups", "config", "explorer")
    with explore(model, **{k: options.pop(k) for k in own if k in options}) as exploration:
        tokens = run(exploration, model, prompts, **options)
    return tokens, exploration.draws


def assert_same(one: Draw, other: Draw) -> None:
    assert torch.equal(one.token_ids, other.token_ids)
    for name in ("logprob", "base_logprob", "novelty", "kl"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_the_decoder(name: str, params: SamplingParams, cache: Any) -> None:
    """Token for token, with prompts of different lengths and rows that end at different times."""
    config = DistillerConfig(gate=False)
    decoder = Decoder(build(name), config=config)
    want = decoder.generate(PROMPTS, n=3, params=params, max_new_tokens=12, stop_token_ids=STOP, cache=cache)
    implementation = {"cache_implementation": "static"} if cache == "static" else {}
    tokens, draws = generated(
        build(name), params=params, config=config, do_sample=True, num_return_sequences=3, **implementation
    )
    assert len({len(g.token_ids) for g in want}) > 1
    assert draws.novelty.abs().max() > 0.1
    for row, expected in enumerate(want):
        n = len(expected.token_ids)
        assert tokens[row].tolist() == [*expected.token_ids, *[0] * (tokens.shape[1] - n)]
        assert draws.token_ids[row].tolist() == [*expected.token_ids, *[-1] * (tokens.shape[1] - n)]
        assert (draws.status[row, n:] == Status.INACTIVE).all() and (draws.logprob[row, n:] == 0).all()
        for numbers, name_ in ((expected.logprobs, "logprob"), (expected.base_logprobs, "base_logprob")):
            torch.testing.assert_close(getattr(draws, name_)[row, :n], torch.tensor(numbers), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(draws.novelty[row, :n], torch.tensor(expected.novelty), atol=1e-5, rtol=1e-5)


def test_one_params_per_prompt() -> None:
    some = [
        GREEDY,
        SAMPLED,
        SamplingParams(beta=0.0, seed=9, distinct=False),
        SamplingParams(beta=0.5, top_k=3, seed=9, distinct=False),
    ]
    tokens = []
    for params in (some, [replace(p, stratified=True) for p in some]):
        want = Decoder(build("llama")).generate(PROMPTS, n=3, params=params, max_new_tokens=12, stop_token_ids=STOP)
        _, draws = generated(build("llama"), repeated(PROMPTS, 3), params=params)
        for row, expected in enumerate(want):
            assert [t for t in draws.token_ids[row].tolist() if t >= 0] == list(expected.token_ids)
        tokens.append([list(g.token_ids) for g in want])
    # Stratified are all that draw: greedy rows are as they were.
    assert tokens[0][:3] == tokens[1][:3] and all(tokens[0][i : i + 3] != tokens[1][i : i + 3] for i in (3, 6, 9))


def test_without_beta_it_is_transformers_greedy() -> None:
    """Processors of generate before ours included: what they ban is not drawn."""
    edits: dict[str, Any] = {
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[11], [12, 13]],
        "min_new_tokens": 5,
        "suppress_tokens": list(range(20, 40)),
        "sequence_bias": [[[50], 1.5]],
    }
    for options in ({}, edits):
        common = {**options, "max_new_tokens": 12, "eos_token_id": list(STOP), "pad_token_id": 0}
        want = build("llama").generate(**padded(PROMPTS), **common)[:, max(map(len, PROMPTS)) :]
        tokens, _ = generated(build("llama"), beta=0.0, **options)
        assert torch.equal(tokens, want)


def test_seed_of_torch_fixes_the_draws() -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(generated(build("llama"), repeated(PROMPTS, 2), params=SamplingParams())[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


class Watch(Spy):
    """Also keeps the untouched logits."""

    def sample(self, logits: Tensor, rows: Any, *, model_logits: Tensor | None = None) -> Draw:
        if model_logits is not None:
            self._note("model_logits", model_logits, rows)
        return super().sample(logits, rows, model_logits=model_logits)


def watch(name: str) -> Watch:
    parts = find_parts(build(name))
    return Watch(parts.head, parts.hidden_size, max_rows=64)


def check_steps(name: str, spy: Watch, explorer_rows: list[tuple[int, list[int]]], tokens: Tensor) -> None:
    """Every step of every row was that of a forward without cache, and there were no others."""
    for row, (seed, prompt) in enumerate(explorer_rows):
        end = next((i + 1 for i, token in enumerate(tokens[row].tolist()) if token in STOP), tokens.shape[1])
        drawn = tokens[row, :end].tolist()
        plain = plain_forward(name, prompt + drawn)
        for t in range(end):
            step = spy.steps.pop((seed, t))
            step["logits"] = step.get("model_logits", step["logits"])
            for what in ("shallow", "deep", "logits"):
                torch.testing.assert_close(step[what], plain[what][len(prompt) - 1 + t], atol=1e-4, rtol=1e-4)
    assert not spy.steps


MODES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 4},
    "penalty": {"repetition_penalty": 1.5},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_taps_see_what_a_plain_forward_gives(name: str, mode: str) -> None:
    prompts = repeated([PROMPTS[3], PROMPTS[3][::-1]] if mode == "chunked" else PROMPTS, 2)
    spy = watch(name)
    with explore(build(name), params=SAMPLED, explorer=spy) as exploration:
        tokens = run(exploration, build(name), prompts, **MODES[mode])
        assert exploration._run is not None
        seeds = exploration._run.rows.seeds.tolist()
    assert ("model_logits" in next(iter(spy.steps.values()))) == (mode == "penalty")
    ended = exploration.draws.token_ids < 0
    assert ended.any() and tokens[ended].eq(0).all()  # rows ended at different times
    check_steps(name, spy, list(zip(seeds, prompts, strict=True)), tokens)
    assert exploration.draws.status[ended].eq(Status.INACTIVE).all()


def test_a_penalty_is_not_amplified() -> None:
    """Novelty and base_logprob are of the model's own logits, the draw of the edited ones."""
    _, draws = generated(build("llama"), beta=0.25, seed=1, repetition_penalty=1.5)
    for row, prompt in enumerate(PROMPTS):
        drawn = [t for t in draws.token_ids[row].tolist() if t >= 0]
        plain = plain_forward("llama", prompt + drawn)["logits"][len(prompt) - 1 : -1].log_softmax(-1)
        want = plain[torch.arange(len(drawn)), torch.tensor(drawn)]
        torch.testing.assert_close(draws.base_logprob[row, : len(drawn)], want, atol=1e-4, rtol=1e-4)


class EndOn(hf.StoppingCriteria):  # type: ignore[misc]
    """Ends rows by something that no stop token tells of."""

    def __init__(self, tokens: range) -> None:
        self.tokens = torch.tensor(list(tokens))

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


def test_rows_that_a_criterion_ends_draw_and_teach_no_more() -> None:
    ends, spy, prompts = range(60, 80), watch("llama"), repeated(PROMPTS, 3)
    with explore(build("llama"), params=SAMPLED, explorer=spy) as exploration:
        tokens = run(exploration, build("llama"), prompts, stopping_criteria=[EndOn(ends)])
    drawn = exploration.draws.token_ids
    last = [max(t for t, token in enumerate(row) if token >= 0) for row in drawn.tolist()]
    ended = [row for row, t in enumerate(last) if drawn[row, t] in ends and t < drawn.shape[1] - 1]
    assert ended
    for row, t in enumerate(last):
        assert tokens[row].tolist() == [*drawn[row, : t + 1].tolist(), *[0] * (drawn.shape[1] - t - 1)]
    # As in the decoder, a row that the host ended is still in the prediction that was already under way.
    learned = [step for step in spy.steps.values() if "deep" in step]
    assert len(learned) == int((drawn >= 0).sum())


def test_without_stop_tokens_rows_go_on_as_in_generate() -> None:
    tokens, draws = generated(
        build("llama"), seed=1, do_sample=True, eos_token_id=None, stopping_criteria=[EndOn(range(60, 80))]
    )
    assert torch.equal(tokens, draws.token_ids) and (draws.token_ids >= 0).all()


class Ban(hf.LogitsProcessor):  # type: ignore[misc]
    """Leaves one row nothing to draw, from some length on."""

    def __init__(self, row: int, length: int) -> None:
        self.row, self.length = row, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        if input_ids.shape[1] >= self.length:
            scores[self.row] = -torch.inf
        return scores


def test_row_with_nothing_to_draw_ends() -> None:
    message = r"of 4 samples 1 had no logit above -inf, and ended \(Status.EMPTY\)"
    with pytest.warns(UserWarning, match=message), explore(build("llama"), seed=2) as exploration:
        inputs = padded(PROMPTS)
        out = build("llama").generate(
            **inputs,
            do_sample=True,
            eos_token_id=[118, 119],
            pad_token_id=0,
            max_new_tokens=6,
            logits_processor=[Ban(1, inputs["input_ids"].shape[1] + 2), *exploration.logits_processor],
        )
    assert exploration.draws.token_ids[1, 2:].eq(-1).all() and (exploration.draws.token_ids[0] >= 0).all()
    assert exploration.draws.status[1, 2] & Status.EMPTY
    assert out[1, -4:].tolist() == [118, 0, 0, 0]
