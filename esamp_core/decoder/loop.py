"""One call of ``Decoder.generate``: the loop around the batch, and what a step is."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from esamp_core.base.errors import EsampError, UnsupportedModelError
from esamp_core.base.tensors import Distilled, Draw
from esamp_core.decoder.batch import Batch, Receipt, Step, to_device
from esamp_core.decoder.cuda_graph import GraphPolicy, WaveSteps
from esamp_core.decoder.kv_cache import RowCache, static_cache
from esamp_core.decoder.output import Output
from esamp_core.decoder.prompts import Prompt, pad_token_id_of
from esamp_core.decoder.results import RunningSample
from esamp_core.explorer import Explorer
from esamp_core.models.parts import ModelParts
from esamp_core.models.taps import Tapped, Taps

CacheKind = Literal["dynamic", "static"]


class Run:
    """The queue of prompts and the running batch."""

    def __init__(
        self,
        parts: ModelParts,
        explorer: Explorer,
        queue: deque[Prompt],
        n: int,
        batch_rows: int,
        stop_ids: tuple[int, ...],
        check_first: Callable[[Tapped, Any, bool], None],
        waves: GraphPolicy | None,
        latent: bool,
        retain: bool,
        prompt_host: bool,
        keep_distilled: bool,
    ) -> None:
        """check_first: called with a prefill's states and cache, and whether a row explores.  waves: of a static cache;
        None is a dynamic one.  latent: whether states are mixed before the head.  retain: whether Distillers outlive
        their prompts.  prompt_host: the host handles a step before the next begins, instead of one late.
        keep_distilled: results say what tokens were explored with."""
        self._parts, self._explorer, self._check_first = parts, explorer, check_first
        self._queue, self._n, self._batch_rows = queue, n, batch_rows
        self._waves, self._static = waves, waves is not None
        self._latent, self._retain, self._prompt_host = latent, retain, prompt_host
        self._keep_distilled = keep_distilled
        self._steps: WaveSteps | None = None
        self._stop_ids = to_device(stop_ids, self._parts.device)
        self._pad_id = pad_token_id_of(self._parts.model, self._parts.vocab_size)
        self._batch: Batch | None = None
        if self._static and "position_ids" not in self._parts.accepts:
            raise UnsupportedModelError(
                f'cache="static" needs a model that takes position_ids, got {type(self._parts.model).__name__}'
            )

    def loop(self, taps: Taps, output: Output) -> None:
        """Until every prompt is done: launch a step, handle the one before, let rows leave and prompts join."""
        waiting: list[Receipt] = []
        while self._queue or self._batch is not None or waiting:
            launched = []
            if self._prompt_host:
                self._handle(waiting, output)
                waiting = []
            if self._batch is not None and self._batch.can_draw():
                launched.append(self._step(taps, self._batch))
            self._handle(waiting, output)
            if prompts := self._next_prompts():
                launched.append(self._start(taps, prompts))
            waiting = launched

    def close(self) -> None:
        """After the last step, or an error in one."""
        if self._batch is not None:
            with contextlib.suppress(EsampError):  # would hide the error that led here
                self._batch.rows.end()  # whatever they have become, if an interrupt came between
            self._batch = self._steps = None

    def _handle(self, waiting: list[Receipt], output: Output) -> None:
        """Read what was drawn.  Finished rows leave; in a static batch they stay, masked, until all have finished."""
        cut = [sample for receipt in waiting for sample in output.receive(receipt)]
        batch = self._batch
        if batch is None:
            return
        if cut and (self._static or batch.rows.families is not None):
            batch.switch_off([sample.finish_reason is not None for sample in batch.samples])
        running = [i for i, sample in enumerate(batch.samples) if not sample.done]
        if not running:
            self._explorer.close(batch.rows)  # waits: the graph may be in use until then
            self._batch = self._steps = None
        elif not self._static and len(running) < len(batch.samples):
            batch.keep(running)

    def _next_prompts(self) -> list[Prompt]:
        """The prompts that can start now, all n samples of each at once."""
        samples = [] if self._batch is None else self._batch.samples
        if samples and self._static:
            return []
        rows, groups = self._batch_rows - len(samples), {sample.prompt.group for sample in samples} - {None}
        chosen: list[Prompt] = []
        while self._queue and rows >= (len(chosen) + 1) * self._n:
            groups |= {self._queue[0].group} - {None}
            if len(groups) > self._explorer.max_groups:
                break
            chosen.append(self._queue.popleft())
        return chosen

    def _step(self, taps: Taps, batch: Batch) -> Receipt:
        """One token for every row."""
        if self._steps is None:
            step = self._eager_step(taps, batch)
        else:
            step = self._steps.run()
        batch.length += 1
        return Receipt(batch.samples, step, batch.rows)

    def _eager_step(self, taps: Taps, batch: Batch) -> Step:
        """All device work of a step, and nothing else: this is what a graph repeats."""
        if not self._static:
            batch.cache.padded = batch.padded
        rows = batch.rows
        tapped = taps.step(
            batch.tokens[:, None],
            batch.attention_mask(),
            batch.positions[:, None],
            batch.cache,
            on_shallow=partial(self._explorer.predict, rows=rows) if batch.explores else None,
            on_deep=partial(self._explorer.mix, rows=rows) if batch.explores and self._latent else None,
        )
        return self._draw(batch, tapped)

    def _draw(self, batch: Batch, tapped: Tapped) -> Step:
        kept = self._distilled(batch) if self._keep_distilled else None
        if batch.rows.families is None:
            step = Step(self._explorer.sample(tapped.logits, batch.rows), None, kept)
        else:
            draw, parent = self._explorer.branch(tapped.logits, batch.rows)
            step = Step(draw, parent, None if kept is None else Distilled(*(t[parent] for t in kept)))
        if batch.explores:
            self._explorer.learn(tapped.deep, batch.rows)
            if self._latent:
                step = step._replace(draw=_without_the_base_model(step.draw, batch.rows.params.beta))
        batch.advance(step, self._stop_ids, self._pad_id)
        return step

    def _distilled(self, batch: Batch) -> Distilled:
        """What the step is about to explore with, before it is drawn."""
        found = self._explorer.distilled(batch.rows)
        if found is not None:
            return found
        shapes = (len(batch.rows), self._parts.hidden_size), (len(batch.rows),)
        return Distilled(*(torch.zeros(shape, dtype=torch.float32, device=self._parts.device) for shape in shapes))

    def _start(self, taps: Taps, prompts: list[Prompt]) -> Receipt:
        """Prefill prompts once each, spread them over their samples, draw the first tokens, and join the batch."""
        device, n = self._parts.device, self._n
        length = max(len(p.token_ids) for p in prompts)
        pads = [length - len(p.token_ids) for p in prompts]
        token_ids = [i for pad, p in zip(pads, prompts, strict=True) for i in (self._pad_id,) * pad + p.token_ids]
        positions = torch.arange(length, device=device) - to_device(pads, device)[:, None]
        columns = length + max(p.budget for p in prompts) if self._static else None
        config = self._parts.model.config
        cache = RowCache.of(config) if columns is None else static_cache(config, columns)
        tapped = taps.step(
            to_device(token_ids, device).view(len(prompts), length),
            (positions >= 0).long() if any(pads) else None,
            positions.clamp(min=0),
            cache,
        )
        self._check_first(tapped, cache, any(prompt.explores for prompt in prompts))
        origin = [i for i in range(len(prompts)) for _ in range(n)]
        spread = to_device(origin, device)
        if n > 1:
            cache.reorder_cache(spread)
            tapped = Tapped(*(t[spread] for t in tapped))
        samples = [RunningSample(prompt, i) for prompt in prompts for i in range(n)]
        rows = self._explorer.open(
            [sample.prompt.group if sample.prompt.explores else None for sample in samples],
            [sample.prompt.params for sample in samples],
            sample_index=[sample.index for sample in samples],
            sets=origin,
            retain=self._retain,
        )
        try:
            batch = Batch(
                samples=samples,
                rows=rows,
                cache=cache,
                length=length,
                pads=[pads[i] for i in origin],
                tokens=torch.zeros_like(spread),  # drawn below
                positions=positions[:, -1][spread],
                remaining=to_device([sample.prompt.budget for sample in samples], device),
                columns=columns,
            )
            if batch.explores:
                self._explorer.predict(tapped.shallow, rows)
                if self._latent:  # the prompt's forward ran once for all of its samples, before there were rows
                    mixed = self._explorer.mix(tapped.deep, rows)
                    tapped = tapped._replace(logits=self._parts.logits(mixed)[:, : tapped.logits.shape[1]])
            receipt = Receipt(samples, self._draw(batch, tapped), rows)
            if self._batch is not None:
                self._batch.join(batch)  # may run out of memory
                return receipt
        except BaseException:
            rows.end()
            raise
        self._batch = batch
        if self._waves is not None:
            self._steps = WaveSteps(lambda: self._eager_step(taps, batch), cache, self._explorer, self._waves)
        return receipt


def _without_the_base_model(draw: Draw, beta: Tensor) -> Draw:
    """The base model's logits were never computed in rows that were mixed: what needs them is not known."""
    known = beta == 0
    names = ("base_logprob", "novelty", "kl")
    return draw._replace(**{name: torch.where(known, getattr(draw, name), math.nan) for name in names})
