"""What is refused, per request and at start-up, each in one line that says what and why."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import PROCESSOR
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from esamp_core.base.errors import ArgumentError, UnsupportedModelError
from esamp_core.base.tensors import Head
from esamp_core.bindings.vllm_config import PluginConfig, check_engine, read_request
from esamp_core.bindings.vllm_head import _check_head, _read_head
from esamp_core.bindings.vllm_models import _digits, _position, check_architecture
from esamp_core.bindings.vllm_plugin import ExploratoryProcessor


def request(esamp: Any, **given: Any) -> SamplingParams:
    return SamplingParams(extra_args=None if esamp is None else {"esamp": esamp}, **given)


def test_request_takes_the_engines_own_parameters() -> None:
    asked = read_request(request({"group": 7}, temperature=0.5, top_k=-1, top_p=0.9, min_p=0.1, seed=3), 0.75)
    assert asked is not None and asked.group == 7 and not asked.edited and asked.sample_index == 0
    ours = asked.params
    assert (ours.temperature, ours.top_k, ours.top_p, ours.min_p, ours.beta, ours.seed) == (0.5, 0, 0.9, 0.1, 0.75, 3)
    greedy = read_request(request('{"beta": 0.5, "sample_index": 2}', temperature=0, top_k=5))
    assert greedy is not None and greedy.params.temperature == 0 and greedy.params.beta == 0.5
    assert greedy.sample_index == 2 and greedy.group is None


@pytest.mark.parametrize("esamp", [None, {"beta": 0}, '{"beta": 0.0}'])
def test_request_that_does_not_explore(esamp: Any) -> None:
    assert read_request(request(esamp, presence_penalty=1.0)) is None


@pytest.mark.parametrize("given", [{"logit_bias": {3: 1.0}}, {"allowed_token_ids": [3]}, {"min_tokens": 2}])
def test_request_whose_logits_are_edited(given: dict[str, Any]) -> None:
    asked = read_request(request({}, **given))
    assert asked is not None and asked.edited


@pytest.mark.parametrize(
    ("esamp", "given", "complaint"),
    [
        ({}, {"presence_penalty": 0.5}, "presence_penalty is applied after"),
        ({}, {"frequency_penalty": 0.5}, "frequency_penalty is applied after"),
        ({}, {"repetition_penalty": 1.1}, "repetition_penalty is applied after"),
        ({}, {"thinking_token_budget": 5}, "thinking_token_budget is applied after"),
        ({"strength": 1}, {}, "have only the keys group, beta, sample_index"),
        ({"group": [1]}, {}, "group must be a string or an integer"),
        ({"beta": "much"}, {}, "beta must be a number"),
        ({"sample_index": -1}, {}, "sample_index must be an integer >= 0"),
        ("{", {}, "must be an object or its JSON text"),
        ("7", {}, "must be an object or its JSON text"),
        (True, {}, "must be an object or its JSON text"),
    ],
)
def test_request_is_refused(esamp: Any, given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ExploratoryProcessor.validate_params(request(esamp, **given))


def engine_config(model: str, esamp: Any = None, **given: Any) -> Any:
    options = {"logits_processors": [PROCESSOR], "additional_config": {"esamp": {} if esamp is None else esamp}}
    return EngineArgs(model=model, dtype="float32", max_model_len=64, **{**options, **given}).create_engine_config()


def test_engine_is_accepted(qwen3: str) -> None:
    config = engine_config(qwen3, {"beta": 0.5, "distiller": {"rank": 8, "weight_dtype": "bfloat16"}})
    check_engine(config)
    read = PluginConfig.read(config)
    assert read.beta == 0.5 and read.distiller.rank == 8 and read.distiller.weight_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("esamp", "complaint"),
    [
        ({"rank": 8}, "have only the keys beta, "),
        ({"distiller": {"ranks": 8}}, "esamp.distiller must have only the keys rank, "),
        ({"distiller": {"weight_dtype": "float16"}}, "weight_dtype must be"),
        ({"distiller": {"rank": 0}}, "rank must be"),
        ({"beta": "x"}, "beta must be"),
        ({"max_groups": 0}, "esamp.max_groups must be"),
        ({"max_candidates": 2000}, "esamp.max_candidates must be"),
        ({"shallow_layer": -1}, "esamp.shallow_layer must be"),
        ({"log_interval": 0}, "esamp.log_interval must be"),
        ([], "additional_config.esamp must be an object"),
    ],
)
def test_settings_are_refused(qwen3: str, esamp: Any, complaint: str) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        check_engine(engine_config(qwen3, esamp))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"enable_lora": True}, "LoRA"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"runner": "pooling"}, "a pooling model"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding",
        ),
        (
            {"tensor_parallel_size": 2, "additional_config": {"esamp": {"distiller": {"target": "choice"}}}},
            "whole head",
        ),
        ({"additional_config": {}}, "needs --additional-config"),
        ({"logits_processors": None}, "nothing draws: add --logits-processors"),
    ],
)
def test_engine_is_refused(qwen3: str, given: dict[str, Any], complaint: str) -> None:
    with pytest.raises((ArgumentError, UnsupportedModelError), match=complaint):
        check_engine(engine_config(qwen3, **given))


def test_architecture_without_the_interface_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="GPTBigCodeForCausalLM: vLLM gives no access"):
        check_architecture(type("GPTBigCodeForCausalLM", (torch.nn.Module,), {}))


def test_plugin_that_was_not_loaded_is_missed(qwen3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config(qwen3)
    monkeypatch.setattr("esamp_core.bindings.vllm_models._bases", {})
    with pytest.raises(UnsupportedModelError, match=r"no tap for architecture Qwen3ForCausalLM.*VLLM_PLUGINS"):
        ExploratoryProcessor(config, torch.device("cpu"), False)


def test_other_version_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    monkeypatch.setattr(vllm, "__version__", "0.40.1")
    with pytest.warns(UserWarning, match=r"tried with vLLM 0\.32, this is 0\.40\.1"):
        check_architecture(Qwen3ForCausalLM)


def model_with_head(**changes: Any) -> Any:
    """The parts of a model that are read for its head."""
    shard = SimpleNamespace(num_org_elements=6, org_vocab_start_index=6)
    method = type(changes.pop("method", "UnquantizedEmbeddingMethod"), (), {})()
    head = {"weight": torch.zeros(8, 4), "shard_indices": shard, "quant_method": method, "bias": None}
    processor = {"scale": 1.0, "soft_cap": None}
    for part in (head, processor):
        part.update({name: value for name, value in changes.items() if name in part})
    return SimpleNamespace(lm_head=SimpleNamespace(**head), logits_processor=SimpleNamespace(**processor))


def test_head_is_read_without_padding() -> None:
    head = _read_head(model_with_head(soft_cap=30.0, bias=torch.arange(8.0)))
    assert head.vocab_size == 6 and head.vocab_start == 6 and head.softcap == 30.0
    assert head.bias is not None and head.bias.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"method": "GPTQLinearMethod"}, "lm_head unquantised"),
        ({"weight": torch.zeros(8, 4, dtype=torch.int8)}, "lm_head unquantised"),
        ({"weight": None}, "cannot read"),
        ({"scale": 0.5, "soft_cap": 30.0}, "scales after its soft-cap"),
    ],
)
def test_head_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedModelError, match=complaint):
        _read_head(model_with_head(**changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_model_does_to_its_logits_by_itself_is_noticed(dtype: torch.dtype) -> None:
    """Of the size that real heads have: a cap bends the logits of unit states by no more than rounding does."""
    weight = (0.02 * torch.randn(50, 2048, generator=torch.Generator().manual_seed(1))).to(dtype)
    head = Head(weight)
    _check_head(head, lambda deep: deep @ weight.T, "Plain")
    for own in (lambda x: 30 * torch.tanh(x / 30), lambda x: 1.1 * x):
        with pytest.raises(UnsupportedModelError, match="its logits differ"):
            _check_head(head, lambda deep, own=own: own(deep @ weight.T), "Capped")  # type: ignore[misc]
    capped = dataclasses.replace(head, softcap=30.0)
    _check_head(capped, lambda deep: 30 * torch.tanh((deep @ weight.T) / 30), "Capped")
    with pytest.raises(UnsupportedModelError, match="its logits differ"):  # large states saturate, small ones do not
        _check_head(capped, lambda deep: 30 * torch.tanh(1.1 * (deep @ weight.T) / 30), "Scaled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_survive_any_dtype(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 127, 128, 255, 257, 131_071, 1_048_577, 128**4 - 1])
    assert torch.equal(_position(_digits(positions, dtype)), positions)
