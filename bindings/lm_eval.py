"""lm-evaluation-harness with exploratory sampling: the model ``esamp``, which is ``hf`` but for how it samples.

    python -m esamp_core.bindings.lm_eval run --model esamp --model_args pretrained=...,beta=0.1 --tasks ...

or, in Python, ``import esamp_core.bindings.lm_eval`` before ``lm_eval.simple_evaluate(model="esamp", ...)``.

The harness asks for a document's ``repeats`` by repeating its request.  Here these are siblings: samples of one prompt,
prefilled once, that divide its distribution among them, or explore.  What is not sampled (log-likelihoods, greedy
requests) is as with ``hf``.  See docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers.utils import logging

from esamp_core.base.checks import is_int, require
from esamp_core.base.config import Apply, DistillerConfig, SamplingParams, check_apply, check_options
from esamp_core.base.errors import UnsupportedModelError
from esamp_core.base.seeds import fresh_seed, prompt_seed
from esamp_core.bindings.hf_generate import requested_params
from esamp_core.bindings.lm_eval_requests import Siblings, find_siblings, key_of, requested_config
from esamp_core.decoder import Decoder, Generation
from esamp_core.decoder.prompts import eos_token_ids

_SAMPLES_AT_ONCE = 1024  # of one Decoder.generate, which keeps numbers of every token until it returns
_GREEDY = SamplingParams(temperature=0.0, beta=0.0, seed=0)


class Settings(NamedTuple):
    """What a request's gen_kwargs, and the model's own GenerationConfig, ask for."""

    params: SamplingParams  # _GREEDY, or without the seed of a prompt
    until: list[str]
    stop_ids: tuple[int, ...]
    longest: int  # most tokens of a prompt; of a longer one the first are left out
    max_new_tokens: int


class ExploringLM(HFLM):
    """HFLM whose sampled requests are drawn by :class:`~esamp_core.decoder.Decoder`, siblings together.

    beta: strength of exploration in sampled requests.  Default 0, none.
    stratified: a prompt's samples divide every distribution evenly; each keeps its own, so averages over repeats stay
        unbiased.  Default (None) True, but False with distinct.
    distinct: they are drawn without replacement, for pass@n; averages over repeats are biased.  Default False.
    start: file of start weights that ``esamp calibrate`` wrote for this model, of rank 64.  Default None.
    max_candidates: how many tokens exploration scores; see ``select_candidates``.  Default 256.
    max_batch_rows: most samples at once, at least a prompt's repeats.  Default (None) the harness's batch_size, or
        the repeats where they are more.
    sampling_seed: equal ones give equal texts.  Default (None) from torch's generator, which ``--seed`` sets.  Each
        prompt has samples of its own, also if its text has been in this call, another, or another rank's.
    apply: "candidates" (default) or "latent"; see Decoder.
    pretrained and all others: HFLM's.

    Raises ArgumentError, also for parallelize, tp_plan, and mixed_precision_dtype with beta; UnsupportedModelError for
    encoder-decoder models, and what Decoder refuses.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        beta: float = 0.0,
        stratified: bool | None = None,
        distinct: bool = False,
        start: str | None = None,
        max_candidates: int = 256,
        max_batch_rows: int | None = None,
        sampling_seed: int | None = None,
        apply: Apply = "candidates",
        **kwargs: Any,
    ) -> None:
        for name in ("parallelize", "tp_plan"):
            require(not kwargs.get(name), name, "be left out: the model must be on one device", kwargs.get(name))
        ok_rows = max_batch_rows is None or (is_int(max_batch_rows) and max_batch_rows >= 1)
        require(ok_rows, "max_batch_rows", "be None or an integer >= 1", max_batch_rows)
        require(sampling_seed is None or is_int(sampling_seed), "sampling_seed", "be None or an integer", sampling_seed)
        require(isinstance(distinct, bool), "distinct", "be True or False", distinct)
        stratified = not distinct if stratified is None else stratified
        self._base = SamplingParams(beta=beta, stratified=stratified, distinct=distinct, seed=sampling_seed)
        autocast = kwargs.get("mixed_precision_dtype")
        without = "be None with beta: Distillers do not run under autocast; give dtype instead"
        require(beta == 0 or autocast is None, "mixed_precision_dtype", without, autocast)
        check_options("transformers", max_candidates)
        config = DistillerConfig(start=start)
        check_apply(apply, config.target, False)
        self.max_batch_rows = max_batch_rows
        self._rank_seed: int | None = None
        self._sampled = 0  # prompts, over the life of this object
        super().__init__(pretrained, **kwargs)
        # HFLM looks for stop strings in texts with their special tokens; many a stop string is one.
        verbatim = SimpleNamespace(decode=lambda token_ids, skip_special_tokens: self.tokenizer.decode(token_ids))
        self._decoder = Decoder(self.model, verbatim, config=config, max_candidates=max_candidates, apply=apply)

    def _get_backend(self, *args: Any, **kwargs: Any) -> None:
        """HFLM's, which knows before any weights are loaded."""
        super()._get_backend(*args, **kwargs)
        if self.backend != "causal":
            raise UnsupportedModelError(f"pretrained must be a decoder-only model, got the backend {self.backend!r}")

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The texts of the requests, in their order.

        Raises ArgumentError, before anything is drawn, for what a request or the model's GenerationConfig asks for
        and Decoder does not do.
        """
        calls: dict[Hashable, tuple[Settings, list[Siblings]]] = {}
        for siblings in find_siblings(requests):
            key = (key_of(siblings.gen_kwargs), len(siblings.places))
            if key not in calls:
                calls[key] = (self._settings(siblings.gen_kwargs), [])
            calls[key][1].append(siblings)
        if (rows := self.max_batch_rows or self.batch_size) == "auto":
            rows = self._detect_batch_size()
        texts, hidden = [""] * len(requests), disable_tqdm or self.rank != 0
        with logging.tqdm(total=len(requests), disable=hidden, desc="Running generate_until requests") as bar:
            for settings, sets in calls.values():
                self._draw(settings, sets, rows, texts, bar)
        return texts

    def _settings(self, gen_kwargs: dict[str, Any]) -> Settings:
        asked: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        eos: str = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(asked.pop("until"), eos=eos)
        require(all(isinstance(text, str) and text for text in until), "until", "be texts, none of them empty", until)
        context = self._decoder.parts.context or self.max_length
        require(self.max_length <= context, "max_length", f"be at most the model's {context}", self.max_length)
        room = asked.pop("max_gen_toks")
        require(1 <= room < self.max_length, "max_gen_toks", f"be in 1..{self.max_length - 1}", room)
        config = requested_config(self.model.generation_config, asked)
        return Settings(
            params=requested_params(config, self._base) if config.do_sample else _GREEDY,
            until=until,
            stop_ids=(*eos_token_ids(config), self.eot_token_id),
            longest=self.max_length - room,
            max_new_tokens=config.max_new_tokens or room,  # in generate the model's goes before HFLM's max_length
        )

    def _draw(self, settings: Settings, sets: list[Siblings], rows: int, texts: list[str], bar: Any) -> None:
        """Fill in the texts of sets of one size."""
        greedy = settings.params is _GREEDY
        n = 1 if greedy else len(sets[0].places)
        prompts = [(self._encode(siblings.context, settings), self._seeded(settings), siblings) for siblings in sets]
        prompts.sort(key=lambda prompt: -len(prompt[0]))  # as HFLM: what needs most memory comes first
        many = max(1, _SAMPLES_AT_ONCE // n)
        for token_ids, params, some in (zip(*prompts[i : i + many], strict=True) for i in range(0, len(prompts), many)):

            def give(drawn: Generation, some: Sequence[Siblings] = some) -> None:
                places, context, gen_kwargs = some[drawn.prompt_index]
                text = self._text(list(drawn.token_ids), settings.until)
                for place in places if greedy else [places[drawn.sample_index]]:
                    texts[place] = text
                    self.cache_hook.add_partial("generate_until", (context, gen_kwargs), text)
                    bar.update(1)

            precision = self.mixed_precision_dtype
            with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
                self._decoder.generate(
                    token_ids,
                    n=n,
                    params=params,
                    max_new_tokens=settings.max_new_tokens,
                    stop_token_ids=settings.stop_ids,
                    stop_strings=settings.until,
                    max_batch_rows=self.max_batch_rows or max(n, rows),
                    on_result=give,
                )

    def _encode(self, context: str, settings: Settings) -> list[int]:
        # Alone, as HFLM does with batch_size 1: whether it adds a start token depends on the first of a batch.
        token_ids, _ = self.tok_batch_encode([context], left_truncate_len=settings.longest, truncation=self.truncation)
        return list(token_ids[0].tolist())

    def _seeded(self, settings: Settings) -> SamplingParams:
        if settings.params is _GREEDY:
            return _GREEDY
        if self._rank_seed is None:
            seed = fresh_seed() if self._base.seed is None else self._base.seed
            self._rank_seed = prompt_seed(seed, 1 + self.rank)
        self._sampled += 1
        return replace(settings.params, seed=prompt_seed(self._rank_seed, self._sampled))

    def _text(self, token_ids: list[int], until: list[str]) -> str:
        """What HFLM makes of these tokens."""
        thought = self.think_end_token
        by_id = isinstance(thought, int)
        if by_id and thought in token_ids:
            token_ids = token_ids[len(token_ids) - token_ids[::-1].index(thought) :]
        text: str = self.tok_decode(token_ids)
        return str(postprocess_generated_text(text.lstrip() if by_id else text, until, None if by_id else thought))


def main() -> None:
    """The harness's own command, with this model."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


# By name, not by class: run with ``python -m`` this text is a second module, whose class nobody should get.
if "esamp" not in model_registry:
    model_registry.register("esamp", target="esamp_core.bindings.lm_eval:ExploringLM")

if __name__ == "__main__":
    main()
