"""The plugin in a real engine: who is touched, what is mixed, and that the log-probabilities returned are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import V2, in_transformers
from engines import (
    PROMPTS,
    ask,
    check_rows,
    chosen,
    expected_logits,
    generate,
    make_llm,
    mixer,
    params,
    returned_logprobs,
    tokenise,
)
from latent_oracle import judged_start
from vllm import SamplingParams

from esamp_core.reference import published
from esamp_core.sample import DistillerConfig, Head

pytestmark = pytest.mark.both_runners
COUNT = 10
CONFIG = DistillerConfig(gate=False)


def keyed(i: int, beta: float = 1.0, **given: Any) -> SamplingParams:
    return params(i, extra_args={"esamp": {"group": f"r{i}", "beta": beta}}, **given)


@pytest.fixture(scope="module")
def untouched(plain: Any) -> list[list[list[int]]]:
    return generate(plain, [params(i, n=1 + 2 * (i % 3 == 0)) for i in range(COUNT)])


def test_without_the_key_and_with_beta_0_the_engine_is_untouched(exploring: Any, untouched: Any, captured: Any) -> None:
    for asked in (None, {"esamp": {"beta": 0}}, {"esamp": False}, {"esamp_beta": 0.0}):
        sampling = [params(i, n=1 + 2 * (i % 3 == 0), extra_args=asked) for i in range(COUNT)]
        assert generate(exploring, sampling) == untouched
    assert not captured


def test_only_keyed_requests_change(exploring: Any, untouched: Any, captured: Any) -> None:
    sampling = [params(i, n=1 + 2 * (i % 3 == 0)) for i in range(COUNT)]
    for i in range(0, COUNT, 2):
        sampling[i].extra_args = {"esamp": {"beta": 4.0}}
    outputs = generate(exploring, sampling)
    assert outputs[1::2] == untouched[1::2]
    assert all(now != before for now, before in zip(outputs[::2], untouched[::2], strict=True))
    assert len(captured) == sum(len(sample) for output in outputs[::2] for sample in output)


def test_rows_are_those_of_transformers(exploring: Any, reference: Any, captured: Any) -> None:
    outputs = generate(exploring, [keyed(i) for i in range(COUNT)])
    prompts = [tokenise(PROMPTS[i % len(PROMPTS)]) for i in range(COUNT)]
    check_rows(captured, reference, {f"r{i}": (prompts[i], outputs[i][0]) for i in range(COUNT)})


@pytest.mark.parametrize("siblings", [1, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_returned_logprobs_are_those_of_the_mixed_model(
    exploring: Any, reference: Any, siblings: int, temperature: float
) -> None:
    """Raw ones, at temperature 1 over the whole vocabulary: of every token that was drawn, learning included."""
    sampling = SamplingParams(
        n=siblings, temperature=temperature, max_tokens=24, seed=5, ignore_eos=True, logprobs=3,
        extra_args={"esamp": {"beta": 0.7}},
    )  # fmt: skip
    (output,) = ask(exploring, [sampling], ["hello"])
    tokens = [list(sample.token_ids) for sample in output.outputs]
    want = expected_logits(reference, tokenise("hello"), tokens, 0.7, CONFIG)
    base = expected_logits(reference, tokenise("hello"), tokens, 0.7, None)
    frozen = expected_logits(reference, tokenise("hello"), tokens, 0.7, DistillerConfig(lr=0.0, gate=False))
    for sample, logits, plain, unlearned in zip(output.outputs, want, base, frozen, strict=True):
        got = returned_logprobs(sample)
        torch.testing.assert_close(got, chosen(logits, sample.token_ids), atol=2e-3, rtol=0)
        # The tolerance can tell it from no exploration, and from a Distiller that does not learn.
        assert (got - chosen(plain, sample.token_ids)).abs().max() > 0.2
        assert (got - chosen(unlearned, sample.token_ids)).abs()[4:].max() > 0.02
        for step, row in zip(sample.logprobs, logits.log_softmax(-1), strict=True):
            for token, said in step.items():
                assert abs(said.logprob - float(row[token])) < 2e-3


def test_a_calibrated_start_is_trusted_from_the_first_token(qwen3: str, reference: Any, tmp_path: Path) -> None:
    """Gated, as engines are by default; the oracle counts trust anew.  One of another model is refused."""
    head = Head(reference.lm_head.weight.detach())
    path = judged_start(head, tmp_path / "start")
    llm = make_llm(qwen3, {"distiller": {"gate": True, "rank": 8, "start": path}})
    sampling = SamplingParams(
        n=3, max_tokens=20, seed=5, ignore_eos=True, logprobs=0, extra_args={"esamp": {"beta": 0.7}}
    )
    (output,) = ask(llm, [sampling], ["hello"])
    tokens = [list(sample.token_ids) for sample in output.outputs]
    want = expected_logits(reference, tokenise("hello"), tokens, 0.7, DistillerConfig(rank=8, start=path))
    base = expected_logits(reference, tokenise("hello"), tokens, 0.7, None)
    for sample, logits, plain in zip(output.outputs, want, base, strict=True):
        got = returned_logprobs(sample)
        torch.testing.assert_close(got, chosen(logits, sample.token_ids), atol=2e-3, rtol=0)
        assert (got - chosen(plain, sample.token_ids)).abs()[0] > 0.01
    other = judged_start(replace(head, weight=head.weight + 1), tmp_path / "other")
    with pytest.raises(Exception, match="start must be calibrated for this model"):
        make_llm(qwen3, {"distiller": {"rank": 8, "start": other}})


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_published_recipes_mix_and_learn(qwen3: str, reference: Any, recipe: Any) -> None:
    """The first token by the start weights, later ones by what was learned since."""
    config = DistillerConfig(recipe=recipe, rank=8, gate=False)
    llm = make_llm(qwen3, {"distiller": {"recipe": recipe, "rank": 8, "gate": False}})
    sampling = SamplingParams(
        n=3, max_tokens=20, seed=5, ignore_eos=True, logprobs=0, extra_args={"esamp": {"beta": 0.7, "group": "all"}}
    )
    (output,) = ask(llm, [sampling], ["hello"])
    for sample in output.outputs:
        tokens = torch.tensor([tokenise("hello") + list(sample.token_ids)])
        states = reference(tokens, output_hidden_states=True).hidden_states
        shallow, deep = (states[layer][0, len(tokenise("hello")) - 1 : -1] for layer in (1, -1))
        start = published.start_weights(shallow.shape[1], config)
        unlearned = 1.7 * deep - 0.7 * published.predict(shallow, start, published.RECIPES[recipe])
        got, want = returned_logprobs(sample), chosen(reference.lm_head(unlearned), sample.token_ids)
        plain = chosen(reference.lm_head(deep), sample.token_ids)
        torch.testing.assert_close(got[0], want[0], atol=2e-3, rtol=0, check_dtype=False)
        assert abs(got[0] - plain[0]) > 0.02
        assert (got - want).abs()[4:].max() > (0.02 if recipe == "paper" else 1e-5)


def test_processed_logprobs_are_the_behaviour_policy(qwen3: str, reference: Any) -> None:
    """Under logprobs_mode="processed_logprobs": softmax over what the request's own filters leave."""
    llm = make_llm(qwen3, {"beta": 0.7}, logprobs_mode="processed_logprobs")
    given = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02}
    sampling = SamplingParams(**given, max_tokens=20, seed=3, ignore_eos=True, logprobs=0, extra_args={"esamp": True})
    (output,) = ask(llm, [sampling], ["another prompt"])
    (sample,) = output.outputs
    (logits,) = expected_logits(reference, tokenise("another prompt"), [sample.token_ids], 0.7, CONFIG)
    got = returned_logprobs(sample)
    for step, (row, token) in enumerate(zip(logits / 0.8, sample.token_ids, strict=True)):
        row = torch.where(row.softmax(-1) >= 0.02 * row.softmax(-1).max(), row, float("-inf"))
        row = torch.where(row >= row.topk(12).values[-1], row, float("-inf"))
        ascending, order = row.softmax(-1).sort()
        row[order[ascending.cumsum(0) <= 1 - 0.9]] = float("-inf")
        assert abs(float(got[step]) - float(row.log_softmax(-1)[token])) < 2e-3
    assert (got - chosen(logits, sample.token_ids)).abs().max() > 0.05  # the raw ones are others


def test_llama(llama: str) -> None:
    sampling = SamplingParams(
        n=3, temperature=1.0, max_tokens=12, seed=1, ignore_eos=True, logprobs=0, extra_args={"esamp_beta": 0.5}
    )
    (output,) = ask(make_llm(llama, {}), [sampling], ["world, abc"])
    tokens = [list(sample.token_ids) for sample in output.outputs]
    want = expected_logits(in_transformers(llama), tokenise("world, abc"), tokens, 0.5, CONFIG)
    for sample, logits in zip(output.outputs, want, strict=True):
        torch.testing.assert_close(returned_logprobs(sample), chosen(logits, sample.token_ids), atol=2e-3, rtol=0)


def test_second_generate_starts_clean(exploring: Any) -> None:
    sampling = [params(2, n=3, extra_args={"esamp": {"group": "same", "beta": 2.0}}) for _ in range(2)]
    assert generate(exploring, sampling) == generate(exploring, sampling)


def test_siblings_share_a_distiller_and_strangers_do_not(exploring: Any) -> None:
    """By default the group is the prompt."""
    sampling = [
        params(2, seed=5, extra_args={"esamp": {"beta": 3.0}}),
        params(2, seed=6, extra_args={"esamp": {"beta": 3.0}}),
    ]
    together = generate(exploring, sampling, ["hello", "hello"])
    apart = generate(
        exploring,
        [params(2, seed=s.seed, extra_args={"esamp": {"beta": 3.0, "group": s.seed}}) for s in sampling],
        ["hello"] * 2,
    )
    alone = [generate(exploring, [s], ["hello"])[0] for s in sampling]
    assert apart == alone
    assert together != alone
    assert generate(exploring, sampling, ["hello", "world"])[0] == alone[0]


@pytest.mark.parametrize("switch", ["settings", "environment", "environment, an object"])
def test_a_default_for_requests_that_do_not_say(
    qwen3: str, untouched: Any, captured: Any, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    """Those that sample explore; greedy ones, and those that say no, are vLLM's."""
    if switch == "settings":
        llm = make_llm(qwen3, {"default": {"beta": 2.0}})
    else:
        settings = '{"default": true, "beta": 2.0, "distiller": {"gate": false}}'
        monkeypatch.setenv("ESAMP_VLLM", "1" if switch == "environment" else settings)
        llm = make_llm(qwen3)
    assert mixer().config.default is not None and mixer().explorer is not None
    sampling = [params(i, n=1 + 2 * (i % 3 == 0)) for i in range(COUNT)]
    sampling[2].extra_args = {"esamp": False}
    outputs = generate(llm, sampling)
    changed = {i for i in range(COUNT) if outputs[i] != untouched[i]}
    assert changed <= {i for i in range(COUNT) if i % 3 != 1 and i != 2}
    assert len(changed) >= 3 or switch == "environment"  # short ones may be the same, and all while the gate is shut
    assert len(captured) == sum(len(s) for i in range(COUNT) if i % 3 != 1 and i != 2 for s in outputs[i])


def test_an_engine_that_is_not_set_up_says_so(plain: Any, untouched: Any, caplog: pytest.LogCaptureFixture) -> None:
    sampling = [params(i, n=1 + 2 * (i % 3 == 0), extra_args={"esamp": True}) for i in range(COUNT)]
    assert generate(plain, sampling) == untouched
    assert caplog.text.count("this engine is not set up for it") == 1


def test_the_runner_is_the_one_that_was_asked_for(exploring: Any) -> None:
    assert exploring.llm_engine.vllm_config.use_v2_model_runner == V2
