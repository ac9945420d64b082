"""What the vLLM plugin tells: a log line per interval, a warning, once, for each thing that is wrong, and counters."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from esamp_core.base.tensors import Status
from esamp_core.bindings.vllm_config import PluginConfig
from esamp_core.explorer import Explorer, Rows

logger = init_logger("vllm.esamp")

COUNTERS = {
    "mixed_rows": "Rows that were sampled from mixed states.",
    "plain_rows": "Rows of requests that asked to explore, and were sampled plainly.",
    "nonfinite_rows": "Rows whose mixed state was not finite, and which were sampled plainly in that step.",
    "faults": "Steps and requests that failed, and went on plainly.",
}


@functools.cache  # a process may start several engines; Prometheus knows one of a name
def _metrics() -> dict[str, Any]:
    from prometheus_client import Counter, Gauge

    found: dict[str, Any] = {name: Counter(f"esamp:{name}", text) for name, text in COUNTERS.items()}
    text = "Distiller slots in use."
    return found | {"groups": Gauge("esamp:groups", text, multiprocess_mode="livemostrecent")}


class Report:
    """Counts over an interval.  Sums stay on the device; the host waits for them once per interval."""

    def __init__(self, config: PluginConfig, speaks: Callable[[], bool]) -> None:
        self._config, self._speaks = config, speaks
        self._began = time.monotonic()
        self._steps = self._plain = self._faults = 0
        self._sums: Tensor | None = None  # int64 [2]: rows mixed, rows that were not finite
        self._idle = 0  # intervals in a row in which rows were mixed and no Distiller had learned anything
        self._warned: set[str] = set()

    def plain(self, rows: int) -> None:
        """Rows that asked to explore and are sampled plainly."""
        self._plain += rows

    def fault(self) -> None:
        self._faults += 1

    def no_tokens(self) -> None:
        self._warn("a prompt that is given as embeddings is sampled plainly: where its rows stand is not known")

    def not_configured(self) -> None:
        self._warn(
            "a request asks to explore, but this engine is not set up for it: --additional-config '{\"esamp\": {}}', "
            "or ESAMP_VLLM=1 in its environment"
        )

    def no_tap(self, rows: int) -> None:
        self.plain(rows)
        self._warn(
            "the rows to be sampled are not those that the engine announced, so requests are sampled plainly; is this "
            "vLLM not the one that was tried?"
        )

    def full(self, max_groups: int) -> None:
        self._warn(
            f"all {max_groups} Distiller slots are in use, so further requests are sampled plainly; raise "
            '"max_groups" in --additional-config, or give requests of one prompt the same group'
        )

    def step(self, explorer: Explorer, rows: Rows) -> None:
        """At the end of a step: count, and speak if it is time."""
        explores = rows.active & (rows.params.beta != 0)
        bad = rows.status & int(Status.NONFINITE_NOVELTY) != 0
        sums = torch.stack(((explores & ~bad).sum(), bad.sum()))
        rows.status.zero_()
        self._sums = sums if self._sums is None else self._sums + sums
        self._steps += 1
        now = time.monotonic()
        if now - self._began >= self._config.log_interval:
            self._began = now
            if self._speaks():
                self._speak(explorer)
            self._sums, self._steps, self._plain, self._faults = None, 0, 0, 0

    def _speak(self, explorer: Explorer) -> None:
        mixed, bad = (0, 0) if self._sums is None else self._sums.tolist()
        groups = [g for g in explorer.stats().values() if g.rows > 0]
        total = sum(g.updates for g in groups)
        logger.info(
            "esamp: %d rows mixed in %d steps, %d sampled plainly; %d/%d slots in use, with %d updates so far",
            *(mixed, self._steps, self._plain, len(groups), explorer.max_groups, total),
        )
        counts = {"mixed_rows": mixed, "plain_rows": self._plain, "nonfinite_rows": bad, "faults": self._faults}
        metrics = _metrics()
        for name, count in counts.items():
            metrics[name].inc(count)
        metrics["groups"].set(len(groups))
        stuck = mixed > 0 and bool(groups) and total == 0 and self._config.distiller.lr > 0
        self._idle = self._idle + 1 if stuck else 0
        if self._idle == 2:
            self._warn(
                "no Distiller has been updated, so there is nothing to explore by; are the model's hidden states "
                'finite? Another "shallow_layer" or a smaller "lr" may help'
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned and self._speaks():
            logger.warning("esamp: %s", message)
        self._warned.add(message)
