"""The stateful face: rows that join and leave a running batch, and four verbs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esamp_core.base.atomic import whole
from esamp_core.base.checks import LOGIT_DTYPES, check_hashables, check_logits, check_tensor, is_int, require
from esamp_core.base.config import DistillerConfig, FilterOrder, SamplingParams, check_options
from esamp_core.base.errors import ArgumentError, StateError
from esamp_core.base.seeds import request_seeds
from esamp_core.base.tensors import Branch, Distilled, Draw, Head, RowParams
from esamp_core.explorer.bank import DistillerBank
from esamp_core.explorer.learned import Learned, settle
from esamp_core.explorer.learner import Learner
from esamp_core.explorer.ledger import LARGEST_INDEX, Ledger, OnFull, verb
from esamp_core.explorer.rows import Rows
from esamp_core.explorer.siblings import distinct_sets
from esamp_core.explorer.start import check_start
from esamp_core.explorer.steps import Steps
from esamp_core.explorer.streams import Lane, default_lane
from esamp_core.ops import backend_name, warm_up
from esamp_core.ops.arguments import check_mixed_out
from esamp_core.ops.siblings import draw_children, taken
from esamp_core.reference import grow


class Explorer(Learned):
    """Exploratory sampling for a running batch: ``open``, then ``predict``, ``sample``, ``learn`` every step.

    Engines that sample themselves call ``mix`` instead of ``sample``: before their head.

    head: the model's output head; its device is the Explorer's.  None: nothing is drawn here, states are only mixed.
    hidden_size: H of the shallow and deep hidden states.
    config: the Distiller and its learning rule.
    max_groups: Distiller slots, S.  max_rows: most rows open at once.
    max_candidates: C, tokens scored per row, 1..1024; the others keep their own logit.
    filter_order: "transformers" or "vllm", see ``select_candidates``.
    neutral: novelty in ``sample`` without its regression on the logits, see ``reweight``; ``mix`` has no such form.
    on_full: "error", or "evict" the least recently used idle group, when a new group finds no slot.
    lane: where learning runs; default a second CUDA stream, or in line on the CPU.
    device: the Explorer's, where there is no head.

    One thread at a time: a verb that meets another thread's raises StateError.  Every verb is all or nothing, whatever
    is raised in it (docs/semantics.md).  Needs grad mode nowhere, but not ``torch.inference_mode``: weights are updated
    in place.
    """

    def __init__(
        self,
        head: Head | None,
        hidden_size: int,
        config: DistillerConfig | None = None,
        *,
        max_groups: int = 256,
        max_rows: int = 1024,
        max_candidates: int = 256,
        filter_order: FilterOrder = "transformers",
        neutral: bool = False,
        on_full: OnFull = "error",
        lane: Lane | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        require(head is None or isinstance(head, Head), "head", "be a Head or None", type(head).__name__)
        self.config = config or DistillerConfig()
        if head is not None:
            require(head.hidden_size == hidden_size, "hidden_size", f"be the head's {head.hidden_size}", hidden_size)
            require(device is None, "device", "be left out with a head, which has its own", device)
            check_start(self.config, head.weight)
        else:
            require(device is not None, "device", "be given where there is no head", device)
            require(self.config.target == "deep", "head", 'be given for target "choice"', head)
        check_options(filter_order, max_candidates)
        require(isinstance(neutral, bool), "neutral", "be True or False", neutral)
        require(not (neutral and head is None), "neutral", "be False without a head: candidates alone have it", neutral)
        self.head, self.neutral, self.max_groups = head, neutral, max_groups
        self.max_rows, self.max_candidates, self.filter_order = max_rows, max_candidates, filter_order
        self._device = torch.empty(0, dtype=torch.int64, device=device).device if head is None else head.weight.device
        self.ledger = Ledger(max_groups, max_rows, on_full)
        """Who holds what: rows and slots."""
        self._bank = DistillerBank(hidden_size, self.config, max_groups, self._device)
        self._learner = Learner(self._bank, head, max_rows, lane or default_lane(self._device))
        self.ledger.settle = partial(settle, self._bank, self._learner)
        self._backend_name = backend_name(self._device)
        self._steps = Steps()

    def __repr__(self) -> str:
        bank, mib = self._bank, 2.0**-20
        return (
            f"Explorer(hidden_size={bank.hidden_size}, rank={self.config.rank}, target={self.config.target!r}, "
            f"{len(self.ledger.leases)}/{bank.slots} groups, {self.open_rows}/{self.max_rows} rows, "
            f"{bank.bytes_per_slot * mib:.2f} MiB per group, {bank.bytes_per_slot * bank.slots * mib:.0f} MiB "
            f"in all, backend={self._backend_name!r} on {self._device})"
        )

    @property
    def open_rows(self) -> int:
        """How many rows are open, of at most ``max_rows``."""
        return self.ledger.open_rows

    def alone(self) -> AbstractContextManager[None]:
        """A context in which this Explorer is this thread's: its verbs raise StateError in others.

        For a loop; a single verb is alone anyway.
        """
        return self.ledger.alone()

    def warm_up(self, dtype: torch.dtype = torch.float32) -> None:
        """Compile the kernels for logits [R, V] of this dtype now, instead of during the first steps.

        V is the head's; without a head it is the dtype of the deep states.  Without Triton there is nothing to do.
        Raises ArgumentError.
        """
        head = self._learner.head
        config = DistillerConfig() if self.config.published else self.config  # published ones have no kernels
        if head is not None:
            warm_up(head, config, max_candidates=self.max_candidates, dtype=dtype, neutral=self.neutral)
        else:
            require(dtype in LOGIT_DTYPES, "dtype", f"be one of {', '.join(map(str, LOGIT_DTYPES))}", dtype)
            self._learner.backend.warm_up_mixing(self._bank.hidden_size, config, dtype, self._device)

    @verb
    def open(
        self,
        groups: Sequence[Hashable | None],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sample_index: Sequence[int] | None = None,
        position: int | Sequence[int] = 0,
        retain: bool = False,
        sets: Sequence[Hashable | None] | None = None,
    ) -> Rows:
        """Start rows; siblings are the rows of one group.

        groups: a hashable per row; None is a row without a Distiller, sampled plainly.
        params: one :class:`SamplingParams` for all (default), or one per row.
        sample_index: a row's ordinal among its siblings, part of its seed; default counts on within the group.
        position: tokens drawn so far, to resume a row; one or one per row.  0 for stratified and distinct rows.
        retain: keep the group's Distiller when its last row ends, until it is evicted.
        sets: a hashable per row: stratified rows of one set divide their distributions among them, distinct ones
            (``SamplingParams(distinct=True)``, see ``branch``) draw without replacement; None is a row by itself.
            Default the groups.

        Returns :class:`Rows`: to be closed, or used as a context; rows that nobody holds any more are closed too.
        Raises ArgumentError, CapacityError; then nothing was opened.
        """
        groups = check_hashables("groups", groups)
        count = len(groups)
        per_row = [params or SamplingParams()] * count if not isinstance(params, Sequence) else list(params)
        columns = RowParams.of(per_row, count, self._device)
        positions = _indices("position", [position] * count if isinstance(position, int) else position, count)
        given = None if sample_index is None else _indices("sample_index", sample_index, count)
        named = groups if sets is None else check_hashables("sets", sets, count)
        if any((p.stratified or p.distinct) and at for p, at in zip(per_row, positions, strict=True)):
            raise ArgumentError(f"position must be 0 for stratified rows and distinct ones, got {position!r}")
        distinct = distinct_sets(per_row, named)
        if distinct and self.config.target != "deep":
            raise ArgumentError(f"params.distinct must be False with target {self.config.target!r}")
        seeds = request_seeds(groups, per_row)
        entries, books = self.ledger.opened(groups, per_row, given, seeds, retain, distinct)
        rows = Rows.new(self.ledger, entries, per_row, columns, seeds, positions, named, distinct, self._device)
        return self.ledger.stand(rows, books=books)

    @verb
    def close(self, rows: Rows) -> None:
        """End these rows.  Groups without rows give their slot back, unless they were opened with ``retain``.

        Enqueues what was staged and waits for the learning in flight; also right after an exception in a step.
        """
        self._check(rows)
        rows.check_replaceable()
        self.ledger.close(rows)

    def _check(self, rows: Rows) -> None:
        """Raises ArgumentError for another Explorer's rows, StateError for outdated ones."""
        require(isinstance(rows, Rows) and rows.ledger is self.ledger, "rows", "come from this Explorer's open", rows)
        rows.check_current()

    @verb
    def predict(self, shallow: Tensor, rows: Rows) -> None:
        """Predict the deep hidden states, on the second stream; returns at once.

        shallow: [R, H] float, the residual stream after an early block at the position being decoded.  It is copied,
        so the engine may overwrite it.  Raises ArgumentError, StateError (the step before was not learned).
        """
        self._check(rows)
        check_tensor("shallow", shallow, (len(rows), self._bank.hidden_size), self._device)
        if self._learner.learns:
            self._steps.check_learned()
        if rows.grouped:
            fresh, scale = self.ledger.books.fresh, self.ledger.books.scale
            mine = {row.slot: fresh[row.slot] for row in rows.entries if row.slot in fresh} if fresh else {}
            if scale is not None:
                self._learner.ready({}, scale)
            self._learner.predict(shallow.detach(), rows.row_groups, rows.slots, rows.active, mine)
            if mine or scale is not None:
                self.ledger.was_readied(mine)
        else:
            self._learner.flush()
        self._steps.begin(rows)

    @verb
    def prediction(self, rows: Rows) -> Tensor:
        """What the Distillers predict of the deep hidden states in this step: float32 [R, H], 0 in rows without one.

        Main waits for it, the host does not; valid until the next ``predict``.  Raises ArgumentError, StateError (no
        ``predict`` for these rows, or no deep state was learned yet from which its scale is known).
        """
        self._check(rows)
        if self._steps.of(rows) is None or not rows.grouped:
            raise StateError("prediction needs predict for these very rows first, in the same step")
        if not self._learner.scored:
            raise StateError("prediction needs a step learned before, or config.deep_scale: its scale is not known yet")
        return self._learner.prediction()

    @verb
    def distilled(self, rows: Rows) -> Distilled | None:
        """What this step, from ``predict`` to ``learn``, explores with; None: no row does.  Valid as ``prediction``."""
        if self._steps.of(rows) is None or not (rows.explores and self._learner.scored):
            return None
        return Distilled(self._learner.prediction(), self._learner.strength(rows.params.beta))

    @verb
    @torch.no_grad()
    def mix(self, deep: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
        """The deep hidden states with exploration in them, for the model's own head and any sampler.

        ``(1 + beta) * deep - beta * prediction``, see :func:`~esamp_core.sample.mix`.  Then ``learn`` with the same
        deep, which was not changed; ``sample`` in the same step draws from logits as they are.

        deep: [R, H] float32, bfloat16 or float16, the input of lm_head.  out: [R, H] of its dtype, other memory than
        deep's, to write into.
        Returns [R, H] in deep's dtype, bit-equal to deep in rows with beta 0, in those without a group or switched off,
        and in those whose mixed state is not finite, which ``rows.status`` flags; deep itself where no row explores
        and before the scale of predictions is known.  Raises ArgumentError, StateError (no ``predict`` for these rows).
        """
        self._check(rows)
        check_tensor("deep", deep, (len(rows), self._bank.hidden_size), self._device)
        require(deep.dtype in LOGIT_DTYPES, "deep", "be float32, bfloat16 or float16", deep.dtype)
        check_mixed_out(out, rows.status, deep)
        check_tensor("active", rows.active, (len(rows),), self._device, "bool")
        if self.config.target != "deep":
            raise StateError(f'mix needs Distillers of target "deep", these have {self.config.target!r}')
        self._steps.to_mix(rows)
        if rows.explores and self._learner.scored:
            mixed = self._learner.mix(deep.detach(), rows.params.beta, rows.active, out, rows.status)
        else:
            mixed = deep if out is None else out.copy_(deep)
        self._steps.mixed(rows)
        return mixed

    @verb
    @torch.no_grad()
    def sample(self, logits: Tensor, rows: Rows, *, model_logits: Tensor | None = None) -> Draw:
        """Draw one token per row and advance the rows' positions.

        logits: [R, V] as they are to be sampled, before temperature and filters.  model_logits: [R, V] the model's own
        where ``logits`` were edited (penalties, bans, grammars); novelty uses these, so that no edit is amplified.
        Where ``mix`` was called in this step the logits have exploration in them, and are drawn from as they are:
        novelty and kl are then 0, and base_logprob is that of the mixed model.
        Returns :class:`Draw`.  Raises ArgumentError, StateError (no ``predict`` for these rows, no head).
        """
        arguments = self._to_draw("sample", logits, rows, model_logits)
        if rows.families is not None:
            raise StateError("sample draws no distinct siblings, which change places: call branch")
        codes = rows.codes if rows.stratified else None
        draw = self._learner.backend.explore(logits, seed=rows.seeds, position=rows.positions, codes=codes, **arguments)
        self._drawn(rows, draw, rows.advance(draw.token_ids))
        return draw

    @verb
    @torch.no_grad()
    def branch(self, logits: Tensor, rows: Rows, *, model_logits: Tensor | None = None) -> Branch:
        """``sample`` for rows of which some are distinct siblings: each set of them is drawn without replacement.

        A row may be lost, and another go on in two (see ``grow``): **reorder the key-value cache, and all that you keep
        for each row, by** ``parent``.  A set begins in its first row; rows are switched on and off in place.  Switch a
        row off at its last token: what it holds stays while it is among the set's samples.  A set has ended when all of
        its rows are off; where ``rows.tree.perturbed`` is -inf the filters left nothing for a row.

        Returns :class:`Branch`.  The rest as for :meth:`sample`; ``learn`` takes the rows as they were before.
        """
        self._check(rows)
        if rows.families is None:
            draw = self.sample(logits, rows, model_logits=model_logits)
            return Branch(draw, torch.arange(len(rows), device=self._device))
        draw, children = draw_children(
            self._learner.backend, logits, width=rows.families.shape[1], codes=rows.codes if rows.stratified else None,
            seed=rows.seeds, position=rows.positions, **self._to_draw("branch", logits, rows, model_logits),
        )  # fmt: skip
        growth = grow(children, rows.tree, rows.families, rows.active, rows.seeds, rows.positions)
        draw = taken(growth, draw, children, logits, model_logits)
        self._drawn(rows, draw, rows.take(growth))
        return Branch(draw, growth.parent)

    def _to_draw(self, name: str, logits: Tensor, rows: Rows, model_logits: Tensor | None) -> dict[str, Any]:
        """What the draw's op takes beside logits, seeds and positions, everything checked."""
        self._check(rows)
        check_logits(logits, rows=len(rows), device=self._device)
        rows.check_tensors()
        step = self._steps.to_draw(name, rows)
        if model_logits is not None:
            check_logits(model_logits, "model_logits", logits)
        distilled = None if step is not None and step.done == "mixed" else self.distilled(rows)
        head = None if distilled is None else self._learner.head
        if distilled is not None and head is None:
            raise StateError(f"{name} needs a head to explore with, or mix first: this Explorer has none")
        if head is not None:
            head.check_covers(logits.shape[1])
        return {
            "params": rows.params if distilled is None else rows.params._replace(beta=distilled.strength),
            "direction": None if distilled is None else distilled.prediction,
            "head": head,
            "model_logits": model_logits,
            "model_weight": 0.0 if self.config.target == "choice" else 1.0,
            "neutral": self.neutral,
            "filter_order": self.filter_order,
            "max_candidates": self.max_candidates,
            "active": rows.active,
        }

    def _drawn(self, rows: Rows, draw: Draw, go_on: Callable[[], object]) -> None:
        """Commit a draw."""

        def commit() -> None:
            self._steps.sampled(rows, draw.token_ids)
            go_on()

        whole(commit)

    @verb
    def learn(self, deep: Tensor | None, rows: Rows, *, teaches: Tensor | None = None) -> None:
        """Stage this step's lesson; the next ``predict`` enqueues it.

        deep: [R, H] float, the input of lm_head at the same position; copied.  With target "choice" the drawn tokens
        teach instead, and deep may be None.  teaches: bool [R], rows that count, of those that were active at
        ``predict``; default all.  For speculative decoding, where it is known only now which drafts were accepted.
        Raises ArgumentError, StateError (no ``predict`` for these rows).
        """
        self._check(rows)
        step = self._steps.to_learn(rows, from_choice=self.config.target == "choice")
        if teaches is not None:
            check_tensor("teaches", teaches, (len(rows),), self._device, "bool")
        target = deep
        if self.config.target == "choice":
            target = step.drawn
        else:
            check_tensor("deep", deep, (len(rows), self._bank.hidden_size), self._device)
        assert target is not None
        if self._learner.learns and rows.grouped:
            self._learner.stage(target.detach(), teaches)
        self._steps.now = None

    @verb
    def flush(self) -> None:
        """Enqueue what ``learn`` has staged now, not at the next ``predict``: the same, bit for bit.  Returns at once.

        For engines that only call ``predict`` when the forward is over: learning then runs beside the next forward.
        """
        self._learner.flush()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """For verbs that are captured and not run: afterwards nothing was predicted, drawn or staged by them."""
        before = self._steps.now
        try:
            with self._learner.recording():
                yield
        finally:
            self._steps.now = before

    @property
    def step_state(self) -> tuple[object, ...]:
        """What the host knows and a step depends on: a captured step may be replayed while it is what it was then."""
        return self._steps.now is None, *self._learner.host_state


def _indices(name: str, values: Sequence[int], count: int) -> list[int]:
    fits = isinstance(values, Sequence) and len(values) == count
    if not (fits and all(is_int(v) and 0 <= v < LARGEST_INDEX for v in values)):
        raise ArgumentError(f"{name} must be {count} integers in 0..2^62-1, one per row, got {values!r}")
    return list(values)
