"""A second stream that is as late as its events permit, and unkind to anyone who forgot one."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

from torch import Tensor


class SimulatedLane:
    """Work waits in a queue; random amounts of it run whenever main does something, all of it only when main waits.

    A buffer that the lane will write is NaN for main from the moment the work is enqueued until it has run.
    Enqueuing work while main's writes are not published is an error: on a GPU the work might read too early.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._queue: deque[Callable[[], None]] = deque()
        self._enqueued = self._done = self._marked = 0
        self._unpublished = False

    def _run_until(self, count: int) -> None:
        while self._done < count:
            self._queue.popleft()()
            self._done += 1

    def _drift(self) -> None:
        if self._random.random() < 0.3:
            self._run_until(self._done + self._random.randint(0, len(self._queue)))

    def stage(self, buffer: Tensor, value: Tensor) -> None:
        self._drift()
        buffer.copy_(value)
        self._unpublished = True

    def publish(self) -> None:
        self._unpublished = False
        self._drift()

    def run(self, work: Callable[[], None], writes: tuple[Tensor, ...] = ()) -> None:
        assert not self._unpublished, "work was enqueued that may run before main's writes"
        for buffer in writes:
            buffer.fill_(float("nan"))
        self._queue.append(work)
        self._enqueued += 1
        self._drift()

    def mark(self) -> None:
        self._marked = self._enqueued

    def wait(self) -> None:
        self._run_until(self._marked)

    def synchronize(self) -> None:
        self._run_until(self._enqueued)
