"""What has been done since ``predict``, and so which verb may come next."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from esamp_core.base.errors import StateError
from esamp_core.explorer.rows import Rows


@dataclass(frozen=True)
class Step:
    """A step that ``predict`` has begun and ``learn`` has not ended."""

    of: weakref.ref[Rows]  # rows that nobody holds are closed, also in the middle of a step
    done: Literal["", "mixed", "sampled"] = ""
    drawn: Tensor | None = None  # int64 [R], -1 in rows that had ended


class Steps:
    """The step that an Explorer is in; the checks raise StateError."""

    def __init__(self) -> None:
        self.now: Step | None = None

    def of(self, rows: Rows) -> Step | None:
        """The step that was begun with predict for these very rows."""
        return self.now if self.now is not None and self.now.of() is rows else None

    def begin(self, rows: Rows) -> None:
        self.now = Step(weakref.ref(rows))

    def check_learned(self) -> None:
        rows = None if self.now is None else self.now.of()
        if rows is not None and rows.current:
            raise StateError(
                "predict was called again before learn; every step must be learned (lr=0 freezes), one at a time"
            )

    def to_mix(self, rows: Rows) -> None:
        step = self.of(rows)
        if step is not None and step.done:
            raise StateError(f"mix was called after the step was {step.done}; call learn and predict first")
        if rows.explores and step is None:
            raise StateError("mix needs predict for these very rows first, or nothing would be explored (beta > 0)")

    def to_draw(self, verb: str, rows: Rows) -> Step | None:
        step = self.of(rows)
        if step is not None and step.done == "sampled":
            raise StateError(f"{verb} was called twice in a step; call learn and predict first")
        if rows.explores and step is None:
            raise StateError(f"{verb} needs predict for these very rows first, or nothing would be explored (beta > 0)")
        return step

    def to_learn(self, rows: Rows, from_choice: bool) -> Step:
        step = self.of(rows)
        if step is None:
            raise StateError("learn needs predict for these very rows first, in the same step")
        if from_choice and step.drawn is None:
            raise StateError('learn with target="choice" needs sample first: the drawn tokens teach')
        return step

    def mixed(self, rows: Rows) -> None:
        if (step := self.of(rows)) is not None:
            self.now = replace(step, done="mixed")

    def sampled(self, rows: Rows, token_ids: Tensor) -> None:
        """Of other rows than the step's, it is none of its business."""
        if (step := self.of(rows)) is not None:
            self.now = replace(step, done="sampled", drawn=token_ids)
