"""What the transformers binding knows of a running ``generate()``: what its forward tapped, and what it was asked for.

A logits processor is told the tokens and the logits, nothing else.  The rest stands in the frame of the decoding loop
that calls it, ``GenerationMixin._sample``, and is read from there: its arguments, and its mask of unfinished rows.
Nothing is written to it.  Calls by any other loop are recognised, and refused.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import CodeType
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.generation import GenerationMixin

from esamp_core.config import SamplingParams
from esamp_core.errors import ArgumentError, UnsupportedModelError
from esamp_core.taps import ModelParts, Tapped, Taps
from esamp_core.versions import tried_versions

# What generate puts behind custom processors and what, given a single finite logit, changes nothing.
_HARMLESS_AFTER = {
    *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TopHLogitsWarper"),
    *("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization"),
}
# generate's filters and what they are where nobody asked for them.
_FILTERS = {"temperature": (None, 1.0), "top_k": (None, 0, 50), "top_p": (None, 1.0), "min_p": (None, 0.0)}
# Those that SamplingParams does not have.
_OTHER_FILTERS = {"typical_p": (None, 1.0), "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0), "top_h": (None,)}


class GenerateTaps(Taps):
    """The taps of a model whose forward others call.  What is kept is that of the latest forward.

    Everything here may be traced by torch.compile, so it is assignments and lists, and nothing that grows.
    """

    def __init__(self, parts: ModelParts, on_shallow: Callable[[Tensor], None]) -> None:
        super().__init__(parts.model, parts)
        self._on_shallow = on_shallow
        self._logits: list[Tensor] = []
        self._skipped = False
        self.ran = False
        self.float_inputs: list[str] = []
        """Names of the tensor inputs of the latest forward, seen uncompiled, that are numbers and not tokens."""

    def __enter__(self) -> GenerateTaps:
        super().__enter__()
        self._shallow, self._deep, self._logits = [], [], []
        self._skipped = self.ran = False
        model = _generating(self._parts)
        self._handles += [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._tap_logits),
        ]
        return self

    def _begin(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        self.ran = True
        self._skipped = self._skipped or len(self._logits) > 0
        self._shallow, self._deep, self._logits = [], [], []
        if not torch.compiler.is_compiling():
            tensors = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and n != "attention_mask"}
            self.float_inputs = [name for name, value in tensors.items() if value.is_floating_point()]

    def _tap_logits(self, module: nn.Module, args: Any, output: Any) -> None:
        self._logits.append((output.logits if hasattr(output, "logits") else output[0])[:, -1])

    def take(self) -> tuple[Tapped, bool]:
        """What the latest forward tapped, and whether forwards before it were not drawn from.

        Raises UnsupportedModelError if a tap did not run exactly once in it.
        """
        skipped, self._skipped = self._skipped, False
        name = type(self._parts.model).__name__
        for what, tapped in (("block", self._shallow), ("head", self._deep), ("model", self._logits)):
            if len(tapped) != 1:
                raise UnsupportedModelError(
                    f"the tap on {name}'s {what} ran {len(tapped)} times in a forward instead of once; a model "
                    "that was compiled before its taps were installed ignores them: call torch.compiler.reset() after "
                    "entering explore(...), or compile there"
                )
        return Tapped(self._shallow.pop(), self._deep.pop(), self._logits.pop()), skipped


class Loop(NamedTuple):
    """What the calling decoding loop knows; the names of its variables."""

    generation_config: Any
    logits_processor: Sequence[Any]
    stopping_criteria: Sequence[Any]
    unfinished_sequences: Tensor  # int64 [R], 1 or 0


def _code(name: str) -> CodeType | None:
    method = getattr(GenerationMixin, name, None)
    return None if method is None else inspect.unwrap(method).__code__


_SAMPLE = _code("_sample")
_OTHER_LOOPS = {
    _code("_beam_search"): "beam search (num_beams > 1)",
    _code("_assisted_decoding"): "assisted generation (assistant_model, prompt_lookup_num_tokens)",
}


def _generating(parts: ModelParts) -> Any:
    """The module whose ``generate`` and ``forward`` run: PEFT's wrapper passes generate on to the model within."""
    model: Any = parts.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def calling_loop(parts: ModelParts) -> Loop:
    """What is known to the decoding loop that called the processor.  Raises UnsupportedModelError."""
    name, frame = type(_generating(parts)).__name__, sys._getframe()
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
    if caller is not _generating(parts):
        raise UnsupportedModelError(
            f"{name}'s logits processor was called by another model's generate ({type(caller).__name__}); assistant "
            "models are not supported"
        )
    return Loop(**found)


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


def differing_filters(config: Any, params: SamplingParams) -> list[str]:
    """What generate was asked for and ``params`` does otherwise, as texts."""
    asked = _asked(config, {**_FILTERS, **_OTHER_FILTERS}) if config.do_sample else {}
    return [f"{name}={value}" for name, value in asked.items() if getattr(params, name, None) != value]


def _asked(config: Any, filters: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    values = {name: getattr(config, name, None) for name in filters}
    return {name: value for name, value in values.items() if value not in filters[name]}
