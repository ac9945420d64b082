"""What calibration is asked for, and the file that an interrupted one goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from esamp_core.base.checks import is_int, is_real, require
from esamp_core.base.errors import ArgumentError

OnProgress = Callable[[str, int, int], None]  # what is being done, how much of it is, and of how much


@dataclass(frozen=True)
class CalibrationConfig:
    """How start weights are fitted.

    rank: r of the Distillers that will start here.  samples: generations per prompt.  max_new_tokens: of each.
    held_out: share of the prompts, at least one, whose tokens only measure the error.
    steps, batch, rate: AdamW steps, tokens per step, and peak rate (cosine, a tenth of the steps warm-up).
    seed: of generations, start weights and batches.
    """

    rank: int = 64
    samples: int = 8
    max_new_tokens: int = 256
    held_out: float = 0.125
    steps: int = 1000
    batch: int = 512
    rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "samples", "max_new_tokens", "steps", "batch"):
            value = getattr(self, name)
            require(is_int(value) and value >= 1, name, "be an integer >= 1", value)
        require(is_real(self.held_out) and 0 < self.held_out < 1, "held_out", "be between 0 and 1", self.held_out)
        require(is_real(self.rate) and self.rate > 0, "rate", "be a number > 0", self.rate)
        require(is_int(self.seed) and self.seed >= 0, "seed", "be an integer >= 0", self.seed)


class Work:
    """What a run has done so far, as a file: a run that was interrupted ends with the same weights."""

    def __init__(self, path: Path, config: CalibrationConfig, prompts: Sequence[str]) -> None:
        """Raises ArgumentError for a file of other settings or prompts."""
        self._path = path
        identity = json.dumps([asdict(config), list(prompts)])
        self.done: dict[str, Any] = {"identity": identity, "sequences": [], "prompts_done": 0, "step": 0}
        if path.exists():
            self.done = torch.load(path, weights_only=True)
            if self.done.get("identity") != identity:
                raise ArgumentError(f"{path} belongs to a run with other settings or prompts; remove it to start anew")

    def save(self) -> None:
        partial = self._path.with_name(self._path.name + ".partial")
        torch.save(self.done, partial)
        partial.replace(self._path)
