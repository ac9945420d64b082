"""The open sequences of a running batch, in its order."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esamp_core import ops
from esamp_core.config import is_int
from esamp_core.errors import ArgumentError
from esamp_core.structures import RowParams

if TYPE_CHECKING:
    from esamp_core.explorer import Explorer


@dataclass(frozen=True)
class Row:
    """What the host knows of one running sequence."""

    group: Hashable | None
    slot: int
    sample_index: int
    explores: bool
    stratified: bool


class Rows:
    """The open sequences of a batch, in its order.  Immutable but for ``active``, ``positions`` and ``codes``.

    Made by :meth:`Explorer.open`, :meth:`keep` and ``+``; each of them outdates the Rows it was made from.
    """

    def __init__(
        self,
        explorer: Explorer,
        rows: list[Row],
        seeds: Tensor,
        positions: Tensor,
        codes: Tensor,
        active: Tensor,
        params: RowParams,
    ) -> None:
        self._explorer, self._rows, self._current = explorer, rows, True
        self.seeds = seeds
        """int64 [R], row seeds."""
        self.positions = positions
        """int64 [R], tokens drawn so far; advanced by ``sample``."""
        self.codes = codes
        """float64 [R, 2], codes of stratified rows (see ``draw``); negative in other rows."""
        self.active = active
        """bool [R]; switch finished rows off in place (``rows.active &= running``): they draw -1 and do not teach."""
        self.params = params
        slots = torch.tensor([r.slot for r in rows], dtype=torch.int64, device=seeds.device)
        rank = torch.tensor([r.sample_index for r in rows], dtype=torch.int64, device=seeds.device)
        self._groups = ops.group_rows(slots, explorer._bank.max_groups, rank)
        self._explores = any(r.explores for r in rows)
        self._stratified = any(r.stratified for r in rows)
        self._grouped = any(r.slot >= 0 for r in rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        state = "" if self._current else ", outdated"
        return f"Rows({len(self)} rows of {len({r.group for r in self._rows} - {None})} groups{state})"

    @property
    def groups(self) -> list[Hashable | None]:
        """Each row's group, as given to ``open``."""
        return [r.group for r in self._rows]

    @property
    def sample_index(self) -> list[int]:
        """Each row's ordinal among its siblings."""
        return [r.sample_index for r in self._rows]

    def keep(self, which: Sequence[bool] | Sequence[int] | Tensor) -> Rows:
        """Only these rows, in this order; the others are closed.

        which: R host booleans, or distinct row numbers in any order (a list or a CPU tensor; reading a GPU tensor
        would stall the batch and is refused).  Call it between ``learn`` and the next ``predict``.
        """
        indices = _host_indices(which, len(self))
        self._explorer._retire(self)
        kept = set(indices)
        self._explorer._release([r for i, r in enumerate(self._rows) if i not in kept])
        index = torch.tensor(indices, dtype=torch.int64, device=self.seeds.device)
        return Rows(
            self._explorer,
            [self._rows[i] for i in indices],
            self.seeds[index],
            self.positions[index],
            self.codes[index],
            self.active[index],
            self.params.take(index),
        )

    def __add__(self, other: Rows) -> Rows:
        """These rows, then those."""
        if not isinstance(other, Rows):
            return NotImplemented
        if self is other or self._explorer is not other._explorer:
            raise ArgumentError("rows + rows must be two different Rows of one Explorer")
        self._explorer._retire(self)
        self._explorer._retire(other)
        return Rows(
            self._explorer,
            self._rows + other._rows,
            torch.cat([self.seeds, other.seeds]),
            torch.cat([self.positions, other.positions]),
            torch.cat([self.codes, other.codes]),
            torch.cat([self.active, other.active]),
            RowParams(*(torch.cat(pair) for pair in zip(self.params, other.params, strict=True))),
        )


def _host_indices(which: Sequence[bool] | Sequence[int] | Tensor, rows: int) -> list[int]:
    if isinstance(which, Tensor) and which.device.type != "cpu":
        raise ArgumentError(f"which must be on the host, got a tensor on {which.device}")
    values = which.tolist() if hasattr(which, "tolist") else list(which)
    if values and all(isinstance(v, bool) for v in values):
        if len(values) != rows:
            raise ArgumentError(f"which must have one boolean per row ({rows}), got {len(values)}")
        return [i for i, v in enumerate(values) if v]
    if not all(is_int(v) and 0 <= v < rows for v in values) or len(set(values)) != len(values):
        raise ArgumentError(f"which must be booleans or distinct row numbers below {rows}, got {values!r}")
    return values
