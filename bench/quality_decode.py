"""A plain batched decoding loop for studies: groups of n siblings, one sampler, every number of every token kept.

Slower paths of the library's decoder (streaming, joining prompts, stop strings) are left out; what is measured is the
sampler.  All groups of a batch start together and their rows leave as they finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bench.quality_tasks import Source
from esamp_core.base.seeds import as_int64
from esamp_core.models.taps import Taps

COMPACT_BELOW = 0.85  # rows that have finished are dropped when fewer than this share still runs


class Setting(NamedTuple):
    """What a sampler is told before a batch: P groups of n siblings."""

    source: Source
    groups: int
    siblings: int
    request_seeds: Tensor  # int64 [P]
    max_new_tokens: int


class Step(NamedTuple):
    """One decode step of R rows.  Row i is sibling ``row[i] % n`` of group ``row[i] // n``."""

    index: int
    row: Tensor  # int64 [R]
    active: Tensor  # bool [R]; rows that are off have finished, and must not teach
    shallow: Tensor  # [R, H]
    deep: Tensor  # [R, H]
    logits: Tensor  # float32 [R, V]


class Pick(NamedTuple):
    """What a sampler drew."""

    token_ids: Tensor  # int64 [R]
    logprob: Tensor  # float32 [R], nats, under the distribution that was drawn from
    novelty: Tensor | None = None  # float32 [R], what exploration added to the drawn token's logit


class Run(Protocol):
    """A sampler at work on one batch."""

    def draw(self, step: Step) -> Pick: ...

    def keep(self, index: Tensor) -> None:
        """Only these of the step's rows go on."""

    def losses(self) -> list[float]:
        """Mean Distiller error per step; empty without a Distiller."""


class Sampler(Protocol):
    name: str
    dependent: bool  # siblings influence each other: Pass@k needs runs of exactly k

    def start(self, setting: Setting) -> Run: ...


class Batch(NamedTuple):
    """Everything drawn, [P * n, T]; -1 and 0 after a row's end."""

    token_ids: Tensor
    logprob: Tensor
    base_logprob: Tensor  # of the model itself: temperature 1, no filters
    novelty: Tensor
    entropy: Tensor  # of the model itself, where the token was drawn
    losses: list[float]


class SlabLayer(DynamicLayer):
    """A cache layer with room for ``columns``: appending a token copies that token, not the whole cache."""

    def __init__(self, keys: Tensor, values: Tensor, columns: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        shape = (*keys.shape[:2], columns, keys.shape[-1])
        self._slabs = (keys.new_empty(shape), values.new_empty(shape))
        self._show(0)
        self.update(keys, values)

    def _show(self, length: int) -> None:
        self.keys, self.values = (slab[:, :, :length] for slab in self._slabs)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        for slab, states in zip(self._slabs, (key_states, value_states), strict=True):
            slab[:, :, start:stop] = states
        self._show(stop)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.keys.shape[-2]
        self._slabs = tuple(slab[indices] for slab in self._slabs)
        self._show(length)


def request_seeds(seed: int, first: int, groups: int) -> Tensor:
    """int64 [P]: one request seed per (run's seed, problem's place in its list)."""
    return torch.tensor([as_int64((seed << 32) | (first + i)) for i in range(groups)])


@torch.no_grad()
def decode(
    source: Source, sampler: Sampler, prompts: Sequence[Sequence[int]], n: int, seeds: Tensor, max_new_tokens: int
) -> Batch:
    """Draw n samples of every prompt.

    prompts: P lists of token ids; shorter ones are padded on the left.  seeds: int64 [P], request seeds.
    """
    groups, length = len(prompts), max(map(len, prompts))
    run = sampler.start(Setting(source, groups, n, seeds, max_new_tokens))
    pads = torch.tensor([length - len(p) for p in prompts])
    ids = torch.tensor([[source.pad_id] * (length - len(p)) + list(p) for p in prompts])
    stop = torch.tensor(source.stop_ids)
    drawn = _Log(groups * n, max_new_tokens)
    with Taps(source.model, source.parts) as taps:
        cache = DynamicCache(config=source.model.config)
        tapped = taps.step(ids, *_columns(pads, length, length), cache)
        spread = torch.arange(groups).repeat_interleave(n)
        _spread_cache(cache, spread, length + max_new_tokens)
        shallow, deep, logits = (t[spread] for t in tapped)
        row, active, pads = torch.arange(groups * n), torch.ones(groups * n, dtype=torch.bool), pads[spread]
        for index in range(max_new_tokens):
            step = Step(index, row, active, shallow, deep, logits.float())
            pick = run.draw(step)
            drawn.add(step, pick)
            active = active & ~torch.isin(pick.token_ids, stop)
            running = int(active.sum())
            if running == 0 or index == max_new_tokens - 1:
                break
            token = torch.where(active, pick.token_ids, source.pad_id)
            if running < COMPACT_BELOW * len(row):
                keep = active.nonzero()[:, 0]
                row, active, pads, token = row[keep], active[keep], pads[keep], token[keep]
                cache.batch_select_indices(keep)
                run.keep(keep)
            at = length + index
            shallow, deep, logits = taps.step(token[:, None], *_columns(pads, at + 1, 1), cache)
    return drawn.batch(run.losses())


def _columns(pads: Tensor, columns: int, width: int) -> tuple[Tensor | None, Tensor]:
    """Mask and positions for the last ``width`` of ``columns`` columns; the mask only where it is needed."""
    column = torch.arange(columns)
    mask = (column >= pads[:, None]).long() if pads.any() else None
    return mask, (column[-width:] - pads[:, None]).clamp(min=0)


def _spread_cache(cache: DynamicCache, spread: Tensor, columns: int) -> None:
    """Repeat every prompt for its siblings, in layers that need not grow where they are plain ones."""
    cache.batch_select_indices(spread)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = SlabLayer(layer.keys, layer.values, columns)


class _Log:
    """Collects the steps."""

    def __init__(self, rows: int, steps: int) -> None:
        self._tokens = torch.full((rows, steps), -1)
        self._numbers = torch.zeros(4, rows, steps)
        self._steps = 0

    def add(self, step: Step, pick: Pick) -> None:
        on = step.active
        row, token = step.row[on], pick.token_ids[on]
        base = step.logits[on].log_softmax(-1)
        novelty = torch.zeros_like(pick.logprob) if pick.novelty is None else pick.novelty
        entropy = -(base.exp() * base.masked_fill(base == -torch.inf, 0.0)).sum(-1)
        self._tokens[row, step.index] = token
        columns = (pick.logprob[on], base.gather(-1, token[:, None])[:, 0], novelty[on], entropy)
        self._numbers[:, row, step.index] = torch.stack(columns)
        self._steps = step.index + 1

    def batch(self, losses: list[float]) -> Batch:
        return Batch(self._tokens[:, : self._steps], *self._numbers[:, :, : self._steps], losses)
