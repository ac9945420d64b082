"""The latent form inside generate(): every mode of it, on the mixed model's logits, as float64 computes them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from latent_oracle import chosen, expected_logits
from torch import Tensor

from esamp_core.bindings.hf import explore
from esamp_core.sample import (
    ArgumentError,
    DistillerConfig,
    Explorer,
    Head,
    SamplingParams,
    StateError,
    UnsupportedModelError,
)
from tests.test_decoder_models import PROMPTS, build, one_thread  # noqa: F401
from tests.test_hf import padded
from tests.test_hf_calls import compiled_by_generate, shallow_model

BETA, STEPS = 0.8, 12
CONFIG = DistillerConfig(gate=False)
PROMPT = PROMPTS[0]
EXACT = dict(atol=1e-3, rtol=0.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def latent(model: Any, **options: Any) -> Any:
    if "explorer" not in options:
        options = {"config": CONFIG} | options
    return explore(model, apply="latent", **{"beta": BETA} | options)


def run(model: Any, prompts: list[list[int]], **options: Any) -> Any:
    """generate's own results, without stop tokens; output_logits and output_scores are there."""
    inputs = padded(prompts)
    wanted = dict(return_dict_in_generate=True, output_logits=True, output_scores=True, max_new_tokens=STEPS)
    rest = dict(eos_token_id=None, pad_token_id=0, top_k=0, do_sample=True)
    torch.manual_seed(3)
    return model.generate(**inputs, **{**wanted, **rest, **options})


def new_tokens(result: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [row[max(map(len, prompts)) :].tolist() for row in result.sequences]


def check_logits(model: Any, result: Any, prompts: list[list[int]], n: int = 1, config: Any = CONFIG) -> None:
    """What generate got from the head, of every row and step."""
    tokens, logits = new_tokens(result, prompts), torch.stack(result.logits, 1).double()
    for i, prompt in enumerate(prompts):
        rows = slice(i * n, (i + 1) * n)
        want = expected_logits(model, prompt, tokens[rows], BETA, config)
        torch.testing.assert_close(logits[rows], torch.stack(want), **EXACT)
        base = expected_logits(model, prompt, tokens[rows], BETA, None)
        assert (logits[rows] - torch.stack(base)).abs().amax() > 100 * EXACT["atol"]


@pytest.mark.parametrize("n", [1, 4])
def test_logits_are_those_of_the_mixed_model(model: Any, n: int) -> None:
    prompts = PROMPTS[:2]
    with latent(model) as exploration:
        result = run(model, prompts, num_return_sequences=n, logits_processor=hf.LogitsProcessorList(
            exploration.logits_processor
        ))  # fmt: skip
        assert exploration.groups == [i for i in range(2) for _ in range(n)]
        with pytest.raises(StateError, match="output_scores"):
            _ = exploration.draws
    check_logits(model, result, prompts, n)
    # And generate's own way to log-probabilities gives those of what was drawn from.
    scores = model.compute_transition_scores(result.sequences, result.scores, normalize_logits=True)
    for i, tokens in enumerate(new_tokens(result, prompts)):
        want = chosen(torch.stack(result.scores, 1)[i].double(), tokens)
        torch.testing.assert_close(scores[i].double(), want, atol=1e-5, rtol=1e-5)
    assert not model._forward_pre_hooks and not model.lm_head._forward_pre_hooks


class Ban(hf.LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, ::2] = float("-inf")
        return scores


def processors_of_all_kinds() -> dict[str, dict[str, Any]]:
    return {
        "greedy": dict(do_sample=False),
        "filters": dict(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02),
        "other filters": dict(typical_p=0.9, epsilon_cutoff=1e-4, eta_cutoff=1e-4),
        "penalties": dict(repetition_penalty=1.5, no_repeat_ngram_size=2, encoder_repetition_penalty=1.1),
        "min_new_tokens": dict(eos_token_id=list(range(20)), min_new_tokens=STEPS),
        "a processor of one's own": dict(logits_processor=hf.LogitsProcessorList([Ban()])),
        "bans and forces": dict(bad_words_ids=[[5]], suppress_tokens=[6, 7], forced_eos_token_id=9),
        "watermark": dict(watermarking_config=hf.WatermarkingConfig()),
        "static cache": dict(cache_implementation="static"),
        "no cache": dict(use_cache=False),
        "chunked prefill": dict(prefill_chunk_size=2),
        "renormalised": dict(renormalize_logits=True, temperature=0.5),
    }


@pytest.mark.parametrize("mode", processors_of_all_kinds())
def test_every_mode_of_generate(model: Any, mode: str) -> None:
    """Its own processors see the mixed model's logits, whatever they do with them."""
    options = processors_of_all_kinds()[mode]
    with latent(model):
        result = run(model, [PROMPT], num_return_sequences=1 if mode == "greedy" else 3, **options)
    check_logits(model, result, [PROMPT], 1 if mode == "greedy" else 3)
    if mode == "a processor of one's own":
        assert all(token % 2 for row in new_tokens(result, [PROMPT]) for token in row)


def test_rows_that_end_teach_no_more(model: Any) -> None:
    """The others go on as if they were alone: exactly, not a step late."""
    stop = list(range(3, 27))
    with latent(model):
        result = run(model, [PROMPT], num_return_sequences=4, eos_token_id=stop)
    logits, whole = torch.stack(result.logits, 1).double(), new_tokens(result, [PROMPT])
    ends = [next((i + 1 for i, t in enumerate(row) if t in stop), len(row)) for row in whole]
    assert len(set(ends)) > 1
    want = expected_logits(model, PROMPT, [row[:end] for row, end in zip(whole, ends, strict=True)], BETA, CONFIG)
    for i, end in enumerate(ends):
        torch.testing.assert_close(logits[i, :end], want[i], **EXACT)


class Frozen:
    """Mixes with Distillers that do not learn by hooks of its own, in float32: what beams are compared with."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        scale = self.model.model.norm.weight.float().square().mean().sqrt()

        def keep(module: Any, inputs: Any, output: Any) -> None:
            x = (output[0] if isinstance(output, tuple) else output)[:, -1]
            x = x / x.square().mean(-1, keepdim=True).sqrt()
            self.pred = scale * torch.nn.functional.layer_norm(x, x.shape[-1:])

        def mix(module: Any, inputs: Any) -> Any:
            hidden = inputs[0].clone()
            hidden[:, -1] = (1 + BETA) * hidden[:, -1] - BETA * self.pred
            return (hidden,)

        self.hooks = [
            self.model.model.layers[0].register_forward_hook(keep),
            self.model.lm_head.register_forward_pre_hook(mix),
        ]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("sample", [False, True])
def test_beams(model: Any, sample: bool) -> None:
    """Of one prompt siblings, however they are reordered; the search is that of a model whose head is mixed for."""
    prompts, options = PROMPTS[:2], dict(num_beams=3, num_return_sequences=2, do_sample=sample, eos_token_id=[4, 5])
    frozen = DistillerConfig(lr=0.0, gate=False)
    with latent(model, config=frozen) as exploration:
        found = run(model, prompts, **options)
    assert exploration.groups == [0, 0, 0, 1, 1, 1]
    with Frozen(model):
        want = run(model, prompts, **options)
    assert torch.equal(found.sequences, want.sequences)
    torch.testing.assert_close(found.sequences_scores, want.sequences_scores, **EXACT)
    assert not torch.equal(found.sequences, run(model, prompts, **options).sequences)
    with latent(model) as exploration:
        run(model, prompts, **options)
        assert exploration.explorer is not None
        stats = exploration.explorer.stats()
        assert [stats[group].rows for group in (0, 1)] == [3, 3]
        assert all(4 <= stats[group].updates <= STEPS for group in (0, 1))


def group_beams(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
    """A small diverse beam search, as a custom_generate: two groups of two beams of a prompt, which are reordered."""
    rows, length = input_ids.shape
    scores = torch.tensor([0.0, -1e9, 0.0, -1e9]).repeat(rows // 4)
    for _ in range(generation_config.max_length - length):
        logprobs = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits[:, -1].log_softmax(-1)
        order, tokens = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        for prompt in range(rows // 4):
            used = torch.zeros(logprobs.shape[1])
            for group in range(2):
                mine = slice(prompt * 4 + group * 2, prompt * 4 + group * 2 + 2)
                total = (scores[mine, None] + logprobs[mine] - 0.5 * used).flatten()
                best = total.topk(2)
                scores[mine] = best.values
                order[mine], tokens[mine] = mine.start + best.indices // len(used), best.indices % len(used)
                used[tokens[mine]] += 1
        input_ids = torch.cat([input_ids[order], tokens[:, None]], 1)
    return input_ids


def test_group_beams_by_a_loop_of_ones_own(model: Any) -> None:
    prompts = [PROMPT, [7, *PROMPT[1:]]]
    options = dict(custom_generate=group_beams, num_beams=4, use_cache=False, max_new_tokens=6)
    with Frozen(model):
        want = model.generate(**padded(prompts), **options)
    # It feeds whole sequences, and asks for the logits of all: which of them it samples, nobody knows.
    refused = pytest.raises(UnsupportedModelError, match="positions in one step of a custom generate")
    with refused, latent(model, config=DistillerConfig(lr=0.0, gate=False)):
        model.generate(**padded(prompts), **options)

    def last_logits(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
        def one(input_ids: Tensor, attention_mask: Tensor) -> Any:
            return model.forward_of_last(input_ids=input_ids, attention_mask=attention_mask)

        return group_beams(one, input_ids, generation_config)

    model.forward_of_last = lambda **inputs: model(**inputs, use_cache=False, logits_to_keep=1)
    try:
        with latent(model, config=DistillerConfig(lr=0.0, gate=False)) as exploration:
            found = model.generate(**padded(prompts), **{**options, "custom_generate": last_logits})
    finally:
        del model.forward_of_last
    assert torch.equal(found, want) and exploration.groups == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("assistant", [True, False])
def test_assisted_decoding_is_refused(model: Any, assistant: bool) -> None:
    options = dict(assistant_model=build("llama")) if assistant else dict(prompt_lookup_num_tokens=2)
    with pytest.raises(UnsupportedModelError, match="cannot explore with assisted generation"), latent(model):
        model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, **options)


def test_guidance_asks_the_model_beside_and_is_left_alone(model: Any) -> None:
    """The unconditional forward is a processor's own: neither mixed nor learned."""
    with latent(model):
        result = run(model, [PROMPT], guidance_scale=1.5)
    check_logits(model, result, [PROMPT])


def test_own_forwards_and_heads_are_left_alone(model: Any) -> None:
    tokens = torch.tensor([PROMPT])
    plain = model(tokens).logits
    with latent(model):
        run(model, [PROMPT])
        assert torch.equal(model(tokens).logits, plain)
        hidden = model.model(tokens).last_hidden_state
        assert torch.equal(model.lm_head(hidden), plain)


def test_every_generate_starts_clean_and_groups_are_the_callers(model: Any) -> None:
    with latent(model) as exploration:
        first, second = (run(model, [PROMPT], num_return_sequences=2) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))
    with latent(model, groups=["a", None]) as exploration:
        apart = run(model, [PROMPT], num_return_sequences=2)
        assert exploration.groups == ["a", None]
    tokens = new_tokens(apart, [PROMPT])
    (mixed,) = expected_logits(model, PROMPT, [tokens[0]], BETA, CONFIG)
    (plain,) = expected_logits(model, PROMPT, [tokens[1]], BETA, None)
    torch.testing.assert_close(torch.stack(apart.logits, 1).double(), torch.stack([mixed, plain]), **EXACT)


def test_beta_0_is_the_model(model: Any) -> None:
    with latent(model, beta=0.0):
        found = run(model, [PROMPT])
    want = run(model, [PROMPT])
    assert torch.equal(found.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, want.logits, strict=True))


@pytest.mark.parametrize("with_head", [True, False])
def test_an_explorer_of_ones_own(model: Any, with_head: bool) -> None:
    head = Head(model.lm_head.weight.detach()) if with_head else None
    scale = float(model.model.norm.weight.detach().square().mean().sqrt())
    config = DistillerConfig(deep_scale=scale, gate=False)
    explorer = Explorer(head, model.config.hidden_size, config, device=None if with_head else "cpu")
    with latent(model, explorer=explorer):
        result = run(model, [PROMPT], num_return_sequences=2)
    check_logits(model, result, [PROMPT], 2)
    assert explorer.open_rows == 0


def test_inference_mode_and_bfloat16() -> None:
    model = copy.deepcopy(build("llama")).bfloat16()
    with torch.inference_mode(), latent(model):
        result = run(model, [PROMPT], num_return_sequences=2)
    assert result.logits[0].dtype == torch.float32 and torch.isfinite(torch.stack(result.logits)).all()


def test_states_that_are_not_finite_warn(model: Any) -> None:
    def spoil(module: Any, inputs: Any) -> Any:
        return (torch.full_like(inputs[0], float("inf")),)

    hook = model.lm_head.register_forward_pre_hook(spoil)
    try:
        with pytest.warns(UserWarning, match="not finite"), latent(model):
            model.generate(torch.tensor([PROMPT]), max_new_tokens=3, do_sample=False)
    finally:
        hook.remove()


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.traced
@pytest.mark.parametrize("way", ["by generate", "wrapped"])
def test_compiled(way: str, dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shallow_model()
    with latent(torch.compile(model, backend="eager") if way == "wrapped" else model):
        options = {"cache_implementation": "static"} if way == "wrapped" else compiled_by_generate()
        result = run(model, [PROMPT], num_return_sequences=2, **{**options, "max_new_tokens": 5})
    check_logits(model, result, [PROMPT], 2)


def test_misuse_is_told(model: Any) -> None:
    with pytest.raises(StateError, match="not in a generate of its own"), latent(model):
        model(torch.tensor([PROMPT]))
    with pytest.warns(UserWarning, match="nothing ran on"), latent(model):
        pass
    with warnings.catch_warnings(), latent(model), pytest.raises(StateError, match="being explored already"):
        warnings.simplefilter("error")
        try:
            with latent(model):
                pass
        finally:
            run(model, [PROMPT], max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"apply": "both"}, "apply must be"),
        ({"apply": "latent", "seed": 3}, "leave out seed=3"),
        ({"apply": "latent", "params": SamplingParams()}, "leave out params="),
        ({"apply": "latent", "filter_order": "vllm", "max_candidates": 8}, "leave out filter_order='vllm', max_cand"),
        ({"apply": "latent", "config": DistillerConfig(target="choice")}, 'config.target must be "deep"'),
    ],
)
def test_bad_arguments(model: Any, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        explore(model, **options)
