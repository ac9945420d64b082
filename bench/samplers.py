"""The samplers that are compared, side by side, and the controls that could explain a gain away.

Filters are transformers' own warpers.  All samplers draw with the library's counter-based noise, so that at one seed
they differ by what they do and not by their luck.  ``Explored`` is the library's Explorer itself; the main table uses
the batched Distillers of ``quality_distiller``, which draw the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bench.quality_decode import Pick, Run, Setting, Step
from bench.quality_memory import Memory
from esamp_core.base.philox import CODE_BELOW, code_uniform, gumbel, vocabulary_bits
from esamp_core.base.seeds import row_seeds, stratified_codes
from esamp_core.sample import DistillerConfig, Explorer, SamplingParams


@dataclass(frozen=True)
class Filter:
    """Which tokens can be drawn, and with which logits.  Order as in transformers; None, 0 and 1 are off.

    first_temperature: of the first token alone (FIRE).  top_n_sigma: keep logits within n standard deviations of the
    largest (Tang et al. 2024, arXiv 2411.07641).  p_less: keep tokens at least as likely as two draws are to be equal
    (Tan et al. 2025, arXiv 2509.23234).  top_h: keep the most likely tokens, of a hundred, as long as their entropy is
    at most this share of that of all (Potraghloo et al. 2025, arXiv 2509.02510).  sharpen: factor on what is left.
    """

    temperature: float = 1.0
    first_temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    top_n_sigma: float | None = None
    p_less: bool = False
    top_h: float | None = None
    sharpen: float = 1.0

    def warpers(self, first: bool) -> LogitsProcessorList:
        """transformers' processors, in its order."""
        hot = self.first_temperature if first else None
        processors = LogitsProcessorList([TemperatureLogitsWarper(float(hot or self.temperature))])
        if self.top_h is not None:
            processors.append(TopHLogitsWarper(self.top_h))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            processors.append(MinPLogitsWarper(self.min_p))
        return processors

    def __call__(self, logits: Tensor, first: bool) -> Tensor:
        """Logits [R, V], divided by the temperature; -inf where a token cannot be drawn."""
        scores = logits
        if self.top_n_sigma is not None:  # of the raw logits, so that it does not depend on the temperature
            floor = logits.max(-1, keepdim=True).values - self.top_n_sigma * logits.std(-1, keepdim=True)
            scores = scores.masked_fill(scores < floor, -torch.inf)
        empty = torch.zeros(len(scores), 0, dtype=torch.long)  # none of these warpers looks at the tokens
        scores = self.warpers(first)(empty, scores)
        if self.p_less:
            chances = scores.softmax(-1)
            scores = scores.masked_fill(chances < chances.square().sum(-1, keepdim=True), -torch.inf)
        return scores * self.sharpen


class GumbelDraw:
    """Independent siblings: the library's draw without exploration."""

    def __init__(self, setting: Setting) -> None:
        index = torch.arange(setting.siblings).repeat(setting.groups)
        self.seeds = row_seeds(setting.request_seeds.repeat_interleave(setting.siblings), index)

    def __call__(self, scores: Tensor, row: Tensor, position: int) -> Tensor:
        bits = vocabulary_bits(self.seeds[row], torch.full_like(row, position), scores.shape[-1])
        return (scores + gumbel(bits)).argmax(-1)


class ArithmeticDraw(GumbelDraw):
    """Stratified siblings: the library's ``SamplingParams(stratified=True)`` over the whole vocabulary at once.

    by_embedding: shares lie in the order of the head's rows along their first principal component, so that codes that
    are near each other mean tokens that are, instead of in the order of token ids.
    """

    def __init__(self, setting: Setting, by_embedding: bool = False) -> None:
        super().__init__(setting)
        self._order = _along_first_component(setting.source.parts.head.weight) if by_embedding else None
        n, index = setting.siblings, torch.arange(setting.siblings).repeat(setting.groups)
        first = self.seeds[::n].repeat_interleave(n)
        self._codes = stratified_codes(first, index, torch.full_like(index, n))

    def __call__(self, scores: Tensor, row: Tensor, position: int) -> Tensor:
        if self._order is not None:
            return self._order[self._by_place(scores[:, self._order], row, position)]
        return self._by_place(scores, row, position)

    def _by_place(self, scores: Tensor, row: Tensor, position: int) -> Tensor:
        chances = scores.double().softmax(-1)
        upper = chances.cumsum(-1)
        code = self._codes[row, :1] * upper[:, -1:]
        token = torch.searchsorted(upper, code, right=True)
        last = scores.shape[-1] - 1 - chances.flip(-1).gt(0).int().argmax(-1, keepdim=True)
        token = torch.minimum(token, last)  # rounding must not lead beyond the last token that can be drawn
        chance = chances.gather(-1, token)
        inside = (code - (upper.gather(-1, token) - chance)) / chance
        siblings = self._codes[row, 1] * chance[:, 0]
        fresh = code_uniform(self.seeds[row], torch.full_like(row, position))
        code = torch.where(siblings > 1, inside[:, 0].clamp(0.0, CODE_BELOW), fresh)
        self._codes[row] = torch.stack([code, siblings], -1)
        return token[:, 0]


_orders: dict[int, Tensor] = {}  # by where the weights lie


def _along_first_component(weight: Tensor) -> Tensor:
    """int64 [V]: token ids in the order of their head rows' first principal component."""
    place = weight.data_ptr()
    if place not in _orders:
        rows = weight.float() - weight.float().mean(0)
        _, vectors = torch.linalg.eigh(rows.T @ rows)  # ascending
        _orders[place] = (rows @ vectors[:, -1]).argsort()
    return _orders[place]


def log_chance(scores: Tensor, token: Tensor) -> Tensor:
    return scores.log_softmax(-1).gather(-1, token[:, None])[:, 0]


@dataclass(frozen=True)
class Plain:
    """Filters, an optional memory of what siblings did, and one of the two draws.

    learns: whether the memory changes; the untrained control's does not, and leaves siblings independent.
    by_embedding: see ArithmeticDraw.
    rounds: within a step, siblings i with i % rounds = r draw in round r and see what earlier rounds drew.
    """

    name: str
    filter: Filter
    arithmetic: bool = False
    by_embedding: bool = False
    memory: Callable[[Setting], Memory] | None = None
    rounds: int = 1
    learns: bool = True

    @property
    def dependent(self) -> bool:
        return self.arithmetic or (self.memory is not None and self.learns)

    def start(self, setting: Setting) -> Run:
        return PlainRun(self, setting)


class PlainRun:
    def __init__(self, sampler: Plain, setting: Setting) -> None:
        self._sampler, self._setting = sampler, setting
        self._draw = ArithmeticDraw(setting, sampler.by_embedding) if sampler.arithmetic else GumbelDraw(setting)
        self._memory = None if sampler.memory is None else sampler.memory(setting)

    def draw(self, step: Step) -> Pick:
        scores = self._sampler.filter(step.logits, step.index == 0)
        if self._memory is None:
            token = self._draw(scores, step.row, step.index)
            return Pick(token, log_chance(scores, token))
        groups, n = self._setting.groups, self._setting.siblings

        def dense(t: Tensor) -> Tensor:
            """[R, ..] as [P, n, ..], with zeros for rows that have left."""
            return torch.zeros(groups * n, *t.shape[1:], dtype=t.dtype).index_copy_(0, step.row, t).view(groups, n, -1)

        self._memory.begin(dense(step.shallow), dense(step.deep))
        token, novelty = torch.zeros_like(step.row), torch.zeros(len(step.row))
        for r in range(min(self._sampler.rounds, n)):
            siblings = torch.arange(r, n, self._sampler.rounds)
            here = (step.row % n % self._sampler.rounds == r).nonzero()[:, 0]
            penalty = self._memory.penalty(siblings)
            rows = step.row[here]
            mine = penalty[rows // n, rows % n // self._sampler.rounds]
            scores[here] -= mine / self._sampler.filter.temperature  # the temperature divides the reweighted logits
            token[here] = self._draw(scores[here], rows, step.index)
            novelty[here] = -mine.gather(-1, token[here, None])[:, 0]
            drawn, taught = dense(token[:, None])[..., 0], dense(step.active[:, None])[..., 0]
            self._memory.add(siblings, drawn[:, siblings], taught[:, siblings])
        return Pick(token, log_chance(scores, token), novelty)

    def keep(self, index: Tensor) -> None:
        pass

    def losses(self) -> list[float]:
        return [] if self._memory is None else self._memory.losses


@dataclass(frozen=True)
class Explored:
    """The library's Explorer: ESamp, the choice-Distiller, and with lr 0 the untrained control.

    shared: one Distiller for all prompts, of a batch and of those that come after until :func:`forget`, instead of one
    for each.
    """

    name: str
    params: SamplingParams
    config: DistillerConfig
    neutral: bool = False
    shared: bool = False

    @property
    def dependent(self) -> bool:
        return self.config.lr > 0

    def start(self, setting: Setting) -> Run:
        return ExploredRun(self, setting)


class ExploredRun:
    def __init__(self, sampler: Explored, setting: Setting) -> None:
        parts, n = setting.source.parts, setting.siblings
        self._explorer = _kept.pop((sampler, setting.source.name), None) or Explorer(
            parts.head,
            parts.hidden_size,
            parts.complete(sampler.config),
            max_groups=1 if sampler.shared else setting.groups,
            max_rows=max(setting.groups * n, 1024 if sampler.shared else 0),
            neutral=sampler.neutral,
        )
        if sampler.shared:
            _kept[sampler, setting.source.name] = self._explorer
        seeds = setting.request_seeds.tolist()
        params = [replace(sampler.params, seed=seed) for seed in seeds for _ in range(n)]
        prompts = [g for g in range(setting.groups) for _ in range(n)]
        self._rows = self._explorer.open(
            [0] * len(prompts) if sampler.shared else prompts, params, sets=prompts, retain=sampler.shared,
            sample_index=list(range(n)) * setting.groups,
        )  # fmt: skip
        self._beta, self._losses, self._shared = sampler.params.beta, list[float](), sampler.shared

    def draw(self, step: Step) -> Pick:
        self._rows.active.copy_(step.active)
        self._explorer.predict(step.shallow, self._rows)
        if step.index:
            stats = self._explorer.stats().values()
            self._losses.append(sum(s.loss for s in stats) / len(stats))
        draw = self._explorer.sample(step.logits, self._rows)
        self._explorer.learn(step.deep, self._rows)
        return Pick(draw.token_ids.clamp_min(0), draw.logprob, draw.novelty * self._beta)

    def keep(self, index: Tensor) -> None:
        self._rows = self._rows.keep(index.cpu())

    def losses(self) -> list[float]:
        """Called last."""
        if self._shared:
            self._explorer.close(self._rows)
        return self._losses if self._explorer.config.lr > 0 else []


_kept: dict[tuple[Explored, str], Explorer] = {}  # whose Distiller goes on, by sampler and model


def forget() -> None:
    """Distillers that are shared start afresh."""
    _kept.clear()


class Named(Protocol):
    name: str


S = TypeVar("S", bound=Named)


def by_name(samplers: Sequence[S]) -> dict[str, S]:
    found = {s.name: s for s in samplers}
    assert len(found) == len(samplers), "two samplers of one name"
    return found
