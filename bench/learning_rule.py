"""Learning recipes on recorded hidden states: ``python -m bench.learning_rule``, about a minute.

The model's own samples (temperature 1, no exploration) are recorded once: per step, the shallow and deep states and the
drawn tokens of n siblings of each problem.  Every recipe then learns from the very same states, so that recipes differ
by what they do and not by what was sampled.  The error is measured before each step, on states not yet learned from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from torch import Tensor

from bench.quality_decode import Pick, Setting, Step, decode, request_seeds
from bench.quality_distiller import STUDY_LR, DenseDistillers
from bench.quality_memory import RidgeMemory
from bench.quality_table import grid, write_between
from bench.quality_tasks import Source, Task, disjoint_problems, load_source, load_task
from bench.results import commit
from bench.samplers import Filter, Plain, PlainRun
from esamp_core.reference.distiller import token_targets
from esamp_core.sample import DistillerConfig

WINDOWS = ((0, 1), (1, 9), (9, 25), (25, 52))  # steps over which the error is averaged: from, to


class Recording(NamedTuple):
    """States of P groups of n siblings over T steps; rows that have finished are off."""

    shallow: Tensor  # [T, P, n, H]
    deep: Tensor  # [T, P, n, H]
    tokens: Tensor  # int64 [T, P, n]
    on: Tensor  # bool [T, P, n]
    setting: Setting


class _Recorder(PlainRun):
    """Draws plainly and keeps every step."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(Plain("recorded", Filter()), setting)
        self.setting, self.steps = setting, list[tuple[Step, Tensor]]()

    def draw(self, step: Step) -> Pick:
        pick = super().draw(step)
        self.steps.append((step, pick.token_ids))
        return pick

    def recording(self) -> Recording:
        groups, n = self.setting.groups, self.setting.siblings

        def dense(row: Tensor, t: Tensor) -> Tensor:
            return t.new_zeros(groups * n, *t.shape[1:]).index_copy_(0, row, t).view(groups, n, *t.shape[1:])

        columns = [
            (dense(s.row, s.shallow), dense(s.row, s.deep), dense(s.row, token), dense(s.row, s.active))
            for s, token in self.steps
        ]
        return Recording(*(torch.stack(c) for c in zip(*columns, strict=True)), self.setting)


@dataclass
class _Recorded:
    """A sampler whose run can be looked at afterwards."""

    name: str = "recorded"
    dependent: bool = False
    runs: list[_Recorder] = field(default_factory=list)

    def start(self, setting: Setting) -> _Recorder:
        self.runs.append(_Recorder(setting))
        return self.runs[-1]


def record(source: Source, task: Task, problems: int, n: int, seed: int) -> Recording:
    """Sample problems of the tuning pool, and keep the states."""
    chosen = disjoint_problems(task, "tune", problems)
    return record_prompts(source, [source.encode(task.prompt(p)) for p in chosen], n, seed, task.max_new_tokens)


def record_prompts(
    source: Source, prompts: Sequence[Sequence[int]], n: int, seed: int, max_new_tokens: int
) -> Recording:
    """The same of prompts' token ids."""
    sampler = _Recorded()
    decode(source, sampler, prompts, n, request_seeds(seed, 0, len(prompts)), max_new_tokens)
    return sampler.runs[0].recording()


@dataclass(frozen=True)
class Recipe:
    """A learning rule.  rows: siblings that teach, None for all."""

    name: str
    config: DistillerConfig
    rows: int | None = None


def relearn(recording: Recording, recipe: Recipe) -> Tensor:
    """Mean relative squared error [T] over the rows that run, before each step's lesson.

    With target "choice" it is the error in predicting the centred head row of the drawn token; 1 is to predict nothing.
    """
    setting, config = recording.setting, recipe.config
    parts = setting.source.parts
    if config.target == "choice":
        scale, targets = parts.hidden_size**-0.5, token_targets(parts.head.centred(), recording.tokens)
    else:
        assert parts.deep_scale is not None
        scale, targets = parts.deep_scale, recording.deep
    distillers = DenseDistillers(setting.groups, parts.hidden_size, config, scale)
    taught = recording.on.clone()
    if recipe.rows is not None:
        taught[:, :, recipe.rows :] = False
    errors = []
    for shallow, target, on, teaches in zip(recording.shallow, targets, recording.on, taught, strict=True):
        distillers.predict(shallow)
        errors.append(distillers.errors(target)[on].mean())
        distillers.learn(target, teaches)
    return torch.stack(errors)


def constant_errors(recording: Recording) -> Tensor:
    """The same of each group's mean of all earlier deep states; NaN in the first step."""
    total, count, errors = torch.zeros_like(recording.deep[0, :, 0]), torch.zeros(len(recording.deep[0])), []
    for deep, on in zip(recording.deep, recording.on, strict=True):
        mean = total / count[:, None]
        error = (deep - mean[:, None]).square().sum(-1) / deep.square().sum(-1)
        errors.append(error[on].mean())
        some = on.any(-1)
        step = (deep * on[..., None]).sum(1) / on.sum(-1, keepdim=True).clamp_min(1)
        total, count = total + step * some[:, None], count + some
    return torch.stack(errors)


def relearn_ridge(recording: Recording) -> Tensor:
    """The same for the recursive ridge regression of ``quality_memory``."""
    memory = RidgeMemory(recording.setting, 1.0)
    siblings = torch.arange(recording.setting.siblings)
    errors = []
    for shallow, deep, tokens, on in zip(*recording[:4], strict=True):
        memory.begin(shallow, deep)
        target = memory.embedding[tokens]
        error = (memory.predict(siblings) - target).square().sum(-1) / target.square().sum(-1)
        errors.append(error[on].mean())
        memory.add(siblings, tokens, on)
    return torch.stack(errors)


def recipes(start: str | None) -> Iterator[tuple[str, list[Recipe]]]:
    """Groups of recipes; in each, one thing differs from the others: rate STUDY_LR, rank 64, all siblings."""

    def deep(name: str, rows: int | None = None, **config: object) -> Recipe:
        return Recipe(name, DistillerConfig(**({"lr": STUDY_LR, "gate": False} | config)), rows)  # type: ignore[arg-type]

    rates = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
    yield "rate", [deep(f"lr {lr:g}", lr=lr) for lr in (0.0, *rates)]
    yield "momentum", [deep(f"lr {lr:g}, momentum {m:g}", lr=lr, momentum=m) for m in (0.5, 0.9) for lr in rates[3:6]]
    yield "rows", [deep("first sibling only", rows=1), deep("4 siblings", rows=4), deep("all siblings")]
    yield "rank", [deep(f"rank {r}", rank=r) for r in (4, 16, 64, 128)]
    if start is not None:
        yield "calibrated start", [deep(f"calibrated, lr {lr:g}", lr=lr, start=start) for lr in (0.0, *rates)]
    yield (
        "choice target",
        [deep(f"choice, lr {lr:g}", lr=lr, target="choice") for lr in (0.0, *rates)]
        + [deep(f"choice, lr {lr:g}, momentum 0.9", lr=lr, momentum=0.9, target="choice") for lr in rates[1:4]],
    )


def table(recording: Recording, start: str | None) -> str:
    """Markdown: one row per recipe, one column per window of steps."""
    windows = [(a, min(b, len(recording.on))) for a, b in WINDOWS if a < len(recording.on)]
    head = ["what varies", "recipe", *(f"step {a + 1}" if b == a + 1 else f"steps {a + 1}-{b}" for a, b in windows)]

    def cells(errors: Tensor) -> list[str]:
        return [f"{float(errors[a:b].mean()):.3f}" for a, b in windows]

    rows = [[what, r.name, *cells(relearn(recording, r))] for what, group in recipes(start) for r in group]
    rows.append(["choice target", "choice, recursive ridge", *cells(relearn_ridge(recording))])
    setting = recording.setting
    caption = (
        f"Model {setting.source.name}, {setting.groups} problems of the tuning pool, n = {setting.siblings}, "
        f"{int(recording.on.sum())} tokens, seed {int(setting.request_seeds[0]) >> 32}, commit {commit()}, "
        f"torch {torch.__version__}. Mean relative squared error before each step's lesson; siblings run in lock-step."
    )
    return caption + "\n\n" + grid(head, rows)


def main(
    model: Annotated[str, typer.Option(help="'countdown', or a folder or hub name.")] = "countdown",
    task: Annotated[str, typer.Option(help="'countdown', or a module with a task.")] = "countdown",
    problems: Annotated[int, typer.Option(min=1)] = 24,
    n: Annotated[int, typer.Option("-n", help="Siblings per problem.")] = 16,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    start: Annotated[Path | None, typer.Option(help="File of `esamp calibrate`, to learn on from too.")] = None,
    doc: Annotated[Path | None, typer.Option(help="Markdown file to write into; default stdout.")] = None,
) -> None:
    """Print or write the table."""
    recording = record(load_source(model), load_task(task), problems, n, seed)
    text = table(recording, None if start is None else str(start))
    if doc is None:
        print(text)
    else:
        write_between(doc, "learning-rule-table", text)


if __name__ == "__main__":
    typer.run(main)
