"""Countdown: a small real model inside the package, with a task that a program can check.

>>> from esamp_core.countdown import check, held_out_problems, load
>>> model, tokenizer = load()
>>> problem = held_out_problems("tune", 1)[0]
>>> ids = tokenizer(problem.prompt, return_tensors="pt").input_ids
>>> answer = tokenizer.decode(model.generate(ids)[0, ids.shape[1] :])
>>> check(problem, answer).correct  # doctest: +SKIP

``PATH`` is the folder of the weights: ``AutoModelForCausalLM.from_pretrained(countdown.PATH)`` works as for any local
model. The model card is the folder's README.md. Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from esamp_core.countdown.task import (
    MAX_NEW_TOKENS,
    Pool,
    Problem,
    Solution,
    SolutionKey,
    Step,
    Verdict,
    attempt_text,
    check,
    draw_problem,
    held_out_pool,
    held_out_problems,
    is_held_out,
    solution_key,
    solutions,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "PATH",
    "DISTILLER",
    "load",
    "Problem",
    "check",
    "Verdict",
    "held_out_problems",
    "is_held_out",
    "held_out_pool",
    "Pool",
    "solutions",
    "solution_key",
    "attempt_text",
    "draw_problem",
    "Solution",
    "SolutionKey",
    "Step",
    "MAX_NEW_TOKENS",
]

PATH: Path = Path(__file__).resolve().parent
DISTILLER: Path = PATH / "distiller" / "start.safetensors"
"""Calibrated start weights of rank 64, for ``DistillerConfig(start=str(DISTILLER))``; see docs/quality.md."""


def load(
    dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model, in evaluation mode, and its tokenizer; works offline.

    Args:
        dtype: of the weights; None means float32 (they are stored as bfloat16).
        device: where the model goes.
    """
    from esamp_core.countdown.model import load_folder

    return load_folder(PATH, dtype, device)
