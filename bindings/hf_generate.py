"""What the transformers binding knows of a running ``generate()``: what it was asked for, and which rows go on.

A logits processor is told the tokens and the logits, a hook of the model less.  The rest stands in the frames of the
decoding loop that calls them, ``GenerationMixin._sample`` or another, and of ``generate``, and is read from there:
their arguments, and the mask of unfinished rows.  Nothing is written to them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any, NamedTuple

import transformers
from torch import Tensor
from transformers.generation import GenerationMixin

from esamp_core.base.config import SamplingParams
from esamp_core.base.errors import ArgumentError, UnsupportedModelError
from esamp_core.base.versions import tried_versions
from esamp_core.models.parts import ModelParts

# What generate puts behind custom processors and what, given a single finite logit, changes nothing.
_HARMLESS_AFTER = {
    *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TopHLogitsWarper"),
    *("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization"),
}
# generate's filters and what they are where they were not asked for.
_FILTERS = {"temperature": (None, 1.0), "top_k": (None, 0, 50), "top_p": (None, 1.0), "min_p": (None, 0.0)}
# Those that SamplingParams does not have.
_OTHER_FILTERS = {"typical_p": (None, 1.0), "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0), "top_h": (None,)}


class Loop(NamedTuple):
    """What the calling decoding loop knows; the names of its variables."""

    generation_config: Any
    logits_processor: Sequence[Any]
    stopping_criteria: Sequence[Any]
    unfinished_sequences: Tensor  # int64 [R], 1 or 0


def _code(name: str) -> CodeType | None:
    method = getattr(GenerationMixin, name, None)
    return None if method is None else inspect.unwrap(method).__code__


_SAMPLE, _BEAMS = _code("_sample"), _code("_beam_search")
_PREFILL, _GENERATE = _code("_prefill"), _code("generate")
_PROCESSORS = transformers.LogitsProcessorList.__call__.__code__
_OTHER_LOOPS = {
    _BEAMS: "beam search (num_beams > 1)",
    _code("_assisted_decoding"): "assisted generation (assistant_model, prompt_lookup_num_tokens)",
}


def calling_loop(parts: ModelParts) -> Loop:
    """What is known to the decoding loop that called the processor.  Raises UnsupportedModelError."""
    name, frame = type(parts.base_model).__name__, sys._getframe()
    while frame.f_back is not None and frame.f_code is not _SAMPLE and frame.f_code not in _OTHER_LOOPS:
        frame = frame.f_back
    if frame.f_code in _OTHER_LOOPS:
        raise UnsupportedModelError(f"{name}.generate cannot explore with {_OTHER_LOOPS[frame.f_code]}")
    known = frame.f_locals if frame.f_code is _SAMPLE else {}
    caller, found = known.get("self"), {field: known[field] for field in Loop._fields if field in known}
    if type(known) is dict:  # before Python 3.13 a snapshot, which would keep the loop's tensors alive
        known.clear()
    if len(found) < len(Loop._fields):
        raise UnsupportedModelError(
            f"{name}'s logits processor was not called by generate's own sampling loop, as known up to transformers "
            f"{tried_versions('transformers')[-1]} (this is {transformers.__version__}); other decoding loops are not "
            "supported"
        )
    if caller is not parts.base_model:
        raise UnsupportedModelError(
            f"{name}'s logits processor was called by another model's generate ({type(caller).__name__}); assistant "
            "models are not supported"
        )
    return Loop(**found)


class Call(NamedTuple):
    """A forward that a ``generate`` makes for its next tokens."""

    generation_config: Any  # generate's own copy, which tells one call from the next
    input_ids: Tensor  # [R, T] prompts, repeated as they are to be continued
    unfinished: Tensor | None  # int64 [R], 1 or 0; None where the loop keeps no such mask
    known_loop: bool  # transformers' own: one token per forward and row


def running_call(parts: ModelParts) -> Call | None:
    """The ``generate`` that makes the forward that is running, of this model; None if it is not made for a next token.

    That is: by nobody's generate, by a logits processor that asks the model something else, or for a part of a prompt.
    Raises UnsupportedModelError for assisted generation.
    """
    name, unfinished, loop, config, input_ids = type(parts.base_model).__name__, None, False, None, None
    found = False
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code in _OTHER_LOOPS and "beam" not in _OTHER_LOOPS[code]:
            raise UnsupportedModelError(f"{name}.generate cannot explore with {_OTHER_LOOPS[code]}")
        if not found and code is _PROCESSORS:
            return None
        if not found and code in (_SAMPLE, _BEAMS, _PREFILL, _GENERATE):
            known = frame.f_locals
            loop = loop or code in (_SAMPLE, _BEAMS)
            unfinished = known.get("unfinished_sequences", unfinished)
            part, parts_of = known.get("input_chunk"), known.get("input_chunks")
            if code is _GENERATE:
                found = known.get("self") is parts.base_model
                config, input_ids = known.get("generation_config"), known.get("input_ids")
            if type(known) is dict:  # before Python 3.13 a snapshot, which would keep the loop's tensors alive
                known.clear()
            if code is _PREFILL and parts_of is not None and part is not parts_of[-1]:
                return None
        frame = frame.f_back
    if not found:
        return None
    if config is None or not isinstance(input_ids, Tensor):
        raise UnsupportedModelError(
            f"{name}.generate does not have its generation_config and input_ids where transformers up to "
            f"{tried_versions('transformers')[-1]} has them (this is {transformers.__version__})"
        )
    return Call(config, input_ids, unfinished, loop)


def check_request(loop: Loop, ours: Any) -> bool:
    """Whether other processors edit the logits before ours.  Raises UnsupportedModelError, ArgumentError."""
    config = loop.generation_config
    for argument, off in (("guidance_scale", (None, 1)), ("watermarking_config", (None,))):
        value = getattr(config, argument, None)
        if value not in off:
            raise UnsupportedModelError(f"generate cannot explore with {argument}, got {value!r}")
    places = [i for i, processor in enumerate(loop.logits_processor) if processor is ours]
    if len(places) != 1:
        raise ArgumentError(
            f"logits_processor must have the exploration's in it once, unwrapped, got it {len(places)} times"
        )
    place = places[0]
    after = [type(processor).__name__ for processor in loop.logits_processor[place + 1 :]]
    if wrong := [name for name in after if name not in _HARMLESS_AFTER]:
        raise ArgumentError(
            "logits_processor must end with the exploration's, or what is drawn would be edited, got "
            f"{', '.join(wrong)} after it"
        )
    return place > 0


def requested_params(config: Any, base: SamplingParams) -> SamplingParams:
    """``base`` with the filters that generate was asked for.  Raises ArgumentError for what SamplingParams lacks."""
    if not config.do_sample:
        return replace(base, temperature=0.0)
    if others := _asked(config, _OTHER_FILTERS):
        raise ArgumentError(f"generate must be called without {', '.join(others)} to explore, got {others}")
    return replace(
        base,
        temperature=1.0 if config.temperature is None else config.temperature,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
    )


# What of a GenerationConfig a decoder that is not generate does: what requested_params reads or refuses; ends, lengths.
_DONE = {"do_sample", *_FILTERS, *_OTHER_FILTERS, "eos_token_id", "max_new_tokens", "max_length"}
# What changes no token where neither beams nor an assistant draw it.
_WITHOUT_EFFECT = {
    *("use_cache", "cache_implementation", "cache_config", "compile_config", "disable_compile"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("pad_token_id", "bos_token_id", "decoder_start_token_id", "length_penalty", "early_stopping"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "is_assistant"),
    *("renormalize_logits", "transformers_version", "_from_model_config"),
}
# Where a setting is off at something else than None, False, 0 or nothing in it.
_OFF = dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale"), 1)
_OFF |= dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), 1)


def left_undone(config: Any) -> dict[str, tuple[Any, Any]]:
    """What a GenerationConfig asks for beside filters, lengths and stop tokens: name -> (value, what it would be off).

    A decoder that is not generate would drop it in silence.
    """
    names = sorted(vars(transformers.GenerationConfig()).keys() - _DONE - _WITHOUT_EFFECT)
    asked = ((name, getattr(config, name, None), _OFF.get(name)) for name in names)
    return {name: (value, off) for name, value, off in asked if value and value != off}


def differing_filters(config: Any, params: SamplingParams) -> list[str]:
    """What generate was asked for and ``params`` does otherwise, as texts."""
    asked = _asked(config, {**_FILTERS, **_OTHER_FILTERS}) if config.do_sample else {}
    return [f"{name}={value}" for name, value in asked.items() if getattr(params, name, None) != value]


def _asked(config: Any, filters: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    values = {name: getattr(config, name, None) for name in filters}
    return {name: value for name, value in values.items() if value not in filters[name]}
