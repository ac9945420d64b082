"""What a quality study samples: a model and a task whose answers a program can check.

A task is a module (``--task package.module``) or any object with the four names of :class:`Task`; the embedded
Countdown task is the default, and ``countdown-hard`` its problems with few solutions.  Tuning and reporting use
different pools, which a task must keep disjoint.
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn

from esamp_core import countdown
from esamp_core.base.errors import ArgumentError
from esamp_core.models.parts import ModelParts, find_parts

Pool = Literal["tune", "report"]
POOLS: tuple[Pool, ...] = ("tune", "report")


class Verdict(Protocol):
    """What the checker says about one answer; ``countdown.Verdict`` is one."""

    @property
    def correct(self) -> bool: ...

    @property
    def valid(self) -> bool:
        """Whether the answer obeys the rules, right or wrong."""

    @property
    def key(self) -> Hashable | None:
        """Of a correct answer: equal exactly for answers that are the same solution."""


class Task(Protocol):
    """Problems, prompts and a checker."""

    max_new_tokens: int

    def problems(self, pool: Pool, count: int) -> Sequence[Any]:
        """Distinct problems; the first of a longer list are those of a shorter one."""

    def prompt(self, problem: Any) -> str: ...

    def check(self, problem: Any, answer: str) -> Verdict: ...


class CountdownTask:
    """The embedded task; see ``esamp_core.countdown``."""

    max_new_tokens = countdown.MAX_NEW_TOKENS

    def problems(self, pool: Pool, count: int) -> Sequence[countdown.Problem]:
        return countdown.held_out_problems(pool, count)

    def prompt(self, problem: countdown.Problem) -> str:
        return problem.prompt

    def check(self, problem: countdown.Problem, answer: str) -> countdown.Verdict:
        return countdown.check(problem, answer)


class HardCountdownTask(CountdownTask):
    """Problems with few solutions, none of them among the first of the plain task: room above Pass@32."""

    max_solutions = 3
    skipped = 200  # what the main table reports

    def problems(self, pool: Pool, count: int) -> Sequence[countdown.Problem]:
        reported = {p.canonical for p in countdown.held_out_problems(pool, self.skipped)}
        hard = countdown.held_out_problems(pool, count + self.skipped, max_solutions=self.max_solutions)
        return [p for p in hard if p.canonical not in reported][:count]


TASKS: dict[str, type[Task]] = {"countdown": CountdownTask, "countdown-hard": HardCountdownTask}


def load_task(name: str) -> Task:
    """A name of ``TASKS``, or a module with Task's four names.  Raises ArgumentError."""
    if name in TASKS:
        return TASKS[name]()
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ArgumentError(f"--task {name!r} cannot be imported: {error}") from None
    missing = [n for n in ("max_new_tokens", "problems", "prompt", "check") if not hasattr(module, n)]
    if missing:
        raise ArgumentError(f"--task {name!r} must have {', '.join(missing)}")
    return cast(Task, module)


def disjoint_problems(task: Task, pool: Pool, count: int) -> Sequence[Any]:
    """The first problems of a pool.  Raises ArgumentError if any is in the other pool's list or appears twice."""
    chosen = task.problems(pool, count)
    (other,) = (p for p in POOLS if p != pool)
    prompts = [task.prompt(p) for p in chosen]
    shared = set(prompts) & {task.prompt(p) for p in task.problems(other, count)}
    if shared or len(set(prompts)) != len(prompts):
        raise ArgumentError(f"problems of the pools must be distinct and disjoint, got {sorted(shared)[:3]} twice")
    return chosen


@dataclass(frozen=True)
class Source:
    """A model that can be sampled from, with its tokenizer and what was found in it."""

    name: str
    model: nn.Module
    tokenizer: Any

    @cached_property
    def parts(self) -> ModelParts:
        return find_parts(self.model)

    @cached_property
    def stop_ids(self) -> list[int]:
        stop = self.model.generation_config.eos_token_id
        return list(stop) if isinstance(stop, (list, tuple)) else [stop]

    @cached_property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.stop_ids[0] if pad is None else int(pad)

    def encode(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt)["input_ids"])


def load_source(name: str, device: str = "cpu") -> Source:
    """``"countdown"`` or a folder or hub name of a transformers model, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = countdown.PATH if name == "countdown" else name
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    model = model.to(device)
    label = name if name == "countdown" else Path(name).name
    return Source(label, model, AutoTokenizer.from_pretrained(path))
