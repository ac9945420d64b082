"""The open sequences of a running batch, in its order, and the ledger that they are entered in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esamp_core.base.checks import check_tensor, is_int, require
from esamp_core.base.config import SamplingParams
from esamp_core.base.errors import ArgumentError, CapacityError, StateError
from esamp_core.base.tensors import Growth, RowParams, Tree
from esamp_core.explorer.bank import DistillerBank
from esamp_core.explorer.siblings import families_of
from esamp_core.reference import group_rows


@dataclass(frozen=True)
class Row:
    """What the host knows of one running sequence."""

    group: Hashable | None
    slot: int
    sample_index: int
    explores: bool
    stratified: bool
    family: int = -1
    """Of distinct siblings: the number of their set, -1 for others."""


class Ledger:
    """An Explorer's open rows, at most ``max_rows``, and which :class:`Rows` stand for them now."""

    def __init__(self, bank: DistillerBank, max_rows: int) -> None:
        self.bank, self.max_rows = bank, max_rows
        self.open_rows = 0
        self._families = 0  # sets of distinct siblings that were ever opened
        self.step: Rows | None = None  # whose predict has run, and not yet their learn

    def admit(self, count: int) -> None:
        """Raises CapacityError if so many more do not fit."""
        if self.open_rows + count > self.max_rows:
            raise CapacityError(f"{count} more rows do not fit: {self.open_rows} of max_rows={self.max_rows} are open")

    def enter(
        self,
        groups: Sequence[Hashable | None],
        params: Sequence[SamplingParams],
        sample_index: Sequence[int] | None,
        seeds: Sequence[int],
        retain: bool,
        reset: Callable[[int, int], None],
        distinct: Sequence[Sequence[int]],
    ) -> list[Row]:
        """Open rows; their groups get slots.  reset: called with the slot and the seed of each group that is new.
        distinct: row numbers of each set of distinct siblings."""
        family = {i: self._families + number for number, members in enumerate(distinct) for i in members}
        self._families += len(distinct)
        fresh = self.bank.acquire((g for g in groups if g is not None), retain)
        rows: list[Row] = []
        plain_index = 0
        for i, (group, p) in enumerate(zip(groups, params, strict=True)):
            if group is None:
                given = plain_index if sample_index is None else sample_index[i]
                rows.append(Row(None, -1, given, False, p.stratified, family.get(i, -1)))
                plain_index += 1
                continue
            lease = self.bank.leases[group]
            if group in fresh:  # the first of its rows
                fresh.remove(group)
                reset(lease.slot, seeds[i])
            lease.rows += 1
            given = lease.next_sample_index if sample_index is None else sample_index[i]
            lease.next_sample_index = max(lease.next_sample_index, given + 1)
            rows.append(Row(group, lease.slot, given, p.beta != 0, p.stratified, family.get(i, -1)))
        self.open_rows += len(rows)
        return rows

    def check(self, rows: Rows) -> None:
        """Raises ArgumentError for another Explorer's rows, StateError for outdated ones."""
        ours = isinstance(rows, Rows) and rows.ledger is self
        require(ours, "rows", "come from this Explorer's open", rows)
        if not (rows if rows.origin is None else rows.origin).current:
            raise StateError(f"{rows!r} was closed, or replaced by keep or +; use the newest Rows")

    def retire(self, rows: Rows) -> None:
        """Other Rows are about to stand for these, or none."""
        self.check(rows)
        if rows.origin is not None:
            raise StateError(f"{rows!r} were spread from others; keep, add and close those")
        rows.current = False
        if self.step is not None and rows in (self.step, self.step.origin):
            self.step = None

    def release(self, entries: Iterable[Row]) -> None:
        """These rows have ended."""
        for row in entries:
            if row.group is not None:
                self.bank.release_row(row.group)
            self.open_rows -= 1


class Rows:
    """The open sequences of a batch, in its order.

    Immutable but for ``active``, ``positions``, ``codes``, ``status``; and ``seeds`` and ``tree`` of distinct siblings.

    Made by :meth:`Explorer.open`, :meth:`keep` and ``+``; each of them outdates the Rows it was made from.
    """

    def __init__(
        self,
        ledger: Ledger,
        entries: list[Row],
        seeds: Tensor,
        positions: Tensor,
        codes: Tensor,
        tree: Tree,
        active: Tensor,
        status: Tensor,
        params: RowParams,
        origin: Rows | None = None,
    ) -> None:
        self.ledger, self.entries = ledger, entries
        self.current = True
        """False once they are closed, or replaced by others."""
        self.origin = origin
        """What they were spread from."""
        self.seeds = seeds
        """int64 [R], row seeds."""
        self.positions = positions
        """int64 [R], tokens drawn so far; advanced by ``sample``."""
        self.codes = codes
        """float64 [R, 2], codes of stratified rows (see ``draw``); negative in other rows."""
        self.tree = tree
        """What distinct siblings have drawn is chosen by it (see ``grow``); -inf perturbed: nothing is in the row."""
        self.active = active
        """bool [R]; switch finished rows off in place (``rows.active &= running``): they draw -1 and do not teach."""
        self.status = status
        """int32 [R], Status flags of all that ``mix`` has met so far."""
        self.params = params
        self.slots = torch.tensor([r.slot for r in entries], dtype=torch.int64, device=seeds.device)
        rank = torch.tensor([r.sample_index for r in entries], dtype=torch.int64, device=seeds.device)
        self.row_groups = group_rows(self.slots, ledger.bank.max_groups, rank)
        self.explores = any(r.explores for r in entries)
        self.stratified = any(r.stratified for r in entries)
        self.grouped = any(r.slot >= 0 for r in entries)
        self.families = families_of([r.family for r in entries], seeds.device)
        """int64 [P, W], row numbers of distinct siblings, see ``grow``; None where there are none."""

    def check_tensors(self) -> None:
        """Raises ArgumentError if one of those that others may write is not what it was."""
        rows, device = len(self), self.seeds.device
        check_tensor("active", self.active, (rows,), device, "bool")
        check_tensor("positions", self.positions, (rows,), device, "int")
        check_tensor("codes", self.codes, (rows, 2), device)

    def take(self, growth: Growth) -> None:
        """Distinct siblings change places, and what belongs to them goes along."""
        parent, drawn = growth.parent, growth.child >= 0
        self.positions.copy_(self.positions[parent] + drawn)
        self.status.copy_(self.status[parent])
        self.seeds.copy_(growth.seed)
        self.active.copy_(drawn)
        for mine, new in zip(self.tree, growth.tree, strict=True):
            mine.copy_(new)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        state = "" if self.current else ", outdated"
        return f"Rows({len(self)} rows of {len({r.group for r in self.entries} - {None})} groups{state})"

    @property
    def groups(self) -> list[Hashable | None]:
        """Each row's group, as given to ``open``."""
        return [r.group for r in self.entries]

    @property
    def sample_index(self) -> list[int]:
        """Each row's ordinal among its siblings."""
        return [r.sample_index for r in self.entries]

    def keep(self, which: Sequence[bool] | Sequence[int] | Tensor) -> Rows:
        """Only these rows, in this order; the others are closed.

        which: R host booleans, or distinct row numbers in any order (a list or a CPU tensor; reading a GPU tensor
        would stall the batch and is refused).  Call it between ``learn`` and the next ``predict``.
        """
        indices = _host_indices(which, len(self))
        kept = set(indices)
        gone = [r for i, r in enumerate(self.entries) if i not in kept]
        if ({r.family for r in gone} & {self.entries[i].family for i in indices}) - {-1}:
            raise ArgumentError(f"which must keep all rows of a set of distinct siblings or none, got {indices}")
        self.ledger.retire(self)
        self.ledger.release(gone)
        index = torch.tensor(indices, dtype=torch.int64, device=self.seeds.device)
        return Rows(
            self.ledger,
            [self.entries[i] for i in indices],
            self.seeds[index],
            self.positions[index],
            self.codes[index],
            Tree(*(column[index] for column in self.tree)),
            self.active[index],
            self.status[index],
            self.params.take(index),
        )

    def spread(self, places: Sequence[int]) -> Rows:
        """One step's rows of an engine, whose batch has others too, in its own order.

        places: for each of its rows the number of the row here, as often as it occurs (drafts of speculative decoding
        are several rows of one sequence), or -1 for one that is not ours, which has no Distiller.
        Nothing is opened: these Rows stay as they are, and the spread ones are good as long as they are.
        """
        wrong = [place for place in places if not (is_int(place) and -1 <= place < len(self))]
        require(not wrong, "places", f"be row numbers below {len(self)}, or -1", wrong)
        require(self.families is None, "rows", "not be distinct siblings, which change places", self)
        index = torch.tensor(list(places), dtype=torch.int64, device=self.seeds.device)
        stranger = RowParams.of(SamplingParams(beta=0.0), 1, self.seeds.device)

        def take(column: Tensor, other: Tensor) -> Tensor:
            return torch.cat([column, other.to(column.dtype)])[index]  # -1 is the last

        zero = torch.zeros(1, dtype=torch.int64, device=self.seeds.device)
        return Rows(
            self.ledger,
            [self.entries[place] if place >= 0 else Row(None, -1, 0, False, False) for place in places],
            take(self.seeds, zero),
            take(self.positions, zero),
            take(self.codes, zero.new_full((1, 2), -1.0)),
            Tree(*(take(column, zero) for column in self.tree)),
            take(self.active, zero + 1),
            torch.zeros_like(index, dtype=torch.int32),
            RowParams(*(take(mine, other) for mine, other in zip(self.params, stranger, strict=True))),
            origin=self if self.origin is None else self.origin,
        )

    def __add__(self, other: Rows) -> Rows:
        """These rows, then those."""
        if not isinstance(other, Rows):
            return NotImplemented
        if self is other or self.ledger is not other.ledger:
            raise ArgumentError("rows + rows must be two different Rows of one Explorer")
        self.ledger.retire(self)
        self.ledger.retire(other)
        return Rows(
            self.ledger,
            self.entries + other.entries,
            torch.cat([self.seeds, other.seeds]),
            torch.cat([self.positions, other.positions]),
            torch.cat([self.codes, other.codes]),
            Tree(*(torch.cat(pair) for pair in zip(self.tree, other.tree, strict=True))),
            torch.cat([self.active, other.active]),
            torch.cat([self.status, other.status]),
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
