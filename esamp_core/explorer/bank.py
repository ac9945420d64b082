"""The Distiller bank: a fixed pool of slots, and the weights in them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esamp_core.base.checks import is_int, require
from esamp_core.base.config import DistillerConfig
from esamp_core.base.seeds import as_int64
from esamp_core.base.tensors import DistillerState, DistillerWeights, Gauge
from esamp_core.explorer.ledger import Lease
from esamp_core.explorer.start import Start, start_of
from esamp_core.reference.published import RECIPES


class GroupStats(NamedTuple):
    """What one group has learned."""

    rows: int  # open rows; 0 is an idle, retained group
    updates: int  # SGD steps made
    loss: float  # mean relative squared error at the latest step, before it; NaN before the first
    first_loss: float  # the same at the first step
    nonfinite: int  # steps skipped because the loss was not finite
    learning: bool  # False if after config.patience updates the error is not below the baseline, or none was made
    error: float  # mean of the loss over the latest 32 steps; NaN before the second, and without config.gate
    baseline: float  # the same of a constant, the mean of all earlier deep states
    trust: float  # what beta is scaled by: 1 - error / baseline, at least 0; 1 without config.gate


class DistillerBank:
    """The weights of ``slots`` Distillers, and what was seen of their learning.  Which slot is whose, the ledger knows.

    The methods that touch device memory are called in stream order by the learner.
    """

    def __init__(self, hidden_size: int, config: DistillerConfig, slots: int, device: torch.device) -> None:
        require(is_int(hidden_size) and hidden_size >= 1, "hidden_size", "be an integer >= 1", hidden_size)
        self.hidden_size, self.config, self.slots = hidden_size, config, slots
        self._warned: set[int] = set()  # leases by their number
        self.start: Start = start_of(hidden_size, config, device)
        self.state = _empty_state(self.start.weights, config, slots, device)
        self.gauge = _empty_gauge(slots, hidden_size, device)
        # NaN until known: a prediction in unknown units must not look like a number.
        self.scale = torch.full((), self._known_scale(), dtype=torch.float32, device=device)

    def _known_scale(self) -> float:
        if self.config.published:
            return 1.0  # they predict the deep state as it is
        if self.config.target == "choice":
            return 1.0 / math.sqrt(self.hidden_size)  # centred head rows over their mean norm
        return math.nan if self.config.deep_scale is None else self.config.deep_scale

    @property
    def bytes_per_slot(self) -> int:
        """Device memory of one slot: weights, and momentum where it is used."""
        tensors = [*self.state.weights, *(self.state.momentum or ())]
        return sum(t[0].numel() * t.element_size() for t in tensors)

    def reset(self, slot: int, seed: int) -> None:
        """Put the start weights into a slot; seed keys its stochastic rounding."""
        for weights, start in zip(self.state.weights, self.start.weights, strict=True):
            weights[slot].copy_(start)
        for column, start in zip(self.gauge, self.start.gauge, strict=True):
            column[slot].copy_(start)
        for velocity in self.state.momentum or ():
            velocity[slot].zero_()
        self.state.seed[slot] = as_int64(seed)
        self.state.updates[slot] = 0
        self.state.nonfinite[slot] = 0
        self.state.loss[slot] = math.nan
        self.state.first_loss[slot] = math.nan

    def fill(self, slots: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Put saved tensors, a row for each of these slots, into them; what is not saved is as at the start."""
        for i, slot in enumerate(slots):
            self.reset(slot, 0)
            for name, tensor in self.named_tensors().items():
                tensor[slot].copy_(tensors[name][i])

    def measure_scale(self, deep: Tensor, teaches: Tensor) -> None:
        """Freeze s as the rms of the first learned batch, if it is not known yet.  teaches: bool [R]."""
        use = torch.where(teaches.any(), teaches, torch.ones_like(teaches))[:, None]
        rms = (deep.square() * use).sum().div(use.sum() * deep.shape[1]).sqrt()
        rms = torch.where(torch.isfinite(rms) & (rms > 0), rms, 1.0)
        self.scale.copy_(torch.where(torch.isnan(self.scale), rms, self.scale))

    def stats(self, leases: Mapping[Hashable, tuple[Lease, int]]) -> dict[Hashable, GroupStats]:
        """Per group, from its lease and its open rows; waits for the device.  Warns once where one does not learn."""
        state, gauge = self.state, self.gauge
        columns = [t.tolist() for t in (state.updates, state.loss, state.first_loss, state.nonfinite)]
        judged = [t.tolist() for t in (gauge.error, gauge.baseline, gauge.trust)]
        self._warned &= {lease.number for lease, _ in leases.values()}
        result = {}
        for group, (lease, rows) in leases.items():
            updates, loss, first_loss, nonfinite = (column[lease.slot] for column in columns)
            error, baseline, trust = (column[lease.slot] for column in judged)
            better = error < baseline if self.config.gated else loss < first_loss
            learning = not ((updates >= self.config.patience and not better) or (nonfinite > 0 and updates == 0))
            gated = (error, baseline, trust if self.config.gated else 1.0)
            result[group] = GroupStats(rows, updates, loss, first_loss, nonfinite, learning, *gated)
            if (not learning or nonfinite > 0) and lease.number not in self._warned:
                self._warned.add(lease.number)
                warnings.warn(
                    f"the Distiller of group {group!r} does not learn well: loss {first_loss:.3g} -> {loss:.3g} after "
                    f"{updates} updates, {error:.3g} lately where a constant has {baseline:.3g}, {nonfinite} skipped "
                    "as not finite; check the taps, or config.lr",
                    stacklevel=4,
                )
        return result

    def named_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs of each slot, which is the first dimension."""
        state = self.state
        named = {f"weights.{k}": t for k, t in state.weights._asdict().items()}
        if state.momentum is not None:
            named |= {f"momentum.{k}": t for k, t in state.momentum._asdict().items()}
        if self.config.gated:
            named |= {f"gauge.{k}": t for k, t in self.gauge._asdict().items()}
        return named | {k: getattr(state, k) for k in ("seed", "updates", "loss", "first_loss", "nonfinite")}


def _empty_gauge(slots: int, hidden_size: int, device: torch.device) -> Gauge:
    zeros = torch.zeros(slots, dtype=torch.float32, device=device)
    steps = torch.zeros(slots, dtype=torch.int64, device=device)
    mean = torch.zeros(slots, hidden_size, dtype=torch.float32, device=device)
    return Gauge(mean, steps, zeros, zeros.clone(), zeros.clone())


def _empty_state(start: DistillerWeights, config: DistillerConfig, slots: int, device: torch.device) -> DistillerState:
    def pool(*shape: int, dtype: torch.dtype | None = None) -> DistillerWeights:
        return DistillerWeights(*(torch.zeros(*shape, *t.shape, dtype=dtype or t.dtype, device=device) for t in start))

    def column(dtype: torch.dtype) -> Tensor:
        return torch.zeros(slots, dtype=dtype, device=device)

    momentum = pool(slots, dtype=torch.float32) if config.momentum > 0 else None
    if config.published and RECIPES[config.recipe].adam:
        momentum = pool(slots, 2, dtype=torch.float32)
    return DistillerState(
        weights=pool(slots),
        momentum=momentum,
        seed=column(torch.int64),
        updates=column(torch.int64),
        loss=column(torch.float32),
        first_loss=column(torch.float32),
        nonfinite=column(torch.int64),
    )
