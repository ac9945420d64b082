"""The optimizer loop of both training phases, with checkpoints that continue exactly where they stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esamp_core.base.errors import ArgumentError
from esamp_core.base.trees import read_tree, write_tree
from esamp_core.countdown.data import IGNORE
from esamp_core.countdown.task import PROMPT_TOKENS

FORMAT = "esamp-countdown-checkpoint-1"
OnStep = Callable[[str, int, float], None]  # phase, steps done, loss


@dataclass(frozen=True)
class Phase:
    """What one phase trains on and how.

    Attributes:
        name: as in checkpoints and progress bars.
        steps: how many optimizer steps.
        rate: peak learning rate, of all optimizers.
        warm_up: steps of linear warm-up.
        optimizers: together they cover all parameters.
        batch: token ids and labels of a step, drawn with the phase's generator.
        seed: of that generator.
    """

    name: str
    steps: int
    rate: float
    warm_up: int
    optimizers: tuple[torch.optim.Optimizer, ...]
    batch: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    seed: int


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds: weights, optimizers, random state, and what the run has cost so far."""

    phase: str
    step: int  # steps done in this phase
    model: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    generator: Tensor  # state of the phase's generator
    seconds: float  # wall-clock, summed over all the runs that led here
    cpu_seconds: float  # the same of all threads
    started: str  # date of the first run


class Checkpoints:
    """The one checkpoint file of a run, and the stopwatch that goes on from it.

    Args:
        path: of the file.
        settings: of the run; a file with other settings is refused.
        today: date, kept as the start of a run that has no checkpoint yet.
    """

    def __init__(self, path: Path, settings: dict[str, Any], today: str) -> None:
        self.path = path
        self.settings = settings
        self._started = today
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def restore(self, model: Any) -> Progress | None:
        """Load the checkpoint's weights into the model; None where there is no checkpoint yet.

        Raises:
            ArgumentError: the checkpoint belongs to a run with other settings.
        """
        if not self.path.exists():
            return None
        saved = read_tree(self.path, FORMAT)
        plain = json.loads(json.dumps(self.settings))  # as they come out of a file
        if saved["settings"] != plain:
            names = sorted(name for name in plain if plain[name] != saved["settings"].get(name))
            raise ArgumentError(f"out holds a run with other settings ({', '.join(names)}): got {self.path}")
        progress = Progress(**saved["progress"])
        model.load_state_dict(progress.model)
        self._started = progress.started
        self._wall -= progress.seconds
        self._cpu -= progress.cpu_seconds
        return progress

    def save(self, phase: Phase, step: int, model: Any, generator: torch.Generator) -> Progress:
        """Write and replace in one go, so that an interruption leaves the old checkpoint or the new one."""
        progress = Progress(
            phase=phase.name,
            step=step,
            model=model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in phase.optimizers],
            generator=generator.get_state(),
            seconds=time.monotonic() - self._wall,
            cpu_seconds=time.process_time() - self._cpu,
            started=self._started,
        )
        write_tree(self.path, {"settings": self.settings, "progress": vars(progress)}, FORMAT)
        return progress


def learning_rate(peak: float, step: int, steps: int, warm_up: int) -> float:
    """Linear warm-up, a slow decay (a cosine that would end long after the last step), a linear cool-down to zero."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / (1.65 * steps)))
    cool_down = min(1.0, (steps - step) / (0.2 * steps))
    return peak * min(1.0, (step + 1) / warm_up) * (0.03 + 0.97 * cosine) * cool_down


def loss_of(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the learned tokens of a batch; ids and labels are [rows, length] int64."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, PROMPT_TOKENS - 1 :])  # prompts are never learned
    return cross_entropy(logits.flatten(0, 1), labels[:, PROMPT_TOKENS:].flatten(), ignore_index=IGNORE)


def run_phase(
    model: Any, phase: Phase, resumed: Progress | None, checkpoints: Checkpoints, every: int, on_step: OnStep
) -> Progress:
    """Run a phase to its end, from its start or from where it was left.

    Args:
        resumed: this phase's checkpoint, whose weights the model already has.
        every: steps between checkpoints; the last step always makes one.
        on_step: called after each step and its checkpoint.

    Returns:
        The state at the end of the phase.
    """
    generator = torch.Generator().manual_seed(phase.seed)
    if resumed is not None:
        generator.set_state(resumed.generator)
        for optimizer, state in zip(phase.optimizers, resumed.optimizers, strict=True):
            optimizer.load_state_dict(state)
    progress = resumed
    model.train()
    for step in range(resumed.step if resumed else 0, phase.steps):
        for optimizer in phase.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(phase.rate, step, phase.steps, min(phase.warm_up, phase.steps))
        loss = loss_of(model, *phase.batch(step, generator))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in phase.optimizers:
            optimizer.step()
        done = step + 1
        if done % every == 0 or done == phase.steps:
            progress = checkpoints.save(phase, done, model, generator)
        on_step(phase.name, done, loss.item())
    assert progress is not None  # a phase has at least one step, and the last one is saved
    return progress
