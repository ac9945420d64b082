"""What goes into the decoder and comes out of it: prompts, tokens, generations, and text as it grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from esamp_core.config import SamplingParams, is_int
from esamp_core.errors import ArgumentError, EncodingError

FinishReason = Literal["stop", "length", "empty"]
Prompts = str | Sequence[str] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class Token:
    """One drawn token, as handed to ``on_token``."""

    prompt_index: int
    sample_index: int
    token_id: int
    text: str  # what became certain with this token; a sample's texts add up to its Generation.text
    logprob: float
    base_logprob: float
    novelty: float


@dataclass(frozen=True)
class Generation:
    """One finished sample.  The numbers are one per token, as in :class:`~esamp_core.structures.Draw`."""

    prompt_index: int
    sample_index: int
    prompt: str | None  # None if the prompt was given as token ids
    prompt_token_ids: tuple[int, ...]
    text: str | None  # without special tokens, the stop token and the stop string; None without a tokenizer
    token_ids: tuple[int, ...]  # everything drawn, the stop token and a stop string's tokens included
    logprobs: tuple[float, ...]  # nats, of the distribution that was sampled
    base_logprobs: tuple[float, ...]  # nats, of the model's own, temperature 1
    novelty: tuple[float, ...]  # logit units
    kl: tuple[float, ...]  # nats, of the distribution that was sampled from the model's on the same candidates
    count: tuple[int, ...]  # candidates that the filters kept
    status: tuple[int, ...]  # Status flags; 0 is an ordinary draw
    finish_reason: FinishReason  # "empty": the model left no token that could be drawn
    stop_reason: int | str | None  # the stop token or stop string that ended it
    seed: int  # the request seed of the prompt: SamplingParams(seed=...) that repeats this prompt alone


@dataclass(frozen=True)
class Prompt:
    """A prompt to be run."""

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    params: SamplingParams  # with a seed
    budget: int  # most tokens to draw


class Drawn(NamedTuple):
    """One row of a :class:`~esamp_core.structures.Draw`, on the host."""

    token_id: int
    logprob: float
    base_logprob: float
    novelty: float
    kl: float
    count: int  # type: ignore[assignment]  # a tuple has a method of this name
    status: int


@dataclass
class Sample:
    """One running row, as far as the host has seen it."""

    prompt: Prompt
    index: int
    drawn: list[Drawn] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # those of drawn, for decoding
    status: int = 0  # Status flags of all steps, those without a token too
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def take(self, drawn: Drawn) -> None:
        """One step's outcome; without a token nothing is kept but what the status says."""
        self.status |= drawn.status
        if drawn.token_id >= 0:
            self.drawn.append(drawn)
            self.token_ids.append(drawn.token_id)

    def generation(self, text: str | None) -> Generation:
        assert self.finish_reason is not None and self.prompt.params.seed is not None
        return Generation(
            prompt_index=self.prompt.index,
            sample_index=self.index,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids,
            text=text,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(d.logprob for d in self.drawn),
            base_logprobs=tuple(d.base_logprob for d in self.drawn),
            novelty=tuple(d.novelty for d in self.drawn),
            kl=tuple(d.kl for d in self.drawn),
            count=tuple(d.count for d in self.drawn),
            status=tuple(d.status for d in self.drawn),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            seed=self.prompt.params.seed,
        )


def read_prompts(
    prompts: Prompts, tokenizer: Any, attention_mask: Tensor | None, vocab_size: int, context: int | None
) -> list[tuple[str | None, tuple[int, ...]]]:
    """Texts and token ids of the prompts, checked.  Raises ArgumentError."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if attention_mask is not None and not isinstance(prompts, Tensor):
        raise ArgumentError(f"attention_mask must go with a tensor of prompts, got it with {type(prompts).__name__}")
    if not isinstance(prompts, (Tensor, Sequence)):
        raise ArgumentError(f"prompts must be texts, lists of token ids or a tensor [P, T], got {prompts!r}")
    read: list[tuple[str | None, tuple[int, ...]]] = []
    if isinstance(prompts, Tensor):
        mask = torch.ones_like(prompts) if attention_mask is None else attention_mask
        if prompts.dim() != 2 or prompts.is_floating_point() or mask.shape != prompts.shape:
            raise ArgumentError(
                "prompts must be an integer tensor [P, T] with an attention_mask of the same shape, got "
                f"{prompts.dtype} {list(prompts.shape)} and {list(mask.shape)}"
            )
        pairs = zip(prompts.tolist(), mask.bool().tolist(), strict=True)
        read = [(None, tuple(i for i, on in zip(ids, kept, strict=True) if on)) for ids, kept in pairs]
    else:
        for number, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                if tokenizer is None:
                    raise ArgumentError(f"tokenizer must be given for prompts of text, got None for {prompt[:40]!r}")
                read.append((prompt, _encode(tokenizer, prompt, number)))
            elif isinstance(prompt, (list, tuple)) and all(is_int(i) for i in prompt):
                read.append((None, tuple(prompt)))
            else:
                raise ArgumentError(f"prompts[{number}] must be a text or a list of token ids, got {prompt!r}")
    for number, (_, ids) in enumerate(read):
        if not ids:
            raise ArgumentError(f"prompts[{number}] must have at least one token, got none")
        if context is not None and len(ids) >= context:
            raise ArgumentError(
                f"prompts[{number}] must leave room in the model's context of {context} tokens, got {len(ids)} tokens"
            )
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ArgumentError(
                f"prompts[{number}] must hold token ids in 0..{vocab_size - 1}, got {min(ids)}..{max(ids)}"
            )
    return read


def _encode(tokenizer: Any, prompt: str, number: int) -> tuple[int, ...]:
    try:
        return tuple(tokenizer(prompt)["input_ids"])
    except Exception as error:  # of any class: a word-level tokenizer without an unknown token raises a bare Exception
        raise EncodingError(
            f"prompts[{number}] must be a text that the tokenizer can encode, got {prompt[:40]!r}: {error}"
        ) from error


def seeded_params(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    """One SamplingParams with a seed for every prompt; see ``Decoder.generate``.  Raises ArgumentError."""
    if params is not None and not isinstance(params, SamplingParams):
        if len(params) != prompts or not all(isinstance(p, SamplingParams) for p in params):
            raise ArgumentError(f"params must be one SamplingParams or one per prompt ({prompts}), got {params!r}")
        return [p if p.seed is not None else replace(p, seed=_fresh_seed()) for p in params]
    params = params or SamplingParams()
    seed = _fresh_seed() if params.seed is None else params.seed
    return [replace(params, seed=(seed + i) % 2**64) for i in range(prompts)]


def _fresh_seed() -> int:
    return int(torch.randint(2**63 - 1, ()))


def stop_token_ids_of(model: nn.Module, given: Sequence[int] | None) -> tuple[int, ...]:
    """The token ids that end a sample: those given, or the model's.  Raises ArgumentError."""
    if given is None:
        eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        given = () if eos is None else [eos] if is_int(eos) else eos
    if not isinstance(given, Iterable) or not all(is_int(i) and i >= 0 for i in given):
        raise ArgumentError(f"stop_token_ids must be integers >= 0, got {given!r}")
    return tuple(given)


def pad_token_id_of(model: nn.Module, vocab_size: int) -> int:
    """What finished rows and padding are fed; its value is never seen."""
    pad: Any = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return pad if is_int(pad) and 0 <= pad < vocab_size else 0


class TextStream:
    """The text of one sample as its tokens arrive: stop strings, and pieces that are safe to show.

    A token may end in the middle of a character, and decoding is not additive, so a piece is the difference of two
    decodings that start at the same, recent token.
    """

    def __init__(self, tokenizer: Any, stop_strings: tuple[str, ...]) -> None:
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        # Text that may yet turn out to begin a stop string is held back.
        self._held = max(map(len, stop_strings), default=1) - 1
        self.text = ""
        self._shown = 0
        self._start = self._read = 0

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def add(self, token_ids: list[int]) -> str | None:
        """Take the newest of all tokens so far; returns the stop string that is now complete, and cuts it off."""
        known = self._decode(token_ids[self._start : self._read])
        text = self._decode(token_ids[self._start :])
        if len(text) <= len(known) or text.endswith("\ufffd"):
            return None
        searched = max(0, len(self.text) - self._held)
        self.text += text[len(known) :]
        self._start, self._read = self._read, len(token_ids)
        found = [(self.text.find(s, searched), s) for s in self._stop_strings]
        first = min(((at, s) for at, s in found if at >= 0), default=None)
        if first is None:
            return None
        self.text = self.text[: first[0]]
        return first[1]

    def finish(self, token_ids: list[int]) -> None:
        """No stop string ended the sample: take in what was held for the rest of a character."""
        whole = self._decode(token_ids)
        if whole.startswith(self.text[: self._shown]):
            self.text = whole

    def piece(self, final: bool) -> str:
        """What can be shown since the last piece."""
        upto = len(self.text) if final else max(self._shown, len(self.text) - self._held)
        start, self._shown = self._shown, upto
        return self.text[start:upto]
