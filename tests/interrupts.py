"""Ctrl-C at any line of the library."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from floor_plan import ROOT

LIBRARY = (str(ROOT / "esamp_core"), str(ROOT / "kernels"), str(ROOT / "bindings"))


class InterruptAt:
    """A context in which KeyboardInterrupt comes at the n-th line of the library that is about to run, once."""

    def __init__(self, number: int, only: str = "") -> None:
        """only: in files whose path has this in it."""
        self.number, self.only = number, only
        self.lines = 0
        self.where = ""
        self._known: dict[str, bool] = {}

    def __enter__(self) -> InterruptAt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        path = frame.f_code.co_filename
        if path not in self._known:
            self._known[path] = str(Path(path).resolve()).startswith(LIBRARY) and self.only in path
        return self._line if self._known[path] and not self.where else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and not self.where:
            self.lines += 1
            if self.lines == self.number:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def interrupted(call: Callable[[int], Callable[[], object]], only: str = "", every: int = 1) -> Iterator[str]:
    """Run what ``call(number)`` returns, interrupted at line 1, 2, ... until it runs through; yields where, after each.

    call: makes everything anew; what it returns is what is interrupted.  every: skip lines, where there are many.
    """
    number = 1
    while True:
        run = call(number)
        with InterruptAt(number, only) as at:
            try:
                run()
            except KeyboardInterrupt:
                assert at.where, "not ours"
        if not at.where:
            assert number > 1, "no line of the library ran"
            return
        yield at.where
        number += every
