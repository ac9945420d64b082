"""The latent form inside transformers' own ``generate()``: what the head sees is mixed, generate does the rest.

A forward is a step if ``generate`` makes it for a next token (``hf_generate.running_call``).  Its shallow state
predicts in the middle of it, beside the later blocks; before the head the deep state of the last position is mixed,
and staged to be learned.  Penalties, processors, beams, scores and the draw come after the head and are generate's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from esamp_core.base.config import DistillerConfig, SamplingParams
from esamp_core.base.errors import StateError, UnsupportedModelError
from esamp_core.base.tensors import warn_of_bad_numbers
from esamp_core.bindings.hf_context import ModelContext, groups_of_rows
from esamp_core.bindings.hf_generate import Call, running_call
from esamp_core.explorer import Explorer, Rows
from esamp_core.models.parts import ModelParts
from esamp_core.models.taps import MixingTaps


class LatentExploration(ModelContext):
    """What ``explore(model, apply="latent")`` gives; to be entered as a context, in which ``generate`` explores."""

    _taps: MixingTaps
    logits_processor: tuple[Any, ...] = ()
    """Nothing: code written for the candidates form may go on passing it to generate."""

    def __init__(
        self,
        parts: ModelParts,
        beta: float,
        groups: Sequence[Hashable | None] | None,
        config: DistillerConfig,
        explorer: Explorer | None,
    ) -> None:
        super().__init__(parts, MixingTaps(parts, self._predict, self._mix), groups, explorer)
        self._params, self._config = SamplingParams(beta=beta), config
        self._run: _Run | None = None
        self._step = False  # whether the forward that runs is one

    @property
    def draws(self) -> NoReturn:
        """generate draws; what it drew, and with which log-probability, it says itself.  Raises StateError."""
        raise StateError(
            'with apply="latent" generate draws: pass return_dict_in_generate=True, output_scores=True to it, and take '
            "log-probabilities from its scores (compute_transition_scores)"
        )

    @property
    def groups(self) -> list[Hashable | None]:
        """Each row's group in the latest ``generate``: as given, or the number of its prompt."""
        return [] if self._run is None else list(self._run.groups)

    @torch.inference_mode(False)  # a caller's: Distillers are updated in place
    @torch.no_grad()
    def _predict(self, shallow: Tensor) -> None:
        """Called in the middle of a forward.  shallow: [B, H], of the last position."""
        self._step, call = False, running_call(self._parts)
        if call is None:
            return
        self._used = True
        run = self._run
        if run is None or run.config is not call.generation_config:
            self._close()
            run = self._start(call)
        if shallow.shape[0] != len(run.rows):
            raise UnsupportedModelError(
                f"{type(self._parts.model).__name__} ran with {shallow.shape[0]} rows in a generate of {len(run.rows)}"
            )
        if call.unfinished is not None:  # before the first draw all are
            run.rows.active.copy_(call.unfinished > 0)
        run.explorer.predict(shallow, run.rows)
        self._step = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def _mix(self, deep: Tensor) -> Tensor:
        """Called before the head.  deep: [B, H], of the last position, which alone is sampled."""
        run, step, self._step = self._run, self._step, False
        if not step or run is None:
            return deep
        if run.steps > 0 and self._taps.positions > 1 and not run.known_loop:
            raise UnsupportedModelError(
                f"{type(self._parts.model).__name__} ran on {self._taps.positions} positions in one step of a custom "
                "generate; which of them are sampled is not known"
            )
        mixed = run.explorer.mix(deep, run.rows)
        run.explorer.learn(deep, run.rows)
        run.steps += 1
        return mixed

    def _start(self, call: Call) -> _Run:
        """The first step of a ``generate``: its rows and groups."""
        groups = groups_of_rows(self._groups, call.input_ids, self._taps.float_inputs)
        distinct = len({group for group in groups if group is not None})
        explorer = self._given or Explorer(
            None,
            self._parts.hidden_size,
            self._config,
            max_groups=max(1, distinct),
            max_rows=len(groups),
            device=self._parts.device,
        )
        # Rows with beta 0 do not use what a Distiller has learned.
        rows = explorer.open(
            [None] * len(groups) if self._params.beta == 0 else groups, self._params, retain=self._retains
        )
        self.explorer = explorer
        self._run = _Run(call.generation_config, explorer, rows, groups, call.known_loop)
        return self._run

    def _close(self) -> None:
        run, self._step = self._run, False
        if run is not None and run.open:
            run.rows.end()
            run.open = False
            warn_of_bad_numbers(run.rows.status.tolist())

    def _check_unused(self) -> None:
        name = type(self._parts.model).__name__
        if self._taps.ran:
            raise StateError(
                f"{name} ran, but not in a generate of its own, so nothing explored (continuous batching is not "
                "supported)"
            )
        warnings.warn(
            f"nothing ran on {name} while it was explored; a model that was compiled before explore(...) was entered "
            "ignores it: call torch.compiler.reset() there",
            stacklevel=3,
        )


@dataclass
class _Run:
    """One call of ``generate``."""

    config: Any  # generate's own copy of its GenerationConfig, which tells one call from the next
    explorer: Explorer
    rows: Rows
    groups: list[Hashable | None]
    known_loop: bool
    steps: int = 0
    open: bool = True
