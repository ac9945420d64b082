"""What requests of lm-evaluation-harness ask for: which are samples of one prompt, and what ``generate`` would do.

Nothing that is asked for is left undone in silence, by a request's gen_kwargs or by the model's own GenerationConfig.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from transformers import GenerationConfig

from esamp_core.base.checks import require
from esamp_core.base.errors import ArgumentError
from esamp_core.bindings.hf_generate import left_undone


class Siblings(NamedTuple):
    """Requests that are samples of one prompt."""

    places: list[int]  # among all requests
    context: str
    gen_kwargs: dict[str, Any]


def find_siblings(requests: Sequence[Any]) -> list[Siblings]:
    """Equal requests of one document, ``repeats`` of them at a time.  Raises ArgumentError.

    So two documents of one text are two prompts, as are the copies of a document that fill up a rank which has fewer.
    """
    equal: dict[Hashable, list[int]] = {}
    for place, request in enumerate(requests):
        require(len(request.args) == 2, "requests", "be texts with gen_kwargs, without images or audio", request.args)
        key = (request.task_name, request.doc_id, request.args[0], key_of(request.args[1]))
        equal.setdefault(key, []).append(place)
    found = []
    for places in equal.values():
        repeats = requests[places[0]].repeats or len(places)
        sets = [places[i : i + repeats] for i in range(0, len(places), repeats)]
        found += [Siblings(part, *requests[part[0]].args) for part in sets]
    return found


def key_of(gen_kwargs: dict[str, Any]) -> str:
    """The same for equal ones.  Raises ArgumentError."""
    require(isinstance(gen_kwargs, dict), "gen_kwargs", "be a dict", gen_kwargs)
    return repr(sorted(gen_kwargs.items()))


def requested_config(own: GenerationConfig, asked: dict[str, Any]) -> GenerationConfig:
    """What ``generate`` goes by when HFLM calls it.

    own: the model's.  asked: gen_kwargs, normalised, without until and max_gen_toks.  Raises ArgumentError for what
    cannot be honoured.
    """
    do_sample, temperature = asked["do_sample"], asked.get("temperature", 0.0)  # never the model's own
    require(isinstance(do_sample, bool), "gen_kwargs.do_sample", "be True or False", do_sample)
    require(not do_sample or temperature > 0, "gen_kwargs.temperature", "be above 0 with do_sample=True", temperature)
    length = asked.get("max_length")
    require(length is None, "gen_kwargs.max_length", "be left out: it counts the prompt; give max_gen_toks", length)
    config = copy.deepcopy(own)
    if config.top_k is None:
        config.top_k = 50  # the only one of generate's own defaults that changes a token
    if not do_sample:
        asked = {name: value for name, value in asked.items() if name != "temperature"}  # of which update would warn
    for name, value in config.update(**asked).items():
        raise ArgumentError(f"gen_kwargs.{name} is not known to generate, got {value!r}")
    for name, (value, off) in left_undone(config).items():
        where = f"gen_kwargs.{name}" if name in asked else f"the model's generation_config.{name}"
        hint = "" if name in asked else "; gen_kwargs may say otherwise"
        raise ArgumentError(f"{where} must be {off} or left out{hint}, got {value!r}")
    return config
