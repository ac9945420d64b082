"""What the user asks of the vLLM plugin, and what it refuses: at start-up per engine, at admission per request."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from esamp_core.base.checks import is_int, is_real, require
from esamp_core.base.config import DistillerConfig, SamplingParams
from esamp_core.base.errors import ArgumentError, UnsupportedModelError

KEY = "esamp"
PROCESSOR = "esamp_core.bindings.vllm_plugin:ExploratoryProcessor"


@dataclass(frozen=True)
class PluginConfig:
    """``--additional-config '{"esamp": {...}}'``.

    beta: strength of exploration of requests that name none. Default that of ``SamplingParams``.
    shallow_layer: index of the block whose output is the shallow tap. Default 0.
    max_groups: Distiller slots; when all are in use, further requests are sampled untouched. Default 64.
    max_candidates: tokens scored per row. Default 256.
    log_interval: seconds between two log lines. Default 10.
    distiller: fields of DistillerConfig, as a JSON object; weight_dtype is "float32" or "bfloat16".
    """

    beta: float = SamplingParams.beta
    shallow_layer: int = 0
    max_groups: int = 64
    max_candidates: int = 256
    log_interval: float = 10.0
    distiller: DistillerConfig = field(default_factory=DistillerConfig)

    def __post_init__(self) -> None:
        SamplingParams(beta=self.beta)
        ok = is_int(self.shallow_layer) and self.shallow_layer >= 0
        require(ok, "esamp.shallow_layer", "be an integer >= 0", self.shallow_layer)
        ok = is_int(self.max_groups) and 1 <= self.max_groups <= 65536
        require(ok, "esamp.max_groups", "be an integer in 1..65536", self.max_groups)
        ok = is_int(self.max_candidates) and 1 <= self.max_candidates <= 1024
        require(ok, "esamp.max_candidates", "be an integer in 1..1024", self.max_candidates)
        ok = is_real(self.log_interval) and self.log_interval > 0
        require(ok, "esamp.log_interval", "be a number of seconds > 0", self.log_interval)

    @staticmethod
    def read(vllm_config: Any) -> PluginConfig:
        """From the engine's ``additional_config``.  Raises ArgumentError."""
        given = dict(_entry(vllm_config) or {})
        _check_keys("esamp", given, PluginConfig)
        distiller = given.pop("distiller", {})
        require(isinstance(distiller, Mapping), "esamp.distiller", "be an object", distiller)
        _check_keys("esamp.distiller", distiller, DistillerConfig)
        distiller = dict(distiller)
        if "weight_dtype" in distiller:
            dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
            name = distiller["weight_dtype"]
            require(name in dtypes, "esamp.distiller.weight_dtype", 'be "float32" or "bfloat16"', name)
            distiller["weight_dtype"] = dtypes[name]
        return PluginConfig(**given, distiller=DistillerConfig(**distiller))


def _entry(vllm_config: Any) -> Mapping[str, Any] | None:
    additional = vllm_config.additional_config
    entry = additional.get(KEY) if isinstance(additional, Mapping) else None
    require(entry is None or isinstance(entry, Mapping), "additional_config.esamp", "be an object", entry)
    return entry


def _check_keys(where: str, given: Mapping[str, Any], cls: type) -> None:
    names = [f.name for f in fields(cls)]
    unknown = sorted(set(given) - set(names))
    require(not unknown, where, f"have only the keys {', '.join(names)}", unknown)


def is_configured(vllm_config: Any) -> bool:
    """Whether this engine is to explore: it has an ``esamp`` entry, which may be empty."""
    return _entry(vllm_config) is not None


def check_engine(vllm_config: Any) -> None:
    """Refuse what exploration cannot work with, in one line.  Raises ArgumentError, UnsupportedModelError."""
    PluginConfig.read(vllm_config)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if not is_configured(vllm_config):
        raise ArgumentError(
            "ExploratoryProcessor needs --additional-config '{\"esamp\": {}}': its settings, and what keeps vLLM from "
            "loading a graph compiled without the tap"
        )
    if not any(_is_ours(processor) for processor in model.logits_processors or ()):
        raise ArgumentError(f"additional_config has esamp, but nothing draws: add --logits-processors {PROCESSOR}")
    refused = {
        "a pooling model": model.runner_type == "pooling",
        "pipeline parallelism (the shallow and the deep state are in different processes)": (
            parallel.pipeline_parallel_size > 1
        ),
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA (an adapter's output head is not read)": vllm_config.lora_config is not None,
        "batch-sharded sampling": bool(parallel.enable_batch_sharded_sampling),
        "watermarking": getattr(vllm_config, "watermark_config", None) is not None,
        "prompt embeddings": model.enable_prompt_embeds,
        "multimodal rotary positions": model.uses_mrope,
        "micro-batching (DBO)": bool(getattr(parallel, "use_ubatching", False)),
        'distiller target "choice" with tensor parallelism (it needs the whole head)': (
            PluginConfig.read(vllm_config).distiller.target == "choice" and parallel.tensor_parallel_size > 1
        ),
    }
    for feature, asked in refused.items():
        if asked:
            raise UnsupportedModelError(f"esamp does not work with {feature}; switch one of them off")


def _is_ours(processor: object) -> bool:
    if isinstance(processor, type):
        return any(cls.__name__ == "ExploratoryProcessor" for cls in processor.__mro__)
    return processor == PROCESSOR


@dataclass(frozen=True)
class RequestParams:
    """What one request asks for."""

    group: Hashable | None  # None: its prompt
    sample_index: int
    params: SamplingParams
    edited: bool  # the engine edits its logits before they reach us


def read_request(params: Any, default_beta: float = SamplingParams.beta) -> RequestParams | None:
    """``SamplingParams(extra_args={"esamp": {"group": ..., "beta": ..., "sample_index": ...}})``, all three optional.

    The value may be the object's JSON text, which is what the OpenAI server's ``vllm_xargs`` can carry.
    Returns None for a request that does not ask to explore, or whose beta is 0.  Raises ArgumentError.
    """
    given = (params.extra_args or {}).get(KEY)
    if given is None:
        return None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise ArgumentError(f"extra_args.esamp must be an object or its JSON text, got {given!r}") from None
    require(isinstance(given, Mapping), "extra_args.esamp", "be an object or its JSON text", given)
    unknown = sorted(set(given) - {"group", "beta", "sample_index"})
    require(not unknown, "extra_args.esamp", "have only the keys group, beta, sample_index", unknown)
    group, sample_index = given.get("group"), given.get("sample_index", 0)
    ok = group is None or is_int(group) or isinstance(group, str)
    require(ok, "extra_args.esamp.group", "be a string or an integer", group)
    ok = is_int(sample_index) and sample_index >= 0
    require(ok, "extra_args.esamp.sample_index", "be an integer >= 0", sample_index)
    ours = SamplingParams(
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        beta=given.get("beta", default_beta),
        seed=params.seed,
    )
    if ours.beta == 0:
        return None
    _check_nothing_follows(params)
    edits = (
        params.logit_bias,
        params.allowed_token_ids,
        params.bad_words,
        params.structured_outputs,
        params.min_tokens,
    )
    return RequestParams(group, sample_index, ours, any(edits))


def _check_nothing_follows(params: Any) -> None:
    """What the engine does to logits after us would draw another token than ours."""
    after = {
        "presence_penalty": params.presence_penalty != 0,
        "frequency_penalty": params.frequency_penalty != 0,
        "repetition_penalty": params.repetition_penalty != 1,
        "thinking_token_budget": getattr(params, "thinking_token_budget", None) is not None,
        "trace_decode_token_ids": bool(getattr(params, "trace_decode_token_ids", None)),
    }
    for name, used in after.items():
        if used:
            raise ArgumentError(
                f"{name} is applied after exploration has drawn the token; leave it out, or leave out extra_args.esamp"
            )
