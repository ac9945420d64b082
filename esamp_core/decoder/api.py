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

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from esamp_core.base.checks import check_hashables, is_int, require
from esamp_core.base.config import Apply, DistillerConfig, FilterOrder, SamplingParams, check_apply
from esamp_core.base.errors import ArgumentError, UnsupportedModelError
from esamp_core.base.presets import PRESETS
from esamp_core.base.seeds import seeded_params
from esamp_core.decoder.cuda_graph import GraphMode, GraphPolicy
from esamp_core.decoder.kv_cache import check_padding, holds_nothing
from esamp_core.decoder.loop import CacheKind, Run
from esamp_core.decoder.output import Output
from esamp_core.decoder.prompts import Prompt, Prompts, read_prompts, stop_token_ids_of
from esamp_core.decoder.replay import replay_sample
from esamp_core.decoder.results import Generation, Token
from esamp_core.explorer import Explorer, check_start
from esamp_core.models.parts import ModelParts, find_parts
from esamp_core.models.taps import Tapped, Taps, check_head

DEFAULT_ROWS = 128


def generate(
    model: nn.Module,
    prompts: Prompts,
    tokenizer: Any = None,
    *,
    attention_mask: Tensor | None = None,
    n: int = 1,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    groups: Sequence[Hashable | None] | None = None,
    config: DistillerConfig | None = None,
    max_new_tokens: int = 256,
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: str | Sequence[str] = (),
    cache: CacheKind = "dynamic",
    graph: GraphMode = "auto",
    max_batch_rows: int | None = None,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    shallow_layer: int = 0,
    apply: Apply = "candidates",
    neutral: bool = False,
    progress: bool = False,
    return_distilled: bool = False,
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
        apply=apply,
        neutral=neutral,
        explorer=explorer,
    )
    return decoder.generate(
        prompts,
        attention_mask=attention_mask,
        n=n,
        params=params,
        groups=groups,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        stop_strings=stop_strings,
        cache=cache,
        graph=graph,
        max_batch_rows=max_batch_rows,
        progress=progress,
        return_distilled=return_distilled,
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
    apply: "candidates" (default): scored candidates are reweighted after the filters, and each token's novelty, KL and
        log-probability under the base model are known.  "latent": hidden states are mixed before the head (see
        ``Explorer.mix``), so every token of the vocabulary moves, and filters see the mixed model; in rows that explore
        base_logprob, novelty and kl are NaN, not known.  Not with target "choice".
    neutral: only novelty that leaves the entropy as it is (see ``reweight``); not with apply "latent".
    explorer: one to use instead of making one per call; it then brings config, filter_order, max_candidates, neutral.

    Raises UnsupportedModelError (encoder-decoder, several devices, offloaded, no head that can be read) and
    ArgumentError.  One thread at a time: with a model or an Explorer that another thread is using, ``generate`` raises
    StateError at once.
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
        apply: Apply = "candidates",
        neutral: bool = False,
        explorer: Explorer | None = None,
    ) -> None:
        if explorer is not None and (config is not None or neutral):
            raise ArgumentError("config and neutral must be left out when an explorer is given, which has its own")
        self.model, self.tokenizer = model, tokenizer
        self.parts: ModelParts = find_parts(model, shallow_layer)
        check_padding(self.parts)
        self.apply = apply
        if explorer is None:
            self.config, self.neutral = self.parts.complete(config), neutral
            self.filter_order, self.max_candidates = filter_order, max_candidates
        else:
            self.config, self.neutral = explorer.config, explorer.neutral
            self.filter_order, self.max_candidates = explorer.filter_order, explorer.max_candidates
        check_apply(apply, self.config.target, neutral)
        if explorer is None:  # or it has checked its own
            check_start(self.config, self.parts.head.weight)
        self._given = explorer
        self.explorer = explorer
        """The Explorer in use; without one given, that of the latest call.  Within on_result its stats() still hold
        the prompt's group, ("prompt", prompt_index)."""
        self._checked = False
        self._graphs = GraphPolicy(self.parts.device)

    @torch.inference_mode(False)  # a caller's: Distillers are updated in place
    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        *,
        attention_mask: Tensor | None = None,
        n: int = 1,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        groups: Sequence[Hashable | None] | None = None,
        max_new_tokens: int = 256,
        stop_token_ids: Sequence[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        cache: CacheKind = "dynamic",
        graph: GraphMode = "auto",
        max_batch_rows: int | None = None,
        progress: bool = False,
        return_distilled: bool = False,
        on_token: Callable[[Token], None] | None = None,
        on_result: Callable[[Generation], None] | None = None,
    ) -> list[Generation]:
        """Draw n samples of every prompt.

        prompts: texts (the tokenizer adds its special tokens; apply a chat template yourself), lists of token ids, or
            an integer tensor [P, T], padded on either side, with its attention_mask [P, T].
        n: samples of each prompt; they share a Distiller, and a prefill.  Default 1.
        params: one :class:`SamplingParams`, or one per prompt.  One for all: each prompt's request seed is made of its
            seed and the prompt's index (that of the first is the seed); without a seed a fresh one is drawn from
            torch's generator, so torch.manual_seed fixes it.  One per prompt: each seed is used as it is.  A sample's
            stream depends on its request seed and its index alone (stratified: and on n), not on the batch it ran in.
            Default ``PRESETS["default"].params``.
            Unless they say ``distinct=False`` (or stratified, or temperature 0) the n samples of a prompt are drawn
            without replacement, so all of them differ.  They are numbered, and given to on_result, when all have ended;
            the first of them is the ordinary sample 0.  For estimates that need independent samples, such as
            averages, votes or policy gradients, turn it off.  Filters may leave fewer: the others are then copies
            (``Generation.copy_of``).
        groups: one per prompt; prompts of equal ones share a Distiller, which goes on from one to the next, and with an
            explorer of yours from call to call. None: that prompt has none, and is sampled plainly. Default: each
            prompt has its own, which starts afresh and ends with it.
        max_new_tokens: most tokens per sample, the stop token included; also ended by the model's context.
        stop_token_ids: default those of ``model.generation_config``; () for none.
        stop_strings: a text ends before the first of them.
        cache: "dynamic" (default): prompts wait in a queue and join as rows finish.  "static": constant shapes, prompts
            run in waves, finished rows stay and are masked.
        graph: with a static cache, capture the decode step as one CUDA graph per wave and replay it.  "auto" (default):
            on CUDA where that is possible; where it is not, a warning says why, once per Decoder.  True: or raise.
            False: never.
        max_batch_rows: most rows at once, at least n.  Default 128, or n.
        progress: show a bar.
        return_distilled: keep what each token was explored with (``Generation.distilled``, 4 H bytes a token), so that
            ``replay`` can tell its log-probability again.
        on_token: called with every :class:`Token`, one step late; not with distinct siblings,
            of whose tokens none is certain before all have ended.  on_result: called with each
            :class:`Generation` as it finishes.

        Returns a list of :class:`Generation`, a prompt's samples side by side.  Raises ArgumentError, and
        UnsupportedModelError if a tap does not run or the head as read does not give the model's logits.
        """
        require(is_int(n) and n >= 1, "n", "be an integer >= 1", n)
        require(is_int(max_new_tokens) and max_new_tokens >= 1, "max_new_tokens", "be >= 1", max_new_tokens)
        require(cache in ("dynamic", "static"), "cache", 'be "dynamic" or "static"', cache)
        require(graph in (True, False, "auto"), "graph", 'be True, False or "auto"', graph)
        if graph is True and cache != "static":
            raise ArgumentError(f'graph=True needs cache="static", got cache={cache!r}')
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
        self._graphs.ask(graph)
        read = read_prompts(prompts, self.tokenizer, attention_mask, parts.vocab_size, parts.context)
        given = PRESETS["default"].params if params is None else params
        per_prompt = [self._settled(p, n) for p in seeded_params(given, len(read))]
        distinct = any(p.distinct for p in per_prompt)
        if distinct and on_token is not None:
            raise ArgumentError(
                f"params.distinct must be False with on_token and n={n}: which tokens each of the samples has is known "
                "when all have ended"
            )
        named = [("prompt", i) for i in range(len(read))] if groups is None else check_hashables("groups", groups)
        if len(named) != len(read):
            raise ArgumentError(f"groups must be one per prompt ({len(read)}), got {len(named)}")
        queue = deque(
            Prompt(
                index=i,
                text=text,
                token_ids=ids,
                params=per_prompt[i],
                group=named[i],
                budget=max_new_tokens if parts.context is None else min(max_new_tokens, parts.context - len(ids)),
            )
            for i, (text, ids) in enumerate(read)
        )
        if not queue:
            return []
        batch_rows = min(batch_rows, len(queue) * n)
        latent = self.apply == "latent"
        explorer = self._given or Explorer(
            None if latent else parts.head,
            parts.hidden_size,
            self.config,
            # A prompt with one sample left still holds its Distiller; named ones are kept to the end of the call.
            max_groups=min(batch_rows, len(queue)) if groups is None else max(1, len({*named} - {None})),
            max_rows=batch_rows,
            max_candidates=self.max_candidates,
            filter_order=self.filter_order,
            neutral=self.neutral,
            device=parts.device if latent else None,
        )
        self.explorer = explorer
        self._checked = False  # of this call: the weights of a kept Decoder may have moved, or an adapter come
        run = Run(
            parts,
            explorer,
            queue,
            n,
            batch_rows,
            stop_ids,
            self._check_first,
            self._graphs if cache == "static" else None,
            latent,
            retain=groups is not None,
            # A sample that a stop string has ended must not go on in other rows.
            prompt_host=distinct and bool(strings),
            keep_distilled=return_distilled,
        )
        output = Output(self.tokenizer, len(queue), n, stop_ids, strings, on_token, on_result, progress)
        # Kernels and captures go to the current device.
        on_device = torch.cuda.device(parts.device) if parts.device.type == "cuda" else nullcontext()
        taps = Taps(self.model, parts)
        with on_device, closing(output), explorer.alone():
            try:
                with taps:
                    run.loop(taps, output)
            finally:  # also where an interrupt comes while the taps' context is being left
                taps.remove()
                run.close()
        return output.results()

    def replay(self, generation: Generation, logits: Tensor) -> Tensor:
        """Log-probabilities of a sample's tokens again, with what each of them was explored with: for trainers.

        generation: from ``generate(return_distilled=True)`` of a Decoder with these options; without exploration
            (beta 0) any.
        logits: [T, V] float, the model's own at the T positions that the tokens were drawn from, under the weights of
            now; the log-probabilities are differentiable in them.  The prediction is the one of then, and a constant.

        Returns float32 [T], nats: ``generation.logprobs`` where logits are those of then, to rounding; -inf for a token
        that the filters no longer keep.  Raises ArgumentError; UnsupportedModelError with apply "latent" and a
        soft-cap.
        """
        choice = self.config.target == "choice"
        return replay_sample(
            self.parts,
            self.parts.head.centred() if choice else self.parts.head,
            generation,
            logits,
            self.apply,
            model_weight=0.0 if choice else 1.0,
            neutral=self.neutral,
            filter_order=self.filter_order,
            max_candidates=self.max_candidates,
        )

    def _settled(self, params: SamplingParams, n: int) -> SamplingParams:
        """Whether a prompt's samples are distinct: where that is possible, unless the parameters say otherwise."""
        learns = self.config.target
        if params.distinct and learns != "deep":
            raise ArgumentError(f"params.distinct must be None or False with target {learns!r}")
        possible = n > 1 and params.temperature > 0 and not params.stratified and learns == "deep"
        return replace(params, distinct=possible and params.distinct is not False)

    def _check_first(self, tapped: Tapped, cache: Any, explores: bool) -> None:
        """The forward uses what it is given; and once a call, before anything explores: the head is the model's."""
        name = type(self.parts.model).__name__
        if holds_nothing(cache):
            raise UnsupportedModelError(f"{name} was given a cache as {self.parts.cache_argument} and left it empty")
        if explores and not self._checked:
            assert self.explorer is not None
            head = None if self.apply == "latent" else self.explorer.head or self.parts.head
            self._checked = check_head(self.parts, head, tapped)
