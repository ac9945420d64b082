"""Exploratory sampling inside vLLM, unpatched.

    vllm serve MODEL --additional-config '{"esamp": {"default": {}}}'      # or ESAMP_VLLM=1 in its environment

    SamplingParams(temperature=0.8, extra_args={"esamp": {"group": "problem 7", "beta": 0.1}})

The rows of requests that explore are mixed with their Distillers' predictions before the model's head sees them
(``vllm_models``, ``vllm_mixing``); what vLLM does with the logits, and the log-probabilities that it reports, are its
own.  This logits processor changes no logits: it validates requests, and the V1 model runner tells it who is in which
row.  It is installed as an entry point of ``vllm.logits_processors``, so no argument has to name it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from esamp_core.base.errors import ArgumentError, UnsupportedModelError
from esamp_core.bindings.vllm_config import PluginConfig, read_request
from esamp_core.bindings.vllm_mixing import Mixer
from esamp_core.bindings.vllm_models import is_registered, mixer_of
from esamp_core.bindings.vllm_report import Report

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError:  # a vLLM without the V2 model runner
    LogitsProcessorV2 = object

_DEFAULTS = PluginConfig()  # where an engine's own are not known


class ExploratoryProcessor(LogitsProcessor, LogitsProcessorV2):
    """Changes no logits.  Satisfies the interfaces of both model runners; V2 tells its model state who is where."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ArgumentError, a ValueError, which fails the request alone."""
        read_request(sampling_params, _DEFAULTS)

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        self._tap: Mixer | None = mixer_of(vllm_config)  # what the model taps, told here who is in which row
        architecture = vllm_config.model_config.architecture
        if self._tap is not None and not is_registered(architecture):
            raise UnsupportedModelError(
                f"esamp has no tap for architecture {architecture}: only text-generation models have one, and the "
                "plugin `esamp` of the group vllm.general_plugins must be loaded (see VLLM_PLUGINS)"
            )
        self._report = Report(_DEFAULTS, lambda: True)  # of an engine that is not configured
        # Named in --logits-processors too, there are two of it: the first one tells.
        if self._tap is not None and self._tap.told_by is None:
            self._tap.told_by = self

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """As they are."""
        return logits

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: whether logits of this request are changed."""
        self._warn_in_vain([sampling_params])
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: requests that joined, left and moved since the step before, and the next one is about to run."""
        if batch_update is not None:
            self._warn_in_vain(params for _, params, *_ in batch_update.added)
        mixer = self._tap
        if mixer is None or mixer.told_by is not self:
            return
        if batch_update is not None:
            for row in batch_update.removed:
                mixer.requests.pop(row, None)
            for row, params, prompt, output in batch_update.added:
                mixer.join(row, params, prompt, len(prompt or ()) + len(output))
            for source, target, direction in batch_update.moved:
                moving, other = mixer.requests.pop(source, None), mixer.requests.pop(target, None)
                if moving is not None:
                    mixer.requests[target] = moving
                if other is not None and direction == MoveDirectionality.SWAP:
                    mixer.requests[source] = other
        mixer.expect(range)  # the batch's order is that of the rows

    def _warn_in_vain(self, joined: Iterable[Any]) -> None:
        """Of requests that ask an engine that is not configured."""
        if self._tap is None:
            for params in joined:
                with contextlib.suppress(ArgumentError):  # was answered at admission
                    if read_request(params, _DEFAULTS) is not None:
                        self._report.not_configured()
