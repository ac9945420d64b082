"""What both forms of exploration inside transformers' ``generate()`` share: the context, and who are siblings."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Sequence
from types import TracebackType
from typing import Self

from torch import Tensor, nn

from esamp_core.base.atomic import whole
from esamp_core.base.errors import ArgumentError, EsampError, StateError
from esamp_core.explorer import Explorer
from esamp_core.models.parts import ModelParts
from esamp_core.models.taps import ForeignTaps

_explored: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class ModelContext:
    """A model that is tapped while the context is entered, by one at a time."""

    def __init__(
        self, parts: ModelParts, taps: ForeignTaps, groups: Sequence[Hashable | None] | None, explorer: Explorer | None
    ) -> None:
        self._parts, self._taps, self._groups = parts, taps, groups
        self._given = explorer
        self._retains = groups is not None and explorer is not None  # else names mean nothing after a generate
        self.explorer = explorer
        """The Explorer in use; without one given, that of the latest ``generate``."""
        self._entered = self._used = False

    def __enter__(self) -> Self:
        if self._parts.model in _explored:
            raise StateError(f"{type(self._parts.model).__name__} is being explored already; leave that context first")
        try:
            self._taps.__enter__()
            _explored.add(self._parts.model)
            self._entered, self._used = True, False
            return self
        except BaseException:
            whole(self._untap)
            raise

    def _untap(self) -> None:
        self._entered = False
        self._taps.remove()
        _explored.discard(self._parts.model)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        whole(self._untap)
        # An error while closing would hide the one that led here.
        with contextlib.nullcontext() if error is None else contextlib.suppress(EsampError):
            whole(self._close)
        if error is None and not self._used:
            self._check_unused()

    def leave(self) -> None:
        """What leaving the context does, again: for an interrupt that came while it was being left."""
        whole(self._untap)
        whole(self._close)

    def _close(self) -> None:
        """The latest generate is over.  May be done again."""

    def _check_unused(self) -> None:
        """Nothing explored in the context.  Raises StateError if something should have."""


def groups_of_rows(
    given: Sequence[Hashable | None] | None, input_ids: Tensor, float_inputs: list[str]
) -> list[Hashable | None]:
    """Each row's group: as given, or the number of its prompt among the rows' prompts.  Raises ArgumentError.

    input_ids: [R, T].  float_inputs: names of inputs that are numbers, so that equal tokens are not equal prompts.
    """
    count = input_ids.shape[0]
    if given is not None:
        if len(given) != count:
            raise ArgumentError(
                f"groups must be one per row of generate, {count} with num_return_sequences, got {given!r}"
            )
        return list(given)
    if input_ids.shape[1] == 0 or float_inputs:
        seen = ", ".join(float_inputs) or "no token ids"
        raise ArgumentError(f"groups must be given where prompts are more than token ids, got None with {seen}")
    prompts = [ids.tobytes() for ids in input_ids.cpu().numpy()]
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return [numbers[prompt] for prompt in prompts]
