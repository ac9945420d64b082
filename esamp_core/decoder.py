"""The thin decoder: exploratory sampling with any decoder-only transformers model, unchanged.

``generate(model, prompts, tokenizer, n=16, params=SamplingParams(...))`` draws n samples of every prompt; a prompt's
samples share one Distiller.  It is also an example of an engine around :class:`~esamp_core.sample.Explorer`: one
prefill per prompt, a batch that rows join and leave, and a host that reads tokens one step late.

A step, all of it on the device::

    forward ..block --shallow--> predict .. head --deep, logits--> sample, learn, stop? --> next tokens
                                                                                   '--> copies for the host

The host then handles the copies of the step *before*: stop strings, streaming, leaving rows, joining prompts.  So a row
whose stop string was completed draws one token more, which is thrown away; nothing else depends on being late.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from esamp_core.config import DistillerConfig, FilterOrder, SamplingParams, is_int, require
from esamp_core.decoder_batch import Batch, Receipt, to_device
from esamp_core.decoder_cache import RowCache, static_cache
from esamp_core.decoder_output import Output
from esamp_core.decoder_text import (
    Generation,
    Prompt,
    Prompts,
    Sample,
    Token,
    pad_token_id_of,
    read_prompts,
    seeded_params,
    stop_token_ids_of,
)
from esamp_core.errors import ArgumentError, EsampError, UnsupportedModelError
from esamp_core.explorer import Explorer
from esamp_core.taps import ModelParts, Tapped, Taps, check_head, find_parts

__all__ = ["Decoder", "Generation", "Token", "generate"]

CacheKind = Literal["dynamic", "static"]
DEFAULT_ROWS = 128


def generate(
    model: nn.Module,
    prompts: Prompts,
    tokenizer: Any = None,
    *,
    attention_mask: Tensor | None = None,
    n: int = 1,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    config: DistillerConfig | None = None,
    max_new_tokens: int = 256,
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: str | Sequence[str] = (),
    cache: CacheKind = "dynamic",
    max_batch_rows: int | None = None,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    shallow_layer: int = 0,
    progress: bool = False,
    on_token: Callable[[Token], None] | None = None,
    on_result: Callable[[Generation], None] | None = None,
    explorer: Explorer | None = None,
) -> list[Generation]:
    """Draw n samples of every prompt, in one call: a :class:`Decoder`, and its ``generate``; see these.

    Returns a list of :class:`Generation`, a prompt's samples side by side.  Raises ArgumentError,
    UnsupportedModelError.
    """
    decoder = Decoder(
        model,
        tokenizer,
        config=config,
        filter_order=filter_order,
        max_candidates=max_candidates,
        shallow_layer=shallow_layer,
        explorer=explorer,
    )
    return decoder.generate(
        prompts,
        attention_mask=attention_mask,
        n=n,
        params=params,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        stop_strings=stop_strings,
        cache=cache,
        max_batch_rows=max_batch_rows,
        progress=progress,
        on_token=on_token,
        on_result=on_result,
    )


class Decoder:
    """A model that is ready to be sampled from.

    model: a decoder-only transformers model with its head, on one device, in eval mode; any attention implementation.
    tokenizer: of transformers; needed for prompts of text, texts in results, and stop strings.
    config: the Distillers'.  Default ``DistillerConfig()``, with ``deep_scale`` read from the model's final norm.
    filter_order, max_candidates: see ``select_candidates``.
    shallow_layer: the block whose output is the shallow tap; negative counts from the end.  Default 0.
    explorer: one to use instead of making one per call; it then brings config, filter_order and max_candidates.

    Raises UnsupportedModelError (encoder-decoder, several devices, offloaded, no head that can be read) and
    ArgumentError.  Not thread-safe.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        config: DistillerConfig | None = None,
        filter_order: FilterOrder = "transformers",
        max_candidates: int = 256,
        shallow_layer: int = 0,
        explorer: Explorer | None = None,
    ) -> None:
        if explorer is not None and config is not None:
            raise ArgumentError("config must be left out when an explorer is given, which has its own")
        self.model, self.tokenizer = model, tokenizer
        self.parts: ModelParts = find_parts(model, shallow_layer)
        self.filter_order, self.max_candidates = filter_order, max_candidates
        config = config or DistillerConfig()
        if config.deep_scale is None and config.target == "deep":
            config = replace(config, deep_scale=self.parts.deep_scale)
        self.config = config
        self._given = explorer
        self.explorer = explorer
        """The Explorer in use; without one given, that of the latest call.  Within on_result its stats() still hold
        the prompt's group, ("prompt", prompt_index)."""
        self._head_checked = False

    @torch.inference_mode(False)  # a caller's: Distillers are updated in place
    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        *,
        attention_mask: Tensor | None = None,
        n: int = 1,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        max_new_tokens: int = 256,
        stop_token_ids: Sequence[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        cache: CacheKind = "dynamic",
        max_batch_rows: int | None = None,
        progress: bool = False,
        on_token: Callable[[Token], None] | None = None,
        on_result: Callable[[Generation], None] | None = None,
    ) -> list[Generation]:
        """Draw n samples of every prompt.

        prompts: texts (the tokenizer adds its special tokens; apply a chat template yourself), lists of token ids, or
            an integer tensor [P, T], padded on either side, with its attention_mask [P, T].
        n: samples of each prompt; they share a Distiller, and a prefill.  Default 1.
        params: one :class:`SamplingParams`, or one per prompt.  One for all: prompt i's request seed is seed + i
            (modulo 2^64); without a seed a fresh one is drawn from torch's generator, so torch.manual_seed fixes it.
            One per prompt: each seed is used as it is.  A sample's stream depends on its request seed and its index
            alone, not on the batch it ran in.  Default ``SamplingParams()``.
        max_new_tokens: most tokens per sample, the stop token included; also ended by the model's context.
        stop_token_ids: default those of ``model.generation_config``; () for none.
        stop_strings: a text ends before the first of them.
        cache: "dynamic" (default): prompts wait in a queue and join as rows finish.  "static": constant shapes, prompts
            run in waves, finished rows stay and are masked.
        max_batch_rows: most rows at once, at least n.  Default 128, or n.
        progress: show a bar.  on_token: called with every :class:`Token`, one step late.  on_result: called with each
            :class:`Generation` as it finishes.

        Returns a list of :class:`Generation`, a prompt's samples side by side.  Raises ArgumentError, and
        UnsupportedModelError if a tap does not run or the head as read does not give the model's logits.
        """
        require(is_int(n) and n >= 1, "n", "be an integer >= 1", n)
        require(is_int(max_new_tokens) and max_new_tokens >= 1, "max_new_tokens", "be >= 1", max_new_tokens)
        require(cache in ("dynamic", "static"), "cache", 'be "dynamic" or "static"', cache)
        limit = DEFAULT_ROWS if self._given is None else min(DEFAULT_ROWS, self._given.max_rows)
        batch_rows = max(limit, n) if max_batch_rows is None else max_batch_rows
        require(is_int(batch_rows) and batch_rows >= n, "max_batch_rows", f"be an integer >= n={n}", batch_rows)
        if self._given is not None and self._given.max_rows < batch_rows:
            raise ArgumentError(
                f"max_batch_rows must be <= the explorer's max_rows={self._given.max_rows}, got {batch_rows}"
            )
        strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        if not all(isinstance(s, str) and s for s in strings):
            raise ArgumentError(f"stop_strings must be texts that are not empty, got {stop_strings!r}")
        if strings and self.tokenizer is None:
            raise ArgumentError(f"tokenizer must be given for stop_strings, got None for {strings!r}")
        stop_ids = stop_token_ids_of(self.parts.model, stop_token_ids)
        parts = self.parts
        read = read_prompts(prompts, self.tokenizer, attention_mask, parts.vocab_size, parts.context)
        per_prompt = seeded_params(params, len(read))
        queue = deque(
            Prompt(
                index=i,
                text=text,
                token_ids=ids,
                params=per_prompt[i],
                budget=max_new_tokens if parts.context is None else min(max_new_tokens, parts.context - len(ids)),
            )
            for i, (text, ids) in enumerate(read)
        )
        if not queue:
            return []
        batch_rows = min(batch_rows, len(queue) * n)
        explorer = self._given or Explorer(
            parts.head,
            parts.hidden_size,
            self.config,
            max_groups=min(batch_rows, len(queue)),  # a prompt with one sample left still holds its Distiller
            max_rows=batch_rows,
            max_candidates=self.max_candidates,
            filter_order=self.filter_order,
        )
        self.explorer = explorer
        run = _Run(self, explorer, queue, n, batch_rows, stop_ids, cache)
        output = Output(self.tokenizer, len(queue), n, stop_ids, strings, on_token, on_result, progress)
        try:
            with Taps(self.model, parts) as taps:
                run.loop(taps, output)
        finally:
            run.close()
            output.close()
        return output.results()

    def check_head(self, explorer: Explorer, tapped: Tapped) -> None:
        """Once per model: the head that scores candidates must be the model's."""
        if not self._head_checked:
            self._head_checked = check_head(self.parts, explorer.head, tapped)


class _Run:
    """One call of ``Decoder.generate``: the queue of prompts and the running batch."""

    def __init__(
        self,
        decoder: Decoder,
        explorer: Explorer,
        queue: deque[Prompt],
        n: int,
        batch_rows: int,
        stop_ids: tuple[int, ...],
        cache: CacheKind,
    ) -> None:
        self._decoder, self._explorer, self._parts = decoder, explorer, decoder.parts
        self._queue, self._n, self._batch_rows = queue, n, batch_rows
        self._static = cache == "static"
        self._stop_ids = to_device(stop_ids, self._parts.device)
        self._pad_id = pad_token_id_of(self._parts.model, self._parts.vocab_size)
        self._explores = any(p.params.beta != 0 for p in queue)  # else predict and learn have nothing to do
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
            if self._batch is not None and self._batch.can_draw():
                launched.append(self._step(taps, self._batch))
            cut = [sample for receipt in waiting for sample in output.receive(receipt)]
            self._leave(cut)
            if prompts := self._next_prompts():
                launched.append(self._start(taps, prompts))
            waiting = launched

    def close(self) -> None:
        """After the last step, or an error in one."""
        if self._batch is not None:
            with contextlib.suppress(EsampError):  # would hide the error that led here
                self._explorer.close(self._batch.rows)
            self._batch = None

    def _leave(self, cut: list[Sample]) -> None:
        """Finished rows leave; in a static batch they stay, masked, until all have finished."""
        batch = self._batch
        if batch is None:
            return
        running = [i for i, sample in enumerate(batch.samples) if sample.finish_reason is None]
        if not running:
            self._batch = None
            self._explorer.close(batch.rows)
        elif self._static:
            if cut:
                batch.switch_off([sample.finish_reason is not None for sample in batch.samples])
        elif len(running) < len(batch.samples):
            batch.keep(running)

    @staticmethod
    def _group(sample: Sample) -> tuple[str, int] | None:
        """One Distiller per prompt; none where nobody would look at what it learned."""
        return ("prompt", sample.prompt.index) if sample.prompt.params.beta != 0 else None

    def _next_prompts(self) -> list[Prompt]:
        """The prompts that can start now, all n samples of each at once."""
        samples = [] if self._batch is None else self._batch.samples
        if samples and self._static:
            return []
        rows = self._batch_rows - len(samples)
        groups = self._explorer.max_groups - len({sample.prompt.index for sample in samples})
        return [self._queue.popleft() for _ in range(min(rows // self._n, groups, len(self._queue)))]

    def _step(self, taps: Taps, batch: Batch) -> Receipt:
        """One token for every row."""
        if not self._static:
            batch.cache.padded = batch.padded
        rows = batch.rows
        tapped = taps.forward(
            on_shallow=(lambda shallow: self._explorer.predict(shallow, rows)) if self._explores else None,
            **self._inputs(batch.tokens[:, None], batch.attention_mask(), batch.positions[:, None], batch.cache),
        )
        batch.length += 1
        return self._sample(batch, tapped)

    def _sample(self, batch: Batch, tapped: Tapped) -> Receipt:
        draw = self._explorer.sample(tapped.logits, batch.rows)
        if self._explores:
            self._explorer.learn(tapped.deep, batch.rows)
        return batch.advance(draw, self._stop_ids, self._pad_id)

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
        tapped = taps.forward(
            **self._inputs(
                to_device(token_ids, device).view(len(prompts), length),
                (positions >= 0).long() if any(pads) else None,
                positions.clamp(min=0),
                cache,
            )
        )
        self._decoder.check_head(self._explorer, tapped)
        origin = [i for i in range(len(prompts)) for _ in range(n)]
        spread = to_device(origin, device)
        if n > 1:
            cache.reorder_cache(spread)
            tapped = Tapped(*(t[spread] for t in tapped))
        samples = [Sample(prompt, i) for prompt in prompts for i in range(n)]
        rows = self._explorer.open(
            [self._group(sample) for sample in samples],
            [sample.prompt.params for sample in samples],
            sample_index=[sample.index for sample in samples],
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
            if self._explores:
                self._explorer.predict(tapped.shallow, rows)
            receipt = self._sample(batch, tapped)
        except BaseException:
            self._explorer.close(rows)
            raise
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.join(batch)
        return receipt

    def _inputs(self, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> dict[str, Any]:
        inputs = {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        return {name: value for name, value in inputs.items() if name in self._parts.accepts}
