"""What requests and models ask for is what hf would do, or is refused and named before anything is loaded or drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("lm_eval")

from harness import SAMPLED, asked, exploring, letters, make_checkpoint, request
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig, T5Config
from transformers.generation import GenerationMixin

from esamp_core.base.errors import ArgumentError, UnsupportedModelError
from esamp_core.decoder import Decoder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("own", [{}, {"top_k": 3, "top_p": 0.9}, {"min_p": 0.1, "temperature": 5, "top_k": 0}], ids=str)
@pytest.mark.parametrize("asked_for", [{}, {"top_k": 7}, {"top_p": 0.8, "min_p": 0.02}, {"eos_token_id": 5}], ids=str)
def test_what_is_not_asked_for_comes_from_the_model(own: Any, asked_for: Any, checkpoint: str) -> None:
    """The same as in hf, whose generate is stopped where it begins to sample."""
    hf, lm = HFLM(checkpoint, device="cpu"), exploring(checkpoint)
    for model in (hf.model, lm.model):
        model.generation_config.update(**own, do_sample=True, max_new_tokens=9)
    requests = [request("ab=", do_sample=True, temperature=0.6, **asked_for)]
    seen: dict[str, Any] = {}

    def stop(self: Any, *args: Any, generation_config: GenerationConfig, **kwargs: Any) -> None:
        seen["hf"] = generation_config
        raise Stopped

    with patch.object(GenerationMixin, "_sample", stop), pytest.raises(Stopped):
        asked(hf, requests)
    with patch.object(Decoder, "generate", side_effect=Stopped) as spy, pytest.raises(Stopped):
        asked(lm, requests)
    want, (params,) = seen["hf"], spy.call_args.kwargs["params"]
    got = (params.temperature, params.top_k, params.top_p, params.min_p)
    assert got == (want.temperature, want.top_k, want.top_p, want.min_p or 0.0)
    assert spy.call_args.kwargs["max_new_tokens"] == want.max_length - 3
    assert set(spy.call_args.kwargs["stop_token_ids"]) == {want.eos_token_id, 1}


@pytest.mark.parametrize(
    ("gen_kwargs", "named"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids"),
        ({"min_length": 4}, "min_length"),
        ({"stop_strings": ["a"]}, "stop_strings"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"typical_p": 0.5, **SAMPLED}, "typical_p"),
        ({"top_h": 0.5, **SAMPLED}, "top_h"),
        ({"tempreature": 0.5}, "tempreature"),
        ({"stop": ["a"]}, "stop"),
        ({"max_length": 30}, "max_length"),
        ({"max_gen_toks": 0}, "max_gen_toks"),
        ({"max_gen_toks": 64}, "max_gen_toks"),
        ({"until": [""]}, "until"),
        ({"do_sample": True}, "temperature"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": "yes"}, "do_sample"),
        ({**SAMPLED, "top_p": 1.5}, "top_p"),
    ],
)
def test_requests_that_cannot_be_honoured_are_refused(gen_kwargs: Any, named: str, checkpoint: str) -> None:
    lm = exploring(checkpoint)
    with patch.object(Decoder, "generate", side_effect=AssertionError("drawn")), pytest.raises(ValueError, match=named):
        asked(
            lm,
            [
                request(
                    "ab=",
                ),
                request("ab=", **gen_kwargs),
            ],
        )


def test_values_that_ask_for_nothing_are_not_refused(checkpoint: str) -> None:
    lm = exploring(checkpoint, sampling_seed=1)
    off = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0, "max_time": None}
    want = asked(lm, [request("ab=", **SAMPLED)])
    assert asked(exploring(checkpoint, sampling_seed=1), [request("ab=", **SAMPLED, **off)]) == want


@pytest.mark.parametrize("sampled", [True, False])
def test_what_the_model_itself_asks_for_is_refused_too(sampled: bool, checkpoint: str) -> None:
    lm, gen_kwargs = exploring(checkpoint), SAMPLED if sampled else {}
    lm.model.generation_config.repetition_penalty = 1.05
    with pytest.raises(ArgumentError, match=r"generation_config.repetition_penalty must be 1 .*got 1.05"):
        asked(lm, [request("ab=", **gen_kwargs)])
    asked(lm, [request("ab=", **gen_kwargs, repetition_penalty=1.0)])  # the request's goes before


def test_images_are_refused(checkpoint: str) -> None:
    instance = Instance("generate_until", {}, ("ab=", {}, {"visual": []}), 0, ("task", 0, 1))
    with pytest.raises(ArgumentError, match="images"):
        asked(exploring(checkpoint), [instance])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"beta": "strong"}, "beta"),
        ({"stratified": True, "distinct": True}, "distinct"),
        ({"stratified": 1}, "stratified"),
        ({"distinct": "yes"}, "distinct"),
        ({"start": 3}, "start"),
        ({"max_candidates": 0}, "max_candidates"),
        ({"max_batch_rows": 0}, "max_batch_rows"),
        ({"sampling_seed": 1.5}, "sampling_seed"),
        ({"apply": "both"}, "apply"),
        ({"parallelize": True}, "parallelize"),
        ({"tp_plan": "auto"}, "tp_plan"),
        ({"beta": 0.1, "mixed_precision_dtype": "bfloat16"}, "mixed_precision_dtype"),
    ],
)
def test_arguments_are_checked_before_the_model_is_loaded(arguments: Any, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        exploring("no such model", **arguments)


def test_files_and_rows_that_do_not_fit(checkpoint: str) -> None:
    with pytest.raises(ArgumentError, match="start cannot be read"):
        exploring(checkpoint, start="no such file")
    with pytest.raises(ArgumentError, match=r"max_batch_rows must be .* n=5"):
        asked(exploring(checkpoint, max_batch_rows=4), [request("ab=", 0, 5, **SAMPLED)] * 5)
    with pytest.raises(ArgumentError, match="max_length"):
        asked(exploring(checkpoint, max_length=65), [request("ab=")])


def test_encoder_decoder_models_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)  # no weights
    letters().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        exploring(str(tmp_path))
