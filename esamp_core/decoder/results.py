"""What comes out of the decoder: tokens, and finished samples; and a sample while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from esamp_core.base.config import SamplingParams
from esamp_core.base.tensors import Distilled
from esamp_core.decoder.prompts import Prompt

FinishReason = Literal["stop", "length", "empty"]


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
    """One finished sample.  The numbers are one per token, as in :class:`~esamp_core.sample.Draw`."""

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
    params: SamplingParams  # with this seed, and with distinct decided
    perturbed_logprob: float | None = None  # nats, of distinct siblings: what orders them, the largest first
    copy_of: int | None = None  # sample_index: fewer than n different samples were left, and this is that one again
    # With return_distilled, on the CPU: prediction [T, H] and strength [T] of the T tokens.  See Decoder.replay.
    distilled: Distilled | None = field(default=None, compare=False)


class Drawn(NamedTuple):
    """One row of a :class:`~esamp_core.sample.Draw`, on the host."""

    token_id: int
    logprob: float
    base_logprob: float
    novelty: float
    kl: float
    count: int  # type: ignore[assignment]  # a tuple has a method of this name
    status: int
    distilled: Distilled | None  # prediction [H] and strength, 0-d, if they are kept


@dataclass
class RunningSample:
    """One running row, as far as the host has seen it."""

    prompt: Prompt
    index: int
    drawn: list[Drawn] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # those of drawn, for decoding
    status: int = 0  # Status flags of all steps, those without a token too
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    done: bool = False  # its result was given: at its end, or at that of all distinct siblings

    def take(self, drawn: Drawn) -> None:
        """One step's outcome; without a token nothing is kept but what the status says."""
        self.status |= drawn.status
        if drawn.token_id >= 0:
            self.drawn.append(drawn)
            self.token_ids.append(drawn.token_id)

    def go_on_from(self, other: RunningSample) -> None:
        """Take over what another row has drawn, instead of what this one has."""
        self.drawn, self.token_ids, self.status = list(other.drawn), list(other.token_ids), other.status
        self.finish_reason = self.stop_reason = None

    def _distilled(self) -> Distilled | None:
        kept = [d.distilled for d in self.drawn if d.distilled is not None]
        return Distilled(*map(torch.stack, zip(*kept, strict=True))) if kept else None

    def generation(
        self, text: str | None, number: int | None = None, perturbed: float | None = None, copy_of: int | None = None
    ) -> Generation:
        """number: of distinct siblings, which are numbered when all have ended."""
        assert self.finish_reason is not None and self.prompt.params.seed is not None
        return Generation(
            prompt_index=self.prompt.index,
            sample_index=self.index if number is None else number,
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
            params=self.prompt.params,
            perturbed_logprob=perturbed,
            copy_of=copy_of,
            distilled=self._distilled(),
        )
