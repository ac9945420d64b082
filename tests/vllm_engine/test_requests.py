"""What is asked and what is refused, per request and at start-up, each in one line that says what and why."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from esamp_core.base.errors import ArgumentError, UnsupportedModelError
from esamp_core.bindings.vllm_config import PluginConfig, RequestParams, adopt_switch, check_engine, read_request
from esamp_core.bindings.vllm_models import _adapters, _digits, _position, check_architecture
from esamp_core.bindings.vllm_plugin import ExploratoryProcessor

CONFIG = PluginConfig(beta=0.75)
DEEP = "[" * 100_000


def request(extra: Any, **given: Any) -> SamplingParams:
    return SamplingParams(extra_args=extra, **given)


@pytest.mark.parametrize(
    ("extra", "want"),
    [
        ({"esamp": True}, RequestParams(0.75)),
        ({"esamp": 1}, RequestParams(0.75)),  # what an OpenAI server may make of true
        ({"esamp": "true"}, RequestParams(0.75)),
        ({"esamp": {}}, RequestParams(0.75)),
        ({"esamp": {"beta": 2, "group": 7}}, RequestParams(2.0, 7)),
        ({"esamp": '{"beta": 0.5, "group": "a"}'}, RequestParams(0.5, "a")),
        ({"esamp_beta": 0.5}, RequestParams(0.5)),
        ({"esamp_group": "a", "other": [1]}, RequestParams(0.75, "a")),
        ({"esamp": True, "esamp_beta": -0.5}, RequestParams(-0.5)),
        ({"esamp": {"group": "b"}, "esamp_beta": 0.5}, RequestParams(0.5, "b")),
        ({"esamp": False}, None),
        ({"esamp": 0}, None),
        ({"esamp": "false"}, None),
        ({"esamp": False, "esamp_beta": 0.5}, None),
        ({"esamp": {"beta": 0}}, None),
        ({"esamp_beta": 0.0}, None),
        ({}, None),
        (None, None),
        ({"other": 3, 7: 1}, None),
    ],
)
def test_request_is_read(extra: Any, want: RequestParams | None) -> None:
    ExploratoryProcessor.validate_params(request(extra))
    assert read_request(request(extra), CONFIG) == want
    # With a default, those that do not say get it, but not where the likeliest answer is asked for.
    default = PluginConfig(RequestParams(0.3), beta=0.75)
    says = any(str(name).startswith("esamp") for name in extra or {})
    assert read_request(request(extra), default) == (want if says else RequestParams(0.3))
    assert read_request(request(extra, temperature=0.0), default) == (want if says else None)


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({"esamp": {"strength": 1}}, "esamp must have only the keys beta, group"),
        ({"esamp": {"sample_index": 2**63}}, "esamp must have only the keys beta, group"),
        ({"esamp": '{"group": "x", "sample_index": 9223372036854775808}'}, "only the keys"),
        ({"esamp_strength": 1}, r"esamp_\* must have only the keys beta, group"),
        ({"esamp": {"group": [1]}}, "esamp.group must be a string or a 64-bit integer"),
        ({"esamp": {"group": True}}, "esamp.group must be"),
        ({"esamp": {"group": 2**64}}, "esamp.group must be"),
        ({"esamp_group": 1.5}, "esamp.group must be"),
        ({"esamp_group": 10**5000}, "esamp.group must be .* 'a huge int'"),
        ({"esamp": {"beta": "much"}}, "beta must be a number"),
        ({"esamp_beta": float("nan")}, "beta must be a number"),
        ({"esamp_beta": float("inf")}, "beta must be a number"),
        ({"esamp_beta": 1e300}, "beta must be a number in"),
        ({"esamp_beta": 10**400}, "beta must be a number"),
        ({"esamp_beta": True}, "beta must be a number"),
        ({"esamp": {"beta": 1}, "esamp_beta": 1}, "esamp must name nothing that is also given"),
        ({"esamp": "{"}, "esamp must be true, false, or an object or its JSON text"),
        ({"esamp": DEEP}, "esamp must be true, false, or an object or its JSON text"),
        ({"esamp": "NaN"}, "esamp must be true, false, or an object"),
        ({"esamp": "7"}, "esamp must be true, false, or an object"),
        ({"esamp": 7}, "esamp must be true, false, or an object"),
        ({"esamp": [1] * 100_000}, "esamp must be true, false, or an object"),
        ({"esamp": 0.5}, "esamp must be true, false, or an object"),
        ({"esamp": 7, "esamp_beta": 1.0}, "esamp must be true, false, or an object"),
        ({"esamp": {"x" * 100_000: 1}}, "only the keys"),
        ({"esamp": {str(i): i for i in range(100_000)}}, "only the keys"),
        ({"esamp": {1: 2, None: 3}}, "only the keys"),
        ([("esamp", 1)], "extra_args must be an object"),
    ],
)
def test_request_is_refused(extra: Any, complaint: str) -> None:
    """At validation, in a short line: a hostile value reaches no engine, and no log as a whole."""
    with pytest.raises(ArgumentError, match=complaint) as raised:
        # Not vLLM's SamplingParams: it refuses some of these itself, in this version.
        ExploratoryProcessor.validate_params(SimpleNamespace(extra_args=extra, temperature=1.0))
    assert len(str(raised.value)) < 400


def engine_config(model: str, esamp: Any = None, **given: Any) -> Any:
    options = {"additional_config": {} if esamp is None else {"esamp": esamp}}
    return EngineArgs(model=model, dtype="float32", max_model_len=64, **{**options, **given}).create_engine_config()


def test_engine_is_accepted(qwen3: str) -> None:
    config = engine_config(
        qwen3, {"beta": 0.5, "default": {"group": "all"}, "distiller": {"rank": 8, "weight_dtype": "bfloat16"}}
    )
    check_engine(config)
    read = PluginConfig.read(config)
    assert read.beta == 0.5 and read.distiller.rank == 8 and read.distiller.weight_dtype == torch.bfloat16
    assert read.default == RequestParams(0.5, "all")


@pytest.mark.parametrize(
    ("esamp", "complaint"),
    [
        ({"rank": 8}, "have only the keys default, beta, "),
        ({"max_candidates": 8}, "have only the keys default, beta, "),
        ({"default": {"strength": 1}}, "esamp.default must have only the keys beta, group"),
        ({"default": "yes"}, "esamp.default must be true, false, or an object"),
        ({"distiller": {"ranks": 8}}, "esamp.distiller must have only the keys rank, "),
        ({"distiller": {"weight_dtype": "float16"}}, "weight_dtype must be"),
        ({"distiller": {"rank": 0}}, "rank must be"),
        ({"distiller": {"target": "choice"}}, 'esamp.distiller.target must be "deep"'),
        ({"beta": "x"}, "beta must be"),
        ({"max_groups": 0}, "esamp.max_groups must be"),
        ({"shallow_layer": -1}, "esamp.shallow_layer must be"),
        ({"log_interval": 0}, "esamp.log_interval must be"),
        ([], "additional_config.esamp must be true, false, or an object"),
    ],
)
def test_settings_are_refused(qwen3: str, esamp: Any, complaint: str) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        check_engine(engine_config(qwen3, esamp))


@pytest.mark.parametrize("text", ["{", "yes", "7", "[1]", DEEP])
def test_switch_is_refused(qwen3: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config(qwen3)
    monkeypatch.setenv("ESAMP_VLLM", text)
    with pytest.raises(ArgumentError, match="ESAMP_VLLM must be") as raised:
        PluginConfig.read(config)
    assert len(str(raised.value)) < 300


def test_switch_is_part_of_what_compiled_code_is_stored_under(qwen3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, switched, given = engine_config(qwen3), engine_config(qwen3), engine_config(qwen3, {"default": True})
    monkeypatch.setenv("ESAMP_VLLM", "1")
    adopt_switch(switched)
    assert switched.compute_hash() == given.compute_hash() != plain.compute_hash()
    assert switched.additional_config == given.additional_config
    for off in ("", "0", "false"):
        monkeypatch.setenv("ESAMP_VLLM", off)
        adopt_switch(plain)
        assert plain.additional_config == {}


NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}


@pytest.mark.parametrize(
    ("given", "v2", "complaint"),
    [
        ({"pipeline_parallel_size": 2}, "0", "pipeline parallelism"),
        ({"runner": "pooling"}, "0", "a pooling model"),
        ({"speculative_config": NGRAM}, "0", "speculative decoding in the V1 model runner"),
        ({"speculative_config": {**NGRAM, "method": "suffix"}}, "1", "speculative decoding by suffix"),
        ({"uses_mrope": True}, "0", "multimodal rotary positions"),
        ({"use_ubatching": True}, "0", "micro-batching"),
        ({"enable_batch_sharded_sampling": True}, "1", "batch-sharded sampling"),
        ({"enable_adaptive_verification": True}, "1", "adaptive verification"),
    ],
)
def test_engine_is_refused(qwen3: str, given: dict[str, Any], v2: str, complaint: str) -> None:
    options = {k: v for k, v in given.items() if k in ("pipeline_parallel_size", "runner")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = engine_config(qwen3, {}, **options)
    fake = SimpleNamespace(**{k: getattr(config, k) for k in ("additional_config", "speculative_config")})
    fake.use_v2_model_runner = v2 == "1"
    model, parallel = config.model_config, config.parallel_config
    fake.model_config = SimpleNamespace(runner_type=model.runner_type, uses_mrope=given.get("uses_mrope", False))
    fake.parallel_config = SimpleNamespace(
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        enable_batch_sharded_sampling=given.get("enable_batch_sharded_sampling", False),
        use_ubatching=given.get("use_ubatching", False),
    )
    if "speculative_config" in given or "enable_adaptive_verification" in given:
        drafts = {"method": "ngram", "enable_adaptive_verification": given.get("enable_adaptive_verification", False)}
        fake.speculative_config = SimpleNamespace(**{**drafts, **given.get("speculative_config", {})})
    with pytest.raises(UnsupportedModelError, match=complaint) as raised:
        check_engine(fake)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_speculators_of_tokens_are_accepted_in_v2(qwen3: str, method: str) -> None:
    config = engine_config(qwen3, {})
    drafts = SimpleNamespace(method=method, enable_adaptive_verification=False)
    names = ("additional_config", "model_config", "parallel_config")
    same = {name: getattr(config, name) for name in names}
    check_engine(SimpleNamespace(**same, speculative_config=drafts, use_v2_model_runner=True))


def test_architecture_without_the_interface_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="GPTBigCodeForCausalLM: vLLM gives no access"):
        check_architecture(type("GPTBigCodeForCausalLM", (torch.nn.Module,), {}))


def test_plugin_that_was_not_loaded_is_missed(qwen3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing would explore, and nobody would say so."""
    config = engine_config(qwen3, {})
    monkeypatch.setattr("esamp_core.bindings.vllm_models._bases", {})
    with pytest.raises(UnsupportedModelError, match=r"no tap for architecture Qwen3ForCausalLM.*VLLM_PLUGINS"):
        ExploratoryProcessor(config, torch.device("cpu"), False)


def test_other_version_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    monkeypatch.setattr(vllm, "__version__", "0.40.1")
    with pytest.warns(UserWarning, match=r"tried with vLLM 0\.32, this is 0\.40\.1"):
        check_architecture(Qwen3ForCausalLM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_survive_any_dtype(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 127, 128, 255, 257, 131_071, 1_048_577, 128**4 - 1])
    assert torch.equal(_position(_digits(positions, dtype)), positions)


def test_adapters_that_do_not_fit_the_rows_are_noticed() -> None:
    mapping = SimpleNamespace(_last_mapping=SimpleNamespace(prompt_mapping=(1, 0)))
    assert _adapters(SimpleNamespace(lora_manager=mapping), 2) == (1, 0) and _adapters(SimpleNamespace(), 2) is None
    with pytest.raises(AssertionError, match="vLLM mapped 2 rows to adapters, 3 are sampled"):
        _adapters(SimpleNamespace(lora_manager=mapping), 3)
