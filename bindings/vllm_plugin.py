"""Exploratory sampling inside vLLM, unpatched.

    vllm serve MODEL --logits-processors esamp_core.bindings.vllm_plugin:ExploratoryProcessor \\
        --additional-config '{"esamp": {}}'

    SamplingParams(temperature=0.8, extra_args={"esamp": {"group": "problem 7", "beta": 0.1}})

The model is tapped by ``vllm_models``, this logits processor draws with :class:`~esamp_core.sample.Explorer`, and
returns logits of 0 for the drawn token and -inf elsewhere: whatever the engine does afterwards has one token to choose
from.  Requests without ``extra_args["esamp"]``, and those whose beta is 0, are left to the engine.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from esamp_core.base.errors import CapacityError, UnsupportedModelError
from esamp_core.base.tensors import Draw
from esamp_core.bindings.vllm_config import PluginConfig, RequestParams, check_engine, read_request
from esamp_core.bindings.vllm_models import TappedRows, is_registered, tap_of
from esamp_core.bindings.vllm_report import Report
from esamp_core.explorer import Explorer, Rows

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError:  # a vLLM without the V2 model runner
    LogitsProcessorV2 = object

logger = init_logger("vllm.esamp")


@dataclass(eq=False)
class Request:
    """A request that explores, while the engine holds it.  One that was preempted comes back as another Request."""

    asked: RequestParams
    seed: int
    prompt_length: int
    drawn_before: int  # output tokens from before a preemption; they are fed again without being drawn again
    read_prompt: Callable[[], Sequence[int]]
    untouched: bool = False  # found no Distiller slot: left to the engine to its end

    def group(self) -> Hashable:
        """Which requests share a Distiller; by default those with the same prompt."""
        if self.asked.group is not None:
            return self.asked.group
        return hashlib.blake2b(array("q", self.read_prompt()).tobytes(), digest_size=16).digest()


class ExploratoryProcessor(LogitsProcessor, LogitsProcessorV2):
    """Draws the tokens of requests that ask to explore.  Satisfies the interfaces of both model runners.

    Groups live while any of their requests overlap with others that explore: when no exploring request of the step
    before is left, all groups start afresh, so that nothing is carried from one batch of work to the next.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ArgumentError, a ValueError, which fails the request alone."""
        read_request(sampling_params)

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        check_engine(vllm_config)
        architecture = vllm_config.model_config.architecture
        if not is_registered(architecture):
            raise UnsupportedModelError(
                f"esamp has no tap for architecture {architecture}: only text-generation models have one, and the "
                "plugin `esamp` of the group vllm.general_plugins must be loaded (see VLLM_PLUGINS)"
            )
        self._config = PluginConfig.read(vllm_config)
        self._tap = tap_of(vllm_config)
        self._engine_seed = vllm_config.model_config.seed
        self._v2_state: Any = rest[0] if len(rest) == 1 else None  # V1 is given the device and whether memory is pinned
        self._requests: dict[int, Request] = {}  # by the engine's row (V1) or slot (V2)
        self._joined = 0
        self._batch = _Batch(self._config.max_groups)
        self._report = Report(self._config, _is_first_rank)
        self._placed: tuple[list[int], int] = [], 0  # where our rows are in how many of the engine's
        self._index: Tensor | None = None  # the same on the device, None if ours are all, in order
        self._broken = False

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: requests that joined, left and moved since the step before."""
        if batch_update is None:
            return
        requests = self._requests
        for row in batch_update.removed:
            requests.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            # Without the prompt's tokens (embeddings were given) it is not known where the row stands.
            asked = None if prompt is None else read_request(params, self._config.beta)
            requests.pop(row, None)
            if asked is not None:
                requests[row] = self._request(asked, len(prompt), len(output), partial(list, prompt))
        for source, target, direction in batch_update.moved:
            moving, other = requests.pop(source, None), requests.pop(target, None)
            if moving is not None:
                requests[target] = moving
            if other is not None and direction == MoveDirectionality.SWAP:
                requests[source] = other
        self._mark_edited()

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request joined in a slot, whose last holder is gone."""
        self._requests.pop(req_idx, None)
        asked = read_request(sampling_params, self._config.beta)
        if asked is not None:
            state = self._v2_state
            prompt_length, fed = int(state.prompt_len.np[req_idx]), int(state.prefill_len.np[req_idx])

            def read_prompt() -> Sequence[int]:
                tokens: list[int] = state.all_token_ids.gpu[req_idx, :prompt_length].tolist()
                return tokens

            self._requests[req_idx] = self._request(asked, prompt_length, fed - prompt_length, read_prompt)
        self._mark_edited()
        return asked is not None

    def _request(
        self, asked: RequestParams, prompt_length: int, drawn: int, read_prompt: Callable[[], Sequence[int]]
    ) -> Request:
        seed = asked.params.seed
        if seed is None:
            # As vLLM's own, from the engine's seed; and the same on every tensor-parallel rank.
            text = f"{self._engine_seed} {self._joined}".encode()
            seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        self._joined += 1
        return Request(asked, seed, prompt_length, drawn, read_prompt)

    def _mark_edited(self) -> None:
        self._tap.copy_logits = any(request.asked.edited for request in self._requests.values())

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Draw for the rows that explore.  ctx: the V2 runner's layout of the batch."""
        tapped, self._tap.rows = self._tap.rows, None
        places = range(logits.shape[0]) if ctx is None else ctx.idx_mapping_np.tolist()
        present = {self._requests[p]: row for row, p in enumerate(places) if p in self._requests}
        if self._broken:
            self._report.untouched(len(present))
            return logits
        try:
            self._step(logits, tapped, present)
        except Exception:
            # An error here must not take the engine and everybody's requests with it.
            logger.exception("esamp: a step failed; exploration is off until the engine is restarted")
            self._broken = True
        return logits

    def _step(self, logits: Tensor, tapped: TappedRows | None, present: dict[Request, int]) -> None:
        explorer = self._tap.explorer
        if tapped is None or explorer is None or tapped.deep.shape[0] != logits.shape[0]:
            self._report.no_tap(len(present))
            return
        # The engine runs under inference mode, whose tensors cannot be updated outside it; the Distillers are.
        with torch.inference_mode(False), torch.no_grad():
            self._batch.update(explorer, present, self._report)
            places = [present[request] for request in self._batch.requests]
            if (places, len(logits)) != self._placed:
                self._placed = places, len(logits)
                whole = places == list(range(len(logits)))
                self._index = None if whole else torch.tensor(places, device=logits.device)
            index = self._index
            draw = self._draw(explorer, logits, tapped, index) if places else None
        if draw is not None:
            _leave_only(logits, index, draw.token_ids)
            self._report.draw(draw)
        self._report.step(explorer)

    def _draw(self, explorer: Explorer, logits: Tensor, tapped: TappedRows, index: Tensor | None) -> Draw:
        """index: the engine's row of each of ours, None if all are the same."""
        batch = self._batch
        assert batch.rows is not None
        fed = _at(tapped.position, index) + 1
        # Counted by the model's own positions, so a row that comes back after a preemption goes on where it was.
        batch.rows.positions.copy_(fed - batch.prompt_length)
        # A row that is still being prefilled is in the batch too; the engine throws its token away.
        batch.rows.active.copy_(fed >= batch.first_draw)
        model_logits = None if tapped.logits is None else _at(tapped.logits, index)
        explorer.predict(_at(tapped.shallow, index), batch.rows)
        draw = explorer.sample(_at(logits, index), batch.rows, model_logits=model_logits)
        explorer.learn(_at(tapped.deep, index), batch.rows)
        explorer.flush()  # the next predict comes after the next forward, beside which this is to be learned
        return draw


def _leave_only(logits: Tensor, index: Tensor | None, token_ids: Tensor) -> None:
    """In place: 0 for the drawn token of each row and -inf elsewhere; rows without a token (-1) stay as they are."""
    rows = torch.arange(len(token_ids), device=logits.device) if index is None else index
    drawn, tokens = token_ids >= 0, token_ids.clamp_min(0)
    own = logits[rows, tokens]
    mask = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    mask[rows] = drawn
    logits.masked_fill_(mask[:, None], float("-inf"))
    logits[rows, tokens] = torch.where(drawn, 0.0, own)


def _at(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor[index]


def _is_first_rank() -> bool:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank()) == 0


class _Batch:
    """The requests that are drawn for at present, and the Explorer's rows for them, in the same order."""

    def __init__(self, max_groups: int) -> None:
        self._max_groups = max_groups
        self.requests: list[Request] = []
        self.rows: Rows | None = None
        self._generation = 0  # part of every group's name: groups of an earlier one are never found again

    def update(self, explorer: Explorer, present: Iterable[Request], report: Report) -> None:
        """Close the rows of requests that left, open rows for those that joined."""
        here = {request: None for request in present if not request.untouched}
        report.untouched(sum(request.untouched for request in present))
        stay = [i for i, request in enumerate(self.requests) if request in here]
        known = set(self.requests)
        joined = [request for request in here if request not in known]
        if len(stay) == len(self.requests) and not joined:
            return
        if joined and not stay and not any(request.drawn_before for request in joined):
            self._generation += 1  # where preempted requests come back, the work goes on instead
        if self.rows is None:
            self.rows = explorer.open([])
        if len(stay) < len(self.requests):
            self.rows = self.rows.keep(stay)
        self.requests = [self.requests[i] for i in stay]
        self._open(explorer, joined, report)
        device = self.rows.positions.device
        lengths = [[r.prompt_length, r.prompt_length + r.drawn_before] for r in self.requests]
        columns = torch.tensor(lengths, dtype=torch.int64, device=device).view(-1, 2)
        self.prompt_length, self.first_draw = columns.unbind(1)

    def _open(self, explorer: Explorer, joined: list[Request], report: Report) -> None:
        if not joined:
            return
        try:
            opened = explorer.open(
                [(self._generation, request.group()) for request in joined],
                [replace(request.asked.params, seed=request.seed) for request in joined],
                sample_index=[request.asked.sample_index for request in joined],
                retain=True,
            )
        except CapacityError:
            if len(joined) > 1:  # some may still find a slot
                middle = len(joined) // 2
                self._open(explorer, joined[:middle], report)
                self._open(explorer, joined[middle:], report)
            else:
                joined[0].untouched = True
                report.full(self._max_groups)
                report.untouched(1)
            return
        assert self.rows is not None
        self.rows = self.rows + opened
        self.requests += joined
