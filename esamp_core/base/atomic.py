"""Doing a thing whole, where an interrupt may come at any line."""

from __future__ import annotations

from collections.abc import Callable


def whole(commit: Callable[[], object]) -> None:
    """Run what may be run again: where an interrupt has cut it short, once more, to its end."""
    try:
        commit()
    except BaseException:
        commit()
        raise
