"""The Distiller bank: a fixed pool of slots, who leases them, and the weights in them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from esamp_core.base.checks import is_int, require
from esamp_core.base.config import DistillerConfig
from esamp_core.base.errors import ArgumentError, CapacityError, StateError
from esamp_core.base.files import read_safetensors
from esamp_core.base.seeds import as_int64
from esamp_core.base.tensors import DistillerState, DistillerWeights, Gauge
from esamp_core.explorer.start import Start, start_of
from esamp_core.reference.published import RECIPES

OnFull = Literal["error", "evict"]


@dataclass
class Lease:
    """A group's hold on a slot, from its first open until its last row ends; then idle if retained."""

    slot: int
    rows: int = 0
    retain: bool = False
    next_sample_index: int = 0
    last_used: int = 0


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
    """``max_groups`` Distillers and their leases.

    Leasing is host bookkeeping; the methods that touch device memory are called in stream order by the learner.
    """

    def __init__(
        self, hidden_size: int, config: DistillerConfig, max_groups: int, on_full: OnFull, device: torch.device
    ) -> None:
        require(is_int(hidden_size) and hidden_size >= 1, "hidden_size", "be an integer >= 1", hidden_size)
        require(is_int(max_groups) and 1 <= max_groups <= 65536, "max_groups", "be in 1..65536", max_groups)
        require(on_full in ("error", "evict"), "on_full", 'be "error" or "evict"', on_full)
        self.hidden_size, self.config, self.max_groups, self.on_full = hidden_size, config, max_groups, on_full
        self.leases: dict[Hashable, Lease] = {}
        self._free = list(range(max_groups - 1, -1, -1))
        self._clock = 0
        self._warned: set[Hashable] = set()
        self.start: Start = start_of(hidden_size, config, device)
        self.state = _empty_state(self.start.weights, config, max_groups, device)
        self.gauge = _empty_gauge(max_groups, hidden_size, device)
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

    def acquire(self, groups: Iterable[Hashable], retain: bool) -> set[Hashable]:
        """Lease slots to all of these groups, or to none.

        Returns the groups whose slot is new and must be reset.  Raises CapacityError.
        """
        wanted = dict.fromkeys(groups)
        new = [g for g in wanted if g not in self.leases]
        idle = [g for g, lease in self.leases.items() if lease.rows == 0 and g not in wanted]
        evictable = sorted(idle, key=lambda g: self.leases[g].last_used) if self.on_full == "evict" else []
        room = len(self._free) + len(evictable)
        if len(new) > room:
            held = [repr(g) for g in (*self.leases, *new[:room])]
            holders = ", ".join(held[:8]) + (", ..." if len(held) > 8 else "")
            raise CapacityError(
                f"no Distiller slot for group {new[room]!r}: all {self.max_groups} (max_groups) are held by {holders}; "
                f"{len(idle)} of them are idle and on_full={self.on_full!r}"
            )
        for group in evictable[: max(0, len(new) - len(self._free))]:
            self._drop(group)
        for group in new:
            self.leases[group] = Lease(self._free.pop())
        for group in wanted:
            self._clock += 1
            self.leases[group].retain, self.leases[group].last_used = retain, self._clock
        return set(new)

    def release_row(self, group: Hashable) -> None:
        """One row of the group has ended; the last one gives the slot back, or leaves the group idle."""
        self._clock += 1
        lease = self.leases[group]
        lease.rows, lease.last_used = lease.rows - 1, self._clock
        if lease.rows == 0 and not lease.retain:
            self._drop(group)

    def _drop(self, group: Hashable) -> None:
        self._free.append(self.leases.pop(group).slot)
        self._warned.discard(group)

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

    def measure_scale(self, deep: Tensor, teaches: Tensor) -> None:
        """Freeze s as the rms of the first learned batch, if it is not known yet.  teaches: bool [R]."""
        use = torch.where(teaches.any(), teaches, torch.ones_like(teaches))[:, None]
        rms = (deep.square() * use).sum().div(use.sum() * deep.shape[1]).sqrt()
        rms = torch.where(torch.isfinite(rms) & (rms > 0), rms, 1.0)
        self.scale.copy_(torch.where(torch.isnan(self.scale), rms, self.scale))

    def stats(self) -> dict[Hashable, GroupStats]:
        """Per group; waits for the device.  Warns once per group that does not learn."""
        state, gauge = self.state, self.gauge
        columns = [t.tolist() for t in (state.updates, state.loss, state.first_loss, state.nonfinite)]
        judged = [t.tolist() for t in (gauge.error, gauge.baseline, gauge.trust)]
        result = {}
        for group, lease in self.leases.items():
            updates, loss, first_loss, nonfinite = (column[lease.slot] for column in columns)
            error, baseline, trust = (column[lease.slot] for column in judged)
            better = error < baseline if self.config.gated else loss < first_loss
            learning = not ((updates >= self.config.patience and not better) or (nonfinite > 0 and updates == 0))
            gated = (error, baseline, trust if self.config.gated else 1.0)
            result[group] = GroupStats(lease.rows, updates, loss, first_loss, nonfinite, learning, *gated)
            if (not learning or nonfinite > 0) and group not in self._warned:
                self._warned.add(group)
                warnings.warn(
                    f"the Distiller of group {group!r} does not learn well: loss {first_loss:.3g} -> {loss:.3g} after "
                    f"{updates} updates, {error:.3g} lately where a constant has {baseline:.3g}, {nonfinite} skipped "
                    "as not finite; check the taps, or config.lr",
                    stacklevel=3,
                )
        return result

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: one row per leased group in every tensor, and the groups' names."""
        slots = torch.tensor([lease.slot for lease in self.leases.values()], dtype=torch.long, device="cpu")
        groups = [
            {"group": g, "next_sample_index": lease.next_sample_index, "last_used": lease.last_used}
            for g, lease in self.leases.items()
        ]
        tensors = {name: t[slots.to(t.device)] for name, t in self._named_tensors().items()}
        return {"groups": groups, "config": _plain(self.config), "scale": self.scale.clone(), "tensors": tensors}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take a saved bank's groups over as idle, retained ones.  Raises StateError, ArgumentError, CapacityError."""
        if self.leases:
            raise StateError(f"load needs an unused bank, but {len(self.leases)} groups hold slots")
        mine, theirs = _plain(self.config), {"recipe": "default", **saved["config"]}
        shape = ("recipe", "rank", "target", "weight_dtype")
        if any(mine[k] != theirs[k] for k in shape) or (mine["momentum"] > 0) != (theirs["momentum"] > 0):
            raise ArgumentError(f"state must fit config {mine}, got one saved with {theirs}")
        if missing := sorted(self._named_tensors().keys() - saved["tensors"].keys()):
            raise ArgumentError(f"state must hold {', '.join(missing)}, got one saved with gate={theirs.get('gate')}")
        for name, tensor in self._named_tensors().items():
            got = saved["tensors"][name]
            if got.shape[1:] != tensor.shape[1:]:
                raise ArgumentError(f"state tensor {name} must be [*, {list(tensor.shape[1:])}], got {list(got.shape)}")
        self.acquire((entry["group"] for entry in saved["groups"]), retain=True)
        self.scale.copy_(saved["scale"])
        for i, entry in enumerate(saved["groups"]):
            lease = self.leases[entry["group"]]
            lease.next_sample_index = entry["next_sample_index"]
            self.reset(lease.slot, 0)  # what is not in the file is as at the start
            for name, tensor in self._named_tensors().items():
                tensor[lease.slot].copy_(saved["tensors"][name][i])
        self._clock = max([self._clock, *(entry["last_used"] for entry in saved["groups"])])

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file.  Groups must be strings or integers to have a name in it."""
        saved = self.state_dict()
        for entry in saved["groups"]:
            if not isinstance(entry["group"], (str, int)):
                raise ArgumentError(f"group must be a string or an integer to be saved, got {entry['group']!r}")
        tensors = {name: t.contiguous() for name, t in saved["tensors"].items()} | {"scale": saved["scale"]}
        save_file(tensors, path, metadata={k: json.dumps(saved[k]) for k in ("groups", "config")})

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote."""
        tensors, metadata = read_safetensors(path)
        if "groups" not in metadata or "scale" not in tensors:
            raise ArgumentError(f"path must be a file written by Explorer.save, got {str(path)!r}")
        scale = tensors.pop("scale")
        self.load_state_dict(
            {k: json.loads(metadata[k]) for k in ("groups", "config")} | {"scale": scale, "tensors": tensors}
        )

    def _named_tensors(self) -> dict[str, Tensor]:
        state = self.state
        named = {f"weights.{k}": t for k, t in state.weights._asdict().items()}
        if state.momentum is not None:
            named |= {f"momentum.{k}": t for k, t in state.momentum._asdict().items()}
        if self.config.gated:
            named |= {f"gauge.{k}": t for k, t in self.gauge._asdict().items()}
        return named | {k: getattr(state, k) for k in ("seed", "updates", "loss", "first_loss", "nonfinite")}


def _plain(config: DistillerConfig) -> dict[str, Any]:
    return asdict(config) | {"weight_dtype": str(config.weight_dtype)}


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
