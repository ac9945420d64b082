"""The running batch on the device, and the copies of its tokens for the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esamp_core.base.tensors import Distilled, Draw
from esamp_core.decoder.kv_cache import reorder_columns
from esamp_core.decoder.results import Drawn, RunningSample
from esamp_core.explorer import Rows


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 tensor of host numbers, without waiting for the device."""
    tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Step(NamedTuple):
    """What a step gave."""

    draw: Draw
    parent: Tensor | None  # int64 [R]: which row each goes on from, where distinct siblings change places
    distilled: Distilled | None  # what the tokens were explored with, if that is kept


class Receipt:
    """The tokens of one step on their way to the host.

    Made right after the step, on its stream: a captured step overwrites its results when it is replayed.
    """

    def __init__(self, samples: Sequence[RunningSample], step: Step, rows: Rows) -> None:
        self.samples, draw = tuple(samples), step.draw
        numbers = torch.stack([draw.logprob, draw.base_logprob, draw.novelty, draw.kl])
        self._integers = _to_host(torch.stack([draw.token_ids, draw.count, draw.status.long()]))
        self._numbers = _to_host(numbers)
        self._places = None if step.parent is None else (_to_host(step.parent), _to_host(rows.tree.perturbed))
        self._distilled = None if step.distilled is None else Distilled(*map(_to_host, step.distilled))
        self._arrived: Any = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[Drawn]:
        """What was drawn, row by row.  Waits until it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        token_ids, count, status = self._integers.tolist()
        logprob, base_logprob, novelty, kl = self._numbers.tolist()
        distilled: list[Distilled | None] = [None] * len(token_ids)
        if self._distilled is not None:  # copied, as samples keep their rows to the end, and pinned memory is scarce
            distilled = list(map(Distilled, *(rows.clone() for rows in self._distilled)))
        return list(map(Drawn, token_ids, logprob, base_logprob, novelty, kl, count, status, distilled))

    def places(self) -> tuple[list[int], list[float]] | None:
        """After ``read``, where the batch has distinct siblings: each row's parent, and what they are ordered by."""
        if self._places is None:
            return None
        parent, perturbed = self._places
        return parent.tolist(), perturbed.tolist()


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu")
    return host.copy_(tensor, non_blocking=True)


@dataclass
class Batch:
    """Rows that run together, R of them.  All of them end at column ``length`` of the cache.

    A step changes the device tensors in place, so that a captured step finds them where they were.
    """

    samples: list[RunningSample]
    rows: Rows
    cache: Any
    length: int  # columns of the cache that are filled
    pads: list[int]  # [R] how many of them, on the left, are padding
    tokens: Tensor  # int64 [R], to be fed next; a finished row's is pad
    positions: Tensor  # int64 [R], where they are fed; a finished row stays where it is
    remaining: Tensor  # int64 [R], how many tokens may still be drawn
    columns: int | None = None  # of a static cache

    def __post_init__(self) -> None:
        self._prompt_columns = self.length
        self._pad_columns()

    def _pad_columns(self) -> None:
        self._pads = to_device(self.pads, self.tokens.device)
        self._static_mask = self._mask(self.columns) if self.columns is not None and self.padded else None

    @property
    def padded(self) -> bool:
        return any(self.pads)

    @property
    def explores(self) -> bool:
        """Whether any row does; else predict and learn have nothing to do."""
        return any(sample.prompt.explores for sample in self.samples)

    def can_draw(self) -> bool:
        """Whether any row may still draw, as far as the host knows without looking at tokens."""
        return any(
            not sample.done
            # A row with c columns has drawn c - prompt + 1 tokens, the last of which is not in the cache yet.
            and self.length - pad - len(sample.prompt.token_ids) + 1 < sample.prompt.budget
            for sample, pad in zip(self.samples, self.pads, strict=True)
        )

    def attention_mask(self) -> Tensor | None:
        """int64 [R, columns] for the next forward: all columns of a static cache, else those filled by then."""
        if self.columns is not None:
            return self._static_mask
        return self._mask(self.length + 1) if self.padded else None

    def _mask(self, columns: int) -> Tensor:
        return (torch.arange(columns, device=self.tokens.device) >= self._pads[:, None]).long()

    def advance(self, step: Step, stop_ids: Tensor, pad_id: int) -> None:
        """Take a step's tokens in: who is finished, what is fed next.  Nothing here waits for the device."""
        draw, parent, _ = step
        if parent is not None:
            self.remaining.copy_(self.remaining[parent])
            self.positions.copy_(self.positions[parent])
            if self.columns is None:
                self.cache.reorder_cache(parent)
            else:
                reorder_columns(self.cache, parent, self._prompt_columns)
        stop = (draw.token_ids[:, None] == stop_ids).any(-1) | (draw.token_ids < 0)
        self.remaining.sub_(1)
        self.rows.active.logical_and_(~stop & (self.remaining > 0))
        self.tokens.copy_(torch.where(self.rows.active, draw.token_ids, pad_id))
        self.positions.add_(self.rows.active)

    def switch_off(self, finished: Sequence[bool]) -> None:
        """Rows that the host has ended stop drawing and teaching."""
        running = to_device([not f for f in finished], self.tokens.device).bool()
        self.rows.active.logical_and_(running)
        self.tokens.mul_(running)

    def keep(self, indices: list[int]) -> None:
        """Only these rows; the others are closed.  Columns that are padding in all of them go."""
        index = to_device(indices, self.tokens.device)
        self.rows = self.rows.keep(indices)
        self.samples = [self.samples[i] for i in indices]
        self.pads = [self.pads[i] for i in indices]
        self.tokens, self.positions, self.remaining = self.tokens[index], self.positions[index], self.remaining[index]
        self.cache.reorder_cache(index)
        self._resize(self.length - min(self.pads))

    def join(self, other: Batch) -> None:
        """Append the rows of another batch, which ends to exist."""
        length = max(self.length, other.length)
        self._resize(length)
        other._resize(length)
        self.cache.join(other.cache)
        self.rows = self.rows + other.rows
        self.samples, self.pads = self.samples + other.samples, self.pads + other.pads
        self.tokens = torch.cat([self.tokens, other.tokens])
        self.positions = torch.cat([self.positions, other.positions])
        self.remaining = torch.cat([self.remaining, other.remaining])
        self._pad_columns()

    def _resize(self, length: int) -> None:
        if length != self.length:
            self.cache.resize(length)
            self.pads = [pad + length - self.length for pad in self.pads]
            self.length = length
        self._pad_columns()
