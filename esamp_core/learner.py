"""Learning beside the model: one second stream, and the order of work on it.

::

    main    | embed, block 1 --shallow--> blocks 2..L, head --> logits | wait(pred), sample | stage deep
    second  |   learn(t-1) ---wait(shallow)--> predict(t) --mark(pred)      |

``learn`` only stages its target; the next ``predict`` enqueues learn(t-1) and then predict(t), in order, on ONE second
stream.  The same rule holds on CUDA, under graph capture and on the CPU, so the result is that of the serial run, bit
for bit, whatever the timing.

Who may touch what, and why no buffer needs a twin:

- ``shallow``, ``active``: written by main in predict(t), read by the second stream in predict(t) only.  Main waits for
  predict(t-1) before it writes again.
- activations, copies of their rows and mask: owned by the second stream; predict(t) writes them, learn(t) reads them.
- ``pred``: written by predict(t), read by main between its wait and the next predict's publish.
- ``target``: written by main after waiting for predict(t), which stands behind learn(t-1), its last reader.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from esamp_core import ops
from esamp_core.config import DistillerConfig
from esamp_core.distiller import DistillerBank
from esamp_core.structures import Activations, Head, RowGroups


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


class Learner:
    """The Distillers at work: predict, stage, learn.  All device memory that lives longer than a step is here."""

    def __init__(self, bank: DistillerBank, head: Head, max_rows: int, lane: Lane) -> None:
        self._bank, self._config, self._lane = bank, bank.config, lane
        self.head = head.centred() if self._config.target == "choice" else head
        device, hidden = bank.scale.device, bank.hidden_size
        self._shallow = torch.zeros(max_rows, hidden, device=device)
        self._active = torch.zeros(max_rows, dtype=torch.bool, device=device)
        self._pred = torch.zeros(max_rows, hidden, device=device)
        if self._config.target == "choice":
            self._target = torch.zeros(max_rows, dtype=torch.int64, device=device)
        else:
            self._target = torch.zeros(max_rows, hidden, device=device)
        self._saved: tuple[Activations, RowGroups, Tensor] | None = None
        self._groups: tuple[RowGroups, RowGroups] | None = None  # of main, and the second stream's copy
        self._rows = 0  # of the latest predict
        self._staged = False
        self._scale_known = self._config.target == "choice" or self._config.deep_scale is not None
        self.scored = False  # whether the latest prediction is in known units

    @property
    def learns(self) -> bool:
        return self._config.lr > 0

    def predict(self, shallow: Tensor, groups: RowGroups, active: Tensor) -> None:
        """Enqueue learn of the step before, then the prediction of this one.  shallow [R, H], active bool [R]."""
        self._rows = rows = shallow.shape[0]
        self._lane.wait()
        self._lane.stage(self._shallow[:rows], shallow)
        self._lane.stage(self._active[:rows], active)
        self._lane.publish()
        self._enqueue_learn()
        self.scored = self._scale_known
        self._lane.run(lambda: self._forward(rows, groups), writes=(self._pred,))
        self._lane.mark()

    def prediction(self) -> Tensor:
        """float32 [R, H]: main waits for the latest predict.  Valid until the next one."""
        self._lane.wait()
        return self._pred[: self._rows]

    def stage(self, target: Tensor) -> None:
        """Keep this step's target for learning: [R, H] deep hidden states, or int64 [R] drawn tokens."""
        self._lane.wait()
        self._lane.stage(self._target[: self._rows], target)
        self._staged = True

    def flush(self) -> None:
        """Enqueue what is staged, now."""
        if self._staged:
            self._lane.publish()
            self._enqueue_learn()

    def reset(self, slot: int, seed: int) -> None:
        """Start a slot afresh, behind everything enqueued for its last holder."""
        self.flush()
        self._lane.run(lambda: self._bank.reset(slot, seed))

    def synchronize(self) -> None:
        """Flush, and let the host wait until all learning is done."""
        self.flush()
        self._lane.synchronize()

    def scale_loaded(self) -> None:
        """The bank's scale was loaded from a saved state."""
        self._scale_known = True

    @torch.no_grad()  # the head may be a parameter that requires grad
    def _forward(self, rows: int, groups: RowGroups) -> None:
        # Main may free its Rows while learning still reads them, and reuse their memory at once: keep a copy here.
        if self._groups is None or self._groups[0] is not groups:
            self._groups = (groups, RowGroups(*(t.clone() for t in groups)))
        groups = self._groups[1]
        active = self._active[:rows].clone()
        saved = ops.distiller_forward(self._shallow[:rows], groups, self._bank.state.weights, self._bank.scale)
        self._pred[:rows].copy_(saved.pred)
        self._saved = (saved, groups, active)

    def _enqueue_learn(self) -> None:
        if self._staged:
            self._staged = False
            measure = not self._scale_known
            self._scale_known = True
            self._lane.run(lambda: self._learn(measure))

    @torch.no_grad()
    def _learn(self, measure: bool) -> None:
        assert self._saved is not None
        activations, groups, active = self._saved
        target = self._target[: active.shape[0]]
        if self._config.target == "choice":
            active = active & (target >= 0)
            target = token_targets(self.head, target)
        elif measure:
            self._bank.measure_scale(target, active & (activations.rstd > 0))
        step: DistillerConfig = self._config
        ops.distiller_step_(self._bank.state, activations, target, groups, self._bank.scale, step, active=active)


def token_targets(head: Head, token_ids: Tensor) -> Tensor:
    """float32 [R, H]: the centred, scaled head rows of drawn tokens; what the choice-Distiller learns to predict."""
    assert head.center is not None
    rows = head.weight[token_ids.clamp(0, head.vocab_size - 1)].float()
    return (rows - head.center) * head.scale
