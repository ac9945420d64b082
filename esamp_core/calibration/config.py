"""What calibration is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esamp_core.base.checks import is_int, is_real, require

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
