"""The host's side of decoding: tokens become texts, streams, results and progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers.utils import logging

from esamp_core.base.tensors import warn_of_bad_numbers
from esamp_core.decoder.batch import Receipt
from esamp_core.decoder.results import Generation, RunningSample, Token
from esamp_core.decoder.text import TextStream

REFRESH_SECONDS = 0.5


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
        for sample, drawn in zip(receipt.samples, receipt.read(), strict=True):
            if sample.finish_reason is not None:  # what it drew since then is thrown away
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
            self._emit(sample, token)
        self._show_rate()
        return ended_here

    def _show_rate(self) -> None:
        now = time.perf_counter()
        if self._bar is not None and now - self._shown > REFRESH_SECONDS:
            self._shown = now
            self._bar.set_postfix_str(f"{self._tokens / (now - self._started):,.0f} tokens/s")

    def _text(self, sample: RunningSample) -> bool:
        """Whether the newest token completed a stop string."""
        if (not self._stop_strings and self._on_token is None) or self._tokenizer is None:
            return False
        key = (sample.prompt.index, sample.index)
        stream = self._streams.setdefault(key, TextStream(self._tokenizer, self._stop_strings))
        if sample.finish_reason is not None:
            return False
        found = stream.add(sample.token_ids)
        if found is not None:
            sample.finish_reason, sample.stop_reason = "stop", found
        return found is not None

    def _emit(self, sample: RunningSample, token: int) -> None:
        finished = sample.finish_reason is not None
        stream = self._streams.get((sample.prompt.index, sample.index))
        text = None
        if finished:
            text = self._final_text(sample, stream)
            self._streams.pop((sample.prompt.index, sample.index), None)
        if self._on_token is not None and token >= 0:
            piece = "" if stream is None else stream.piece(finished)
            last = sample.drawn[-1]
            numbers = (last.logprob, last.base_logprob, last.novelty)
            self._on_token(Token(sample.prompt.index, sample.index, token, piece, *numbers))
        if finished:
            result = sample.generation(text)
            self._statuses.append(sample.status)
            self._results[sample.prompt.index * self._samples + sample.index] = result
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
