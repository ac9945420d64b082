"""The Countdown task: problems, solutions, their text, the exact checker and the held-out split.

Combine four numbers with ``+ - * /`` until one is left, and reach the target. Every number on the way is an integer in
1..99, so that each is one token. Most problems have several correct answers, and a program tells which answers are
correct: that makes the task a test bed for samplers that should explore different ideas.

Text format, words separated by single spaces::

    prompt    4 7 8 9 -> 64 :
    attempt   9 + 7 = 16 , 4 8 16 ; 16 * 4 = 64 , 8 64 ; 64 - 8 = 56 no
              (step, numbers still there, step, numbers still there, last step, the writer's own ok or no)
    answer    one to three attempts joined by ``:``; each but the last is meant to be a rejected one (``no``)

The last attempt is the answer; earlier ones are scratch work and are not checked.

This module is plain Python: importing it needs neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from esamp_core.base.errors import ArgumentError

Pool = Literal["tune", "report"]
SolutionKey = tuple[tuple[int, str, int], ...]

COUNT = 4  # numbers per problem
MIN_VALUE, MAX_VALUE = 1, 99  # of every number, intermediate results and the target included
MAX_DRAWN_NUMBER = 15  # generated problems use 1..15: larger numbers leave little to combine below 100
MIN_DRAWN_TARGET = 10  # generated targets are 10..99: smaller ones have very many solutions
MAX_ATTEMPTS = 3

OPERATORS = ("+", "-", "*", "/")
EQUALS, COMMA, STEP_END, PROMPT_END, ARROW = "=", ",", ";", ":", "->"
ATTEMPT_END = PROMPT_END  # one word for "the next attempt starts here", after the prompt and after a rejected attempt
ACCEPT, REJECT = "ok", "no"
PAD, BOS, EOS = "<pad>", "<s>", "</s>"

# The word's position is its token id; the number n has id n.
WORDS: tuple[str, ...] = (
    PAD,
    *(str(value) for value in range(MIN_VALUE, MAX_VALUE + 1)),
    *OPERATORS,
    EQUALS,
    COMMA,
    STEP_END,
    PROMPT_END,
    ARROW,
    ACCEPT,
    REJECT,
    BOS,
    EOS,
)

TOKEN_ID: dict[str, int] = {word: index for index, word in enumerate(WORDS)}

PROMPT_TOKENS = 1 + COUNT + 3  # <s>, the numbers, ->, the target, :
ATTEMPT_TOKENS = 26  # three steps, the numbers after the first two, ok or no, and : or </s>
MAX_NEW_TOKENS = ATTEMPT_TOKENS * MAX_ATTEMPTS

_NUMBERS = {str(value): value for value in range(MIN_VALUE, MAX_VALUE + 1)}

# Another salt is another split: every trained model would then have seen problems that are held out.
_SPLIT_SALT = "esamp-countdown-v1"


@dataclass(frozen=True)
class Problem:
    """Four numbers and a target.

    Args:
        numbers: four integers in 1..99, in the order in which the prompt shows them.
        target: an integer in 1..99.

    Raises:
        ArgumentError: wrong count, or a value that is not an integer in 1..99.
    """

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self) -> None:
        if not isinstance(self.numbers, tuple) or len(self.numbers) != COUNT:
            raise ArgumentError(f"numbers must be a tuple of {COUNT} integers, got {self.numbers!r}")
        for name, value in (*(("numbers", number) for number in self.numbers), ("target", self.target)):
            if type(value) is not int or not MIN_VALUE <= value <= MAX_VALUE:
                raise ArgumentError(f"{name} must be integers in {MIN_VALUE}..{MAX_VALUE}, got {value!r}")

    @property
    def canonical(self) -> Problem:
        """The same problem with its numbers sorted: the unit of the held-out split."""
        return Problem(tuple(sorted(self.numbers)), self.target)

    @property
    def prompt(self) -> str:
        """The prompt's text, ``4 7 8 9 -> 64 :``. The tokenizer adds the begin-of-sequence token."""
        return " ".join((*map(str, self.numbers), ARROW, str(self.target), PROMPT_END))

    @classmethod
    def parse(cls, text: str) -> Problem:
        """The problem in a prompt's text; the final ``:`` may be missing.

        Raises:
            ArgumentError: the text is not four numbers, ``->`` and a target.
        """
        words = text.split()
        if words and words[-1] == PROMPT_END:
            words.pop()
        numbers = [_NUMBERS.get(word) for word in words]
        if len(words) != COUNT + 2 or words[COUNT] != ARROW or None in (*numbers[:COUNT], numbers[-1]):
            raise ArgumentError(f"text must look like '4 7 8 9 -> 64 :' with numbers in 1..99, got {text!r}")
        return cls(tuple(_NUMBERS[word] for word in words[:COUNT]), _NUMBERS[words[-1]])


class Step(NamedTuple):
    """One operation, ``left operator right = result``; ``left >= right`` wherever this module makes one."""

    left: int
    operator: str
    right: int
    result: int


Solution = tuple[Step, ...]  # three steps, in the order in which they are played


@dataclass(frozen=True)
class Verdict:
    """What the checker says about one answer.

    Attributes:
        correct: the last attempt is valid, accepted by its writer (``ok``) and reaches the target.
        valid: the answer has at most three attempts and the last one is well-formed and obeys the rules, whatever
            number it ends with.
        key: of a correct answer, the steps in an order that does not depend on how they were written, so that two
            correct answers are the same solution exactly when their keys are equal; None if not correct.
    """

    correct: bool
    valid: bool
    key: SolutionKey | None


_INVALID = Verdict(correct=False, valid=False, key=None)


def apply(left: int, operator: str, right: int) -> int | None:
    """The result of one operation, or None where the rules forbid it (not an integer in 1..99)."""
    if operator == "+":
        result = left + right
    elif operator == "-":
        result = left - right
    elif operator == "*":
        result = left * right
    elif operator == "/" and right != 0 and left % right == 0:
        result = left // right
    else:
        return None
    return result if MIN_VALUE <= result <= MAX_VALUE else None


@cache
def _steps_of_pair(left: int, right: int) -> tuple[Step, ...]:
    results = ((operator, apply(left, operator, right)) for operator in OPERATORS)
    return tuple(Step(left, operator, right, result) for operator, result in results if result is not None)


def moves(numbers: tuple[int, ...]) -> list[tuple[Step, tuple[int, ...]]]:
    """Every different next step from sorted numbers, each with the sorted numbers it leaves.

    The larger operand stands left: for + and * the order does not matter, for - and / the other one breaks the rules.
    """
    found = []
    seen = set()
    for i in range(1, len(numbers)):
        for j in range(i):
            pair = (numbers[i], numbers[j])
            if pair in seen:
                continue
            seen.add(pair)
            rest = numbers[:j] + numbers[j + 1 : i] + numbers[i + 1 :]
            found += [(step, tuple(sorted((*rest, step.result)))) for step in _steps_of_pair(*pair)]
    return found


def solution_key(steps: Iterable[Step]) -> SolutionKey:
    """Steps as a sorted tuple with the larger operand of + and * first: equal for reorderings of the same steps."""
    return tuple(
        sorted(
            (max(left, right), operator, min(left, right)) if operator in "+*" else (left, operator, right)
            for left, operator, right, _ in steps
        )
    )


def solutions(problem: Problem) -> list[Solution]:
    """Every solution of a problem, one per solution key, found by exhaustive search; sorted by key."""
    found: dict[SolutionKey, Solution] = {}

    def search(numbers: tuple[int, ...], steps: Solution) -> None:
        if len(numbers) == 1:
            if numbers[0] == problem.target:
                found.setdefault(solution_key(steps), steps)
            return
        for step, left_over in moves(numbers):
            search(left_over, (*steps, step))

    search(tuple(sorted(problem.numbers)), ())
    return [found[key] for key in sorted(found)]


def attempt_text(problem: Problem, steps: Solution, verdict: str) -> str:
    """One attempt as text.

    Args:
        problem: whose numbers the steps use.
        steps: three steps that are legal from those numbers.
        verdict: ``"ok"`` or ``"no"``.

    Raises:
        ArgumentError: a step is illegal, or the verdict is neither.
    """
    if verdict not in (ACCEPT, REJECT):
        raise ArgumentError(f"verdict must be {ACCEPT!r} or {REJECT!r}, got {verdict!r}")
    numbers = sorted(problem.numbers)
    words: list[str] = []
    for step in steps:
        if not _play(numbers, step):
            raise ArgumentError(f"steps must be legal from the numbers {problem.numbers}, got {steps!r}")
        words += [str(step.left), step.operator, str(step.right), EQUALS, str(step.result)]
        if len(numbers) > 1:
            words += [COMMA, *map(str, numbers), STEP_END]
    if len(numbers) != 1:
        raise ArgumentError(f"steps must use all numbers {problem.numbers}, got {steps!r}")
    return " ".join((*words, verdict))


def check(problem: Problem, text: str) -> Verdict:
    """Judge an answer: exactly, by replaying its last attempt.

    Args:
        problem: the problem that was asked.
        text: what the tokenizer decodes from the tokens after the prompt, with or without the end-of-sequence token
            (what follows it is ignored). Any text is allowed; malformed answers are not errors but not valid.

    Returns:
        The verdict; see :class:`Verdict`.
    """
    attempts = text.split(EOS, 1)[0].split(ATTEMPT_END)
    if len(attempts) > MAX_ATTEMPTS:
        return _INVALID
    words = attempts[-1].split()
    steps = _parse_attempt(problem, words)
    if steps is None:
        return _INVALID
    correct = words[-1] == ACCEPT and steps[-1].result == problem.target
    return Verdict(correct=correct, valid=True, key=solution_key(steps) if correct else None)


def _play(numbers: list[int], step: Step) -> bool:
    """Replace the step's operands in the sorted numbers by its result; False (numbers spoilt) if that is illegal."""
    for operand in (step.left, step.right):
        if operand not in numbers:
            return False
        numbers.remove(operand)
    numbers.append(step.result)
    numbers.sort()
    return apply(step.left, step.operator, step.right) == step.result


def _parse_attempt(problem: Problem, words: list[str]) -> Solution | None:
    """The steps of a well-formed, legal attempt (its ok or no included), else None."""
    numbers = sorted(problem.numbers)
    steps: list[Step] = []
    at = 0
    while len(numbers) > 1:
        if len(words) < at + 5 or words[at + 3] != EQUALS:
            return None
        left, operator, right, _, result = words[at : at + 5]
        if not (left in _NUMBERS and right in _NUMBERS and result in _NUMBERS):
            return None
        steps.append(Step(_NUMBERS[left], operator, _NUMBERS[right], _NUMBERS[result]))
        if not _play(numbers, steps[-1]):
            return None
        at += 5
        if len(numbers) > 1:  # then the numbers still there are written out, in any order
            end = at + 1 + len(numbers)
            listed = [_NUMBERS.get(word, 0) for word in words[at + 1 : end]]
            if words[at : at + 1] != [COMMA] or sorted(listed) != numbers or words[end : end + 1] != [STEP_END]:
                return None
            at = end + 1
    return tuple(steps) if len(words) == at + 1 and words[at] in (ACCEPT, REJECT) else None


def draw_problem(rng: random.Random) -> tuple[Problem, Solution]:
    """A random solvable problem and the random solution it was made from.

    The four numbers are uniform in 1..15; a walk of uniformly drawn legal steps makes the target, and the draw is
    repeated until that lies in 10..99. Held-out problems are drawn too:
    training goes through :func:`esamp_core.countdown.data.training_stream`, which leaves them out.
    """
    while True:
        numbers = tuple(rng.randint(1, MAX_DRAWN_NUMBER) for _ in range(COUNT))
        left_over = tuple(sorted(numbers))
        steps: Solution = ()
        while len(left_over) > 1:
            choices = moves(left_over)
            if not choices:
                break
            step, left_over = rng.choice(choices)
            steps = (*steps, step)
        if len(left_over) == 1 and left_over[0] >= MIN_DRAWN_TARGET:
            return Problem(numbers, left_over[0]), steps


def _split_bits(problem: Problem) -> int:
    canonical = problem.canonical
    text = f"{_SPLIT_SALT}|{canonical.numbers}|{canonical.target}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big")


def is_held_out(problem: Problem) -> bool:
    """Whether the problem is kept out of training: one in sixteen, by a hash of the sorted numbers and the target."""
    return _split_bits(problem) % 16 == 0


def held_out_pool(problem: Problem) -> Pool | None:
    """The pool of a held-out problem, by a hash bit that the split does not use; None for training problems."""
    if not is_held_out(problem):
        return None
    return "report" if _split_bits(problem) & 0x100 else "tune"


def held_out_problems(pool: Pool, n: int, seed: int = 0, max_solutions: int | None = None) -> list[Problem]:
    """Distinct held-out problems of one pool, drawn as training problems are.

    The pools are disjoint by construction: tune on ``"tune"``, report on ``"report"``. No two of the problems returned
    are equal up to the order of their numbers. Longer lists of the same seed start with the shorter ones.

    Args:
        pool: ``"tune"`` or ``"report"``.
        n: how many, >= 0.
        seed: of the draw.
        max_solutions: keep only problems with at most so many solutions (hard ones); None keeps all.

    Raises:
        ArgumentError: an unknown pool, a negative n, max_solutions < 1, or more problems than could be found.
    """
    if pool not in ("tune", "report"):
        raise ArgumentError(f"pool must be 'tune' or 'report', got {pool!r}")
    if n < 0:
        raise ArgumentError(f"n must be >= 0, got {n}")
    if max_solutions is not None and max_solutions < 1:
        raise ArgumentError(f"max_solutions must be None or >= 1, got {max_solutions}")
    found: list[Problem] = []
    for problem in _distinct(pool, seed):
        if len(found) == n:
            break
        if max_solutions is None or len(solutions(problem)) <= max_solutions:
            found.append(problem)
    if len(found) < n:
        raise ArgumentError(f"n must be at most {len(found)} for pool {pool!r} and these options, got {n}")
    return found


def _distinct(pool: Pool, seed: int) -> Iterator[Problem]:
    """Problems of a pool without repetition; ends when new ones have become rare."""
    rng = random.Random(f"held-out/{pool}/{seed}")
    seen: set[Problem] = set()
    misses = 0
    while misses < 100_000:  # draws in a row without a new problem of the pool, where one in 32 would do at first
        problem, _ = draw_problem(rng)
        if held_out_pool(problem) != pool or problem.canonical in seen:
            misses += 1
            continue
        misses = 0
        seen.add(problem.canonical)
        yield problem
