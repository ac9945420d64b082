"""A sample's log-probabilities again, from what ``generate`` returned and a trainer's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from esamp_core.decoder import Decoder, Generation
from esamp_core.sample import ArgumentError, DistillerConfig, SamplingParams, UnsupportedModelError
from tests.test_decoder_models import PROMPTS, build

# Ungated, so that tokens are explored from the second step on, and strongly.
UNGATED = DistillerConfig(gate=False, lr=0.5)
PARAMS = SamplingParams(beta=0.5, temperature=0.8, seed=3, distinct=False)
# What a forward of the whole sequence, without a cache, may change in a log-probability.
TOLERANCE = 2e-4


def whole_forward(model: Any, sample: Generation) -> Tensor:
    """The logits [T, V] that drew the sample's tokens, as a trainer computes them."""
    ids = torch.tensor([[*sample.prompt_token_ids, *sample.token_ids]])
    first = len(sample.prompt_token_ids) - 1
    logits: Tensor = model(ids).logits[0, first : first + len(sample.token_ids)]
    return logits.float()


def explored(decoder: Decoder, params: SamplingParams, **options: Any) -> list[Generation]:
    options = {"n": 3, "max_new_tokens": 12, "stop_token_ids": tuple(range(3, 8))} | options
    return decoder.generate(PROMPTS, params=params, return_distilled=True, **options)


def check(decoder: Decoder, samples: Sequence[Generation]) -> None:
    """Replayed as they were drawn, and not without what they were explored with."""
    moved = 0.0
    for sample in samples:
        assert sample.distilled is not None
        prediction, strength = sample.distilled
        assert prediction.shape == (len(sample.token_ids), decoder.parts.hidden_size)
        assert strength.shape == (len(sample.token_ids),)
        logits, drawn = whole_forward(decoder.model, sample), torch.tensor(sample.logprobs)
        got = decoder.replay(sample, logits)
        assert got.dtype == torch.float32 and got.shape == drawn.shape
        torch.testing.assert_close(got, drawn, atol=TOLERANCE, rtol=TOLERANCE)
        plain = decoder.replay(replace(sample, params=replace(sample.params, beta=0.0), distilled=None), logits)
        moved = max(moved, float((plain - drawn).detach().abs().max()))
    assert moved > 100 * TOLERANCE


SETTINGS = {
    "plain": PARAMS,
    "filtered": replace(PARAMS, top_k=40, top_p=0.95, min_p=0.02),
    "stratified": replace(PARAMS, stratified=True),
    "distinct": replace(PARAMS, distinct=True),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_settings(setting: str, cache: Any) -> None:
    decoder = Decoder(build("llama"), config=UNGATED)
    # Not all of 12 rows at once, so that rows join and leave.
    check(decoder, explored(decoder, SETTINGS[setting], cache=cache, max_batch_rows=6))


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "cohere", "granite", "qwen3-tied"])
def test_heads(name: str) -> None:
    decoder = Decoder(build(name), config=UNGATED)
    check(decoder, explored(decoder, PARAMS))


FORMS = {
    "latent": {"config": UNGATED, "apply": "latent"},
    "neutral": {"config": UNGATED, "neutral": True},
    "choice": {"config": DistillerConfig(target="choice", lr=0.5)},
    "capped": {"config": UNGATED, "max_candidates": 3},
    "vllm": {"config": UNGATED, "filter_order": "vllm"},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    decoder = Decoder(build("llama"), **FORMS[form])
    check(decoder, explored(decoder, replace(PARAMS, min_p=0.02)))


def test_gated_strength_is_the_trust_of_each_token() -> None:
    decoder = Decoder(build("llama"), config=DistillerConfig(lr=0.5))
    samples = explored(decoder, PARAMS, max_new_tokens=40, stop_token_ids=())
    strengths = torch.cat([s.distilled.strength for s in samples if s.distilled is not None])
    assert strengths.min() >= 0 and strengths.max() <= PARAMS.beta and len(strengths.unique()) > 2
    for sample in samples:
        got = decoder.replay(sample, whole_forward(decoder.model, sample))
        torch.testing.assert_close(got, torch.tensor(sample.logprobs), atol=TOLERANCE, rtol=TOLERANCE)


def test_under_other_weights_and_its_gradient() -> None:
    """Against the formula in float64."""
    decoder = Decoder(build("llama"), config=UNGATED)
    sample = explored(decoder, PARAMS)[1]
    assert sample.distilled is not None
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(len(sample.token_ids), decoder.parts.vocab_size, generator=g).requires_grad_()
    got = decoder.replay(sample, logits)
    x = logits.detach().double().requires_grad_()
    weight, (prediction, strength) = decoder.parts.head.weight.double(), (t.double() for t in sample.distilled)
    new = x + strength[:, None] * (x - prediction @ weight.T)
    tokens = torch.tensor(sample.token_ids)[:, None]
    want = (new / PARAMS.temperature).log_softmax(-1).gather(1, tokens)[:, 0]
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)
    (got,) = torch.autograd.grad(got.sum(), logits)
    (want,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


def test_keeping_changes_nothing_else() -> None:
    runs = [
        Decoder(build("llama"), config=UNGATED).generate(PROMPTS, n=2, params=PARAMS, return_distilled=keep)
        for keep in (False, True)
    ]
    assert runs[0] == runs[1]
    assert all(g.distilled is None for g in runs[0]) and all(g.distilled is not None for g in runs[1])


def test_without_exploration_nothing_need_be_kept() -> None:
    decoder = Decoder(build("llama"))
    for beta, options in ((0.0, {}), (0.5, {"groups": [None] * 4, "return_distilled": True})):
        params = replace(PARAMS, beta=beta)
        for sample in decoder.generate(PROMPTS, n=2, params=params, max_new_tokens=6, **options):
            got = decoder.replay(sample, whole_forward(decoder.model, sample))
            torch.testing.assert_close(got, torch.tensor(sample.logprobs), atol=TOLERANCE, rtol=TOLERANCE)


def test_refused() -> None:
    decoder = Decoder(build("llama"), config=UNGATED)
    (sample,) = decoder.generate(PROMPTS[:1], params=PARAMS, max_new_tokens=4)
    with pytest.raises(ArgumentError, match="return_distilled=True"):
        decoder.replay(sample, whole_forward(decoder.model, sample))
    (sample,) = decoder.generate(PROMPTS[:1], params=PARAMS, max_new_tokens=4, return_distilled=True)
    with pytest.raises(ArgumentError, match=r"logits must be a float tensor \[4, any\]"):
        decoder.replay(sample, whole_forward(decoder.model, sample)[:3])
    decoder = Decoder(build("gemma2"), config=UNGATED, apply="latent")
    (sample,) = decoder.generate(PROMPTS[:1], params=PARAMS, max_new_tokens=4, return_distilled=True)
    with pytest.raises(UnsupportedModelError, match="caps its logits"):
        decoder.replay(sample, whole_forward(decoder.model, sample))
