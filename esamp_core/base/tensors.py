"""The tensors that travel between the ops, named.

R rows (running sequences), V vocabulary, H hidden size, C scored candidates, r Distiller rank, S Distiller slots.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esamp_core.base.checks import is_int, is_real, require
from esamp_core.base.config import SamplingParams
from esamp_core.base.errors import ArgumentError


class Status(IntFlag):
    """Bit flags of a drawn row (``Draw.status``); 0 is an ordinary draw."""

    NAN_LOGITS = 1  # some logit was NaN and counted as -inf
    POS_INF_LOGITS = 2  # +inf was present: only those tokens stayed, uniformly, without novelty
    EMPTY = 4  # every logit was -inf: no token could be drawn, token_ids is -1
    CAPPED = 8  # more candidates than max_candidates: the rest kept their own logit
    INVALID_PARAMS = 16  # a per-row parameter tensor held a value out of range: token_ids is -1
    NONFINITE_NOVELTY = 32  # the prediction gave inf or NaN: the row was sampled, or left, without exploration
    INACTIVE = 64  # the row's active mask was off: nothing was drawn, token_ids is -1


_BAD_NUMBERS = {
    Status.NAN_LOGITS: "had logits that are NaN, which count as -inf",
    Status.POS_INF_LOGITS: "had logits of +inf, and drew among those alone",
    Status.EMPTY: "had no logit above -inf, and ended",
    Status.NONFINITE_NOVELTY: "had novelty that is not finite, and drew without exploration",
}


def warn_of_bad_numbers(statuses: Sequence[int]) -> None:
    """One warning if any sample met numbers that are not finite.  statuses: Status flags of all of a sample's steps."""
    found = {flag: sum(bool(status & flag) for status in statuses) for flag in _BAD_NUMBERS}
    texts = [f"{n} {_BAD_NUMBERS[flag]} (Status.{flag.name})" for flag, n in found.items() if n]
    if texts:
        warnings.warn(f"of {len(statuses)} samples " + "; ".join(texts), stacklevel=3)


@dataclass(frozen=True)
class Head:
    """The model's own output head: ``logits = softcap(scale * (hidden @ weight.T + bias))``.

    weight: [V, H] float tensor, the rows of lm_head. bias: [V] or None. scale: number, e.g. Cohere's logit_scale.
    softcap: None, or c > 0 for ``c * tanh(x / c)`` (Gemma 2).
    center: [H] or None, subtracted from every row of weight. clip: None, or c > 0 to clamp the result to +-c.
    vocab_start: token id of weight's first row, for a tensor-parallel shard; tokens outside the shard score 0.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    center: Tensor | None = None
    clip: float | None = None
    vocab_start: int = 0

    def __post_init__(self) -> None:
        w = self.weight
        if not isinstance(w, Tensor) or w.dim() != 2 or not w.is_floating_point():
            got = f"{w.dtype} {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
            raise ArgumentError(f"head.weight must be a float tensor [V, H], got {got}")
        for name, size in (("bias", w.shape[0]), ("center", w.shape[1])):
            t = getattr(self, name)
            if t is not None and not (isinstance(t, Tensor) and t.is_floating_point()):
                raise ArgumentError(f"head.{name} must be None or a float tensor [{size}], got {t!r}")
            if t is not None and (tuple(t.shape) != (size,) or t.device != w.device):
                raise ArgumentError(f"head.{name} must be [{size}] on {w.device}, got {tuple(t.shape)} on {t.device}")
        require(is_real(self.scale), "head.scale", "be a finite number", self.scale)
        for name in ("softcap", "clip"):
            bound = getattr(self, name)
            require(bound is None or (is_real(bound) and bound > 0), f"head.{name}", "be None or a number > 0", bound)
        start = self.vocab_start
        require(is_int(start) and start >= 0, "head.vocab_start", "be an integer >= 0", start)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    def check_covers(self, vocab_size: int) -> None:
        """Raises ArgumentError if some of so many logits have no row here."""
        # A padded vocabulary may have more logits than tokens, never more logits than head rows.
        has = f"{self.vocab_size} from {self.vocab_start}"  # not the head itself: its repr would print the weights
        require(self.vocab_size >= vocab_size and self.vocab_start == 0, "head", f"have all {vocab_size} rows", has)

    def centred(self, clip: float = 3.0) -> Head:
        """The head of the choice-Distiller: rows minus their mean, over their mean norm, clamped to +-clip."""
        rows = self.weight.detach()
        center = rows.mean(0, dtype=torch.float32)
        # In chunks: a float32 copy of a 152,064-row head would be gigabytes.
        norms = torch.cat([(chunk.float() - center).norm(dim=1) for chunk in torch.split(rows, 8192)])
        mean_norm = float(norms.mean())
        require(mean_norm > 0, "head.weight", "have rows that differ", "identical rows")
        return replace(self, bias=None, scale=1.0 / mean_norm, softcap=None, center=center, clip=clip)


class RowParams(NamedTuple):
    """Sampling parameters as tensors [R]: what :class:`SamplingParams` says, one value per row."""

    temperature: Tensor  # float32
    top_k: Tensor  # int64
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    beta: Tensor  # float32

    @staticmethod
    def of(
        params: SamplingParams | Sequence[SamplingParams] | RowParams, rows: int, device: torch.device | str
    ) -> RowParams:
        """From one SamplingParams for all rows, one per row, or tensors (0-d or [R])."""
        if isinstance(params, RowParams):
            values: Sequence[Any] = params
            given = [
                c if isinstance(c, Tensor)
                else torch.tensor(c, dtype=torch.float32 if isinstance(c, float) else None, device=device)
                for c in values
            ]  # fmt: skip
            for name, column in zip(RowParams._fields, given, strict=True):
                if tuple(column.shape) not in ((), (rows,)):
                    raise ArgumentError(f"params.{name} must be a scalar or [{rows}], got {tuple(column.shape)}")
                # Moving it here would wait for the device, at every step.
                if column.device.type != torch.device(device).type:
                    raise ArgumentError(f"params.{name} must be on {device}, got a tensor on {column.device}")
                if column.dtype == torch.bool or (name == "top_k" and column.is_floating_point()):
                    kind = "an integer" if name == "top_k" else "a number"
                    raise ArgumentError(f"params.{name} must be {kind}, got {column.dtype}")
            columns = [c.expand(rows) for c in given]
        elif isinstance(params, SamplingParams):
            columns = [
                torch.full((rows,), getattr(params, name), dtype=dtype, device=device)
                for name, dtype in RowParams.dtypes().items()
            ]
        else:
            if not isinstance(params, Sequence):
                raise ArgumentError(f"params must be SamplingParams, one or per row, or RowParams, got {params!r}")
            if len(params) != rows:
                raise ArgumentError(f"params must be one SamplingParams or one per row ({rows}), got {len(params)}")
            for p in params:
                if not isinstance(p, SamplingParams):
                    raise ArgumentError(f"params must hold SamplingParams, got {type(p).__name__}")
            columns = [
                torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=device)
                for name, dtype in RowParams.dtypes().items()
            ]
        temperature, top_k, top_p, min_p, beta = columns
        return RowParams(temperature.float(), top_k.long(), top_p.float(), min_p.float(), beta.float())

    @staticmethod
    def dtypes() -> dict[str, torch.dtype]:
        """Of each column, whatever torch's default is."""
        return {name: torch.int64 if name == "top_k" else torch.float32 for name in RowParams._fields}

    def take(self, rows: Tensor) -> RowParams:
        return RowParams(*(column[rows] for column in self))


class Candidates(NamedTuple):
    """What the filters keep of each row, and the most likely C = min(max_candidates, V) of it in order.

    A token is kept if its logit / temperature is above ``threshold``, or equal to it and its id >= ``tie_id``.
    """

    token_ids: Tensor  # int64 [R, C], by logit / temperature descending, then id ascending; -1 where there are fewer
    logits: Tensor  # float32 [R, C], cleaned: NaN is -inf, +inf rows are 0 / -inf; -inf where there are fewer
    count: Tensor  # type: ignore[assignment]  # int64 [R], how many tokens are kept, also beyond C
    threshold: Tensor  # float32 [R], the least kept logit / temperature
    tie_id: Tensor  # int64 [R], the least kept id among tokens at the threshold
    status: Tensor  # int32 [R], Status flags


class Reweighted(NamedTuple):
    """Candidates after exploration."""

    logits: Tensor  # float32 [R, C], before temperature; -inf where there is no candidate
    novelty: Tensor  # float32 [R, C], logit units; 0 where the row is not explored
    status: Tensor  # int32 [R]


class Draw(NamedTuple):
    """One drawn token per row, and what it cost."""

    token_ids: Tensor  # int64 [R], -1 where nothing could be drawn
    logprob: Tensor  # float32 [R], nats, under softmax(reweighted / temperature) over the support; 0 at temperature 0
    base_logprob: Tensor  # float32 [R], nats, under the raw logits, whole vocabulary, temperature 1
    novelty: Tensor  # float32 [R], logit units; 0 if the token was not scored
    kl: Tensor  # float32 [R], nats, of the sampled distribution from softmax(logit / temperature), same support
    count: Tensor  # type: ignore[assignment]  # int64 [R], candidates kept by the filters
    status: Tensor  # int32 [R], Status flags


class Children(NamedTuple):
    """The W continuations of every row that come first when its tokens are drawn without putting them back."""

    token_ids: Tensor  # int64 [R, W], by perturbed descending, then id ascending; -1 where there are fewer
    logprob: Tensor  # float32 [R, W], nats, under softmax(reweighted / temperature); -inf where there are fewer
    perturbed: Tensor  # float32 [R, W], logprob plus the draw's Gumbel noise; -inf where there are fewer
    novelty: Tensor  # float32 [R, W], logit units; 0 where the token was not scored


class Tree(NamedTuple):
    """What distinct siblings are chosen by: for each row, of all that it has drawn."""

    logprob: Tensor  # float64 [R], nats
    perturbed: Tensor  # float64 [R], its Gumbel-perturbed log-probability; -inf: nothing is in this row yet


class Growth(NamedTuple):
    """One step of distinct siblings: each row goes on from what row ``parent`` was."""

    parent: Tensor  # int64 [R]
    child: Tensor  # int64 [R], with which of the parent's children; -1: it has drawn nothing
    tree: Tree
    seed: Tensor  # int64 [R], row seeds of what they are now


class Branch(NamedTuple):
    """A draw of rows that change places."""

    draw: Draw  # token_ids: what row r goes on with; -1, flagged INACTIVE, where it has ended or holds nothing yet
    parent: Tensor  # int64 [R]: row r goes on from what row parent[r] was


class Distilled(NamedTuple):
    """What rows are explored with: ``logit + strength * (logit - distilled logit)``, the head's for the prediction."""

    prediction: Tensor  # float32 [R, H]
    strength: Tensor  # float32 [R]: beta, with a gate times the trust; 0 where nothing is explored


class DistillerWeights(NamedTuple):
    """One Distiller per slot: ``y = x + ((x up) * silu(x gate + gate_bias)) down``, ``pred = s * LayerNorm(y)``."""

    up: Tensor  # A [S, H, r]
    gate: Tensor  # G [S, H, r]
    down: Tensor  # B [S, r, H]
    gate_bias: Tensor  # b [S, r] float32
    norm_weight: Tensor  # w [S, H] float32
    norm_bias: Tensor  # c [S, H] float32


class Activations(NamedTuple):
    """What the Distiller's backward needs of its forward, float32."""

    x: Tensor  # [R, H] shallow / rms(shallow)
    up: Tensor  # [R, r] x A
    gate: Tensor  # [R, r] x G + b, before silu
    y: Tensor  # [R, H] before the LayerNorm
    mean: Tensor  # [R] of y
    rstd: Tensor  # [R] 1 / sqrt(var(y) + 1e-5)
    pred: Tensor  # [R, H] s * (w * (y - mean) * rstd + c)

    @staticmethod
    def empty(
        rows: int, hidden: int, rank: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Activations:
        """Memory for R rows."""
        wide, narrow = (rows, hidden), (rows, rank)
        shapes = (wide, narrow, narrow, wide, (rows,), (rows,), wide)
        return Activations(*(torch.empty(shape, device=device, dtype=dtype) for shape in shapes))


class Mixed(NamedTuple):
    """Deep hidden states after exploration, for the model's own head and any sampler."""

    hidden: Tensor  # [R, H], the dtype of the deep states
    status: Tensor  # int32 [R], Status flags


class RowGroups(NamedTuple):
    """Rows grouped by Distiller slot: group g is rows ``order[offsets[g]:offsets[g + 1]]`` in slot ``slots[g]``.

    G = min(R, S) entries; groups beyond the last used one have slot -1 and no rows.  Rows without a slot are in none.
    """

    order: Tensor  # int32 [R], row numbers sorted by (slot, rank within the group)
    slots: Tensor  # int32 [G]
    offsets: Tensor  # int32 [G + 1]


class DistillerState(NamedTuple):
    """Everything that learning changes, per slot; updated in place by ``distiller_step_``."""

    weights: DistillerWeights
    momentum: DistillerWeights | None  # float32, the shapes of weights; of recipes with Adam [S, 2, ...], both moments
    seed: Tensor  # int64 [S], keys the stochastic rounding of bfloat16 weights
    updates: Tensor  # int64 [S], steps made
    loss: Tensor  # float32 [S], relative squared error of the latest step, before it
    first_loss: Tensor  # float32 [S], of the first step
    nonfinite: Tensor  # int64 [S], steps skipped because the loss was not finite


class Gauge(NamedTuple):
    """How each slot's Distiller compares with a constant: the mean of what it had to predict so far."""

    mean: Tensor  # float32 [S, H], of all targets so far, in units of s
    steps: Tensor  # int64 [S], steps that taught; the first only makes the mean
    error: Tensor  # float32 [S], relative squared error of the Distiller, a running mean over the latest steps
    baseline: Tensor  # float32 [S], the same of the constant
    trust: Tensor  # float32 [S], 1 - error / baseline, 0 where that is negative or nothing was compared yet


def unit_stride(rows: Tensor) -> Tensor:
    """The same [R, N] with a row's numbers side by side, as the kernels want them; rows may have any distance."""
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()
