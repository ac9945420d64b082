"""Every sampling setting of vLLM, in a request that explores: it works as ever, and log-probabilities are right.

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
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams

from esamp_core.sample import DistillerConfig

pytestmark = pytest.mark.both_runners
BETA, STEPS, PROMPT = 0.5, 16, "another prompt"
ALLOWED = list(range(20, 60))
TABLE = Path(__file__).parents[2] / "docs" / "vllm.md"


def ids(result: Any) -> list[int]:
    return list(result.outputs[0].token_ids)


def drawn_logprobs(result: Any) -> torch.Tensor:
    return returned_logprobs(result.outputs[0])


def likeliest(result: Any) -> bool:
    return all(step[token].rank == 1 for step, token in zip(result.outputs[0].logprobs, ids(result), strict=True))


def penalised(
    result: Any, logits: torch.Tensor, presence: float = 0, frequency: float = 0, repetition: float = 1
) -> bool:
    """Whether every token of a greedy answer is the likeliest after penalties; logits: float64 [steps, V]."""
    for step, (row, token) in enumerate(zip(logits, ids(result), strict=True)):
        counts = torch.bincount(torch.tensor(ids(result)[:step], dtype=torch.int64), minlength=len(row))
        seen = counts.clone()
        seen[tokenise(PROMPT)] += 1
        row = torch.where(seen > 0, torch.where(row > 0, row / repetition, row * repetition), row)
        row = row - presence * (counts > 0) - frequency * counts
        if float(row[token]) < float(row.max()) - 1e-2:
            return False
    return True


def whole(result: Any) -> bool:
    return len(ids(result)) == STEPS


A = tokenise("a")[0]
ONLY_A = {"logit_bias": {A: 100.0}}
GREEDY = {"temperature": 0.0}
# Setting -> what is asked for, and what must be true of the result then, and of the mixed model's logits.
WORKS: dict[str, tuple[dict[str, Any], Callable[[Any, torch.Tensor], bool]]] = {
    "n": ({"n": 3}, lambda r, x: len({tuple(sample.token_ids) for sample in r.outputs}) == 3),
    "presence_penalty": ({"presence_penalty": 1.5, **GREEDY}, lambda r, x: penalised(r, x, presence=1.5)),
    "frequency_penalty": ({"frequency_penalty": 1.5, **GREEDY}, lambda r, x: penalised(r, x, frequency=1.5)),
    "repetition_penalty": ({"repetition_penalty": 1.7, **GREEDY}, lambda r, x: penalised(r, x, repetition=1.7)),
    "temperature": (GREEDY, lambda r, x: likeliest(r)),
    "top_p": ({"top_p": 1e-6}, lambda r, x: likeliest(r)),
    "top_k": ({"top_k": 1}, lambda r, x: likeliest(r)),
    "min_p": ({"min_p": 1.0}, lambda r, x: likeliest(r)),
    "seed": ({"seed": None}, lambda r, x: whole(r)),
    "stop": ({"stop": ["aaa"], **ONLY_A}, lambda r, x: ids(r) == [A] * 3 and r.outputs[0].text == ""),
    "stop_token_ids": ({"stop_token_ids": [A], **ONLY_A}, lambda r, x: ids(r) == [A]),
    "ignore_eos": ({"ignore_eos": False, "logit_bias": {1: 100.0}}, lambda r, x: ids(r) == [1]),
    "max_tokens": ({"max_tokens": 5}, lambda r, x: len(ids(r)) == 5),
    "min_tokens": ({"ignore_eos": False, "logit_bias": {1: 100.0}, "min_tokens": 7}, lambda r, x: ids(r).index(1) == 7),
    "logprobs": ({"logprobs": 5}, lambda r, x: all(len(step) >= 5 for step in r.outputs[0].logprobs)),
    "prompt_logprobs": ({"prompt_logprobs": 1}, lambda r, x: len(r.prompt_logprobs) == len(tokenise(PROMPT))),
    "detokenize": ({"detokenize": False}, lambda r, x: r.outputs[0].text == ""),
    "skip_special_tokens": ({"skip_special_tokens": False}, lambda r, x: whole(r)),
    "spaces_between_special_tokens": ({"spaces_between_special_tokens": False}, lambda r, x: whole(r)),
    "include_stop_str_in_output": (
        {"stop": ["aaa"], "include_stop_str_in_output": True, **ONLY_A}, lambda r, x: r.outputs[0].text == "aaa"
    ),
    "output_kind": ({"output_kind": RequestOutputKind.FINAL_ONLY}, lambda r, x: whole(r)),
    "stream_interval": ({"stream_interval": 4}, lambda r, x: whole(r)),
    "skip_clone": ({"skip_clone": True}, lambda r, x: whole(r)),
    "flat_logprobs": ({"flat_logprobs": True}, lambda r, x: len(r.outputs[0].logprobs) == STEPS),
    "structured_outputs": (
        {"structured_outputs": StructuredOutputsParams(regex="[abc]{4}[0-9]{4}"), "ignore_eos": False},
        lambda r, x: re.fullmatch("[abc]{4}[0-9]{4}", r.outputs[0].text) is not None,
    ),
    "logit_bias": (ONLY_A, lambda r, x: set(ids(r)) == {A}),
    "allowed_token_ids": ({"allowed_token_ids": ALLOWED}, lambda r, x: set(ids(r)) <= set(ALLOWED)),
    "extra_args": ({"extra_args": {"esamp_beta": BETA, "another": [1]}}, lambda r, x: whole(r)),
    "bad_words": ({"bad_words": ["a"], **ONLY_A}, lambda r, x: A not in ids(r)),
    "skip_reading_prefix_cache": ({"skip_reading_prefix_cache": True}, lambda r, x: whole(r)),
    "repetition_detection": (
        {"repetition_detection": RepetitionDetectionParams(max_pattern_size=1, min_count=4), **ONLY_A},
        lambda r, x: len(ids(r)) < STEPS,
    ),
    "routed_experts_prompt_start": ({"routed_experts_prompt_start": 0}, lambda r, x: whole(r)),
    "logprob_token_ids": (
        {"logprob_token_ids": [7, 9], "logprobs": 2},
        lambda r, x: all({7, 9} <= set(step) for step in r.outputs[0].logprobs),
    ),
    "prompt_logprob_token_ids": (
        {"prompt_logprob_token_ids": np.array([[7, 9]] * (len(tokenise(PROMPT)) - 1))}, lambda r, x: whole(r)
    ),
    "prompt_logprob_start": (
        {"prompt_logprob_start": 3, "prompt_logprob_token_ids": np.array([[7]] * (len(tokenise(PROMPT)) - 4))},
        lambda r, x: whole(r),
    ),
}  # fmt: skip
# Those that need an engine of their own.
ELSEWHERE = {"watermarking", "thinking_token_budget", "trace_decode_token_ids"}


def request(**given: Any) -> SamplingParams:
    common = {"max_tokens": STEPS, "seed": 11, "ignore_eos": True, "logprobs": 0, "extra_args": {"esamp_beta": BETA}}
    return SamplingParams(**{**common, **given})


@pytest.fixture(scope="module")
def engine(qwen3: str) -> Any:
    return make_llm(qwen3, {})


V2_ONLY = {"prompt_logprob_token_ids", "prompt_logprob_start"}
NOT_INTERPRETED = {"structured_outputs"}  # by kernels of vLLM's V2 that Triton's interpreter cannot run


def check_logprobs(result: Any, reference: Any, masked: bool = False) -> list[torch.Tensor]:
    """Returns the mixed model's logits of each sample.

    masked: by a grammar, which vLLM applies to what it calls raw logits; what is left then has more probability.
    """
    samples = [list(sample.token_ids) for sample in result.outputs]
    want = expected_logits(reference, tokenise(PROMPT), samples, BETA, DistillerConfig(gate=False))
    for sample, logits in zip(result.outputs, want, strict=True):
        got, exact = returned_logprobs(sample), chosen(logits, sample.token_ids)
        if masked:
            assert (got >= exact - 2e-3).all() and (got > exact + 0.1).any()
        else:
            torch.testing.assert_close(got, exact, atol=2e-3, rtol=0)
    return want


@pytest.mark.parametrize("name", WORKS)
def test_setting_works(engine: Any, reference: Any, name: str) -> None:
    if name in V2_ONLY and not V2:
        pytest.skip("vLLM has it in V2 alone")
    if name in NOT_INTERPRETED and V2:
        pytest.skip("vLLM's V2 needs a GPU for it")
    given, holds = WORKS[name]
    (result,) = ask(engine, [request(**given)], [PROMPT])
    logits = check_logprobs(result, reference, masked=name == "structured_outputs")
    assert holds(result, logits[0]), ids(result)


def test_watermarking(qwen3: str, reference: Any) -> None:
    if not V2:
        pytest.skip("vLLM has it in V2 alone")
    llm = make_llm(qwen3, {}, watermark_config={"key": 42})
    (result,) = ask(llm, [request()], [PROMPT])
    check_logprobs(result, reference)


def test_thinking_token_budget(qwen3: str, reference: Any) -> None:
    reasoning = {"reasoning_start_str": "<", "reasoning_end_str": ">"}
    llm = make_llm(qwen3, {}, reasoning_config=reasoning)
    (end,) = tokenise(">")
    (result,) = ask(llm, [request(thinking_token_budget=3)], [PROMPT + "<"])
    assert ids(result)[3] == end  # after so many tokens the end is forced
    (want,) = expected_logits(reference, tokenise(PROMPT + "<"), [ids(result)], BETA, DistillerConfig(gate=False))
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
