"""Who holds what in an Explorer: open rows, and the slots that groups lease.  Host bookkeeping, all or nothing.

Everything stands in one frozen :class:`Books`.  A verb works out the books as they will be, allocates what it needs,
and puts them in the place of the old ones with one assignment; an error or an interrupt leaves the books of before.
Rows that nobody holds any more could never be closed: wherever books are read, they are closed.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import islice
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

from esamp_core.base.checks import is_int, require
from esamp_core.base.config import SamplingParams
from esamp_core.base.errors import CapacityError, StateError

OnFull = Literal["error", "evict"]
P = ParamSpec("P")
Result = TypeVar("Result")

LARGEST_INDEX = 2**62  # of a sample or a position: what is counted on from it stays within 64 bits


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


@dataclass(frozen=True)
class Lease:
    """A group's hold on a slot, from its first open until its last row ends; then idle if retained."""

    slot: int
    number: int  # of all leases that there were
    retain: bool
    next_sample_index: int = 0
    last_used: int = 0


@dataclass(eq=False)
class Lineage:
    """What Rows have in common with those that ``keep`` and ``+`` made of them: at most one of them is open."""

    into: Lineage | None = None
    """Of the Rows that these were added to."""


class Standing(Protocol):
    """What the ledger needs to know of Rows."""

    entries: list[Row]
    lineage: Lineage


@dataclass(frozen=True)
class Books:
    """All that the ledger knows, at one moment."""

    leases: Mapping[Hashable, Lease] = field(default_factory=dict)
    open: Mapping[Lineage, weakref.ref[Any]] = field(default_factory=dict)
    fresh: Mapping[int, int] = field(default_factory=dict)
    """Slots that are to start afresh before they are used, each with the seed of its stochastic rounding."""
    scale: Any = None
    """A scale of predictions that was loaded, and is to be taken over before the next one is made."""
    clock: int = 0
    numbers: int = 0  # leases that there were
    families: int = 0  # sets of distinct siblings that there were


class Ledger:
    """The books of an Explorer, whose verbs are this thread's or another's, one at a time."""

    def __init__(self, max_groups: int, max_rows: int, on_full: OnFull) -> None:
        require(is_int(max_groups) and 1 <= max_groups <= 65536, "max_groups", "be in 1..65536", max_groups)
        require(is_int(max_rows) and max_rows >= 1, "max_rows", "be an integer >= 1", max_rows)
        require(on_full in ("error", "evict"), "on_full", 'be "error" or "evict"', on_full)
        self.max_groups, self.max_rows, self.on_full = max_groups, max_rows, on_full
        self.books = Books()
        self.settle: Callable[[Ledger], None] = lambda ledger: None
        """Called before rows are closed; it may wait."""
        self._at_work: dict[str, int] = {}  # "thread": whose verb is running

    def claim(self) -> Books:
        """The books, for this thread alone until ``release``.  Raises StateError, at once, if another is at work."""
        if self._at_work.setdefault("thread", threading.get_ident()) != threading.get_ident():  # one step: no lock
            raise StateError("the Explorer is in use in another thread; give each its own, or let them take turns")
        return self.books

    @property
    def claimed(self) -> bool:
        """Whether by this thread."""
        return self._at_work.get("thread") == threading.get_ident()

    def release(self) -> None:
        if self.claimed:
            self._at_work.clear()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Verbs of other threads raise StateError until this ends."""
        nested = self.claimed
        try:
            self.claim()
            yield
        finally:
            if not nested:
                self.release()

    @property
    def open_rows(self) -> int:
        return sum(len(rows.entries) for rows in self._standing().values())

    @property
    def leases(self) -> dict[Hashable, tuple[Lease, int]]:
        """Of each group that holds a slot the lease, and how many rows are open."""
        return _held(self.books.leases, self._standing().values())

    def latest(self, lineage: Lineage) -> Any:
        """The open Rows of a lineage, or of that which they were added to; None if they were closed."""
        here: Lineage | None = lineage
        while here is not None and here not in self.books.open:
            here = here.into
        return None if here is None else self.books.open[here]()

    def opened(
        self,
        groups: Sequence[Hashable | None],
        params: Sequence[SamplingParams],
        sample_index: Sequence[int] | None,
        seeds: Sequence[int],
        retain: bool,
        distinct: Sequence[Sequence[int]],
    ) -> tuple[list[Row], Books]:
        """New rows, and the books in which their groups have slots.

        distinct: row numbers of each set of distinct siblings.  Raises CapacityError, ArgumentError.
        """
        if (open_rows := self.open_rows) + len(groups) > self.max_rows:
            raise CapacityError(f"{len(groups)} more rows do not fit: {open_rows} of max_rows={self.max_rows} are open")
        books = self._leased([group for group in groups if group is not None], retain)
        leases, fresh = dict(books.leases), dict(books.fresh)
        for group, seed in reversed(list(zip(groups, seeds, strict=True))):  # the first of its rows says
            if group is not None and leases[group].number >= self.books.numbers:
                fresh[leases[group].slot] = seed
        family = {i: books.families + number for number, members in enumerate(distinct) for i in members}
        rows: list[Row] = []
        plain_index = 0
        for i, (group, p) in enumerate(zip(groups, params, strict=True)):
            if group is None:
                given = plain_index if sample_index is None else sample_index[i]
                rows.append(Row(None, -1, given, False, p.stratified, family.get(i, -1)))
                plain_index += 1
                continue
            lease = leases[group]
            given = lease.next_sample_index if sample_index is None else sample_index[i]
            leases[group] = replace(lease, next_sample_index=max(lease.next_sample_index, given + 1))
            rows.append(Row(group, lease.slot, given, p.beta != 0, p.stratified, family.get(i, -1)))
        largest = max((row.sample_index for row in rows), default=0)
        require(largest < LARGEST_INDEX, "sample_index", f"be below {LARGEST_INDEX}", largest)
        return rows, replace(books, leases=leases, fresh=fresh, families=books.families + len(distinct))

    def _leased(self, groups: Iterable[Hashable], retain: bool) -> Books:
        """The books in which all of these groups have slots.  Raises CapacityError."""
        held = self.leases
        wanted = dict.fromkeys(groups)
        new = [group for group in wanted if group not in held]
        idle = [group for group, (_, rows) in held.items() if rows == 0 and group not in wanted]
        evictable = sorted(idle, key=lambda group: held[group][0].last_used) if self.on_full == "evict" else []
        free = self.max_groups - len(held)
        if len(new) > free + len(evictable):
            room = free + len(evictable)
            names = [repr(group) for group in (*held, *new[:room])]
            holders = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise CapacityError(
                f"no Distiller slot for group {new[room]!r}: all {self.max_groups} (max_groups) are held by {holders}; "
                f"{len(idle)} of them are idle and on_full={self.on_full!r}"
            )
        evicted = set(evictable[: max(0, len(new) - free)])
        leases = {group: lease for group, (lease, _) in held.items() if group not in evicted}
        used = {lease.slot for lease in leases.values()}
        slots = islice((slot for slot in range(self.max_groups) if slot not in used), len(new))
        for number, (group, slot) in enumerate(zip(new, slots, strict=True), self.books.numbers):
            leases[group] = Lease(slot, number, retain)
        for clock, group in enumerate(wanted, self.books.clock + 1):
            leases[group] = replace(leases[group], retain=retain, last_used=clock)
        return replace(
            self.books,
            leases=leases,
            fresh={slot: seed for slot, seed in self.books.fresh.items() if slot in used},
            clock=self.books.clock + len(wanted),
            numbers=self.books.numbers + len(new),
        )

    def stand(self, rows: Result, instead_of: Sequence[Standing] = (), books: Books | None = None) -> Result:
        """Commit: rows are open from now on, those others no longer.  Returns rows.

        books: as they would be otherwise; default as they are.
        """
        self.books = self._with(rows, instead_of, books or self.books)
        return rows

    def close(self, rows: Standing) -> None:
        """Commit: these are no longer open."""
        self.settle(self)
        self.books = self._with(None, [rows], self.books)

    def _with(self, rows: Any, instead_of: Sequence[Standing], books: Books) -> Books:
        gone = {old.lineage for old in instead_of}
        standing = {lineage: found for lineage, found in self._standing().items() if lineage not in gone}
        if rows is not None:
            standing[rows.lineage] = rows
        leases = {group: lease for group, (lease, _) in _held(books.leases, standing.values()).items()}
        ended = Counter(row.group for old in instead_of for row in old.entries)
        if rows is not None:
            ended.subtract(row.group for row in rows.entries)
        fewer = [group for group in leases if ended[group] > 0]
        for clock, group in enumerate(fewer, books.clock + 1):
            leases[group] = replace(leases[group], last_used=clock)
        used = {lease.slot for lease in leases.values()}
        return replace(
            books,
            leases=leases,
            open={lineage: weakref.ref(found) for lineage, found in standing.items()},
            fresh={slot: seed for slot, seed in books.fresh.items() if slot in used},
            clock=books.clock + len(fewer),
        )

    def _standing(self) -> dict[Lineage, Standing]:
        found = ((lineage, reference()) for lineage, reference in self.books.open.items())
        return {lineage: rows for lineage, rows in found if rows is not None}

    def loaded(self, groups: Sequence[tuple[Hashable, int, int]], scale: Any) -> Books:
        """The books of an unused ledger in which these groups are idle and retained.

        groups: of each its name, its next sample index, and when it was last used.  Raises StateError, CapacityError.
        """
        if held := self.leases:
            raise StateError(f"load needs an unused bank, but {len(held)} groups hold slots")
        books = self._leased([group for group, _, _ in groups], retain=True)
        leases = {
            group: replace(books.leases[group], next_sample_index=index, last_used=used)
            for group, index, used in groups
        }
        clock = max([books.clock, *(used for _, _, used in groups)])
        return replace(books, leases=leases, fresh={}, scale=scale, clock=clock)

    def was_readied(self, slots: Iterable[int]) -> None:
        """These slots have started afresh, and the scale was taken over."""
        done = set(slots)
        fresh = {slot: seed for slot, seed in self.books.fresh.items() if slot not in done}
        self.books = replace(self.books, fresh=fresh, scale=None)


def _held(leases: Mapping[Hashable, Lease], standing: Iterable[Standing]) -> dict[Hashable, tuple[Lease, int]]:
    """Of each group that has rows, or is retained, the lease and the number of rows."""
    rows = Counter(row.group for stood in standing for row in stood.entries)
    return {group: (lease, rows[group]) for group, lease in leases.items() if rows[group] or lease.retain}


class Keeping(Protocol):
    """What has verbs: an Explorer, and Rows."""

    @property
    def ledger(self) -> Ledger: ...


Self = TypeVar("Self", bound=Keeping)


def verb(method: Callable[Concatenate[Self, P], Result]) -> Callable[Concatenate[Self, P], Result]:
    """A method that is refused while another thread is in one, and after which the books are new or as before."""

    def whole(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        ledger = self.ledger
        nested, before, after = ledger.claimed, None, None
        try:
            before = ledger.claim()
            result = method(self, *args, **kwargs)
            after = ledger.books
            if not nested:
                ledger.release()
            return result
        except BaseException:  # also an interrupt that comes after the method, and would lose its result
            if before is not None and (ledger.claimed or ledger.books is after):
                ledger.books = before
            if not nested:
                ledger.release()
            raise

    wraps(method)(whole)
    return whole
