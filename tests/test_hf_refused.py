"""The transformers binding refuses what it cannot do with one clear line, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from esamp_core.base.errors import ArgumentError, StateError, UnsupportedModelError
from esamp_core.bindings.hf import explore
from esamp_core.models.parts import find_parts
from esamp_core.sample import DistillerConfig, Explorer, SamplingParams
from tests.test_decoder_models import PROMPTS, SIZES, VOCAB, build, one_thread  # noqa: F401
from tests.test_decoder_taps import PackedHead
from tests.test_hf import SAMPLED, generated, padded
from tests.test_hf_calls import hooks

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 3}, r"LlamaForCausalLM.generate cannot explore with beam search \(num_beams > 1\)"),
    "sampled-beams": ({"num_beams": 2, "do_sample": True}, r"cannot explore with beam search \(num_beams > 1\)"),
    "prompt-lookup": ({"prompt_lookup_num_tokens": 3}, "cannot explore with assisted generation"),
    "assistant": ({"assistant_model": "llama"}, "called by another model's generate .*assistant models are not"),
    "other-assistant": ({"assistant_model": "qwen3-tied"}, "another model's generate .Qwen3ForCausalLM.*assistant"),
    "guidance": ({"guidance_scale": 1.5}, "cannot explore with guidance_scale, got 1.5"),
    "watermark": ({"watermarking_config": hf.WatermarkingConfig()}, "cannot explore with watermarking_config, got"),
    "typical": ({"do_sample": True, "typical_p": 0.9}, r"without typical_p to explore, got {'typical_p': 0.9}"),
    "eta": ({"do_sample": True, "eta_cutoff": 0.1}, r"without eta_cutoff to explore, got"),
    "temperature": ({"do_sample": True, "temperature": 1e9}, "temperature must be 0 or in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_generate(case: str) -> None:
    options, message = REFUSED[case]
    options = dict(options)
    if "assistant_model" in options:
        # generate copies the target's settings to an assistant, so it is not the one of the other tests.
        build.cache_clear()
        options["assistant_model"] = build(options["assistant_model"])
        build.cache_clear()
    model, explorer = build("llama"), Explorer(find_parts(build("llama")).head, 32)
    before = hooks(model)
    with pytest.raises((UnsupportedModelError, ArgumentError), match=message) as error:
        generated(model, PROMPTS[:1], explorer=explorer, **options)
    assert "\n" not in str(error.value)
    assert hooks(model) == before and explorer.stats() == {} and explorer.open_rows == 0


class After(hf.LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


class Wrapped(After):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.inner(input_ids, scores)


class RunsTheModel(After):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        build("llama")(input_ids)
        return scores


def test_processors_after_ours() -> None:
    model = build("llama")
    with explore(model) as exploration:
        with pytest.raises(ArgumentError, match=r"must end with the exploration's, .* got After after it"):
            model.generate(
                **padded(PROMPTS), max_new_tokens=2, logits_processor=[*exploration.logits_processor, After()]
            )
        model.generate(**padded(PROMPTS), max_new_tokens=2, logits_processor=[After(), *exploration.logits_processor])


def test_wrapped_processor() -> None:
    with explore(build("llama")) as exploration, pytest.raises(ArgumentError, match="in it once, unwrapped, got it 0"):
        wrapped = [Wrapped(exploration.logits_processor[0])]
        build("llama").generate(**padded(PROMPTS), max_new_tokens=2, logits_processor=wrapped)


def test_processor_that_runs_the_model() -> None:
    model = build("llama")
    with explore(model) as exploration, pytest.raises(UnsupportedModelError, match="ran more than once in a step"):
        model.generate(
            **padded(PROMPTS), max_new_tokens=3, logits_processor=[RunsTheModel(), *exploration.logits_processor]
        )


def other_loop(model: Any, input_ids: Tensor, logits_processor: Any, **options: Any) -> Tensor:
    logits_processor(input_ids, model(input_ids).logits[:, -1].float())
    return input_ids


def test_custom_loops() -> None:
    model = build("llama")
    with explore(model) as exploration:
        processors = exploration.logits_processor
        with pytest.raises(UnsupportedModelError, match="not called by generate's own sampling loop"):
            model.generate(**padded(PROMPTS), custom_generate=other_loop, max_new_tokens=2, logits_processor=processors)
        with pytest.raises(UnsupportedModelError, match="not called by generate's own sampling loop"):
            processors[0](torch.tensor([[1]]), torch.zeros(1, VOCAB))


def test_generate_without_the_processor() -> None:
    model = build("llama")
    with (
        pytest.raises(StateError, match=r"must be given logits_processor=exploration.logits_processor"),
        explore(model),
    ):
        model.generate(**padded(PROMPTS), max_new_tokens=2)
    with explore(model):
        pass  # nothing ran
    with explore(model) as exploration:  # a baseline beside explored calls is fine
        model.generate(**padded(PROMPTS), max_new_tokens=2)
        model.generate(**padded(PROMPTS), max_new_tokens=2, logits_processor=exploration.logits_processor)


def test_continuous_batching() -> None:
    """Takes no logits processors: nothing was explored, which is said when the context is left."""
    model, config = build("llama"), hf.GenerationConfig(max_new_tokens=3, eos_token_id=2, pad_token_id=0)
    with pytest.raises(StateError, match="continuous batching takes none"), explore(model) as exploration:
        model.generate(
            padded(PROMPTS[:1])["input_ids"],
            generation_config=config,
            cache_implementation="paged",
            continuous_batching_config=hf.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
            logits_processor=exploration.logits_processor,
        )


def test_contexts() -> None:
    model = build("llama")
    with explore(model) as exploration:
        with pytest.raises(StateError, match="LlamaForCausalLM is being explored already"), explore(model):
            pass
        with pytest.raises(StateError, match="draws are there after"):
            _ = exploration.draws
        assert exploration.groups == []
    with explore(build("gpt2")), explore(model):  # two models
        pass
    with pytest.raises(StateError, match=r"while its explore.*context is entered"):
        model.generate(**padded(PROMPTS), max_new_tokens=2, logits_processor=exploration.logits_processor)


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"params": SAMPLED, "beta": 0.1}, "beta and seed must be within params"),
    ({"params": SAMPLED, "seed": 1}, "beta and seed must be within params"),
    ({"beta": float("nan")}, "beta must be"),
    ({"seed": 1.5}, "seed must be"),
    ({"shallow_layer": 3}, "shallow_layer must be a block index below 3"),
    ({"max_candidates": 0}, "max_candidates must be"),
    ({"filter_order": "mine"}, "filter_order must be"),
    (
        {"explorer": Explorer(find_parts(build("llama")).head, 32), "config": DistillerConfig()},
        "config and neutral must be left",
    ),
    ({"groups": "abcd"}, "groups must be a list with one entry per row, got 'abcd'"),
    ({"groups": [torch.tensor(0), torch.tensor(0)]}, r"groups\[0\] must be None or hashable"),
]


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        explore(build("llama"), **options)


def test_params_that_do_not_fit_the_prompts() -> None:
    with pytest.raises(ArgumentError, match=r"one per prompt \(4\)"):
        generated(build("llama"), params=[SamplingParams()] * 3)


def test_models_without_what_is_tapped() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        explore(hf.T5ForConditionalGeneration(hf.T5Config(**sizes)).eval())
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()
    model.lm_head = PackedHead((VOCAB, 32), torch.uint8)
    with pytest.raises(UnsupportedModelError, match="leave the head unquantised"):
        explore(model)
    model.lm_head = nn.Linear(32, VOCAB, device="meta")
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        explore(model)


def test_head_that_does_not_give_the_logits() -> None:
    model = hf.CohereForCausalLM(hf.CohereConfig(**SIZES)).eval()
    model.config.logit_scale = 0.5  # the model kept the first one
    with pytest.raises(UnsupportedModelError, match="times it"):
        generated(model)
