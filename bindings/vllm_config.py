"""What the user asks of the vLLM plugin, and what it refuses: at start-up per engine, at admission per request."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from esamp_core.base.checks import is_int, is_real, require
from esamp_core.base.config import DistillerConfig, SamplingParams
from esamp_core.base.errors import ArgumentError, UnsupportedModelError

KEY = "esamp"
SWITCH = "ESAMP_VLLM"  # the environment variable that stands for the settings
# Speculators that look at tokens alone.  Others are fed the target's hidden states, beside which ours travel.
TOKEN_SPECULATORS = ("ngram", "draft_model")


@dataclass(frozen=True)
class RequestParams:
    """What one request asks for."""

    beta: float
    group: str | int | None = None  # requests of one group share a Distiller; None: those with the same prompt

    @staticmethod
    def read(where: str, given: Any, beta: float) -> RequestParams | None:
        """From an object, or True or False in its place.  beta: unless it names one.  None: it does not explore.

        Raises ArgumentError.
        """
        if isinstance(given, (bool, int)) and given in (0, 1):  # an OpenAI server may make 1 of true
            given = {} if given else {"beta": 0.0}
        require(isinstance(given, Mapping), where, "be true, false, or an object", _shown(given))
        _check_keys(where, given, [f.name for f in fields(RequestParams)])
        group = given.get("group")
        ok = group is None or isinstance(group, str) or (is_int(group) and -(2**63) <= group < 2**64)
        require(ok, f"{where}.group", "be a string or a 64-bit integer", _shown(group))
        beta = given.get("beta", beta)
        require(is_real(beta), f"{where}.beta", "be a number", _shown(beta))
        SamplingParams(beta=beta)
        return None if beta == 0 else RequestParams(float(beta), group)


@dataclass(frozen=True)
class PluginConfig:
    """``--additional-config '{"esamp": {...}}'``, or the same object as JSON in the environment variable ESAMP_VLLM.

    ``true`` (and ``ESAMP_VLLM=1``) stands for ``{"default": {}}``.

    default: what requests get that do not say; an object as a request's, or true.  Default: they are left alone.
    beta: strength of exploration where none is named. Default that of ``SamplingParams``.
    shallow_layer: index of the block whose output is the shallow tap. Default 0.
    max_groups: Distiller slots; when all are in use, further requests are sampled plainly. Default 64.
    log_interval: seconds between two log lines. Default 10.
    distiller: fields of DistillerConfig, as a JSON object; weight_dtype is "float32" or "bfloat16".
    """

    default: RequestParams | None = None
    beta: float = SamplingParams.beta
    shallow_layer: int = 0
    max_groups: int = 64
    log_interval: float = 10.0
    distiller: DistillerConfig = field(default_factory=DistillerConfig)

    def __post_init__(self) -> None:
        SamplingParams(beta=self.beta)
        ok = is_int(self.shallow_layer) and self.shallow_layer >= 0
        require(ok, "esamp.shallow_layer", "be an integer >= 0", self.shallow_layer)
        ok = is_int(self.max_groups) and 1 <= self.max_groups <= 65536
        require(ok, "esamp.max_groups", "be an integer in 1..65536", self.max_groups)
        ok = is_real(self.log_interval) and self.log_interval > 0
        require(ok, "esamp.log_interval", "be a number of seconds > 0", self.log_interval)
        require(self.distiller.target == "deep", "esamp.distiller.target", 'be "deep"', self.distiller.target)

    @staticmethod
    def read(vllm_config: Any) -> PluginConfig:
        """An engine's.  Raises ArgumentError."""
        given = dict(settings_of(vllm_config) or {})
        _check_keys("esamp", given, [f.name for f in fields(PluginConfig)])
        distiller = given.pop("distiller", {})
        require(isinstance(distiller, Mapping), "esamp.distiller", "be an object", distiller)
        _check_keys("esamp.distiller", distiller, [f.name for f in fields(DistillerConfig)])
        distiller = dict(distiller)
        if "weight_dtype" in distiller:
            dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
            name = distiller["weight_dtype"]
            require(name in dtypes, "esamp.distiller.weight_dtype", 'be "float32" or "bfloat16"', name)
            distiller["weight_dtype"] = dtypes[name]
        default, beta = given.pop("default", None), given.get("beta", SamplingParams.beta)
        require(is_real(beta), "esamp.beta", "be a number", beta)
        asked = None if default is None else RequestParams.read("esamp.default", default, beta)
        return PluginConfig(asked, **given, distiller=DistillerConfig(**distiller))


def settings_of(vllm_config: Any) -> Mapping[str, Any] | None:
    """The engine's settings as they were given; None where it is not to explore.  Raises ArgumentError."""
    additional = vllm_config.additional_config
    where, given = "additional_config.esamp", additional.get(KEY) if isinstance(additional, Mapping) else None
    if given is None and (text := os.environ.get(SWITCH, "").strip()):
        where = SWITCH
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            raise ArgumentError(f"{SWITCH} must be 1, 0, or a JSON object, got {_shown(text)}") from None
    if isinstance(given, (bool, int)) and given in (0, 1):
        given = {"default": True} if given else None
    require(given is None or isinstance(given, Mapping), where, "be true, false, or an object", given)
    return given


def adopt_switch(vllm_config: Any) -> None:
    """Write settings of the environment into the engine's own, in whose name it stores what it compiles: a graph that
    was compiled without the tap must not be found."""
    settings = settings_of(vllm_config)
    if settings is not None and isinstance(vllm_config.additional_config, Mapping):
        vllm_config.additional_config = {**vllm_config.additional_config, KEY: dict(settings)}


def _check_keys(where: str, given: Mapping[str, Any], names: list[str]) -> None:
    unknown = sorted(str(name)[:40] for name in set(given) - set(names))
    require(not unknown, where, f"have only the keys {', '.join(names)}", unknown[:8])


def _shown(value: object) -> str:
    """A hostile value in a short text."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_engine(vllm_config: Any) -> None:
    """Refuse what exploration cannot work with, in one line.  Raises ArgumentError, UnsupportedModelError."""
    PluginConfig.read(vllm_config)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    v2, speculative = bool(getattr(vllm_config, "use_v2_model_runner", False)), vllm_config.speculative_config
    method = getattr(speculative, "method", None)
    refused = {
        "a pooling model": model.runner_type == "pooling",
        "pipeline parallelism (the shallow and the deep state are in different processes)": (
            parallel.pipeline_parallel_size > 1
        ),
        "speculative decoding in the V1 model runner (which then tells nobody whose rows it samples)": (
            speculative is not None and not v2
        ),
        f"speculative decoding by {method} (it reads the hidden states that ours travel in); "
        f"{' and '.join(TOKEN_SPECULATORS)} work": (speculative is not None and v2 and method not in TOKEN_SPECULATORS),
        "adaptive verification of drafts (which rows there are is known to the device alone)": bool(
            getattr(speculative, "enable_adaptive_verification", False)
        ),
        "batch-sharded sampling (each rank has other rows)": bool(parallel.enable_batch_sharded_sampling),
        "multimodal rotary positions (a row's place in its text is not read from them)": model.uses_mrope,
        "micro-batching (DBO), which was not tried": bool(getattr(parallel, "use_ubatching", False)),
    }
    for feature, asked in refused.items():
        if asked:
            raise UnsupportedModelError(f"esamp does not work with {feature}; switch one of them off")


def read_request(params: Any, config: PluginConfig) -> RequestParams | None:
    """What a request asks for: ``extra_args`` of vLLM's SamplingParams, ``vllm_xargs`` of its OpenAI server.

    ``{"esamp": true}``, ``{"esamp": {"beta": 0.2, "group": "problem 7"}}``, the object as JSON text, or flat:
    ``{"esamp_beta": 0.2, "esamp_group": "problem 7"}``.  ``{"esamp": false}`` and beta 0 do not explore.  One that does
    not say gets the engine's default, unless its temperature is 0: who asks for the likeliest answer is to get it.
    None: it does not explore.  Raises ArgumentError.
    """
    extra = params.extra_args or {}
    require(isinstance(extra, Mapping), "extra_args", "be an object", _shown(extra))
    flat = {n.removeprefix(f"{KEY}_"): v for n, v in extra.items() if isinstance(n, str) and n.startswith(f"{KEY}_")}
    given = extra.get(KEY)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            text = _shown(given)
            raise ArgumentError(f"{KEY} must be true, false, or an object or its JSON text, got {text}") from None
    if given is None and not flat:
        return config.default if params.temperature != 0 else None
    if flat:
        _check_keys(f"{KEY}_*", flat, [f.name for f in fields(RequestParams)])
        if isinstance(given, Mapping):
            twice = sorted(set(flat) & set(given))
            require(not twice, KEY, "name nothing that is also given as esamp_<name>", twice)
            given = {**given, **flat}
        elif given in (None, True):
            given = flat
        else:
            require(given is False or given == 0, KEY, "be true, false, or an object", _shown(given))
            return None
    return RequestParams.read(KEY, given, config.beta)
