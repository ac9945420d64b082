"""Training data: the stream of problems, and the sequences of both training phases as tensors.

Everything here is a pure function of a seed and an index, so a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from esamp_core.countdown.task import (
    ACCEPT,
    ATTEMPT_END,
    BOS,
    EOS,
    PAD,
    PROMPT_TOKENS,
    REJECT,
    TOKEN_ID,
    Problem,
    Solution,
    apply,
    attempt_text,
    check,
    draw_problem,
    is_held_out,
)

IGNORE = -100  # cross_entropy's label for "no loss here"


@dataclass(frozen=True)
class Sequence:
    """Words of one training sequence after the prompt, and which of them are learned."""

    problem: Problem
    words: list[str]
    learned: list[bool]


def training_stream(seed: int, purpose: str, index: int) -> Iterator[tuple[Problem, Solution]]:
    """Endless training problems, each with one random solution. The only place that leaves out held-out problems.

    Args:
        seed: of the training run.
        purpose: ``"supervised"`` or ``"attempts"``; streams of different purposes are independent.
        index: number of the stream: the step of the supervised phase, 0 for attempts.
    """
    rng = random.Random(f"{purpose}/{seed}/{index}")
    while True:
        problem, steps = draw_problem(rng)
        if not is_held_out(problem):
            yield problem, steps


def supervised_batch(seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels [size, prompt + attempt] int64 of one step of phase 1: one accepted random solution each."""
    stream = training_stream(seed, "supervised", step)
    return to_tensors([accepted(*next(stream)) for _ in range(size)])


def accepted(problem: Problem, steps: Solution) -> Sequence:
    """A single attempt that is right."""
    words = [*attempt_text(problem, steps, ACCEPT).split(), EOS]
    return Sequence(problem, words, [True] * len(words))


def retried(problem: Problem, wrong: list[list[str]], right: list[str]) -> Sequence:
    """Wrong attempts, each rejected, then a right one that is accepted.

    Of the wrong attempts only what a good writer would still do is learned: the true result of the last step (the
    last word), the rejection and the new start.

    Args:
        wrong, right: attempts as words, without their ok or no.
    """
    words: list[str] = []
    learned: list[bool] = []
    for attempt in wrong:
        words += [*attempt, REJECT, ATTEMPT_END]
        learned += [False] * (len(attempt) - 1) + [True] * 3
    words += [*right, ACCEPT, EOS]
    learned += [True] * (len(right) + 2)
    return Sequence(problem, words, learned)


def to_tensors(sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """Token ids (right-padded) and labels (IGNORE where nothing is learned), both [n, longest] int64."""
    length = PROMPT_TOKENS + max(len(sequence.words) for sequence in sequences)
    ids = torch.full((len(sequences), length), TOKEN_ID[PAD], dtype=torch.int64, device="cpu")
    labels = torch.full((len(sequences), length), IGNORE, dtype=torch.int64, device="cpu")
    for row, sequence in enumerate(sequences):
        completion = [TOKEN_ID[word] for word in sequence.words]
        ends = PROMPT_TOKENS + len(completion)
        ids[row, :ends] = torch.tensor(prompt_ids(sequence.problem) + completion, dtype=torch.int64, device="cpu")
        kept = [token if learned else IGNORE for token, learned in zip(completion, sequence.learned, strict=True)]
        labels[row, PROMPT_TOKENS:ends] = torch.tensor(kept, dtype=torch.int64, device="cpu")
    return ids, labels


def prompt_ids(problem: Problem) -> list[int]:
    """What the tokenizer makes of the prompt, without the tokenizer's overhead per call."""
    return [TOKEN_ID[word] for word in (BOS, *problem.prompt.split())]


def sort_attempts(problem: Problem, attempts: list[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """The model's first attempts as (right, legal but wrong); ill-formed ones are dropped.

    A model of phase 1 has only seen right answers and therefore likes to write the target as the last result whatever
    the operation gives. The last word is set to the true result first, which makes an honest wrong attempt of it.

    Args:
        attempts: words of each attempt without its ok or no, ``ATTEMPT_TOKENS - 2`` of them.
    """
    right, wrong = [], []
    for words in attempts:
        left, operator, other = words[-5], words[-4], words[-3]
        if left.isdigit() and other.isdigit():
            result = apply(int(left), operator, int(other))
            words = words if result is None else [*words[:-1], str(result)]
        verdict = check(problem, " ".join((*words, ACCEPT)))
        if verdict.correct:
            right.append(words)
        elif verdict.valid:
            wrong.append(words)
    return right, wrong


def retry_sequences(
    problem: Problem, demonstration: Solution, attempts: list[list[str]], rng: random.Random
) -> list[Sequence]:
    """Up to two training sequences of phase 2 from the model's own attempts at one problem.

    The right attempt is mostly the one the model finds most often, so that it becomes surer of what it can do; where
    the model found none, the demonstration stands in after a wrong attempt. Zero to two wrong attempts come first.
    """
    right, wrong = sort_attempts(problem, attempts)
    if not right and not wrong:
        return []
    favourite = list(Counter(map(tuple, right)).most_common(1)[0][0]) if right else []
    made = []
    for _ in range(2):
        retries = min(len(wrong), rng.choice((0, 1, 1, 2)))
        if right:
            answer = favourite if rng.random() < 0.8 else rng.choice(right)
        else:
            retries = max(retries, 1)
            answer = attempt_text(problem, demonstration, ACCEPT).split()[:-1]
        made.append(retried(problem, rng.sample(wrong, retries), answer))
    return made


def by_length(ids: Tensor) -> list[tuple[int, Tensor]]:
    """(length, row indices) for each number of attempts that occurs: batches of equal lengths need no padding."""
    lengths = (ids != TOKEN_ID[PAD]).sum(1)
    return [(length, (lengths == length).nonzero()[:, 0]) for length in sorted(set(lengths.tolist()))]
