"""Train a Countdown model: ``python -m esamp_core.countdown.train --out DIR``.

Phase 1 learns random solutions of random problems, step by step. Phase 2 lets the model try problems, keeps its right
and its legal but wrong attempts, and teaches it to judge them and to try again (rejection-sampling fine-tuning).
An interrupted run continues from DIR's last checkpoint when it is started again, and ends with the same weights.

On a busy machine set ``OMP_WAIT_POLICY=passive``: torch's threads otherwise spin while they wait for each other.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from esamp_core.base.errors import ArgumentError
from esamp_core.base.trees import read_tree, write_tree
from esamp_core.countdown import data, loop
from esamp_core.countdown.card import write_card
from esamp_core.countdown.evaluate import sample_words
from esamp_core.countdown.model import ModelShape, build_model, save
from esamp_core.countdown.task import ATTEMPT_TOKENS

SUPERVISED, SAMPLING, ATTEMPTS = "supervised", "sampling", "attempts"


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the defaults make the embedded model.

    Attributes:
        seed: of the weights, of both data streams and of all sampling.
        threads: torch's; another number may round differently and so end with other weights.
        supervised_steps, supervised_batch, supervised_rate: phase 1: steps, problems per step, peak learning rate.
        attempt_problems, attempt_samples, attempt_temperature: whose attempts phase 2 learns from, and how many each.
        attempt_steps, attempt_tokens, attempt_rate: phase 2: steps (0 leaves the phase out), tokens per step, peak.
        checkpoint_every: steps.
        shape: the transformer's sizes.
    """

    seed: int = 0
    threads: int = 2
    supervised_steps: int = 1000
    supervised_batch: int = 128
    supervised_rate: float = 3e-3
    attempt_problems: int = 4000
    attempt_samples: int = 6
    attempt_temperature: float = 0.9
    attempt_steps: int = 200
    attempt_tokens: int = 5120
    attempt_rate: float = 1e-3
    checkpoint_every: int = 100
    shape: ModelShape = field(default_factory=ModelShape)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "shape":
                continue
            kind = type(getattr(TrainConfig, name))
            if type(value) is not kind:
                raise ArgumentError(f"{name} must be of type {kind.__name__}, got {value!r}")
            least = 0 if name in ("seed", "attempt_steps") else 1
            if kind is int and value < least:
                raise ArgumentError(f"{name} must be >= {least}, got {value!r}")
            if kind is float and not value > 0:
                raise ArgumentError(f"{name} must be > 0, got {value!r}")


def train(config: TrainConfig, out: Path, on_step: loop.OnStep = lambda phase, done, loss: None) -> loop.Progress:
    """Run or continue a training run; the finished model and its tokenizer lie in ``out`` afterwards.

    Args:
        config: what to train.
        out: folder of the result; ``out/work`` holds the checkpoint and phase 2's sequences.
        on_step: called after each step with phase, steps done and loss; may raise to interrupt the run.

    Returns:
        The final state, with the time it took.

    Raises:
        ArgumentError: ``out`` holds a run with other settings.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return _train(config, out, on_step)
    finally:
        torch.set_num_threads(threads)  # the caller's, whatever happened


def _train(config: TrainConfig, out: Path, on_step: loop.OnStep) -> loop.Progress:
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    checkpoints = loop.Checkpoints(work / "checkpoint.safetensors", asdict(config), datetime.date.today().isoformat())
    model = build_model(config.shape, config.seed)
    progress = checkpoints.restore(model)
    every = config.checkpoint_every
    if progress is None or progress.phase == SUPERVISED:
        progress = loop.run_phase(model, supervised_phase(config, model), progress, checkpoints, every, on_step)
    if config.attempt_steps:
        if progress.phase == SUPERVISED:  # phase 2 has not begun: the weights are still the ones that make its data
            sequences = own_attempts(config, model, on_step)
            write_tree(work / "attempts.safetensors", sequences, "esamp-countdown-attempts-1")
        else:
            sequences = read_tree(work / "attempts.safetensors", "esamp-countdown-attempts-1")
        phase = attempt_phase(config, model, sequences)
        resumed = progress if progress.phase == ATTEMPTS else None
        progress = loop.run_phase(model, phase, resumed, checkpoints, every, on_step)
    save(model, out)
    return progress


def supervised_phase(config: TrainConfig, model: Any) -> loop.Phase:
    """Phase 1. Muon for the matrices of the blocks, AdamW for the rest: Muon gets further in few steps."""
    named = list(model.named_parameters())
    in_blocks = {name for name, tensor in named if tensor.ndim == 2 and "layers" in name}
    rate = config.supervised_rate
    muon = torch.optim.Muon(
        [tensor for name, tensor in named if name in in_blocks],
        lr=rate,
        weight_decay=0.01,
        adjust_lr_fn="match_rms_adamw",
    )
    others = [tensor for name, tensor in named if name not in in_blocks]
    adamw = torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))

    def batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return data.supervised_batch(config.seed, step, config.supervised_batch)

    return loop.Phase(SUPERVISED, config.supervised_steps, rate, 60, (muon, adamw), batch, config.seed)


def own_attempts(config: TrainConfig, model: Any, on_step: loop.OnStep) -> tuple[Tensor, Tensor]:
    """Phase 2's token ids and labels [sequences, length] int64, from the phase-1 model's attempts."""
    stream = data.training_stream(config.seed, "attempts", 0)
    drawn = [next(stream) for _ in range(config.attempt_problems)]
    attempts = sample_words(
        model.eval(),
        [problem for problem, _ in drawn],
        config.attempt_samples,
        config.seed,
        temperature=config.attempt_temperature,
        max_new_tokens=ATTEMPT_TOKENS - 2,  # ok or no, and the end, are not the model's yet: it has only ever seen "ok"
        on_batch=lambda done: on_step(SAMPLING, done, 0.0),
    )
    rng = random.Random(f"retries/{config.seed}")
    sequences: list[data.Sequence] = []
    for (problem, demonstration), rows in zip(drawn, attempts, strict=True):
        whole = [words for words in rows if len(words) == ATTEMPT_TOKENS - 2]  # an early end of sequence cuts a row
        sequences += data.retry_sequences(problem, demonstration, whole, rng)
    if not sequences:  # only a model that has learned nothing: demonstrations still let the phase run
        sequences = [data.accepted(*pair) for pair in drawn]
    return data.to_tensors(sequences)


def attempt_phase(config: TrainConfig, model: Any, sequences: tuple[Tensor, Tensor]) -> loop.Phase:
    """Phase 2: batches of sequences with the same number of attempts, each number as often as it occurs."""
    ids, labels = sequences
    groups = data.by_length(ids)
    sizes = torch.tensor([float(len(group)) for _, group in groups], dtype=torch.float32, device="cpu")

    def batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        length, group = groups[int(torch.multinomial(sizes, 1, generator=generator))]
        size = (max(1, config.attempt_tokens // length),)
        rows = group[torch.randint(len(group), size, generator=generator, device="cpu")]
        return ids[rows, :length], labels[rows, :length]

    rate = config.attempt_rate
    adamw = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    return loop.Phase(ATTEMPTS, config.attempt_steps, rate, 30, (adamw,), batch, config.seed)


def progress_bars(config: TrainConfig) -> tuple[Progress, Callable[[str, int, float], None]]:
    """A rich display with one bar per phase, and the ``on_step`` that moves them."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())
    totals = {SUPERVISED: config.supervised_steps}
    if config.attempt_steps:
        totals |= {SAMPLING: config.attempt_problems, ATTEMPTS: config.attempt_steps}
    tasks = {phase: bars.add_task(phase, total=total, loss="", start=False) for phase, total in totals.items()}

    def on_step(phase: str, done: int, loss: float) -> None:
        bars.start_task(tasks[phase])
        bars.update(tasks[phase], completed=done, loss=f"loss {loss:.3f}" if loss else "")

    return bars, on_step


def main(
    out: Annotated[Path, typer.Option(help="Folder of the result; a run that is there already is continued.")],
    seed: Annotated[int, typer.Option(help="Seed of weights, data and sampling.")] = TrainConfig.seed,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = TrainConfig.threads,
    supervised_steps: Annotated[int, typer.Option(help="Steps of phase 1.")] = TrainConfig.supervised_steps,
    attempt_steps: Annotated[
        int, typer.Option(help="Steps of phase 2; 0 leaves it out: one attempt, always accepted.")
    ] = TrainConfig.attempt_steps,
) -> None:
    """Train a Countdown model, measure it and write its model card."""
    config = TrainConfig(seed=seed, threads=threads, supervised_steps=supervised_steps, attempt_steps=attempt_steps)
    bars, on_step = progress_bars(config)
    with bars:
        progress = train(config, out, on_step)
    settings, defaults = asdict(config), asdict(TrainConfig())
    options = [f"--{name.replace('_', '-')} {settings[name]}" for name in settings if settings[name] != defaults[name]]
    write_card(out, settings, progress, " ".join(("python -m esamp_core.countdown.train --out DIR", *options)))


if __name__ == "__main__":
    typer.run(main)
