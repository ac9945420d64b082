"""A decode step as one CUDA graph: captured once per wave of a static batch, replayed for its later steps.

A replay repeats the device work that one step enqueued, on the same memory; it runs no Python.  So a step may be
captured if everything that changes from step to step lies in device tensors that it updates in place: tokens,
positions, the active mask, the cache and its length, the Distillers.  What the host knows and a step depends on is
compared: the cache's counters before and after a rehearsal, the Explorer's state before every replay.

A wave's first decode step is the rehearsal: it compiles kernels, allocates workspaces, and tells whether the host
waits for the device.  The second is captured.  A capture costs the host about as much as an eager step, so every wave
has its own graph, of its own rows; rows that finish stay and are masked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

from esamp_core.base.errors import ArgumentError, UnsupportedModelError
from esamp_core.decoder.batch import Step
from esamp_core.decoder.kv_cache import host_state
from esamp_core.explorer import Explorer

GraphMode = bool | Literal["auto"]


class StepGraph(Protocol):
    """The device work of one step, recorded once and repeated."""

    def rehearse(self, step: Callable[[], None]) -> str | None:
        """Run the step where it will be captured.  Returns why it cannot be captured, if that shows."""

    def capture(self, step: Callable[[], None]) -> None:
        """Record the step's device work instead of running it.  Raises where that is impossible."""

    def replay(self) -> None:
        """Enqueue what was recorded."""


class CudaGraph:
    """A CUDA graph and the stream that it is captured on.  Its memory lives as long as it does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Of high priority: the learner's second stream has the lowest, so that learning gives way to the model.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._graph = torch.cuda.CUDAGraph()

    def rehearse(self, step: Callable[[], None]) -> str | None:
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        before = torch.cuda.get_sync_debug_mode()
        # A step that waits would break the capture, and a broken capture leaves torch's allocator in a worse state
        # than one that was never begun.
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(self._stream):
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
            main.wait_stream(self._stream)
        waits = False
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                waits = True
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return "a step of this model waits for the device" if waits else None

    def capture(self, step: Callable[[], None]) -> None:
        main = torch.cuda.current_stream(self._device)
        try:
            # Other threads may go on allocating; this one may not.
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                step()
        finally:
            torch.cuda.set_stream(main)  # a capture that fails while it ends leaves its own stream behind

    def replay(self) -> None:
        self._graph.replay()


def step_graph(device: torch.device) -> StepGraph | None:
    """A fresh graph, or None where there is none."""
    return CudaGraph(device) if device.type == "cuda" else None


class GraphPolicy:
    """Whether a model's steps are captured: as asked for, until a reason not to is found; then it says so, once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mode: GraphMode = "auto"
        self._refused = False

    def ask(self, mode: GraphMode) -> None:
        """For the waves to come.  Raises ArgumentError for True where there are no graphs."""
        if mode is True and step_graph(self._device) is None:
            raise ArgumentError(f"graph=True needs a model on CUDA, got one on {self._device}")
        self._mode = mode

    def graph(self) -> StepGraph | None:
        """A graph for a new wave, or None."""
        wanted = self._mode is True or (self._mode == "auto" and not self._refused)
        return step_graph(self._device) if wanted else None

    def refuse(self, reason: str) -> None:
        """Raises UnsupportedModelError if a graph was asked for; else warns, and no more are made by themselves."""
        self._refused = True
        if self._mode is True:
            raise UnsupportedModelError(f"graph=True, but the decode step cannot be captured: {reason}")
        warnings.warn(f"decode steps run without a CUDA graph: {reason}", stacklevel=2)


class WaveSteps:
    """The decode steps of one wave: one rehearsed, one captured, the others replayed; or all of them eager."""

    def __init__(self, step: Callable[[], Step], cache: Any, explorer: Explorer, policy: GraphPolicy) -> None:
        self._step, self._cache, self._explorer, self._policy = step, cache, explorer, policy
        self._graph = policy.graph()
        self._steady: tuple[object, ...] | None = None  # the Explorer's state between two of these steps
        self._captured = False
        self._result: Step | None = None

    def run(self) -> Step:
        """Enqueue one step.  With a graph the returned tensors are overwritten by the next one."""
        if self._graph is None:
            return self._step()
        if self._steady is None:
            return self._rehearse(self._graph)
        # stats() between two steps, for one, has already enqueued the learning that a replay would begin with.
        if self._explorer.step_state != self._steady:
            return self._step()
        if not self._captured and not self._capture(self._graph):
            return self._step()
        self._graph.replay()
        assert self._result is not None
        return self._result

    def _once(self) -> None:
        self._result = self._step()

    def _rehearse(self, graph: StepGraph) -> Step:
        before = host_state(self._cache)
        reason = graph.rehearse(self._once)
        after = host_state(self._cache)
        changed = [name for name in after if after[name] != before.get(name)]
        if changed:
            reason = f"{changed[0]} changes on the host"
        if reason is not None:
            self._refuse(reason)
        self._steady = self._explorer.step_state
        assert self._result is not None
        return self._result

    def _capture(self, graph: StepGraph) -> bool:
        try:
            with self._explorer.recording():
                graph.capture(self._once)
                if self._explorer.step_state != self._steady:
                    raise RuntimeError("the Explorer's state is another after the step")
        except Exception as error:  # the eager step, which comes next, raises what is not the capture's fault
            self._refuse(_first_cause(error))
            return False
        self._captured = True
        return True

    def _refuse(self, reason: str) -> None:
        self._graph = None
        self._policy.refuse(reason)


def _first_cause(error: BaseException) -> str:
    """What went wrong first: ending a broken capture raises again."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
