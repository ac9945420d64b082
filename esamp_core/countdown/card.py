"""The model card: measures a finished model and writes README.md next to it. No number in it is typed by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from esamp_core.base.environment import installed, processor
from esamp_core.countdown.evaluate import Evaluation, evaluate
from esamp_core.countdown.loop import Progress
from esamp_core.countdown.model import load_folder
from esamp_core.countdown.task import MAX_ATTEMPTS, attempt_text, held_out_problems, solutions

PROBLEMS, SAMPLES = 512, 8
HARD = 3  # a hard problem has at most so many solutions

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [countdown, esamp-core]
---

# Countdown model

A decoder of {parameters:,} parameters (Qwen3 architecture, weights stored as bfloat16) that solves Countdown problems:
four numbers and a target; each step combines two numbers with `+ - * /`; every number on the way is an integer in
1..99. It writes its steps and a verdict on its own result, and may try again, {attempts} attempts in all. It is made
for tests, demonstrations and sampling studies of this library, and knows nothing else.

    prompt  {prompt}
    answer  {answer}

`esamp_core.countdown.load()` gives model and tokenizer, `esamp_core.countdown.check` tells whether an answer is
correct.

## Measured

Held-out problems of the pool `report`, distinct up to the order of the numbers, sampled from the float32 model at
temperature {temperature:g} without filters, judged by `check`. "Hard" problems have at most {hard} solutions. The ± is
1.96 standard errors over problems.

| problems | number | samples each | pass@1 | pass@{samples} | legal last attempt | distinct solutions found |
|---|---|---|---|---|---|---|
{rows}

## Training

| | |
|---|---|
| command | `{command}` |
| started | {started} |
| seed | {seed} |
| phase 1, random solutions of random problems | {phase1} |
| phase 2, own attempts, judged and retried | {phase2} |
| training time | {minutes:.1f} min wall-clock beside other work, {cpu_minutes:.1f} min CPU, {threads} threads |
| CPU | {cpu}, {cores} cores |
| versions | Python {python}, torch {torch}, transformers {transformers} |

Data: problems are generated, from numbers in 1..15 and targets in 10..99; nothing was downloaded. One in sixteen of all
problems is held out by a hash of its sorted numbers and target, in two pools: `tune` for choosing settings, `report`
for the numbers above.
"""


def write_card(out: Path, config: dict[str, Any], progress: Progress, command: str) -> dict[str, Evaluation]:
    """Measure the model saved in ``out`` on the report pool and write ``out/README.md``.

    Args:
        config: the training run's settings, as a dict.
        progress: its final state.
        command: what makes this model.

    Returns:
        The measurements that the card states, ``"all"`` and ``"hard"``.
    """
    model, _ = load_folder(out)
    measured = {
        "all": evaluate(model, held_out_problems("report", PROBLEMS), SAMPLES),
        "hard": evaluate(model, held_out_problems("report", PROBLEMS, max_solutions=HARD), SAMPLES),
    }
    example = held_out_problems("tune", 1)[0]
    phase2 = "left out"
    if config["attempt_steps"]:
        phase2 = (
            f"{config['attempt_steps']} steps of {config['attempt_tokens']} tokens, from {config['attempt_samples']} "
            f"attempts at each of {config['attempt_problems']} problems"
        )
    text = CARD.format(
        parameters=sum(tensor.numel() for tensor in model.parameters()),
        attempts=MAX_ATTEMPTS,
        prompt=example.prompt,
        answer=attempt_text(example, solutions(example)[0], "ok"),
        temperature=measured["all"].temperature,
        hard=HARD,
        samples=SAMPLES,
        rows="\n".join(_row(name, evaluation) for name, evaluation in measured.items()),
        command=_environment() + command,
        started=progress.started,
        seed=config["seed"],
        phase1=f"{config['supervised_steps']} steps of {config['supervised_batch']} fresh problems",
        phase2=phase2,
        minutes=progress.seconds / 60,
        cpu_minutes=progress.cpu_seconds / 60,
        threads=config["threads"],
        cpu=processor(),
        cores=os.cpu_count(),
        **installed("python", "torch", "transformers"),
    )
    (out / "README.md").write_text(text, encoding="utf-8")
    return measured


def _row(name: str, e: Evaluation) -> str:
    pass_at_1 = f"{e.pass_at_1:.1%} ± {1.96 * e.standard_error:.1%}"
    cells = (name, e.problems, e.samples, pass_at_1, f"{e.pass_at_n:.1%}", f"{e.valid:.1%}", f"{e.distinct:.2f}")
    return "| " + " | ".join(map(str, cells)) + " |"


def _environment() -> str:
    """The one environment variable that changes the training time (and nothing else), where it is set."""
    policy = os.environ.get("OMP_WAIT_POLICY")
    return f"OMP_WAIT_POLICY={policy} " if policy else ""
