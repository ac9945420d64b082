"""One engine's exploration: which requests explore, their Distillers, and a step of them.

Both model runners tell it who joins and leaves, under keys of their own (a row, a slot), and before each forward in
which order the rows to be sampled will come.  The model's head then asks for the mixed states of those rows.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger

from esamp_core.base.config import DistillerConfig, SamplingParams
from esamp_core.base.errors import CapacityError
from esamp_core.bindings.vllm_config import PluginConfig, RequestParams, read_request
from esamp_core.bindings.vllm_report import Report
from esamp_core.explorer import Explorer, Rows, check_start
from esamp_core.models.parts import norm_rms

logger = init_logger("vllm.esamp")
Order = Callable[[int], Sequence[int]]  # the number of rows to be sampled -> the key of each one's request


@dataclass(eq=False)
class Request:
    """A request that explores, while the engine holds it.  One that was preempted comes back as another Request."""

    asked: RequestParams
    number: int  # of those that joined this engine, the same on every tensor-parallel rank
    prompt: Sequence[int]
    fed: int  # tokens that are fed before the first is drawn: the prompt, and what was drawn before a preemption
    adapter: int | None  # the LoRA adapter, 0 for none; None until it is known, in V1
    plain: bool = False  # found no Distiller slot, or a fault: sampled plainly to its end
    proven: bool = False  # has been in a step without a fault

    @property
    def drawn_before(self) -> bool:
        return self.fed > len(self.prompt)

    def group(self) -> Hashable:
        """Which requests share a Distiller: of one adapter, those that name a group, or else those of one prompt."""
        named = self.asked.group is not None
        digest = hashlib.blake2b(f"{self.adapter} {named} ".encode(), digest_size=16)
        digest.update(repr(self.asked.group).encode() if named else array("q", self.prompt).tobytes())
        return digest.hexdigest()


class Mixer:
    """The one of an engine in this process.  Groups live while their requests overlap with others that explore: when
    none of the step before is left in a step, all start afresh, so that nothing is carried into the next batch of work.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config, self.config = vllm_config, PluginConfig.read(vllm_config)
        self.report = Report(self.config, _is_first_rank)
        self.requests: dict[int, Request] = {}
        self.explorer: Explorer | None = None
        self.told_by: object = None  # what tells it, in the V1 model runner
        self.speculates = vllm_config.speculative_config is not None
        self._joined = 0
        self._order: Order | None = None  # of the step that is about to run
        self._batch = _Batch(self.config.max_groups, int(vllm_config.model_config.seed or 0))
        self._staged: tuple[Tensor, Rows] | None = None  # mixed, and not learned before drafts are accepted
        self._weights: tuple[object, ...] | None = None  # by which a change of them is noticed

    def join(self, key: int, params: Any, prompt: Sequence[int] | None, fed: int, adapter: int | None = None) -> None:
        """A request is in the batch from now on, under a key whose last holder is gone.  params: vLLM's, None for one
        that samples nothing."""
        self.requests.pop(key, None)
        try:
            asked = None if params is None else read_request(params, self.config)
        except Exception:  # it was validated at admission, but an engine may be called without
            logger.exception("esamp: a request cannot explore, and is sampled plainly")
            self.report.fault()
            return
        if asked is None:
            return
        if prompt is None:  # embeddings instead of tokens: where the row stands is not known
            self.report.no_tokens()
            return
        self.requests[key] = Request(asked, self._joined, prompt, fed, adapter)
        self._joined += 1

    def expect(self, order: Order) -> None:
        """The next rows that the head sees are to be sampled, in this order."""
        self._order = order

    def start(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Make the Explorer, for the weights that the model has now.  dtype: of its hidden states."""
        self._weights = _weights_of(model)
        self._batch.clear()
        self._staged, self.explorer = None, None  # the old one's memory first
        config, engine = self.config, self.vllm_config
        head = getattr(getattr(model, "lm_head", None), "weight", None)
        if isinstance(head, Tensor) and head.is_floating_point() and engine.parallel_config.tensor_parallel_size == 1:
            check_start(config.distiller, head[: engine.model_config.get_vocab_size()])  # what follows is padding
        drafts = engine.speculative_config.num_speculative_tokens if self.speculates else 0
        with torch.inference_mode(False), torch.no_grad():
            self.explorer = Explorer(
                None,
                engine.model_config.get_hidden_size(),
                complete(config.distiller, model),
                max_groups=config.max_groups,
                max_rows=engine.scheduler_config.max_num_seqs * (1 + drafts),
                on_full="evict",
                device=device,
            )
            self.explorer.warm_up(dtype)

    def forget(self) -> None:
        """The weights are others from now on: all groups start afresh."""
        self._weights = None

    def mix(
        self,
        model: nn.Module,
        shallow: Tensor,
        deep: Tensor,
        position: Tensor,
        adapters: Callable[[], Sequence[int] | None],
    ) -> Tensor:
        """What the head is to see instead of deep [R, H]; deep itself where no row explores.

        position: int64 [R], of the token that was fed.  adapters: tells that of each row, where requests did not say.
        """
        order, self._order = self._order, None
        if order is None or not self.requests:
            return deep  # prompt log-probabilities, a dummy run; or nobody explores
        keys = list(order(len(deep)))
        present = [self.requests.get(key) for key in keys]
        if not any(present):
            return deep
        if len(present) != len(deep):
            self.report.no_tap(len(present))
            return deep
        try:
            # The engine runs under inference mode, whose tensors cannot be updated outside it; Distillers are.
            with torch.inference_mode(False), torch.no_grad():
                if self.explorer is None or _weights_of(model) != self._weights:
                    self.start(model, deep.device, deep.dtype)
                return self._step(keys, present, shallow, deep, position, adapters)
        except Exception:
            self._fault(present)
            return deep

    def _fault(self, present: list[Request | None]) -> None:
        """An error must not take the engine with it, nor the others' exploration.

        Those that were new in the step go on plainly, or, where none was new, all that were in it.  The rest explores
        on with Distillers that start afresh.
        """
        exploring = [request for request in present if request is not None and not request.plain]
        suspects = [request for request in exploring if not request.proven] or exploring
        logger.exception("esamp: a step failed; %d of its requests are sampled plainly from here on", len(suspects))
        for request in suspects:
            request.plain = True
        self.explorer = self._staged = None
        self.report.fault()

    def _step(
        self, keys: list[int], present: list[Request | None], shallow: Tensor, deep: Tensor, position: Tensor,
        adapters: Callable[[], Sequence[int] | None],
    ) -> Tensor:  # fmt: skip
        explorer = self.explorer
        assert explorer is not None
        self._learn(None)
        self._batch.update(explorer, present, adapters, self.report)
        rows = self._batch.spread(keys, present)
        if rows is None:
            return deep
        # Of a prompt that is not all there yet the engine samples a row too, and throws the token away.  Counted by
        # the model's own positions, so that no count of the host's can run ahead of the engine.
        rows.active.copy_(position + 1 >= self._batch.fed)
        explorer.predict(shallow, rows)
        mixed = explorer.mix(deep, rows)
        self._staged = deep, rows
        if not self.speculates:
            self._learn(None)
        self.report.step(explorer, rows)
        for request in present:
            if request is not None:
                request.proven = True
        return mixed

    def accept(self, accepted: Tensor) -> None:
        """Of the step that was mixed: int [requests], how many rows of each were followed by a token that stays."""
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._learn(accepted)
        except Exception:
            self._fault(list(self.requests.values()))

    def _learn(self, accepted: Tensor | None) -> None:
        """From the step that was mixed, if it was not yet; the forward that comes next runs beside it.

        accepted: rows that teach, as the first so many of each sequence; None: all.
        """
        staged, self._staged = self._staged, None
        if staged is None or self.explorer is None:
            return
        deep, rows = staged
        teaches = None
        if accepted is not None:
            of, ordinal = self._batch.sequence
            teaches = ordinal < accepted.to(torch.int64)[of]
        self.explorer.learn(deep, rows, teaches=teaches)
        self.explorer.flush()


def complete(config: DistillerConfig, model: Any) -> DistillerConfig:
    """The Distillers' config with the model's own ``deep_scale``: rms of what the final norm puts out for an input of
    rms 1.  Where there is no such norm it is measured, and the first step of each engine is not mixed."""
    norm = _final_norm(model)
    return config if config.deep_scale is not None or norm is None else replace(config, deep_scale=norm_rms(norm))


def _final_norm(model: Any) -> Any:
    norm = getattr(getattr(model, "model", None), "norm", None)
    weight = getattr(norm, "weight", None)
    return norm if isinstance(weight, Tensor) and weight.dim() == 1 else None


def _weights_of(model: Any) -> tuple[object, ...]:
    """What changes when weights are written: where some of them lie, and how often torch saw them written to."""
    found = [getattr(part, "weight", None) for part in (_final_norm(model), getattr(model, "lm_head", None))]
    tensors = [weight for weight in found if isinstance(weight, Tensor)]
    return tuple((w.data_ptr(), None if w.is_inference() else w._version) for w in tensors)


def _is_first_rank() -> bool:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank()) == 0


class _Batch:
    """The requests that explore at present, the Explorer's rows for them, and these in the engine's order."""

    def __init__(self, max_groups: int, seed: int) -> None:
        self._max_groups, self._seed = max_groups, seed
        self._generation = 0  # part of every group's name: groups of an earlier one are never found again
        self.clear()

    def clear(self) -> None:
        """Forget rows and requests; those that are still there join again."""
        self._requests: list[Request] = []
        self._rows: Rows | None = None
        self._generation += 1
        self._seen: tuple[list[int], list[Request | None]] | None = None  # the batch that was spread last
        self._spread: Rows | None = None
        self.fed = self.sequence = torch.empty(0, dtype=torch.int64, device="cpu")

    def update(
        self,
        explorer: Explorer,
        present: list[Request | None],
        adapters: Callable[[], Sequence[int] | None],
        report: Report,
    ) -> None:
        """Close the rows of requests that left, open rows for those that joined."""
        report.plain(len({request for request in present if request is not None and request.plain}))
        if self._seen is not None and present == self._seen[1]:
            return
        here: dict[Request, int] = {}  # at its first row
        for place, request in enumerate(present):
            if request is not None and not request.plain:
                here.setdefault(request, place)
        stay = [i for i, request in enumerate(self._requests) if request in here]
        known = set(self._requests)
        joined = [request for request in here if request not in known]
        if joined and not stay and not any(request.drawn_before for request in joined):
            self._generation += 1  # where preempted requests come back, the work goes on instead
        if self._rows is None:
            self._rows = explorer.open([])
        if len(stay) < len(self._requests):
            self._rows = self._rows.keep(stay)
            self._requests = [self._requests[i] for i in stay]
        known_now = adapters() if any(request.adapter is None for request in joined) else None
        for request in joined:
            if request.adapter is None:
                request.adapter = 0 if known_now is None else known_now[here[request]]
        self._open(explorer, joined, report)
        self._seen = None

    def _open(self, explorer: Explorer, joined: list[Request], report: Report) -> None:
        if not joined:
            return
        assert self._rows is not None
        try:
            opened = explorer.open(
                [(self._generation, request.group()) for request in joined],
                [SamplingParams(beta=request.asked.beta, seed=self._seed_of(request)) for request in joined],
                retain=True,  # a row that is not scheduled in a step is not over
            )
        except Exception as error:
            if len(joined) > 1:  # the others may find a slot, or be without fault
                middle = len(joined) // 2
                self._open(explorer, joined[:middle], report)
                self._open(explorer, joined[middle:], report)
                return
            if isinstance(error, CapacityError):
                report.full(self._max_groups)
            else:
                logger.exception("esamp: a request cannot explore, and is sampled plainly")
                report.fault()
            joined[0].plain = True
            report.plain(1)
            return
        self._rows = self._rows + opened
        self._requests += joined

    def _seed_of(self, request: Request) -> int:
        """Of a group's stochastic rounding: from the engine's, and the same on every tensor-parallel rank."""
        text = f"{self._seed} {request.number}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

    def spread(self, keys: list[int], present: list[Request | None]) -> Rows | None:
        """Our rows in the engine's order; None if there are none."""
        if not self._requests or self._rows is None:
            return None
        if self._spread is None or (keys, present) != self._seen:
            self._seen = keys, present
            place = {request: i for i, request in enumerate(self._requests)}
            self._spread = self._rows.spread([-1 if r is None else place.get(r, -1) for r in present])
            device = self._rows.seeds.device
            fed = [0 if request is None else request.fed for request in present]
            self.fed = torch.tensor(fed, dtype=torch.int64, device=device)
            # Which of the batch's sequences a row is of, and the how-manieth row of it: int64 [2, R].
            self.sequence = torch.tensor(_sequences(keys), dtype=torch.int64, device=device).view(-1, 2).T
        return self._spread


def _sequences(keys: list[int]) -> list[tuple[int, int]]:
    """(sequence, ordinal) of every row; the rows of one stand side by side, and are of one key."""
    groups = [list(group) for _, group in itertools.groupby(keys)]
    return [(number, ordinal) for number, group in enumerate(groups) for ordinal in range(len(group))]
