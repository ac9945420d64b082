"""The Countdown task: solver, checker, tokenizer and split against independent oracles."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esamp_core import countdown
from esamp_core.countdown import (
    Problem,
    attempt_text,
    check,
    draw_problem,
    held_out_problems,
    is_held_out,
    solution_key,
    solutions,
)
from esamp_core.countdown.model import build_tokenizer
from esamp_core.countdown.task import ATTEMPT_TOKENS, MAX_NEW_TOKENS, PROMPT_TOKENS, TOKEN_ID, WORDS

seeds = st.integers(0, 2**32 - 1)
Key = tuple[tuple[int, str, int], ...]


def drawn(seed: int) -> Problem:
    return draw_problem(random.Random(seed))[0]


def calculate(left: Fraction, operator: str, right: Fraction) -> Fraction | None:
    """Exact arithmetic; None unless the result is an integer in 1..99."""
    if operator == "/" and right == 0:
        return None
    result = {"+": left + right, "-": left - right, "*": left * right, "/": left / right if right else Fraction(0)}
    value = result[operator]
    return value if value.denominator == 1 and 1 <= value <= 99 else None


def canonical_step(left: int, operator: str, right: int) -> tuple[int, str, int]:
    return (right, operator, left) if operator in ("+", "*") and right > left else (left, operator, right)


def expressions(numbers: tuple[int, ...]) -> Iterator[tuple[Fraction, Key]]:
    """Every value of every expression tree over all the numbers, with its steps: by splitting the numbers in two."""
    if len(numbers) == 1:
        yield Fraction(numbers[0]), ()
        return
    for picked in range(1, 2 ** len(numbers) - 1):
        one = tuple(number for index, number in enumerate(numbers) if picked >> index & 1)
        two = tuple(number for index, number in enumerate(numbers) if not picked >> index & 1)
        for (left, left_steps), (right, right_steps) in product(list(expressions(one)), list(expressions(two))):
            for operator in "+-*/":
                value = calculate(left, operator, right)
                if value is not None:
                    step = canonical_step(int(left), operator, int(right))
                    yield value, tuple(sorted((*left_steps, *right_steps, step)))


def judge(problem: Problem, text: str) -> bool:
    """Whether an answer is correct, by regular expressions and fractions."""
    attempts = text.split("</s>")[0].split(":")
    step = r"(\d+) ([-+*/]) (\d+) = (\d+)"
    match = re.fullmatch(rf"{step} , (\d+ \d+ \d+) ; {step} , (\d+ \d+) ; {step} ok", attempts[-1].strip())
    if len(attempts) > 3 or match is None:
        return False
    parts = match.groups()
    if any(not re.fullmatch("[1-9][0-9]?", number) for part in parts for number in re.findall(r"\d+", part)):
        return False
    left_over = sorted(problem.numbers)
    for left, operator, right, result, listed in (parts[0:5], parts[5:10], (*parts[10:14], None)):
        for operand in (int(left), int(right)):
            if operand not in left_over:
                return False
            left_over.remove(operand)
        if calculate(Fraction(int(left)), operator, Fraction(int(right))) != int(result):
            return False
        left_over = sorted([*left_over, int(result)])
        if listed is not None and sorted(map(int, listed.split())) != left_over:
            return False
    return left_over == [problem.target]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=4, max_size=4), st.integers(0, 999))
def test_solver_finds_exactly_the_solutions_of_the_brute_force(numbers: list[int], pick: int) -> None:
    by_value: dict[int, set[Key]] = {}
    for value, steps in expressions(tuple(numbers)):
        by_value.setdefault(int(value), set()).add(steps)
    targets = sorted(by_value)
    for target in {*targets[pick % max(1, len(targets)) :: 7], 97}:
        found = solutions(Problem(tuple(numbers), target))
        assert {solution_key(steps) for steps in found} == by_value.get(target, set())
        assert len(found) == len(by_value.get(target, set()))


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_every_solution_checks_as_correct(seed: int) -> None:
    problem = drawn(seed)
    found = solutions(problem)
    assert found
    keys = set()
    for steps in found:
        for ending in ("", " </s>", " </s> 3 junk"):
            verdict = check(problem, attempt_text(problem, steps, "ok") + ending)
            assert verdict.correct and verdict.valid and verdict.key == solution_key(steps)
        keys.add(verdict.key)
        assert not check(Problem(problem.numbers, problem.target % 99 + 1), attempt_text(problem, steps, "ok")).correct
    assert len(keys) == len(found)


@settings(max_examples=300, deadline=None)
@given(seeds, st.data())
def test_mutated_answers_are_judged_as_the_oracle_judges_them(seed: int, data: st.DataObject) -> None:
    problem = drawn(seed)
    words = attempt_text(problem, data.draw(st.sampled_from(solutions(problem))), "ok").split()
    at = data.draw(st.integers(0, len(words) - 1))
    other = data.draw(st.sampled_from([word for word in WORDS if word != words[at]]))
    kind = data.draw(st.sampled_from(["replace", "insert", "drop", "swap"]))
    if kind == "swap":
        to = data.draw(st.integers(0, len(words) - 1))
        words[at], words[to] = words[to], words[at]
    else:
        words[at : at + 1] = {"replace": [other], "insert": [other, words[at]], "drop": []}[kind]
    text = " ".join(words)
    verdict = check(problem, text)
    assert verdict.correct == judge(problem, text)
    assert (verdict.key is not None) == verdict.correct


@settings(max_examples=200, deadline=None)
@given(seeds, st.data())
def test_one_changed_number_makes_an_answer_wrong(seed: int, data: st.DataObject) -> None:
    problem = drawn(seed)
    words = attempt_text(problem, data.draw(st.sampled_from(solutions(problem))), "ok").split()
    at = data.draw(st.sampled_from([index for index, word in enumerate(words) if word.isdigit()]))
    words[at] = data.draw(st.sampled_from([word for word in WORDS if word.isdigit() and word != words[at]]))
    assert not check(problem, " ".join(words)).correct


def test_the_last_attempt_is_the_answer() -> None:
    problem = Problem((4, 7, 8, 9), 64)
    right = "9 + 7 = 16 , 4 8 16 ; 16 * 4 = 64 , 8 64 ; 64 - 8 = 56 ok"
    wrong = right.replace("ok", "no")
    assert check(Problem((4, 7, 8, 9), 56), right).correct
    verdict = check(problem, right)
    assert verdict.valid and not verdict.correct and verdict.key is None
    good = attempt_text(problem, solutions(problem)[0], "ok")
    assert check(problem, f"{wrong} : {good} </s>").correct
    assert check(problem, f"{wrong} : {wrong} : {good}").correct
    assert not check(problem, f"{wrong} : {wrong} : {wrong} : {good}").valid  # a fourth attempt
    assert not check(problem, f"{good} : {wrong}").correct
    assert not check(problem, good.replace("ok", "no")).correct  # an answer that its writer rejects
    assert not check(problem, f"{good} :").valid  # cut off at the start of another attempt
    assert not check(problem, f"</s> {good}").valid
    assert not check(problem, "").valid


def test_the_key_forgets_the_order_of_steps_and_operands() -> None:
    problem = Problem((1, 2, 3, 4), 21)
    one = "1 + 2 = 3 , 3 3 4 ; 3 + 4 = 7 , 3 7 ; 3 * 7 = 21 ok"
    two = "4 + 3 = 7 , 7 2 1 ; 2 + 1 = 3 , 7 3 ; 7 * 3 = 21 ok"
    assert check(problem, one).key == check(problem, two).key == ((2, "+", 1), (4, "+", 3), (7, "*", 3))


@pytest.mark.parametrize(
    ("numbers", "target", "named"),
    [
        ((1, 2, 3), 4, "numbers"),
        ((1, 2, 3, 100), 4, "numbers"),
        ((1, 2, 3, 4), 0, "target"),
        ((1, 2, 3, 4), 5.0, "target"),
    ],
)
def test_problems_are_checked_when_made(numbers: tuple[int, ...], target: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Problem(numbers, target)


def test_prompts_parse_back() -> None:
    problem = drawn(3)
    assert Problem.parse(problem.prompt) == Problem.parse(problem.prompt.removesuffix(" :")) == problem
    for text in ("", "1 2 3 4 5", "1 2 3 -> 4", "1 2 3 4 -> 100", "1 2 3 4 -> x :", "1 2 3 4 5 -> 6", "1 2 3 -> 4 5"):
        with pytest.raises(ValueError, match="text"):
            Problem.parse(text)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([word for word in WORDS if not word.startswith("<")]), min_size=1))
def test_tokenizer_round_trip(embedded: tuple[Any, Any], words: list[str]) -> None:
    tokenizer = embedded[1]
    text = " ".join(words)
    ids = tokenizer(text).input_ids
    assert ids == [TOKEN_ID["<s>"], *(TOKEN_ID[word] for word in words)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids) == f"<s> {text}"
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids


def test_tokenizer_files_are_the_built_ones(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    tokenizer = embedded[1]
    build_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (countdown.PATH / "tokenizer.json").read_text()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert len(tokenizer) == len(WORDS) == len(set(WORDS))
    padded = tokenizer(["1 2", "1 2 3"], padding=True)
    assert padded.input_ids[0][0] == tokenizer.pad_token_id and padded.attention_mask[0] == [0, 1, 1, 1]
    with pytest.raises(Exception, match="UNK"):
        tokenizer("1 2 3 4 -> 100 :")


def test_lengths_are_what_the_constants_say(embedded: tuple[Any, Any]) -> None:
    problem = drawn(0)
    assert len(embedded[1](problem.prompt).input_ids) == PROMPT_TOKENS
    assert len(attempt_text(problem, solutions(problem)[0], "ok").split()) + 1 == ATTEMPT_TOKENS
    assert MAX_NEW_TOKENS == 3 * ATTEMPT_TOKENS


def test_split_ignores_the_order_of_numbers_and_never_changes() -> None:
    problem = held_out_problems("report", 1)[0]
    assert is_held_out(Problem(problem.numbers[::-1], problem.target))
    # the embedded model was trained on the other side of this very split
    pinned = [Problem((1, 2, 10, 11), 22), Problem((6, 11, 13, 15), 45)]
    assert [problem.canonical for problem in held_out_problems("report", 2, seed=1)] == pinned
    rng = random.Random(0)
    share = sum(is_held_out(draw_problem(rng)[0]) for _ in range(8000)) / 8000
    assert abs(share - 1 / 16) < 4 * math.sqrt(1 / 16 * 15 / 16 / 8000)


def test_pools_are_disjoint_and_distinct() -> None:
    tune, report = ({problem.canonical for problem in held_out_problems(pool, 200)} for pool in ("tune", "report"))
    assert len(tune) == len(report) == 200
    assert not tune & report
    assert all(map(is_held_out, tune | report))
    assert all(countdown.held_out_pool(problem) == "tune" for problem in tune)
    assert held_out_problems("tune", 5) == held_out_problems("tune", 50)[:5] != held_out_problems("tune", 5, seed=1)
    hard = held_out_problems("tune", 8, max_solutions=2)
    assert all(1 <= len(solutions(problem)) <= 2 for problem in hard)


@pytest.mark.parametrize(
    ("arguments", "named"), [(("train", 1), "pool"), (("tune", -1), "n"), (("tune", 1, 0, 0), "max_")]
)
def test_held_out_problems_names_bad_arguments(arguments: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        held_out_problems(*arguments)
