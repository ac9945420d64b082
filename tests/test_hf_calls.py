"""The transformers binding: what generate was asked for, many calls in one context, compiled models."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from esamp_core.base.seeds import prompt_seed
from esamp_core.bindings.hf import explore
from esamp_core.models.parts import cache_argument, find_parts
from esamp_core.sample import DistillerConfig, Draw, Explorer, SamplingParams
from tests.test_decoder_models import PROMPTS, SIZES, VOCAB, build, one_thread  # noqa: F401
from tests.test_hf import SAMPLED, STOP, assert_same, generated, padded, repeated, run


def test_filters_of_generate_are_used() -> None:
    asked = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.02}
    for options, params in (
        ({"do_sample": True, **asked}, SamplingParams(**asked, beta=0.4, seed=8)),
        ({"do_sample": True}, SamplingParams(top_k=50, beta=0.4, seed=8)),  # transformers' default
        ({}, SamplingParams(temperature=0.0, beta=0.4, seed=8)),
    ):
        _, got = generated(build("llama"), repeated(PROMPTS, 2), beta=0.4, seed=8, **options)
        _, want = generated(build("llama"), repeated(PROMPTS, 2), params=params)
        assert_same(got, want)


@pytest.mark.filterwarnings("error")
def test_what_follows_the_processor_changes_nothing() -> None:
    """Warpers that would leave another token, a renormalisation, and generate's own draw."""
    _, want = generated(build("llama"), params=SAMPLED)
    sharp = {"temperature": 0.01, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.1}
    cut = {"epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "renormalize_logits": True, "do_sample": True}
    with pytest.warns(UserWarning, match=r"asked for temperature=0.01, top_k=1.*eta_cutoff=0.5, but explore\(params"):
        tokens, got = generated(build("llama"), params=SAMPLED, **sharp, **cut)
    assert_same(got, want)
    assert torch.equal(tokens, got.token_ids.clamp_min(0))
    generated(build("llama"), params=SAMPLED, do_sample=True)  # nothing that was asked for is left out
    generated(build("llama"), params=SAMPLED, do_sample=True, top_k=40, temperature=1.2)


def test_rows_of_one_prompt_are_siblings_however_they_were_repeated() -> None:
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    with explore(build("llama"), params=SAMPLED) as exploration:
        run(exploration, build("llama"), prompts)
        assert exploration.groups == [0, 1, 0]
        assert exploration.explorer is not None and set(exploration.explorer.stats()) == {0, 1}
        alternate = exploration.draws
        run(exploration, build("llama"), [prompts[i] for i in (0, 2, 1)])
        assert exploration.groups == [0, 0, 1]
    assert_same(Draw(*(x[[0, 2, 1]] for x in alternate)), exploration.draws)
    _, want = generated(build("llama"), PROMPTS[:2], params=SAMPLED, do_sample=True, num_return_sequences=2)
    _, got = generated(build("llama"), repeated(PROMPTS[:2], 2), params=SAMPLED)
    assert_same(got, want)


def test_groups_of_the_caller() -> None:
    prompts = repeated(PROMPTS[:2], 2)
    _, shared = generated(build("llama"), prompts, params=SAMPLED, groups=["all"] * 4)
    _, apart = generated(build("llama"), prompts, params=SAMPLED, groups=["a", "b", "c", "d"])
    assert not torch.equal(shared.novelty, apart.novelty)
    for i in range(2):  # alone with its own seed, a row does what it does beside others
        alone = replace(SAMPLED, seed=prompt_seed(5, i))
        _, single = generated(build("llama"), [prompts[i]], params=alone, max_new_tokens=4)
        assert_same(Draw(*(x[i : i + 1, :4] for x in apart)), single)
    with pytest.raises(ValueError, match=r"groups must be one per row of generate, 4 .*got \['a'\]"):
        generated(build("llama"), prompts, groups=["a"])


@pytest.mark.parametrize("sample", [False, True])
def test_rows_without_a_group_are_left_to_generate(sample: bool) -> None:
    """Down to the bits of its random numbers."""
    torch.manual_seed(4)
    want = build("llama").generate(
        **padded(PROMPTS), do_sample=sample, max_new_tokens=8, eos_token_id=list(STOP), pad_token_id=0
    )[:, -8:]
    torch.manual_seed(4)
    tokens, draws = generated(
        build("llama"), groups=[None, None, None, None], seed=0, do_sample=sample, max_new_tokens=8
    )
    assert torch.equal(tokens, want) and draws.token_ids.eq(-1).all()
    tokens, draws = generated(build("llama"), groups=[None, "a", None, "a"], seed=0, max_new_tokens=8)
    assert draws.token_ids[[0, 2]].eq(-1).all() and draws.token_ids[[1, 3], 0].ge(0).all()
    if not sample:
        assert torch.equal(tokens[[0, 2]], want[[0, 2]])


def test_embedded_prompts_need_groups() -> None:
    model = build("llama")
    embeds = model.get_input_embeddings()(padded(PROMPTS[1:2])["input_ids"]).detach()
    with (
        explore(model, params=SAMPLED) as exploration,
        pytest.raises(ValueError, match=r"groups must be given .*embeds"),
    ):
        model.generate(inputs_embeds=embeds, max_new_tokens=4, logits_processor=exploration.logits_processor)
    with explore(model, params=SAMPLED, groups=["a"]) as exploration:
        model.generate(inputs_embeds=embeds, max_new_tokens=4, logits_processor=exploration.logits_processor)
    _, want = generated(model, PROMPTS[1:2], params=SAMPLED, max_new_tokens=4, eos_token_id=2)
    assert_same(exploration.draws, want)


class Written(hf.generation.streamers.BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_streamer_and_another_thread() -> None:
    streamer = Written()
    with explore(build("llama"), params=SAMPLED) as exploration:
        options = {"streamer": streamer, "max_new_tokens": 6, "eos_token_id": 119}
        thread = threading.Thread(target=lambda: run(exploration, build("llama"), PROMPTS[:1], **options))
        thread.start()
        thread.join()
    assert streamer.tokens == [*PROMPTS[0], *exploration.draws.token_ids[0].tolist(), -1]


def test_return_dict() -> None:
    with explore(build("llama"), params=SAMPLED) as exploration:
        out = build("llama").generate(
            **padded(PROMPTS),
            max_new_tokens=5,
            eos_token_id=119,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            output_hidden_states=True,
            logits_processor=exploration.logits_processor,
        )
    draws = exploration.draws
    for t, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        assert torch.equal(scores.argmax(-1), draws.token_ids[:, t]) and (scores.isfinite().sum(-1) == 1).all()
        base = logits.log_softmax(-1).gather(1, draws.token_ids[:, t : t + 1])[:, 0]  # untouched
        torch.testing.assert_close(base, draws.base_logprob[:, t], atol=1e-5, rtol=1e-5)


def test_continued_from_a_cache() -> None:
    model, options = build("llama"), {"eos_token_id": 119, "max_new_tokens": 4, "return_dict_in_generate": True}
    with explore(model, params=SAMPLED) as exploration:
        processors = exploration.logits_processor
        first = model.generate(torch.tensor(PROMPTS[:1]), **options, logits_processor=processors)
        more = torch.cat([first.sequences, torch.tensor([[9, 10, 11]])], 1)
        name = cache_argument(model)
        model.generate(more, **{name: first[name]}, **options, logits_processor=processors)
        continued = exploration.draws
        model.generate(more, **options, logits_processor=processors)
    assert_same(continued, exploration.draws)


def test_nothing_of_a_forward_outlives_its_step() -> None:
    """Logits of a whole prompt may be gigabytes, and generate itself lets go of them."""
    model, alive, seen = build("llama"), [], []

    def before(*_: Any) -> None:
        seen.append(sum(ref() is not None for ref in alive))

    def after(module: Any, args: Any, output: Any) -> None:
        alive.append(weakref.ref(output))
        alive.append(weakref.ref(output.logits))

    with explore(model, params=SAMPLED) as exploration:
        handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
        try:
            run(exploration, model, max_new_tokens=4, eos_token_id=119)
        finally:
            for handle in handles:
                handle.remove()
    assert seen == [0, 0, 0, 0]


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_every_generate_starts_clean() -> None:
    parts, before = find_parts(build("llama")), hooks(build("llama"))
    spy = Explorer(parts.head, 32, DistillerConfig(deep_scale=parts.deep_scale), max_rows=16)
    for explorer in (None, spy):
        with explore(build("llama"), params=SAMPLED, explorer=explorer) as exploration:
            run(exploration, build("llama"), repeated(PROMPTS, 2))
            first = exploration.draws
            run(exploration, build("llama"), PROMPTS[:1])
            run(exploration, build("llama"), repeated([[5], [6]], 4))  # a prefill that looks like a step
            run(exploration, build("llama"), repeated([[5], [6]], 4))
            run(exploration, build("llama"), repeated(PROMPTS, 2))
            assert_same(exploration.draws, first)
    assert spy.stats() == {} and spy.open_rows == 0 and hooks(build("llama")) == before


class Fails(hf.StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if input_ids.shape[1] == max(map(len, PROMPTS)) + 3:
            raise RuntimeError("inside")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_error_in_generate_leaves_nothing_behind() -> None:
    explorer, before = Explorer(find_parts(build("llama")).head, 32, max_rows=8), hooks(build("llama"))
    with pytest.raises(RuntimeError, match="inside"), explore(build("llama"), explorer=explorer) as exploration:
        run(exploration, build("llama"), stopping_criteria=[Fails()])
    assert explorer.stats() == {} and explorer.open_rows == 0 and hooks(build("llama")) == before
    _, want = generated(build("llama"), params=SAMPLED)
    with explore(build("llama"), params=SAMPLED) as exploration:
        with pytest.raises(RuntimeError, match="inside"):
            run(exploration, build("llama"), stopping_criteria=[Fails()])
        run(exploration, build("llama"))
    assert_same(exploration.draws, want)


def test_own_forwards_in_between_do_no_harm() -> None:
    _, want = generated(build("llama"), params=SAMPLED)
    with explore(build("llama"), params=SAMPLED) as exploration:
        for _ in range(2):
            build("llama")(torch.tensor([[5, 6], [7, 8], [9, 10], [11, 12]]))
            build("llama")(torch.tensor([[5, 6]]))
            run(exploration, build("llama"))
            assert_same(exploration.draws, want)


def test_inference_mode() -> None:
    _, want = generated(build("llama"), params=SAMPLED, repetition_penalty=1.2)
    with explore(build("llama"), params=SAMPLED) as exploration:
        with torch.inference_mode():
            run(exploration, build("llama"), repetition_penalty=1.2)
        got = exploration.draws
    assert_same(got, want)


def compiled_by_generate() -> dict[str, Any]:
    """What generate does by itself with a static cache on a GPU: it compiles the whole call, hooks included."""
    config = hf.CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def shallow_model() -> Any:
    """One block, to compile quickly; never run before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "num_hidden_layers": 1})).eval()


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("dynamo")
def test_compiled_within_the_context() -> None:
    model, prompts, stop = shallow_model(), [PROMPTS[0]] * 4, {"eos_token_id": 119, "max_new_tokens": 3}
    _, want = generated(model, prompts, params=SAMPLED, **stop)
    model.forward = torch.compile(model.forward, backend="eager")
    with explore(model, params=SAMPLED) as exploration:
        for _ in range(2):
            run(exploration, model, prompts, **stop)
            assert_same(exploration.draws, want)


@pytest.mark.usefixtures("dynamo")
def test_compiled_before_the_context() -> None:
    """Is refused; and a reset helps."""
    model, prompts = shallow_model(), [PROMPTS[0]] * 4
    options = {**compiled_by_generate(), "eos_token_id": 119, "max_new_tokens": 4}
    model.generate(**padded(prompts), **options, pad_token_id=0)
    with explore(model, params=SAMPLED) as exploration:
        with pytest.raises(TypeError, match=r"ran 0 times.*call torch.compiler.reset\(\) after entering"):
            run(exploration, model, prompts, **options)
        torch.compiler.reset()
        for _ in range(2):
            run(exploration, model, prompts, **options)
    _, want = generated(shallow_model(), prompts, params=SAMPLED, eos_token_id=119, max_new_tokens=4)
    assert_same(exploration.draws, want)


def test_model_wrapped_by_torch_compile() -> None:
    _, want = generated(build("llama"), params=SAMPLED)
    _, got = generated(torch.compile(build("llama"), backend="eager"), params=SAMPLED)  # generate runs what is within
    assert_same(got, want)


def test_gradients_of_the_head_are_left_alone() -> None:
    model = copy.deepcopy(build("llama"))
    generated(model, params=SAMPLED)
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and model.config.vocab_size == VOCAB
