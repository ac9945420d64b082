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
- activations, copies of the row groups and of the mask, scratch: owned by the second stream; predict(t) writes them,
  learn(t) reads them.  Main may free its Rows while learning still reads them: hence the copies.
- ``pred``, one of the activations, and ``trust``: written by predict(t), read by main between its wait and the next
  predict's publish; learn does not read them.
- ``mean``, ``rstd`` and ``pred`` where there is no head to score candidates with: predict(t) leaves them to main, which
  writes them after that wait (in mix, or else in prediction or stage); learn(t) stands behind the next publish.
- ``target``: written by main after waiting for predict(t), which stands behind learn(t-1), its last reader.  So is
  ``teaches``, where it becomes known only after the step which rows count.

A whole step may be captured in a CUDA graph and replayed, because what a step leaves for the next lies where it always
lay, in buffers for max_rows of which R rows are used.  Row groups are copied when they change, behind learn(t-1) of the
rows before; so the first step of new rows runs eagerly, and a captured step finds them in place.  Capture runs nothing,
and it must not look across its own edge:

- main waits for a prediction once.  The wait that opens predict(t) is thus behind it already, in the step before:
  stage(t-1), or prediction(t-1) where nothing is learned, has waited for the same mark;
- ``publish`` forks the second stream off main; the wait of prediction(t) or stage(t) joins it: the mark stands behind
  all work of the step;
- a step that begins with something staged ends so, for the same rows: ``host_state`` is what it was.  While it is, a
  replay does what the eager step would do.  Else (``flush`` enqueued the learning, say) an eager step must come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from esamp_core.base.errors import StateError
from esamp_core.base.tensors import Activations, Head, RowGroups
from esamp_core.explorer.bank import DistillerBank
from esamp_core.explorer.streams import Lane
from esamp_core.ops import DistillerOps, backend
from esamp_core.reference.published import Published


@dataclass
class _Host:
    """What the host knows of the work it has enqueued."""

    source: RowGroups | None = None  # whose copy the second stream has; not freed before it has it
    rows: int = 0  # of the latest predict
    normed: bool = False  # whether its LayerNorm is done: mean and rstd are known
    predicted: bool = False  # and pred
    staged: bool = False
    joined: bool = True  # main has waited for the latest mark
    scale_known: bool = False
    scored: bool = False  # whether the latest prediction is in known units


class Learner:
    """The Distillers at work: predict, stage, learn.  All device memory that a step needs is here, for max_rows rows.

    About 28 H bytes per row, 0.11 MB for H = 3584 and r = 64: 20 H for taps, activations and target; the rest is
    scratch, which PyTorch's backend does without.
    """

    def __init__(self, bank: DistillerBank, head: Head | None, max_rows: int, lane: Lane) -> None:
        """head: None where predictions are mixed; the forward's LayerNorm is then left to mix."""
        self._bank, self._config, self._lane = bank, bank.config, lane
        self.head = head.centred() if head is not None and self._config.target == "choice" else head
        device, hidden, groups = bank.scale.device, bank.hidden_size, min(max_rows, bank.slots)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Written by main.
        self._shallow, self._active = zeros(max_rows, hidden), zeros(max_rows, dtype=torch.bool)
        by_tokens = self._config.target == "choice"
        self._target = zeros(max_rows, dtype=torch.int64) if by_tokens else zeros(max_rows, hidden)
        # Written by the second stream.
        self._kept = Activations.empty(max_rows, hidden, self._config.rank, device)
        self._teaches = zeros(max_rows, dtype=torch.bool)
        self._groups = RowGroups(*(zeros(n, dtype=torch.int32) for n in (max_rows, groups, groups + 1)))
        self._slots, self._trust = zeros(max_rows, dtype=torch.int64), zeros(max_rows)
        self.backend = backend(device)
        """Chosen here, once: what it needs of scratch depends on it."""
        self._ops: DistillerOps = Published(self._config) if self._config.published else self.backend
        self._scratch = self._ops.distiller_scratch(bank.state.weights, max_rows)
        self._host = _Host(scale_known=by_tokens or self._config.published or self._config.deep_scale is not None)

    @property
    def learns(self) -> bool:
        return self._config.lr > 0

    @property
    def scored(self) -> bool:
        """Whether the latest prediction is in known units, so that candidates can be scored by it."""
        return self._host.scored

    @contextmanager
    def recording(self) -> Iterator[None]:
        """For work that is captured and not run: the host afterwards knows what it knew before."""
        before = replace(self._host)
        try:
            yield
        finally:
            self._host = before

    @property
    def host_state(self) -> tuple[object, ...]:
        """What the host knows and a step depends on: a captured step may be replayed while it is the same."""
        return self._host.staged, self._host.joined, self._host.scored, self._host.rows, id(self._host.source)

    def predict(
        self,
        shallow: Tensor,
        groups: RowGroups,
        slots: Tensor,
        active: Tensor,
        fresh: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """Enqueue learn of the step before, then the prediction of this one.

        shallow [R, H], active bool [R], slots int64 [R], -1 for none.  fresh: slots that must first start afresh, and
        their seeds.

        Raises StateError in a capture, if the step before was not one that a replay could repeat.
        """
        if not (self.learns or self._host.scale_known):
            self.ready(fresh, None)
            return  # frozen, and in units that stay unknown: no prediction is read
        self._check_capture(groups)
        rows = shallow.shape[0]
        self._wait()
        self._lane.stage(self._shallow[:rows], shallow)
        self._lane.stage(self._active[:rows], active)
        self._lane.publish()
        try:
            self._enqueue_learn()
            self._enqueue_resets(fresh)
            if self._host.source is not groups:
                self._lane.run(lambda: self._copy_groups(groups, slots))
                self._host.source = groups
            self._host.scored, self._host.rows = self._host.scale_known, rows
            self._host.normed = self._host.predicted = self.head is not None
            self._lane.run(lambda: self._forward(rows), writes=(self._kept.pred, self._trust))
        finally:  # also after an interrupt main must wait for what was enqueued
            self._host.joined = False
            self._lane.mark()

    def prediction(self) -> Tensor:
        """float32 [R, H]: main waits for the latest predict.  Valid until the next one."""
        self._wait()
        if not self._host.predicted:
            self._norm()
        return self._kept.pred[: self._host.rows]

    def strength(self, beta: Tensor) -> Tensor:
        """float32 [R]: beta, scaled by how far each row's Distiller is trusted in the latest prediction."""
        if not self._config.gated:
            return beta
        self._wait()
        return beta * self._trust[: self._host.rows]

    def mix(self, deep: Tensor, beta: Tensor, active: Tensor, out: Tensor | None, status: Tensor) -> Tensor:
        """The latest prediction mixed into deep [R, H]; flags are added to status int32 [R]."""
        self._wait()
        kept, groups, _ = self._first(self._host.rows)
        strength = self.strength(beta)
        mixed = self._ops.mix(
            deep,
            kept,
            groups,
            self._bank.state.weights,
            self._bank.scale,
            strength,
            active=active,
            out=out,
            status=status,
        )
        self._host.normed = True
        return mixed.hidden

    def stage(self, target: Tensor, teaches: Tensor | None = None) -> None:
        """Keep this step's target for learning: [R, H] deep hidden states, or int64 [R] drawn tokens.

        teaches: bool [R], rows that count, of those that were active.
        """
        self._wait()
        if not self._host.normed:
            self._norm()
        rows = self._host.rows
        self._lane.stage(self._target[:rows], target)
        if teaches is not None:
            self._teaches[:rows].logical_and_(teaches)
        self._host.staged = True

    @torch.no_grad()
    def _norm(self) -> None:
        """The LayerNorm of the latest prediction, which predict left out.  Main has waited."""
        kept, groups, _ = self._first(self._host.rows)
        self._ops.distiller_norm_(kept, groups, self._bank.state.weights, self._bank.scale)
        self._host.normed = self._host.predicted = True

    def flush(self) -> None:
        """Enqueue what is staged, now."""
        if self._host.staged:
            self._lane.publish()
            self._enqueue_learn()

    def ready(self, fresh: Mapping[int, int], scale: Tensor | None) -> None:
        """Start slots afresh, with these seeds, behind everything enqueued for their last holders.

        scale: one that was loaded, NaN where it was not known.  Captures nothing, and may be done again.
        """
        if scale is not None and not bool(torch.isnan(scale)):
            self._bank.scale.copy_(scale)
            self._host.scale_known = True
        if fresh:
            self._lane.publish()  # main may have replayed steps of their last holders
            self._enqueue_learn()
            self._enqueue_resets(fresh)

    def _enqueue_resets(self, fresh: Mapping[int, int]) -> None:
        for slot, seed in fresh.items():
            self._lane.run(partial(self._bank.reset, slot, seed))

    def synchronize(self) -> None:
        """Flush, and let the host wait until all learning is done."""
        self._lane.publish()  # replayed steps are main's work
        self._enqueue_learn()
        self._lane.synchronize()

    def _wait(self) -> None:
        if not self._host.joined:
            self._lane.wait()
            self._host.joined = True

    @property
    def _captured(self) -> bool:
        """Whether what main does now is recorded, to be replayed."""
        return self._shallow.is_cuda and torch.cuda.is_current_stream_capturing()

    def _check_capture(self, groups: RowGroups) -> None:
        if self._captured:
            if self._config.published:
                raise StateError(f"a step with recipe={self._config.recipe!r} cannot be captured: plain PyTorch waits")
            ready = self._host.joined and self._host.source is groups and self._host.scale_known
            if not (ready and self._host.staged == self.learns):
                raise StateError("a step can be captured only after a whole step, learn included, of the same rows")

    @torch.no_grad()
    def _copy_groups(self, groups: RowGroups, slots: Tensor) -> None:
        for mine, theirs in zip(self._groups, groups, strict=True):
            mine[: theirs.shape[0]].copy_(theirs)
        self._slots[: slots.shape[0]].copy_(slots.clamp_min(0))  # rows without a slot have beta 0

    def _first(self, rows: int) -> tuple[Activations, RowGroups, Tensor]:
        """What the second stream has of so many rows: activations, groups, and the mask."""
        groups = min(rows, self._bank.slots)
        order, slots, offsets = self._groups
        return (
            Activations(*(field[:rows] for field in self._kept)),
            RowGroups(order[:rows], slots[:groups], offsets[: groups + 1]),
            self._teaches[:rows],
        )

    @torch.no_grad()
    def _forward(self, rows: int) -> None:
        kept, groups, teaches = self._first(rows)
        teaches.copy_(self._active[:rows])
        weights, scale = self._bank.state.weights, self._bank.scale
        if self._config.gated:
            torch.index_select(self._bank.gauge.trust, 0, self._slots[:rows], out=self._trust[:rows])
        shallow, norm = self._shallow[:rows], self.head is not None
        self._ops.distiller_forward(shallow, groups, weights, scale, out=kept, scratch=self._scratch, norm=norm)

    def _enqueue_learn(self) -> None:
        if self._host.staged:
            self._host.staged = False
            measure, rows = not self._host.scale_known, self._host.rows
            self._host.scale_known = True
            self._lane.run(lambda: self._learn(rows, measure))

    @torch.no_grad()
    def _learn(self, rows: int, measure: bool) -> None:
        kept, groups, teaches = self._first(rows)
        target, state, scale = self._target[:rows], self._bank.state, self._bank.scale
        if measure:
            self._bank.measure_scale(target, teaches & (kept.rstd > 0))
        head = self.head if self._config.target == "choice" else None
        if self._config.gated:
            self._ops.gauge_(
                self._bank.gauge, kept, target, groups, state.weights, scale, active=teaches, scratch=self._scratch
            )
        self._ops.distiller_step_(
            state, kept, target, groups, scale, self._config, head=head, active=teaches, scratch=self._scratch
        )
