"""Exploratory sampling inside transformers' own ``generate()``, unpatched.

    with explore(model, beta=0.1, seed=7) as exploration:
        model.generate(**inputs, do_sample=True, num_return_sequences=16,
                       logits_processor=exploration.logits_processor)
    exploration.draws.logprob  # [rows, steps]

    with explore(model, apply="latent"):
        model.generate(**inputs, do_sample=True, num_return_sequences=16)  # or beams, or anything else

The second form is in ``hf_latent``.  In the first, the candidates form, which is the default because it tells what a
token's exploration was worth and cost, and because siblings can be stratified in it alone, generate only runs the loop.
Hooks tap the model while the context is entered; the logits processor draws with
:class:`~esamp_core.sample.Explorer` and returns logits of 0 for the drawn token and -inf elsewhere, which leaves
everything that ``generate`` does afterwards, its warpers and its own draw, only one token to choose.

When a row ends, and with which filters it is drawn, is for ``generate`` to say and is read from it; ways of decoding
that cannot explore (beams, assistant models, ...) are refused.  Both are in ``hf_generate``.
"""

from __future__ import annotations

import functools
import itertools
import operator
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from esamp_core.base.checks import check_hashables
from esamp_core.base.config import Apply, DistillerConfig, FilterOrder, SamplingParams, check_apply, check_options
from esamp_core.base.errors import ArgumentError, StateError, UnsupportedModelError
from esamp_core.base.seeds import seeded_params
from esamp_core.base.tensors import Draw, Status, warn_of_bad_numbers
from esamp_core.bindings.hf_context import ModelContext, groups_of_rows
from esamp_core.bindings.hf_generate import (
    Loop,
    calling_loop,
    check_request,
    differing_filters,
    requested_params,
)
from esamp_core.bindings.hf_latent import LatentExploration
from esamp_core.explorer import Explorer, Rows, check_start
from esamp_core.models.parts import ModelParts, find_parts
from esamp_core.models.taps import PassiveTaps, Tapped, check_head


def explore(
    model: nn.Module,
    *,
    beta: float | None = None,
    seed: int | None = None,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    groups: Sequence[Hashable | None] | None = None,
    config: DistillerConfig | None = None,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    shallow_layer: int = 0,
    explorer: Explorer | None = None,
    apply: Apply = "candidates",
    neutral: bool = False,
) -> Exploration | LatentExploration:
    """A context in which ``model.generate(..., logits_processor=exploration.logits_processor)`` explores.

    model: a decoder-only transformers model with its head, on one device, in eval mode.
    beta, seed: strength of exploration (default that of ``SamplingParams``) and request seed, to go with the
        temperature, top-k, top-p and min-p that ``generate`` was given; without ``do_sample`` the temperature is 0.
    params: instead of these, one :class:`SamplingParams`, or one per prompt.  Filters that ``generate`` was asked for
        and that differ are then not applied, which is warned of.  Seeds of one ``SamplingParams``: a prompt's is made
        of its seed and the prompt's index, as in ``Decoder.generate``; without a seed a fresh one is drawn from torch's
        generator.
    groups: one per row, rows * num_return_sequences of them; equal ones share a Distiller.  Default: rows with the same
        token ids, so the samples of one prompt, however it came to be repeated.  None: ``generate`` draws that row.
        With an explorer of yours the Distillers of named groups go on from one ``generate`` to the next.
        Groups take the place of prompts in ``params`` and seeds.
    config: the Distillers'.  Default ``DistillerConfig()``, with ``deep_scale`` read from the model's final norm.
    filter_order, max_candidates: see ``select_candidates``.
    shallow_layer: the block whose output is the shallow tap; negative counts from the end.  Default 0.
    explorer: one to use instead of a new one per ``generate``; it then brings config, filter_order, max_candidates,
        neutral.

    apply: which form.  "candidates" (default): the processor above draws, among scored candidates, after the filters;
        ``draws`` tells each token's log-probability, novelty and KL, seeds are per row, siblings may be stratified.
        "latent": hidden states are mixed before the head and ``generate`` draws, so that everything it can do works,
        beams too, and ``logits_processor`` is empty.  Then seeds, params, filter_order and max_candidates have no
        place, and ``explorer`` may be one without a head.
    neutral: only novelty that leaves the entropy as it is (see ``reweight``); not with apply "latent".

    Raises UnsupportedModelError and ArgumentError, here or from within ``generate``; StateError where the model is
    being explored already.  A model that is compiled must be compiled, or ``torch.compiler.reset()`` called, while the
    context is entered.  Not thread-safe, but ``generate`` may run in another thread.
    """
    if params is not None and (beta is not None or seed is not None):
        raise ArgumentError(f"beta and seed must be within params where these are given, got {beta=}, {seed=}")
    if explorer is not None and (config is not None or neutral):
        raise ArgumentError("config and neutral must be left out when an explorer is given, which has its own")
    if any(p.distinct for p in ([params] if isinstance(params, SamplingParams) else params or ())):
        raise ArgumentError(
            "params.distinct must be None or False: generate owns the cache, whose rows would have to change places; "
            "esamp_core.generate draws distinct siblings"
        )
    check_options(filter_order, max_candidates)
    parts = find_parts(model, shallow_layer)
    base = SamplingParams(beta=SamplingParams.beta if beta is None else beta, seed=seed)
    named = None if groups is None else check_hashables("groups", groups)
    complete = parts.complete(config)
    check_apply(apply, (complete if explorer is None else explorer.config).target, neutral)
    check_start(complete, parts.head.weight)
    if apply == "candidates":
        return Exploration(parts, base, params, named, complete, filter_order, max_candidates, neutral, explorer)
    given = {"seed": seed, "params": params, "filter_order": filter_order, "max_candidates": max_candidates}
    default = {"seed": None, "params": None, "filter_order": "transformers", "max_candidates": 256}
    if wrong := [f"{name}={value!r}" for name, value in given.items() if value != default[name]]:
        raise ArgumentError(f'with apply="latent" generate draws, by its own parameters: leave out {", ".join(wrong)}')
    return LatentExploration(parts, base.beta, named, complete, explorer)


class Exploration(ModelContext):
    """What :func:`explore` gives in the candidates form; to be entered as a context."""

    _taps: PassiveTaps

    def __init__(
        self,
        parts: ModelParts,
        base: SamplingParams,
        params: SamplingParams | Sequence[SamplingParams] | None,
        groups: Sequence[Hashable | None] | None,
        config: DistillerConfig,
        filter_order: FilterOrder,
        max_candidates: int,
        neutral: bool,
        explorer: Explorer | None,
    ) -> None:
        super().__init__(parts, PassiveTaps(parts, self._predict_early), groups, explorer)
        self._base, self._params, self._config = base, params, config
        self._filter_order, self._max_candidates, self._neutral = filter_order, max_candidates, neutral
        self.logits_processor: list[Any] = [_Processor(self)]
        """For ``generate(logits_processor=...)``.  Your own processors go before it: ``[mine, *this]``."""
        self._run: _Run | None = None

    @property
    def draws(self) -> Draw:
        """Of the latest ``generate``: :class:`~esamp_core.sample.Draw` with tensors [rows, steps].

        Where a row had ended, or ``generate`` drew it, token_ids is -1 and the status says INACTIVE.  Raises StateError
        if nothing was drawn.
        """
        if self._run is None or not self._run.draws:
            raise StateError("draws are there after a generate with logits_processor=exploration.logits_processor")
        return Draw(*(torch.stack(column, 1) for column in zip(*self._run.draws, strict=True)))

    @property
    def groups(self) -> list[Hashable | None]:
        """Each row's group in the latest ``generate``: as given, or the number of its prompt."""
        return [] if self._run is None else list(self._run.groups)

    def _predict_early(self, shallow: Tensor) -> None:
        """Called by the shallow tap in the middle of a forward: predict beside the rest of it, where rows are known.

        Compiled code leaves it to the processor.  If this is another ``generate``'s prefill that looks like the next
        step, the rows are about to be closed, and predicting for them changed nothing.
        """
        if torch.compiler.is_compiling():
            return
        run = self._run
        if run is not None and run.open and not run.predicted and len(run.rows) == shallow.shape[0]:
            self._predict(run, shallow)

    @torch.inference_mode(False)  # a caller's: Distillers are updated in place
    @torch.no_grad()
    def _predict(self, run: _Run, shallow: Tensor) -> None:
        run.explorer.predict(shallow, run.rows)
        run.predicted = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def _draw(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The processor's part of a step: sample, learn, and the logits that leave only what was drawn."""
        if not self._entered:
            raise StateError("the logits processor must be used while its explore(...) context is entered")
        self._used = True
        loop = calling_loop(self._parts)
        tapped, skipped = self._taps.take()
        run = self._run
        if run is None or run.config is not loop.generation_config:
            self._close()
            self._run = None
            run = self._start(loop, input_ids, tapped)
        elif skipped:
            raise UnsupportedModelError(
                f"{type(self._parts.model).__name__} ran more than once in a step of generate (another logits "
                "processor that calls the model?), so what was tapped may not belong to the logits"
            )
        rows, device = run.rows, self._parts.device
        if run.stop_ids is not None:  # without stop tokens generate goes on with rows that a criterion has ended
            rows.active.logical_and_(loop.unfinished_sequences.to(device, non_blocking=True) > 0)
        if not run.predicted:
            self._predict(run, tapped.shallow)
        draw = run.explorer.sample(
            scores.to(device), rows, model_logits=tapped.logits.to(scores.dtype) if run.edited else None
        )
        run.explorer.learn(tapped.deep, rows)
        run.predicted = False
        run.draws.append(draw)
        return run.forced(draw.token_ids, scores)

    def _start(self, loop: Loop, input_ids: Tensor, tapped: Tapped) -> _Run:
        """The first step of a ``generate``: its rows, groups and parameters."""
        edited = check_request(loop, self.logits_processor[0])
        groups = groups_of_rows(self._groups, input_ids, self._taps.float_inputs)
        numbers = {group: i for i, group in enumerate(dict.fromkeys(g for g in groups if g is not None))}
        per_prompt = self._prompt_params(loop.generation_config, len(numbers))
        explorer = self._given or Explorer(
            self._parts.head,
            self._parts.hidden_size,
            self._config,
            max_groups=max(1, len(numbers)),
            max_rows=len(groups),
            max_candidates=self._max_candidates,
            filter_order=self._filter_order,
            neutral=self._neutral,
        )
        if any(p.beta != 0 for p in per_prompt):  # of every generate: weights may have moved, or an adapter come
            check_head(self._parts, explorer.head or self._parts.head, tapped)
        params = [self._base if g is None else per_prompt[numbers[g]] for g in groups]
        criteria = loop.stopping_criteria
        device = self._parts.device
        eos = [
            torch.as_tensor(c.eos_token_id, dtype=torch.int64, device=device).reshape(-1)
            for c in criteria
            if hasattr(c, "eos_token_id")
        ]
        skips = torch.tensor([g is None for g in groups], dtype=torch.bool, device=device)
        counters = {group: itertools.count() for group in groups}
        rows = explorer.open(
            # Rows with beta 0 do not use what a Distiller has learned.
            [None if p.beta == 0 else g for g, p in zip(groups, params, strict=True)],
            params,
            sample_index=[next(counters[group]) for group in groups],
            sets=groups,
            retain=self._retains,
        )
        rows.active.logical_and_(~skips)
        self.explorer = explorer
        self._run = _Run(
            config=loop.generation_config,
            explorer=explorer,
            rows=rows,
            groups=groups,
            stop_ids=torch.cat(eos) if eos else None,
            skips=skips if None in groups else None,
            edited=edited,
        )
        return self._run

    def _prompt_params(self, config: Any, prompts: int) -> list[SamplingParams]:
        if self._params is None:
            return seeded_params(requested_params(config, self._base), prompts)
        per_prompt = seeded_params(self._params, prompts)
        if ignored := [text for p in per_prompt for text in differing_filters(config, p)]:
            warnings.warn(
                f"generate was asked for {', '.join(dict.fromkeys(ignored))}, but explore(params=...) decides; leave "
                "params out to use generate's filters, or leave these out of generate",
                stacklevel=2,
            )
        return per_prompt

    def _check_unused(self) -> None:
        if self._taps.ran:
            raise StateError(
                f"{type(self._parts.model).__name__} ran, but without exploration: generate must be given "
                "logits_processor=exploration.logits_processor (continuous batching takes none, and is not supported)"
            )

    def _close(self) -> None:
        if self._run is not None and self._run.open:
            self._run.rows.end()
            self._run.open = False
            warn_of_bad_numbers(self._run.statuses())


class _Processor(LogitsProcessor):
    """What ``generate`` calls, once per step."""

    supports_continuous_batching = False

    def __init__(self, exploration: Exploration) -> None:
        self._exploration = exploration

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._exploration._draw(input_ids, scores)


@dataclass
class _Run:
    """One call of ``generate``."""

    config: Any  # generate's own copy of its GenerationConfig, which tells one call from the next
    explorer: Explorer
    rows: Rows
    groups: list[Hashable | None]
    stop_ids: Tensor | None
    skips: Tensor | None  # bool [R], rows that generate draws
    edited: bool  # whether other processors come before ours
    predicted: bool = False
    open: bool = True
    draws: list[Draw] = field(default_factory=list)

    def statuses(self) -> list[int]:
        """Status flags of every row's steps, as long as it drew."""
        steps = torch.stack([draw.status for draw in self.draws], 1).tolist() if self.draws else []
        return [functools.reduce(operator.or_, (s for s in row if not s & Status.INACTIVE), 0) for row in steps]

    def forced(self, token_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V] logits that leave only the drawn tokens; switches off the rows that these end."""
        token = token_ids
        if self.stop_ids is not None:
            self.rows.active.logical_and_(~(token_ids[:, None] == self.stop_ids).any(-1) & (token_ids >= 0))
            if self.stop_ids.numel() > 0:
                # A row whose logits left nothing to draw ends; one that had ended is fed generate's pad anyway.
                token = torch.where(token_ids < 0, self.stop_ids[0], token_ids)
        forced = torch.full_like(scores, float("-inf"))
        forced.scatter_(1, token.clamp_min(0)[:, None].to(scores.device), 0.0)
        return forced if self.skips is None else torch.where(self.skips[:, None].to(scores.device), scores, forced)
