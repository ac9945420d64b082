"""Watches the library at work: which room calls which, and which tensors are checked."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from floor_plan import ROOT


class Visits:
    """A context; what happened in it."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str, str]] = Counter()  # caller's room, callee's, function
        self.checked: list[tuple[str, int]] = []  # what a tensor was called, and which it is
        self._frames: list[tuple[FrameType, str]] = []
        self._rooms: dict[str, str | None] = {}

    def __enter__(self) -> Visits:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _room(self, path: str) -> str | None:
        if path not in self._rooms:
            inside = Path(path).resolve()
            known = inside.is_relative_to(ROOT / "esamp_core")
            self._rooms[path] = inside.relative_to(ROOT / "esamp_core").parts[0] if known else None
        return self._rooms[path]

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and self._frames and self._frames[-1][0] is frame:
            self._frames.pop()
        if event != "call" or (room := self._room(frame.f_code.co_filename)) is None:
            return
        name = frame.f_code.co_name
        if name == "whole" and "method" in frame.f_locals:  # around a verb of the Explorer
            name = frame.f_locals["method"].__name__
        if name == "check_tensor" and isinstance(frame.f_locals["value"], torch.Tensor):
            self.checked.append((frame.f_locals["name"], id(frame.f_locals["value"])))
        # All rooms stand on the ground floor: calls down to it are no visit, nor is what a model asks its cache.
        asked = frame.f_back is not None and frame.f_back.f_globals["__name__"].startswith("transformers.")
        if self._frames and room not in (self._frames[-1][1], "base") and not asked:
            self.calls[self._frames[-1][1], room, name] += 1
        if room != "base":
            self._frames.append((frame, room))
