"""What an Explorer's Distillers have learned: to be looked at, kept, and taken over again."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

from esamp_core.base.tensors import Head
from esamp_core.explorer import saved
from esamp_core.explorer.bank import DistillerBank, GroupStats
from esamp_core.explorer.learner import Learner
from esamp_core.explorer.ledger import Ledger, verb


class Learned:
    """That side of an :class:`Explorer`."""

    head: Head | None
    ledger: Ledger
    _bank: DistillerBank
    _learner: Learner

    @verb
    def stats(self) -> dict[Hashable, GroupStats]:
        """What each group has learned.  Waits for the device."""
        synchronize(self._learner, self.ledger)
        return self._bank.stats(self.ledger.leases)

    @verb
    def updates(self) -> int:
        """SGD steps that were made in all slots, each since it was last leased.  Waits for the device."""
        synchronize(self._learner, self.ledger)
        return int(self._bank.state.updates.sum())

    @verb
    def state_dict(self) -> dict[str, Any]:
        """The Distillers of all groups; with the same rows opened again, a run continues bit for bit."""
        synchronize(self._learner, self.ledger)
        return saved.state_dict(self._bank, self.ledger.leases, self.head)

    @verb
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take saved groups over, idle and retained.

        Raises ArgumentError (not a state; of other Distillers, or another model), StateError (groups hold slots),
        CapacityError; then nothing was changed.
        """
        synchronize(self._learner, self.ledger)
        fitting = saved.fitting(self._bank, self.head, state)
        groups = [(g.group, g.next_sample_index, g.last_used) for g in fitting.groups]
        books = self.ledger.loaded(groups, fitting.scale)
        # It all goes where nobody reads before the commit.
        self._bank.fill([books.leases[g.group].slot for g in fitting.groups], fitting.tensors)
        self.ledger.books = books

    def save(self, path: str | Path) -> None:
        """Write :meth:`state_dict` as a safetensors file, whole or not at all.  Groups must be strings or integers."""
        saved.write_state(path, self.state_dict())

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote.  Raises as :meth:`load_state_dict`."""
        self.load_state_dict(saved.read_state(path))


def synchronize(learner: Learner, ledger: Ledger) -> None:
    """Everything that was asked for is done, and the host has waited for it."""
    books = ledger.books
    learner.ready(books.fresh, books.scale)
    ledger.was_readied(books.fresh)
    learner.synchronize()


def settle(bank: DistillerBank, learner: Learner, ledger: Ledger) -> None:
    """Before rows are closed."""
    synchronize(learner, ledger)
    bank.stats(ledger.leases)  # warns of groups that did not learn
