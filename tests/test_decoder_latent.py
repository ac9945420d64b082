"""The decoder's latent form: the candidates form's draws where both say the same, and an oracle's log-probabilities."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from latent_oracle import chosen, expected_logits, judged_start

from esamp_core.base.errors import ArgumentError
from esamp_core.bindings.hf import explore
from esamp_core.decoder import Decoder, generate
from esamp_core.models.parts import find_parts
from esamp_core.sample import DistillerConfig, SamplingParams
from tests.test_decoder_graph import Graphs, graphs  # noqa: F401
from tests.test_decoder_models import MODELS, PROMPTS, VOCAB, build, one_thread  # noqa: F401

BETA = 0.7
PARAMS = SamplingParams(temperature=0.8, beta=BETA, seed=11, distinct=False)
CAPPED = {"gemma2"}  # their latent form differs by design


def decode(model: Any, apply: Any, **options: Any) -> Any:
    defaults = {"n": 3, "params": PARAMS, "max_new_tokens": 10, "stop_token_ids": (), "max_candidates": VOCAB}
    if "explorer" not in options:
        defaults["config"] = DistillerConfig(gate=False)
    return generate(model, options.pop("prompts", PROMPTS), apply=apply, **(defaults | options))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", sorted(set(MODELS) - CAPPED))
def test_without_filters_both_forms_draw_the_same(name: str, cache: Any) -> None:
    """All tokens are candidates then, and seeds, Distillers and the formula are the same; heads with a scale too."""
    model = build(name)
    one, other = (decode(model, apply, cache=cache) for apply in ("candidates", "latent"))
    assert [g.token_ids for g in one] == [g.token_ids for g in other]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=1e-4)
        assert all(math.isnan(x) for field in (b.base_logprobs, b.novelty, b.kl) for x in field)
    plain = decode(model, "latent", params=SamplingParams(temperature=0.8, beta=0.0, seed=11, distinct=False))
    assert [g.token_ids for g in plain] != [g.token_ids for g in other]
    assert all(math.isfinite(x) for g in plain for field in (g.base_logprobs, g.novelty, g.kl) for x in field)


def test_logprobs_are_those_of_the_mixed_model() -> None:
    """Filters see it too: with top-k 5 the five likeliest tokens are the mixed model's."""
    model = build("llama")
    params = SamplingParams(temperature=0.8, top_k=5, beta=BETA, seed=2, distinct=False)
    drawn = decode(model, "latent", prompts=PROMPTS[:1], params=params)
    logits = expected_logits(model, PROMPTS[0], [list(g.token_ids) for g in drawn], BETA, DistillerConfig(gate=False))
    for generation, rows in zip(drawn, logits, strict=True):
        kept = torch.where(rows >= rows.topk(5).values[:, -1:], rows / 0.8, float("-inf"))
        want = chosen(kept, generation.token_ids)
        torch.testing.assert_close(torch.tensor(generation.logprobs).double(), want, atol=1e-3, rtol=0)


def test_a_start_is_trusted_from_the_first_token(tmp_path: Path) -> None:
    """The oracle counts trust anew, from what the file says on; in both forms, as long as they draw the same."""
    model = build("llama")
    config = DistillerConfig(rank=8, start=judged_start(find_parts(model).head, tmp_path / "start"))
    for apply in ("latent", "candidates"):
        drawn = decode(model, apply, prompts=PROMPTS[:1], params=replace(PARAMS, temperature=1.0), config=config)
        tokens = [list(g.token_ids) for g in drawn]
        for generation, rows in zip(drawn, expected_logits(model, PROMPTS[0], tokens, BETA, config), strict=True):
            want = chosen(rows, generation.token_ids)
            torch.testing.assert_close(torch.tensor(generation.logprobs).double(), want, atol=1e-3, rtol=0)
        plain = expected_logits(model, PROMPTS[0], tokens, 0.0, config)
        assert (plain[0][0] - expected_logits(model, PROMPTS[0], tokens, BETA, config)[0][0]).abs().max() > 0.1


def test_a_start_of_another_model_is_refused(tmp_path: Path) -> None:
    path = judged_start(find_parts(build("llama")).head, tmp_path / "start")
    other = copy.deepcopy(build("llama"))
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight))
    config = DistillerConfig(rank=8, start=path)
    for apply in ("latent", "candidates"):
        with pytest.raises(ArgumentError, match="start must be calibrated for this model, got that of a llama"):
            Decoder(other, config=config, apply=apply)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="got that of a llama"):
            explore(other, config=config, apply=apply)  # type: ignore[arg-type]
    half = copy.deepcopy(build("llama")).to(torch.bfloat16)  # the same one, rounded
    Decoder(half, config=config)


def test_neutral_is_of_candidates() -> None:
    model = build("llama")
    for make in (Decoder, explore):
        with pytest.raises(ArgumentError, match="neutral must be False with apply"):
            make(model, apply="latent", neutral=True)  # type: ignore[operator]
    plain, neutral = (decode(model, "candidates", neutral=value) for value in (False, True))
    assert [g.token_ids for g in plain] != [g.token_ids for g in neutral]


def test_a_soft_cap_caps_what_was_mixed() -> None:
    """At a strength that candidates' logits would not survive: with all logits within +-2, none is below e^-4 / V."""
    model, params = build("gemma2"), SamplingParams(beta=50.0, seed=1, distinct=False)
    drawn = decode(model, "latent", prompts=PROMPTS[:1], n=4, max_new_tokens=12, params=params)
    assert min(x for g in drawn for x in g.logprobs) >= -4 - math.log(VOCAB) - 1e-4
    other = decode(model, "candidates", prompts=PROMPTS[:1], n=4, max_new_tokens=12, params=params)
    assert max(x for g in other for x in g.logprobs) > -1e-3  # those are moved without bounds


@pytest.mark.parametrize("stratified", [False, True])
def test_rows_that_join_and_leave(stratified: bool) -> None:
    """A queue that refills draws what one batch draws; siblings may be stratified, as the draw is ours."""
    model, params = build("qwen3-tied"), SamplingParams(beta=BETA, seed=4, stratified=stratified)
    options = {"params": params, "stop_token_ids": tuple(range(3, 20)), "max_new_tokens": 12}
    whole = decode(model, "latent", **options)
    assert len({len(g.token_ids) for g in whole}) > 2
    queued = decode(model, "latent", max_batch_rows=3, **options)
    assert [g.token_ids for g in queued] == [g.token_ids for g in whole]


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite"])
def test_graph_mode_is_eager_mode(name: str, graphs: Graphs) -> None:  # noqa: F811
    """The mix is captured with the model's own head, and replayed bit for bit."""
    model = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager, replayed = (decode(model, "latent", cache="static", graph=graph) for graph in (False, "auto"))
    for a, b in zip(eager, replayed, strict=True):
        assert a.token_ids == b.token_ids and a.logprobs == b.logprobs
    assert graphs.replays[0] > 5


def test_compiled_model() -> None:
    model = build("llama")
    want = decode(model, "latent", prompts=PROMPTS[:2])
    torch.compiler.reset()
    got = decode(torch.compile(model, backend="eager"), "latent", prompts=PROMPTS[:2])
    torch.compiler.reset()
    assert [g.token_ids for g in got] == [g.token_ids for g in want]


def test_one_explorer_for_both_forms() -> None:
    model = build("llama")
    own = Decoder(model, config=DistillerConfig(gate=False))
    own.generate(PROMPTS[:1], n=2, params=PARAMS, max_new_tokens=2)
    assert own.explorer is not None and own.explorer.head is not None
    given = Decoder(model, explorer=own.explorer, apply="latent")
    again = given.generate(PROMPTS[:1], n=2, params=PARAMS, max_new_tokens=8, stop_token_ids=())
    want = decode(model, "latent", prompts=PROMPTS[:1], n=2, max_new_tokens=8)
    assert [g.token_ids for g in again] == [g.token_ids for g in want]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"apply": "both"}, "apply must be"), ({"config": DistillerConfig(target="choice")}, 'must be "deep"')],
)
def test_bad_arguments(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        Decoder(build("llama"), **({"apply": "latent"} | options))
