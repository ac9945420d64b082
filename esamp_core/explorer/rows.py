"""The open sequences of a running batch, in its order."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from esamp_core.base.atomic import whole
from esamp_core.base.checks import check_tensor, is_int, require
from esamp_core.base.config import SamplingParams
from esamp_core.base.errors import ArgumentError, StateError
from esamp_core.base.seeds import row_seeds
from esamp_core.base.tensors import Growth, RowParams, Tree
from esamp_core.explorer.ledger import Ledger, Lineage, Row, verb
from esamp_core.explorer.siblings import families_of, starting_codes, starting_tree
from esamp_core.reference import group_rows


class Rows:
    """The open sequences of a batch, in its order.

    Immutable but for ``active``, ``positions``, ``codes``, ``status``; and ``seeds`` and ``tree`` of distinct siblings.

    Made by :meth:`Explorer.open`, :meth:`keep` and ``+``; each of them outdates the Rows it was made from.
    As a context, ``with explorer.open(...) as rows:``, they are closed at its end, whatever they have become by then.
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
        lineage: Lineage,
        origin: Rows | None = None,
    ) -> None:
        self.ledger, self.entries, self.lineage = ledger, entries, lineage
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
        self.row_groups = group_rows(self.slots, ledger.max_groups, rank)
        self.explores = any(r.explores for r in entries)
        self.stratified = any(r.stratified for r in entries)
        self.grouped = any(r.slot >= 0 for r in entries)
        self.families = families_of([r.family for r in entries], seeds.device)
        """int64 [P, W], row numbers of distinct siblings, see ``grow``; None where there are none."""

    @staticmethod
    def new(
        ledger: Ledger,
        entries: list[Row],
        params: Sequence[SamplingParams],
        columns: RowParams,
        request_seed: Sequence[int],
        position: Sequence[int],
        sets: Sequence[Hashable | None],
        distinct: Sequence[Sequence[int]],
        device: torch.device,
    ) -> Rows:
        """Rows at their beginning, which do not stand in the books yet.

        columns: of params.  sets: as in ``Explorer.open``.  distinct: row numbers of each set of distinct siblings.
        """
        index = [row.sample_index for row in entries]
        numbers = torch.tensor([request_seed, index, position], dtype=torch.int64, device=device)
        seeds = row_seeds(numbers[0], numbers[1])
        tree, here = starting_tree(distinct, seeds)
        grouped = torch.tensor([row.slot >= 0 for row in entries], dtype=torch.bool, device=device)
        return Rows(
            ledger,
            entries,
            seeds,
            numbers[2].clone(),
            starting_codes(params, sets, seeds),
            tree,
            here,
            torch.zeros(len(entries), dtype=torch.int32, device=device),
            columns._replace(beta=torch.where(grouped, columns.beta, 0.0)),
            Lineage(),
        )

    def check_tensors(self) -> None:
        """Raises ArgumentError if one of those that others may write is not what it was."""
        rows, device = len(self), self.seeds.device
        check_tensor("active", self.active, (rows,), device, "bool")
        check_tensor("positions", self.positions, (rows,), device, "int")
        check_tensor("codes", self.codes, (rows, 2), device)

    def advance(self, token_ids: Tensor) -> Callable[[], object]:
        """Ready to be done: rows that have drawn go on by one token.  May be done twice."""
        positions = self.positions + (token_ids >= 0)
        return lambda: self.positions.copy_(positions)

    def take(self, growth: Growth) -> Callable[[], object]:
        """The same where distinct siblings change places, and what belongs to them goes along."""
        parent, drawn = growth.parent, growth.child >= 0
        mine = (self.positions, self.status, self.seeds, self.active, *self.tree)
        new = (self.positions[parent] + drawn, self.status[parent], growth.seed, drawn, *growth.tree)
        return lambda: [old.copy_(value) for old, value in zip(mine, new, strict=True)]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def current(self) -> bool:
        """False once they are closed, or replaced by others."""
        source = self if self.origin is None else self.origin
        return source.latest is source

    @property
    def latest(self) -> Rows | None:
        """The Rows that stand for these now: what ``keep`` and ``+`` have made of them.  None once they are closed."""
        latest: Rows | None = self.ledger.latest(self.lineage)
        return latest

    def check_current(self) -> None:
        """Raises StateError."""
        if not self.current:
            raise StateError(f"{self!r} was closed, or replaced by keep or +; use the newest Rows")

    def check_replaceable(self) -> None:
        """Raises StateError where others cannot come in their place."""
        self.check_current()
        if self.origin is not None:
            raise StateError(f"{self!r} were spread from others; keep, add and close those")

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        whole(self.end)

    @verb
    def end(self) -> None:
        """Close what these have become by now, the Rows that they were added to included, if that is still open."""
        if (latest := self.latest) is not None:
            self.ledger.close(latest)

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

    @verb
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
        self.check_replaceable()
        index = torch.tensor(indices, dtype=torch.int64, device=self.seeds.device)
        kept_rows = Rows(
            self.ledger,
            [self.entries[i] for i in indices],
            self.seeds[index],
            self.positions[index],
            self.codes[index],
            Tree(*(column[index] for column in self.tree)),
            self.active[index],
            self.status[index],
            self.params.take(index),
            self.lineage,
        )
        return self.ledger.stand(kept_rows, [self])

    @verb
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
            self.lineage,
            origin=self if self.origin is None else self.origin,
        )

    def __add__(self, other: Rows) -> Rows:
        """These rows, then those."""
        return self._joined(other) if isinstance(other, Rows) else NotImplemented

    @verb
    def _joined(self, other: Rows) -> Rows:
        if self is other or self.ledger is not other.ledger:
            raise ArgumentError("rows + rows must be two different Rows of one Explorer")
        self.check_replaceable()
        other.check_replaceable()
        joined = Rows(
            self.ledger,
            self.entries + other.entries,
            torch.cat([self.seeds, other.seeds]),
            torch.cat([self.positions, other.positions]),
            torch.cat([self.codes, other.codes]),
            Tree(*(torch.cat(pair) for pair in zip(self.tree, other.tree, strict=True))),
            torch.cat([self.active, other.active]),
            torch.cat([self.status, other.status]),
            RowParams(*(torch.cat(pair) for pair in zip(self.params, other.params, strict=True))),
            self.lineage,
        )
        # Neither means anything while the lineage is open, so before the commit nothing has changed.
        other.lineage.into, self.lineage.into = self.lineage, None
        return self.ledger.stand(joined, [self, other])


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
