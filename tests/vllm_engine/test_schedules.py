"""Whatever the engine's scheduler does, every token is drawn from states mixed once, from its own, at its own place."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import V2
from engines import (
    PROMPTS,
    CapturingMixer,
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
from vllm import SamplingParams

from esamp_core.bindings import vllm_mixing
from esamp_core.sample import DistillerConfig

pytestmark = pytest.mark.both_runners
TOTAL = 40 if V2 else 100  # requests; the interpreter takes its time


def named(i: int, **given: Any) -> SamplingParams:
    return params(i, extra_args={"esamp": {"group": i, "beta": 1.0}}, **given)


def test_chunked_prefill_and_prompt_logprobs(qwen3: str, reference: Any, captured: Any) -> None:
    """The engine shows rows whose prompt is not all there yet; they must neither be mixed nor teach."""
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_chunked_prefill": True}
    llm = make_llm(qwen3, {}, **options)
    prompts = [text * 5 for text in PROMPTS[:5]]
    # Without seeds: vLLM itself fails on the CPU with a request's own seed and a chunked prompt.
    outputs = generate(llm, [named(i, seed=None) for i in range(5)], prompts)
    check_rows(captured, reference, {i: (tokenise(prompts[i]), outputs[i][0]) for i in range(5)})
    captured.clear()
    # Those of the prompt are the model's own: its head is asked for more states, which are not to be sampled.
    sampling = [named(i, seed=None, prompt_logprobs=0, logprobs=0) for i in range(3)]
    results = ask(llm, sampling, prompts[:3])
    drawn = [list(result.outputs[0].token_ids) for result in results]
    check_rows(captured, reference, {i: (tokenise(prompts[i]), drawn[i]) for i in range(3)})
    for i, result in enumerate(results):
        tokens = tokenise(prompts[i])
        (logits,) = expected_logits(reference, tokens[:1], [tokens[1:]], 0.0, None)
        got = [step[token].logprob for step, token in zip(result.prompt_logprobs[1:], tokens[1:], strict=True)]
        torch.testing.assert_close(torch.tensor(got).double(), chosen(logits, tokens[1:]), atol=2e-3, rtol=0)
        (logits,) = expected_logits(reference, tokens, [result.outputs[0].token_ids], 1.0, DistillerConfig(gate=False))
        got = returned_logprobs(result.outputs[0])
        torch.testing.assert_close(got, chosen(logits, result.outputs[0].token_ids), atol=2e-3, rtol=0)


def test_preemption_and_prefix_cache(qwen3: str, reference: Any, captured: Any) -> None:
    """A preempted row's tokens are fed again, but mixed and learned once."""
    common = {"max_tokens": 60, "ignore_eos": True, "temperature": 1.0, "logprobs": 0}
    sampling = [SamplingParams(**common, seed=i, extra_args={"esamp": {"group": i, "beta": 1.0}}) for i in range(6)]
    prompts = ["a common beginning of two blocks: " * 2] * 6
    CapturingMixer.resumed = 0
    results = ask(make_llm(qwen3, {}, num_gpu_blocks_override=9, block_size=32), sampling, prompts)
    assert CapturingMixer.resumed > 0
    tokens = [list(result.outputs[0].token_ids) for result in results]
    check_rows(captured, reference, {i: (tokenise(prompts[i]), tokens[i]) for i in range(6)})
    for i, result in enumerate(results):  # and the Distillers went on where they were
        (logits,) = expected_logits(reference, tokenise(prompts[i]), [tokens[i]], 1.0, DistillerConfig(gate=False))
        got = returned_logprobs(result.outputs[0])
        torch.testing.assert_close(got, chosen(logits, tokens[i]), atol=2e-3, rtol=0)


def test_uneven_requests_aborts_and_more_groups_than_slots(
    qwen3: str, reference: Any, captured: Any, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm(qwen3, {"max_groups": 5, "log_interval": 0.05})
    core = llm.llm_engine
    sampling = [named(i, max_tokens=1 + i * 7 % 23, temperature=0.9, top_p=1.0, top_k=0) for i in range(TOTAL)]
    outputs: dict[int, list[int]] = {}
    waiting, aborted = list(range(TOTAL)), set(range(3, TOTAL, 10))
    step = 0
    while waiting or core.has_unfinished_requests():
        for i in waiting[: 1 + step % 12]:
            core.add_request(str(i), {"prompt_token_ids": tokenise(PROMPTS[i % len(PROMPTS)])}, sampling[i])
        now, waiting = waiting[: 1 + step % 12], waiting[1 + step % 12 :]
        for done in core.step():
            outputs[int(done.request_id)] = list(done.outputs[0].token_ids)
        core.abort_request([str(i) for i in now if i in aborted])
        step += 1
    kept = set(range(TOTAL)) - aborted
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


def test_a_fault_in_a_step_costs_its_requests_their_exploration_and_nobody_else(
    qwen3: str, plain: Any, captured: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(qwen3, {})
    real, faults = vllm_mixing.Explorer.predict, []

    def predict(*args: Any) -> None:
        if not faults:
            faults.append(1)
            raise RuntimeError("a fault")
        real(*args)

    monkeypatch.setattr(vllm_mixing.Explorer, "predict", predict)
    assert generate(llm, [named(i) for i in range(3)]) == generate(plain, [params(i) for i in range(3)])
    assert caplog.text.count("a step failed") == 1 and not captured
    again = generate(llm, [named(i) for i in range(3)])
    assert len(captured) == sum(len(sample) for output in again for sample in output)
    assert again != generate(plain, [params(i) for i in range(3)])


def test_a_fault_in_a_newcomers_first_step_costs_it_alone(
    qwen3: str, captured: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others lose that step, and explore on."""
    core = make_llm(qwen3, {}).llm_engine
    real, faults = vllm_mixing.Explorer.predict, []

    def predict(explorer: Any, shallow: Any, rows: Any) -> None:
        if len({*rows.groups} - {None}) == 3 and not faults:
            faults.append(1)
            raise RuntimeError("a fault")
        real(explorer, shallow, rows)

    monkeypatch.setattr(vllm_mixing.Explorer, "predict", predict)
    outputs: dict[int, list[int]] = {}

    def run(steps: int) -> None:
        for _ in range(steps):
            for done in core.step() if core.has_unfinished_requests() else ():
                outputs[int(done.request_id)] = list(done.outputs[0].token_ids)

    for i in range(3):
        given = named(i, max_tokens=12, ignore_eos=True)
        core.add_request(str(i), {"prompt_token_ids": tokenise(PROMPTS[i])}, given)
        run(4 if i == 1 else 0 if i == 0 else 40)
    assert [len(outputs[i]) for i in range(3)] == [12] * 3
    assert faults and caplog.text.count("a step failed; 1 of its requests") == 1
    rows = Counter(row.group for row in captured)
    assert rows == {0: 11, 1: 11}


def test_a_request_that_cannot_join_costs_itself_alone(
    qwen3: str, plain: Any, captured: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(qwen3, {})
    real = vllm_mixing.Request.group

    def group(self: Any) -> Any:
        if self.asked.group == 2:
            raise OverflowError("hostile")
        return real(self)

    monkeypatch.setattr(vllm_mixing.Request, "group", group)
    outputs = generate(llm, [named(i) for i in range(5)])
    assert outputs[2] == generate(plain, [params(i) for i in range(5)])[2]
    assert {row.group for row in captured} == {0, 1, 3, 4}
    assert caplog.text.count("a request cannot explore") == 1
    assert len(captured) == sum(len(outputs[i][0]) for i in (0, 1, 3, 4))


def test_rows_that_nobody_announced_warn_and_stay_plain(
    qwen3: str, plain: Any, captured: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(qwen3, {})
    expect = mixer().expect
    monkeypatch.setattr(mixer(), "expect", lambda order: expect(lambda count: [*order(count), 0]))
    assert generate(llm, [named(i) for i in range(3)]) == generate(plain, [params(i) for i in range(3)])
    assert caplog.text.count("are not those that the engine announced") == 1 and not captured


@pytest.mark.parametrize("way", ["load_weights", "copied"])
def test_groups_fall_when_weights_change(qwen3: str, captured: Any, way: str) -> None:
    """While a request runs: its Distiller starts again, and the norm's scale is read anew."""
    llm = make_llm(qwen3, {})
    core, scales = llm.llm_engine, []

    def change(model: Any) -> None:
        norm = model.model.norm.weight
        with torch.no_grad():
            if way == "copied":
                norm.copy_(norm * 2)
            else:
                model.load_weights([("model.norm.weight", norm.detach().clone() * 2)])

    core.add_request("a", {"prompt_token_ids": tokenise("hello")}, named(0, max_tokens=12))
    for step in range(12):
        core.step()
        explorer = mixer().explorer
        assert explorer is not None
        scales.append(explorer.config.deep_scale)
        if step == 6:
            llm.apply_model(change)
            before = explorer
    (stats,) = (group for group in explorer.stats().values() if group.updates)
    assert explorer is not before and stats.updates <= 5 and len(captured) == 12
    assert scales[7] == pytest.approx(2 * scales[6])


def test_a_prompt_of_embeddings_is_sampled_plainly(qwen3: str, captured: Any, caplog: pytest.LogCaptureFixture) -> None:
    llm = make_llm(qwen3, {}, enable_prompt_embeds=True)
    (table,) = llm.apply_model(lambda model: model.model.embed_tokens.weight.detach().clone())
    tokens = tokenise("hello")
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, extra_args={"esamp_beta": 2.0})
    (output,) = llm.generate([{"prompt_embeds": table[tokens]}], sampling, use_tqdm=False)
    assert not captured and "given as embeddings is sampled plainly" in caplog.text
    plain = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    (same,) = llm.generate([{"prompt_token_ids": tokens}], plain, use_tqdm=False)
    assert output.outputs[0].token_ids == same.outputs[0].token_ids
    llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    assert len(captured) == 6  # tokens explore beside them


def test_adapters_have_their_own_distillers(qwen3: str, checkpoints_dir: Path) -> None:
    """The same prompt under an adapter and without: two groups, though the adapter changes nothing here."""
    from checkpoints import make_adapter
    from vllm.lora.request import LoRARequest

    llm = make_llm(qwen3, {}, enable_lora=True, max_lora_rank=8)
    adapter = LoRARequest("nothing", 1, make_adapter(qwen3, checkpoints_dir))
    sampling = [params(2, seed=seed, top_p=1.0, top_k=0, extra_args={"esamp_beta": 3.0}) for seed in (5, 6)]
    alone = [generate(llm, [given], ["hello"])[0] for given in sampling]
    inputs = [{"prompt_token_ids": tokenise("hello")}] * 2
    results = llm.generate(inputs, sampling, lora_request=[None, adapter], use_tqdm=False)
    assert [[list(sample.token_ids) for sample in result.outputs] for result in results] == alone
    assert generate(llm, sampling, ["hello", "hello"]) != alone  # without adapters they are siblings
    # More rows than are mapped to adapters: those of the prompt, which are not sampled.
    (result,) = ask(llm, [params(2, seed=5, prompt_logprobs=0, extra_args={"esamp_beta": 3.0})], ["hello"])
    assert len(result.prompt_logprobs) == len(tokenise("hello"))


def test_speculative_decoding(qwen3: str, reference: Any, captured: Any) -> None:
    """A draft model, the model itself: every row is mixed with its own prediction, accepted ones teach, in order."""
    if not V2:
        pytest.skip("refused in V1")
    drafts = {"method": "draft_model", "model": qwen3, "num_speculative_tokens": 3}
    llm = make_llm(qwen3, {}, speculative_config=drafts)
    sampling = [
        SamplingParams(
            temperature=temperature, max_tokens=14, seed=i, ignore_eos=True, logprobs=0,
            extra_args={"esamp": {"group": i, "beta": 0.3}},
        )
        for i, temperature in enumerate((0.0, 1.0, 0.7))
    ]  # fmt: skip
    results = ask(llm, sampling, PROMPTS[:3])
    tokens = [list(result.outputs[0].token_ids) for result in results]
    assert any(not row.teaches for row in captured) and len({row.position for row in captured}) < len(captured)
    check_rows(captured, reference, {i: (tokenise(PROMPTS[i]), tokens[i]) for i in range(3)})
    for i, result in enumerate(results):
        # All rows of a step are predicted before any of them teaches: the first token knows no such step.
        (logits,) = expected_logits(reference, tokenise(PROMPTS[i]), [tokens[i]], 0.3, DistillerConfig(gate=False))
        got = returned_logprobs(result.outputs[0])
        assert abs(float(got[0]) - float(chosen(logits, tokens[i])[0])) < 2e-3
