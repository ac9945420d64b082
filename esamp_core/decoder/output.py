"""The host's side of decoding: tokens become texts, streams, results and progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from transformers.utils import logging

from esamp_core.base.tensors import Status, warn_of_bad_numbers
from esamp_core.decoder.batch import Receipt
from esamp_core.decoder.results import Generation, RunningSample, Token
from esamp_core.decoder.text import TextStream

REFRESH_SECONDS = 0.5


def _key(sample: RunningSample) -> tuple[int, int]:
    return sample.prompt.index, sample.index


class Output:
    """Collects what was drawn; decides on the host what the device could not, stop strings."""

    def __init__(
        self,
        tokenizer: Any,
        prompts: int,
        samples: int,
        stop_ids: tuple[int, ...],
        stop_strings: tuple[str, ...],
        on_token: Callable[[Token], None] | None,
        on_result: Callable[[Generation], None] | None,
        progress: bool,
    ) -> None:
        self._tokenizer, self._samples = tokenizer, samples
        self._stop_ids, self._stop_strings = frozenset(stop_ids), stop_strings
        self._on_token, self._on_result = on_token, on_result
        self._streams: dict[tuple[int, int], TextStream] = {}
        self._results: list[Generation | None] = [None] * (prompts * samples)
        self._statuses: list[int] = []  # of finished samples
        self._tokens, self._started = 0, time.perf_counter()
        self._shown = self._started
        self._bar = logging.tqdm(total=len(self._results), unit="sample") if progress else None

    def results(self) -> list[Generation]:
        """All generations, a prompt's samples side by side.  Warns of numbers that were not finite."""
        warn_of_bad_numbers(self._statuses)
        return [result for result in self._results if result is not None]

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def receive(self, receipt: Receipt) -> list[RunningSample]:
        """Take one step's tokens; returns the samples that a stop string ended, which the device does not know."""
        ended_here = []
        drawn_now, places = receipt.read(), receipt.places()
        if places is not None:
            self._change_places(receipt.samples, places[0])
        for sample, drawn in zip(receipt.samples, drawn_now, strict=True):
            # What a finished sample drew since then is thrown away; a row of distinct siblings may hold nothing yet.
            if sample.finish_reason is not None or drawn.status & Status.INACTIVE:
                continue
            sample.take(drawn)
            token = drawn.token_id
            if token < 0:
                sample.finish_reason = "empty"
            else:
                self._tokens += 1
                if token in self._stop_ids:
                    sample.finish_reason, sample.stop_reason = "stop", token
            if self._text(sample):
                ended_here.append(sample)
            if sample.finish_reason is None and len(sample.token_ids) >= sample.prompt.budget:
                sample.finish_reason = "length"
            if not sample.prompt.params.distinct:
                self._emit(sample, token)
        if places is not None:
            self._emit_distinct(receipt.samples, places[1])
        self._show_rate()
        return ended_here

    def _change_places(self, samples: Sequence[RunningSample], parents: Sequence[int]) -> None:
        """Rows that go on from what another row was take over its tokens and its text; that row stays where it is."""
        for sample, parent in zip(samples, (samples[p] for p in parents), strict=True):
            if parent is sample:
                continue
            sample.go_on_from(parent)
            if (stream := self._streams.get(_key(parent))) is not None:
                self._streams[_key(sample)] = copy(stream)

    def _emit_distinct(self, samples: Sequence[RunningSample], perturbed: Sequence[float]) -> None:
        """The samples of every prompt whose distinct siblings have all ended, in the order of their drawing."""
        prompts: dict[int, list[tuple[float, RunningSample]]] = {}
        for sample, value in zip(samples, perturbed, strict=True):
            if sample.prompt.params.distinct and not sample.done:
                prompts.setdefault(sample.prompt.index, []).append((value, sample))
        for rows in prompts.values():
            found = [(value, sample) for value, sample in rows if value > -math.inf]
            if any(sample.finish_reason is None for _, sample in found):
                continue
            found.sort(key=lambda pair: -pair[0])
            texts = [self._final_text(sample, self._streams.get(_key(sample))) for _, sample in found]
            for number, (_, row) in enumerate(rows):
                at = number % len(found)
                value, sample = found[at]
                self._statuses.append(sample.status)
                row.done = True
                self._streams.pop(_key(row), None)
                copy_of = at if number >= len(found) else None
                self._give(sample.generation(texts[at], number, value, copy_of))

    def _show_rate(self) -> None:
        now = time.perf_counter()
        if self._bar is not None and now - self._shown > REFRESH_SECONDS:
            self._shown = now
            self._bar.set_postfix_str(f"{self._tokens / (now - self._started):,.0f} tokens/s")

    def _text(self, sample: RunningSample) -> bool:
        """Whether the newest token completed a stop string."""
        if (not self._stop_strings and self._on_token is None) or self._tokenizer is None:
            return False
        stream = self._streams.setdefault(_key(sample), TextStream(self._tokenizer, self._stop_strings))
        if sample.finish_reason is not None:
            return False
        found = stream.add(sample.token_ids)
        if found is not None:
            sample.finish_reason, sample.stop_reason = "stop", found
        return found is not None

    def _emit(self, sample: RunningSample, token: int) -> None:
        finished = sample.finish_reason is not None
        stream = self._streams.get(_key(sample))
        text = None
        if finished:
            text = self._final_text(sample, stream)
            self._streams.pop(_key(sample), None)
        if self._on_token is not None and token >= 0:
            piece = "" if stream is None else stream.piece(finished)
            last = sample.drawn[-1]
            numbers = (last.logprob, last.base_logprob, last.novelty)
            self._on_token(Token(sample.prompt.index, sample.index, token, piece, *numbers))
        if finished:
            sample.done = True
            self._statuses.append(sample.status)
            self._give(sample.generation(text))

    def _give(self, result: Generation) -> None:
        self._results[result.prompt_index * self._samples + result.sample_index] = result
        if self._on_result is not None:
            self._on_result(result)
        if self._bar is not None:
            self._bar.update()

    def _final_text(self, sample: RunningSample, stream: TextStream | None) -> str | None:
        if self._tokenizer is None:
            return None
        stream = stream or TextStream(self._tokenizer, ())
        if not isinstance(sample.stop_reason, str):
            stopped = sample.finish_reason == "stop"
            stream.finish(sample.token_ids[:-1] if stopped else sample.token_ids)
        return stream.text
