"""Whatever the engine's scheduler does, every token is drawn once, from its own states, at its own position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import PROMPTS, CapturingProcessor, check_rows, forward, generate, make_llm, params, tokenise
from transformers import AutoModelForCausalLM
from vllm import SamplingParams


@pytest.fixture(scope="module")
def reference(qwen3: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(qwen3, attn_implementation="eager").float().eval()


@pytest.fixture
def engine(qwen3: str) -> Callable[..., Any]:
    def make(esamp: dict[str, Any], **options: Any) -> Any:
        return make_llm(qwen3, esamp, logits_processors=[CapturingProcessor], **options)

    return make


def named(i: int, **given: Any) -> SamplingParams:
    return params(i, extra_args={"esamp": {"group": i, "beta": 1.0}}, **given)


def test_chunked_prefill(engine: Any, reference: Any, captured: Any) -> None:
    """The engine shows rows whose prompt is not all there yet; they must neither draw nor teach."""
    llm = engine({}, max_num_batched_tokens=16, max_num_seqs=4, enable_chunked_prefill=True)
    prompts = [text * 5 for text in PROMPTS[:5]]
    # Without seeds: vLLM itself fails on the CPU with a request's own seed and a chunked prompt.
    sampling = [named(i, seed=None) for i in range(5)]
    outputs = generate(llm, sampling, prompts)
    check_rows(captured, reference, {i: (tokenise(prompts[i]), outputs[i][0]) for i in range(5)})
    whole = engine({})
    captured.clear()
    for given in sampling:
        given.prompt_logprobs = 1  # more logits, that are not for us
    assert generate(whole, sampling, prompts) == outputs
    check_rows(captured, reference, {i: (tokenise(prompts[i]), outputs[i][0]) for i in range(5)})


def test_preemption_and_prefix_cache(engine: Any, reference: Any, captured: Any) -> None:
    """A preempted row's tokens are fed again, but not drawn again, and its seeds go on where they were."""
    common = {"max_tokens": 60, "ignore_eos": True, "temperature": 1.0}
    sampling = [SamplingParams(**common, seed=i, extra_args={"esamp": {"group": i, "beta": 1.0}}) for i in range(6)]
    prompts = ["a common beginning of two blocks: " * 2] * 6
    ample = generate(engine({}, num_gpu_blocks_override=64, block_size=32), sampling, prompts)
    captured.clear()
    CapturingProcessor.resumed = 0
    scarce = generate(engine({}, num_gpu_blocks_override=9, block_size=32), sampling, prompts)
    assert CapturingProcessor.resumed > 0
    assert scarce == ample
    check_rows(captured, reference, {i: (tokenise(prompts[i]), scarce[i][0]) for i in range(6)})


def test_edits_before_us_hold_and_are_not_amplified(engine: Any, reference: Any, captured: Any) -> None:
    allowed = list(range(20, 60))
    sampling = [
        named(0, allowed_token_ids=allowed),
        named(2, logit_bias={30: 100.0}),
        named(3, allowed_token_ids=allowed, logit_bias={25: 8.0}),
    ]
    outputs = generate(engine({}), sampling)
    assert set(outputs[0][0]) <= set(allowed) and set(outputs[1][0]) == {30} and set(outputs[2][0]) <= set(allowed)
    assert len(captured) == sum(len(output[0]) for output in outputs)
    ends = {group: (tokenise(PROMPTS[i]), outputs[i][0]) for i, group in enumerate((0, 2, 3))}
    for row in captured:
        prompt, output = ends[row.group]
        logits = forward(reference, prompt + output)[2][row.position]
        torch.testing.assert_close(row.model_logits, logits, rtol=0, atol=1e-4)
        assert not torch.allclose(row.logits, logits, atol=1e-4)


def test_many_requests_aborts_and_more_groups_than_slots(
    engine: Any, reference: Any, captured: Any, caplog: pytest.LogCaptureFixture
) -> None:
    llm = engine({"max_groups": 5, "log_interval": 0.05})
    core, total = llm.llm_engine, 200
    sampling = [named(i, max_tokens=1 + i * 7 % 23, temperature=0.9) for i in range(total)]
    outputs: dict[int, list[int]] = {}
    waiting, aborted = list(range(total)), set(range(3, total, 10))
    step = 0
    while waiting or core.has_unfinished_requests():
        for i in waiting[: 1 + step % 12]:
            core.add_request(str(i), {"prompt_token_ids": tokenise(PROMPTS[i % len(PROMPTS)])}, sampling[i])
        now, waiting = waiting[: 1 + step % 12], waiting[1 + step % 12 :]
        for done in core.step():
            outputs[int(done.request_id)] = list(done.outputs[0].token_ids)
        core.abort_request([str(i) for i in now if i in aborted])
        step += 1
    kept = set(range(total)) - aborted
    assert kept <= set(outputs)
    assert all(len(outputs[i]) == sampling[i].max_tokens for i in kept)

    explored = {row.group for row in captured}
    untouched = kept - explored
    assert explored and untouched
    whole = {i: (tokenise(PROMPTS[i % len(PROMPTS)]), outputs[i]) for i in kept & explored}
    check_rows([row for row in captured if row.group in whole], reference, whole)
    for given in sampling:
        given.extra_args = None
    order = sorted(untouched)
    plain = generate(llm, [sampling[i] for i in order], [PROMPTS[i % len(PROMPTS)] for i in order])
    assert [outputs[i] for i in order] == [sample[0] for sample in plain]
    assert caplog.text.count("all 5 Distiller slots are in use") == 1


def test_tap_that_never_arrives_warns_and_leaves_requests_to_the_engine(
    qwen3: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Deaf(CapturingProcessor):
        def apply(self, logits: Any, ctx: Any = None) -> Any:
            self._tap.rows = None
            return super().apply(logits, ctx)

    llm = make_llm(qwen3, {}, logits_processors=[Deaf])
    assert generate(llm, [named(i) for i in range(3)]) == generate(llm, [params(i) for i in range(3)])
    assert caplog.text.count("no shallow state arrived") == 1


def test_error_in_a_step_ends_exploration_and_not_the_engine(qwen3: str, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(CapturingProcessor):
        def _draw(self, *args: Any) -> Any:
            raise RuntimeError("a fault")

    llm = make_llm(qwen3, {}, logits_processors=[Broken])
    assert generate(llm, [named(i) for i in range(3)]) == generate(llm, [params(i) for i in range(3)])
    assert caplog.text.count("a step failed") == 1
