"""Every sampling setting that vLLM has, in a request that explores: it works as ever, on log-probabilities that are right.

docs/vllm.md lists them; each of its rows is a test here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from conftest import V2
from engines import ask, chosen, expected_logits, make_llm, returned_logprobs, tokenise
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from esamp_core.sample import DistillerConfig

pytestmark = pytest.mark.both_runners
BETA, STEPS, PROMPT = 0.5, 16, "another prompt"
ALLOWED, LETTERS = list(range(20, 60)), "abcdefghijklmnopqrstuvwxyz"
TABLE = Path(__file__).parents[2] / "docs" / "vllm.md"


def ids(result: Any) -> list[int]:
    return list(result.outputs[0].token_ids)


def repeats(result: Any) -> int:
    return len(ids(result)) - len(set(ids(result)))


def drawn_logprobs(result: Any) -> torch.Tensor:
    return returned_logprobs(result.outputs[0])


# Setting -> what is asked for, and what must be true of the result then.
WORKS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "n": ({"n": 3}, lambda r: len({tuple(sample.token_ids) for sample in r.outputs}) == 3),
    "presence_penalty": ({"presence_penalty": 2.0, "max_tokens": 40}, lambda r: repeats(r) <= 8),
    "frequency_penalty": ({"frequency_penalty": 2.0, "max_tokens": 40}, lambda r: repeats(r) <= 8),
    "repetition_penalty": (
        {"repetition_penalty": 50.0, "temperature": 0.3},
        lambda r: not set(ids(r)) & set(tokenise(PROMPT)) and repeats(r) == 0,
    ),
    "temperature": ({"temperature": 0.3}, lambda r: float(drawn_logprobs(r).mean()) > -2.0),
    "top_p": ({"top_p": 0.2}, lambda r: float(drawn_logprobs(r).min()) > -4.0),
    "top_k": ({"top_k": 1}, lambda r: all(step[t].rank == 1 for step, t in zip(r.outputs[0].logprobs, ids(r), strict=True))),
    "min_p": ({"min_p": 0.9}, lambda r: float(drawn_logprobs(r).min()) > -3.5),
    "seed": ({"seed": None}, lambda r: len(ids(r)) == STEPS),
    "stop": ({"stop": list(LETTERS)}, lambda r: r.outputs[0].finish_reason == "stop"),
    "stop_token_ids": ({"stop_token_ids": list(range(130))}, lambda r: r.outputs[0].finish_reason == "stop"),
    "ignore_eos": ({"ignore_eos": False, "logit_bias": {1: 100.0}}, lambda r: ids(r) == [1]),
    "max_tokens": ({"max_tokens": 5}, lambda r: len(ids(r)) == 5),
    "min_tokens": ({"ignore_eos": False, "logit_bias": {1: 9.0}, "min_tokens": 7}, lambda r: 1 not in ids(r)[:7]),
    "logprobs": ({"logprobs": 5}, lambda r: all(len(step) >= 5 for step in r.outputs[0].logprobs)),
    "prompt_logprobs": ({"prompt_logprobs": 1}, lambda r: len(r.prompt_logprobs) == len(tokenise(PROMPT))),
    "detokenize": ({"detokenize": False}, lambda r: r.outputs[0].text == ""),
    "skip_special_tokens": ({"skip_special_tokens": False}, lambda r: len(ids(r)) == STEPS),
    "spaces_between_special_tokens": ({"spaces_between_special_tokens": False}, lambda r: len(ids(r)) == STEPS),
    "include_stop_str_in_output": (
        {"stop": list(LETTERS), "include_stop_str_in_output": True},
        lambda r: r.outputs[0].text[-1] in LETTERS,
    ),
    "output_kind": ({"output_kind": RequestOutputKind.FINAL_ONLY}, lambda r: len(ids(r)) == STEPS),
    "stream_interval": ({"stream_interval": 4}, lambda r: len(ids(r)) == STEPS),
    "skip_clone": ({"skip_clone": True}, lambda r: len(ids(r)) == STEPS),
    "flat_logprobs": ({"flat_logprobs": True}, lambda r: len(r.outputs[0].logprobs) == STEPS),
    "structured_outputs": (
        {"structured_outputs": StructuredOutputsParams(regex="[abc]{4}[0-9]{4}"), "ignore_eos": False},
        lambda r: re.fullmatch("[abc]{4}[0-9]{4}", r.outputs[0].text) is not None,
    ),
    "logit_bias": ({"logit_bias": {30: 100.0}}, lambda r: set(ids(r)) == {30}),
    "allowed_token_ids": ({"allowed_token_ids": ALLOWED}, lambda r: set(ids(r)) <= set(ALLOWED)),
    "extra_args": ({"extra_args": {"esamp_beta": BETA, "another": [1]}}, lambda r: len(ids(r)) == STEPS),
    "bad_words": ({"bad_words": list("abcdefghijkl")}, lambda r: not set(r.outputs[0].text) & set("abcdefghijkl")),
    "skip_reading_prefix_cache": ({"skip_reading_prefix_cache": True}, lambda r: len(ids(r)) == STEPS),
    "repetition_detection": ({"repetition_detection": {"max_pattern_size": 2, "min_count": 8}}, lambda r: bool(ids(r))),
    "routed_experts_prompt_start": ({"routed_experts_prompt_start": 0}, lambda r: len(ids(r)) == STEPS),
    "logprob_token_ids": (
        {"logprob_token_ids": [7, 9], "logprobs": 2}, lambda r: all({7, 9} <= set(step) for step in r.outputs[0].logprobs)
    ),
    "prompt_logprob_token_ids": (
        {"prompt_logprob_token_ids": np.array([[7, 9]] * (len(tokenise(PROMPT)) - 1))}, lambda r: len(ids(r)) == STEPS
    ),
    "prompt_logprob_start": (
        {"prompt_logprob_start": 3, "prompt_logprob_token_ids": np.array([[7]] * (len(tokenise(PROMPT)) - 4))},
        lambda r: len(ids(r)) == STEPS,
    ),
}  # fmt: skip
# Those that need an engine of their own.
ELSEWHERE = {"watermarking", "thinking_token_budget", "trace_decode_token_ids"}


def request(**given: Any) -> SamplingParams:
    common = {"max_tokens": STEPS, "seed": 11, "ignore_eos": True, "logprobs": 0, "extra_args": {"esamp_beta": BETA}}
    if isinstance(pattern := given.get("repetition_detection"), dict):
        from vllm.sampling_params import RepetitionDetectionParams

        given["repetition_detection"] = RepetitionDetectionParams(**pattern)
    return SamplingParams(**{**common, **given})


@pytest.fixture(scope="module")
def engine(qwen3: str) -> Any:
    return make_llm(qwen3, {})


V2_ONLY = {"prompt_logprob_token_ids", "prompt_logprob_start"}
NOT_INTERPRETED = {"structured_outputs"}  # by kernels of vLLM's V2 that Triton's interpreter cannot run


def check_logprobs(result: Any, reference: Any, masked: bool = False) -> None:
    """masked: by a grammar, which vLLM applies to what it calls raw logits; what is left then has more probability."""
    samples = [list(sample.token_ids) for sample in result.outputs]
    want = expected_logits(reference, tokenise(PROMPT), samples, BETA, DistillerConfig())
    for sample, logits in zip(result.outputs, want, strict=True):
        got, exact = returned_logprobs(sample), chosen(logits, sample.token_ids)
        if masked:
            assert (got >= exact - 2e-3).all() and (got > exact + 0.1).any()
        else:
            torch.testing.assert_close(got, exact, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", WORKS)
def test_setting_works(engine: Any, reference: Any, name: str) -> None:
    if name in V2_ONLY and not V2:
        pytest.skip("vLLM has it in V2 alone")
    if name in NOT_INTERPRETED and V2:
        pytest.skip("vLLM's V2 needs a GPU for it")
    given, holds = WORKS[name]
    (result,) = ask(engine, [request(**given)], [PROMPT])
    assert holds(result), ids(result)
    check_logprobs(result, reference, masked=name == "structured_outputs")


def test_watermarking(qwen3: str, reference: Any) -> None:
    if not V2:
        pytest.skip("vLLM has it in V2 alone")
    llm = make_llm(qwen3, {}, watermark_config={"key": 42})
    (result,) = ask(llm, [request()], [PROMPT])
    check_logprobs(result, reference)


def test_thinking_token_budget(qwen3: str, reference: Any) -> None:
    reasoning = {"reasoning_start_str": "<", "reasoning_end_str": ">"}
    llm = make_llm(qwen3, {}, reasoning_config=reasoning)
    start, end = tokenise("<")[0], tokenise(">")[0]
    (result,) = ask(llm, [request(thinking_token_budget=3)], [PROMPT + "<"])
    assert start not in ids(result)[:0] and ids(result)[3] == end  # after so many tokens the end is forced
    (want,) = expected_logits(reference, tokenise(PROMPT + "<"), [ids(result)], BETA, DistillerConfig())
    torch.testing.assert_close(drawn_logprobs(result), chosen(want, ids(result)), atol=2e-3, rtol=0)


def test_trace_decode_token_ids(qwen3: str, reference: Any) -> None:
    if not V2:
        pytest.skip("vLLM has it in V2 alone")
    llm = make_llm(qwen3, {}, enable_trace_replay=True)
    trace = [50 + i for i in range(STEPS)]
    (result,) = ask(llm, [request(trace_decode_token_ids=trace)], [PROMPT])
    assert ids(result) == trace
    check_logprobs(result, reference)


def test_the_docs_list_every_setting() -> None:
    """With what becomes of it, and no other."""
    text = TABLE.read_text(encoding="utf-8").split("<!-- settings -->")[1].split("<!-- /settings -->")[0]
    listed = re.findall(r"^\| `(\w+)` \| (works)\b", text, re.MULTILINE)
    fields = {field.name for field in msgspec.structs.fields(SamplingParams) if not field.name.startswith("_")}
    internal = {"output_text_buffer_length"}  # vLLM sets it itself
    names = [name for name, _ in listed]
    assert len(names) == len(set(names)) and set(names) == fields - internal
    assert set(names) == set(WORKS) | ELSEWHERE
