"""Where learning runs: a second CUDA stream beside the caller's, or in line on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """A second queue of device work beside the caller's own (main)."""

    def stage(self, buffer: Tensor, value: Tensor) -> None:
        """Main copies value into a buffer that the lane will read."""

    def publish(self) -> None:
        """Work enqueued from now on sees everything that main has written so far."""

    def run(self, work: Callable[[], None], writes: tuple[Tensor, ...] = ()) -> None:
        """Enqueue work; ``writes`` are buffers that main may read once it has waited for the work."""

    def mark(self) -> None:
        """Remember this point of the queue."""

    def wait(self) -> None:
        """Main waits until the lane has reached the latest mark."""

    def synchronize(self) -> None:
        """The host waits until everything enqueued is done."""


class SerialLane:
    """No second queue: work runs when it is enqueued.  The CPU's lane."""

    def stage(self, buffer: Tensor, value: Tensor) -> None:
        buffer.copy_(value)

    def publish(self) -> None:
        pass

    def run(self, work: Callable[[], None], writes: tuple[Tensor, ...] = ()) -> None:
        work()

    def mark(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CudaLane:
    """One low-priority CUDA stream.  The host never waits except in ``synchronize``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=0)  # type: ignore[no-untyped-call]
        self._published = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._marked = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def stage(self, buffer: Tensor, value: Tensor) -> None:
        buffer.copy_(value)

    def publish(self) -> None:
        self._published.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(self._published)

    def run(self, work: Callable[[], None], writes: tuple[Tensor, ...] = ()) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> None:
        self._marked.record(self._stream)

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._marked)

    def synchronize(self) -> None:
        self._stream.synchronize()


def default_lane(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else SerialLane()
