"""What the vLLM plugin tells the log: one line per interval, and a warning, once, for each thing that is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from vllm.logger import init_logger

from esamp_core.base.tensors import Draw
from esamp_core.bindings.vllm_config import PluginConfig
from esamp_core.explorer import Explorer

logger = init_logger("vllm.esamp")


class Report:
    """Counts over an interval.  Sums stay on the device; the host waits for them once per interval."""

    def __init__(self, config: PluginConfig, speaks: Callable[[], bool]) -> None:
        self._config, self._speaks = config, speaks
        self._began = time.monotonic()
        self._steps = self._untouched = 0
        self._sums: Tensor | None = None  # float64 [3]: rows drawn, their novelty, their KL
        self._idle = 0  # intervals in a row in which rows were drawn and no Distiller had learned anything
        self._warned: set[str] = set()

    def untouched(self, rows: int) -> None:
        """Rows that asked to explore and were left to the engine."""
        self._untouched += rows

    def no_tap(self, rows: int) -> None:
        self.untouched(rows)
        if rows:
            self._warn(
                "no shallow state arrived with the logits, so requests are sampled without exploration; is another "
                "plugin replacing the model class, or this vLLM not the one that was tried?"
            )

    def full(self, max_groups: int) -> None:
        self._warn(
            f"all {max_groups} Distiller slots are in use, so further requests are sampled without exploration; raise "
            '"max_groups" in --additional-config, or give requests of one prompt the same group'
        )

    def draw(self, draw: Draw) -> None:
        drawn = draw.token_ids >= 0
        columns = torch.stack((torch.ones_like(draw.novelty), draw.novelty, draw.kl)).double()
        sums = torch.where(drawn, columns, 0.0).sum(-1)
        self._sums = sums if self._sums is None else self._sums + sums
        self._steps += 1

    def step(self, explorer: Explorer) -> None:
        """At the end of a step: speak if it is time."""
        now = time.monotonic()
        if now - self._began < self._config.log_interval:
            return
        self._began = now
        sums, self._sums = self._sums, None
        steps, self._steps = self._steps, 0
        untouched, self._untouched = self._untouched, 0
        if (steps or untouched) and self._speaks():
            rows, novelty, kl = (0.0, 0.0, 0.0) if sums is None else sums.tolist()
            groups = [g for g in explorer.stats().values() if g.rows > 0]
            updates = sum(g.updates for g in groups)
            mean = max(rows, 1.0)
            logger.info(
                "esamp: %d rows in %d steps, mean novelty %.3g, KL %.3g, %d rows untouched; %d/%d slots in use, "
                "with %d updates so far",
                *(rows, steps, novelty / mean, kl / mean, untouched, len(groups), explorer.max_groups, updates),
            )
            stuck = rows > 0 and bool(groups) and updates == 0 and self._config.distiller.lr > 0
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
