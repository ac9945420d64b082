"""The bed's work: items with prompts, and graders.  Three kinds, all in the words of a small instruct model.

few-shot   three worked examples and a question; the answer is a line, graded by a program
chat       instructions whose rules a program can check, in the model's chat template
creative   openings without a right answer: how far samples lie apart, and how well the model likes them

Items are made from a seed; a hash of its question decides which pool one is in, so that pools share none.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["few-shot", "chat", "creative"]
Pool = Literal["tune", "report"]


@dataclass(frozen=True)
class Item:
    """prompt: what the model continues; of chat and creative work, what the user says.

    asked: the question alone, which decides the pool; default the prompt.
    """

    prompt: str
    correct: Callable[[str], bool] = lambda answer: False
    asked: str = ""


@dataclass(frozen=True)
class Work:
    """A task.  new_tokens: most of an answer; few-shot ones end with their line."""

    name: str
    kind: Kind
    new_tokens: int
    items: Callable[[random.Random], Iterator[Item]]
    long: bool = False

    def pool(self, pool: Pool, count: int) -> list[Item]:
        """The first ``count`` items of a pool; those of a shorter list begin a longer one."""
        chosen = (item for item in self.items(random.Random(self.name)) if pool_of(item.asked or item.prompt) == pool)
        return list(itertools.islice(chosen, count))


def pool_of(question: str) -> Pool:
    return "tune" if hashlib.sha256(question.encode()).digest()[0] % 2 else "report"


def first_integer(text: str) -> int | None:
    found = re.match(r"\s*(-?\d+)", text)
    return int(found[1]) if found else None


def last_integer(text: str) -> int | None:
    found = re.findall(r"-?\d+", text)
    return int(found[-1]) if found else None


Question = tuple[str, str, Callable[[str], bool]]  # what is asked, a right answer, the grader


def few_shot(
    name: str, ask: Callable[[random.Random], Question], new_tokens: int, shots: int = 3, long: bool = False
) -> Work:
    """Every item has its own examples, drawn like its question.  Where few questions are possible they come again."""

    def items(rng: random.Random) -> Iterator[Item]:
        seen: set[str] = set()
        while True:
            *examples, asked = (ask(rng) for _ in range(shots + 1))
            prompt = "".join(f"{question} {answer}\n" for question, answer, _ in examples) + asked[0]
            if prompt not in seen:
                seen.add(prompt)
                yield Item(prompt, asked[2], asked[0])

    return Work(name, "few-shot", new_tokens, items, long)


def is_number(right: int) -> Callable[[str], bool]:
    return lambda answer: first_integer(answer) == right


def ends_with(right: int) -> Callable[[str], bool]:
    return lambda answer: last_integer(answer) == right


def gcd(rng: random.Random) -> Question:
    common, a, b = rng.randint(2, 12), rng.randint(2, 9), rng.randint(2, 9)
    right = math.gcd(common * a, common * b)
    return f"The greatest common divisor of {common * a} and {common * b} is", f"{right}.", is_number(right)


def lcm(rng: random.Random) -> Question:
    a, b = rng.randint(3, 15), rng.randint(3, 15)
    right = math.lcm(a, b)
    return f"The least common multiple of {a} and {b} is", f"{right}.", is_number(right)


def equation(rng: random.Random) -> Question:
    a, x, b = rng.randint(2, 9), rng.randint(2, 15), rng.randint(1, 20)
    return f"If {a}x + {b} = {a * x + b}, then x =", f"{x}.", is_number(x)


def sums(rng: random.Random) -> Question:
    numbers = [rng.randint(5, 40) for _ in range(2)]
    return f"{' + '.join(map(str, numbers))} =", f"{sum(numbers)}", is_number(sum(numbers))


WORDS = (
    "banana", "balloon", "assassin", "committee", "possession", "mississippi", "tennessee", "beekeeper", "bookkeeper",
    "referee", "cheese", "pepper", "coffee", "raccoon", "address", "success", "necessary", "occurrence", "embarrass",
    "millennium",
)  # fmt: skip


def letters(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    letter = rng.choice(sorted(set(word)))
    right = word.count(letter)
    return f'How many times is the letter "{letter}" in "{word}"?', f"{right}", is_number(right)


def binary(rng: random.Random) -> Question:
    n = rng.randint(5, 40)

    def correct(answer: str) -> bool:
        said = re.match(r"\s*([01]+)\b", answer)
        return said is not None and int(said[1], 2) == n

    return f"{n} in binary is", f"{n:b}.", correct


def countdown(rng: random.Random) -> Question:
    while True:
        a, b, c = (rng.randint(2, 9) for _ in range(3))
        left, right = rng.choice("+-*"), rng.choice("+-*")
        text = f"{a} {left} {b} {right} {c}"
        value = eval(text)  # three numbers and two operators, made above
        if value > 0:
            break
    numbers = sorted((a, b, c))
    given = ", ".join(map(str, numbers))

    def correct(answer: str) -> bool:
        said = answer.strip().removesuffix(".")
        if not re.fullmatch(r"\d+ [-+*] \d+ [-+*] \d+", said) or sorted(map(int, re.findall(r"\d+", said))) != numbers:
            return False
        return bool(eval(said) == value)  # digits and operators alone

    return f"With {given} make {value}:", text, correct


def product(rng: random.Random) -> Question:
    a, b = rng.randint(2, 9), rng.randint(11, 29)
    tens, ones = b // 10 * 10, b % 10
    worked = f"{a} * {tens} + {a} * {ones} = {a * tens} + {a * ones} = {a * b}"
    return f"{a} * {b} =", worked, ends_with(a * b)


def euclid(rng: random.Random) -> Question:
    common, a, b = rng.randint(2, 9), rng.randint(2, 6), rng.randint(2, 6)
    x, y = max(common * a, common * b), min(common * a, common * b)
    text, m, n = [], x, y
    while n:
        text.append(f"{m} mod {n} = {m % n}")
        m, n = n, m % n
    return f"gcd({x}, {y}):", f"{', '.join(text)}, so it is {m}", ends_with(m)


def sorting(rng: random.Random) -> Question:
    """reasoning-gym's number_sorting, ascending, its numbers and its grader."""
    import reasoning_gym

    data = reasoning_gym.create_dataset(
        "number_sorting", size=1, seed=rng.randrange(2**31), min_numbers=3, max_numbers=4, min_decimals=0,
        max_decimals=0, min_value=1, max_value=99,
    )  # fmt: skip
    entry = data[0]
    numbers = [int(float(x)) for x in entry["metadata"]["original_numbers"]]
    right = sorted(numbers)
    return (
        f"Sorted from small to large, {', '.join(map(str, numbers))} is",
        ", ".join(map(str, right)),
        lambda answer: [int(x) for x in re.findall(r"\d+", answer)] == right,
    )


def words_of(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", text)


RULES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("in exactly one sentence", lambda t: len(re.findall(r"[.!?](?:\s|$)", t.strip())) == 1),
    ("in all lowercase letters", lambda t: t.strip() != "" and t == t.lower()),
    ("without using the letter z or any comma", lambda t: bool(t.strip()) and "," not in t and "z" not in t.lower()),
    ("in fewer than fifteen words", lambda t: 0 < len(words_of(t)) < 15),
    ("as a list of exactly three bullet points", lambda t: len(re.findall(r"(?m)^\s*[-*\u2022]\s", t)) == 3),
    ("and end with the word 'indeed'", lambda t: words_of(t)[-1:] in (["indeed"], ["Indeed"])),
)
TOPICS = (
    "why the sky is blue", "how bread is made", "what a computer does", "why people dream", "how to boil an egg",
    "what a library is for", "why cats purr", "how rain forms", "what friendship means", "how a bicycle works",
    "why we sleep", "what a river is", "how plants grow", "why music moves us",
)  # fmt: skip


def chat_items(rng: random.Random) -> Iterator[Item]:
    pairs = list(itertools.product(TOPICS, RULES))
    rng.shuffle(pairs)
    for topic, (rule, correct) in pairs:
        yield Item(f"Tell me {topic}, {rule}.", correct)


THINGS = (
    "a red kite", "a broken clock", "a loaf of bread", "an old map", "a blue door", "a silver key", "a black cat",
    "a wooden boat", "a yellow umbrella", "a letter", "a candle", "a green coat", "a violin", "a bucket",
)  # fmt: skip


def story_items(rng: random.Random) -> Iterator[Item]:
    """All four things must be in it, by name: 150 tokens and more."""
    while True:
        things = rng.sample(THINGS, 4)
        names = [thing.split(" ", 1)[1] for thing in things]

        def correct(answer: str, names: list[str] = names) -> bool:
            return all(name in answer.lower() for name in names)

        yield Item(f"Write a short story with {', '.join(things[:-1])} and {things[-1]} in it.", correct)


def sentences_items(rng: random.Random) -> Iterator[Item]:
    """Long answers that must not begin two sentences alike."""
    topics = list(itertools.product(TOPICS, (6, 7, 8)))
    rng.shuffle(topics)

    def grade(number: int) -> Callable[[str], bool]:
        def correct(answer: str) -> bool:
            starts = [words_of(part)[0].lower() for part in re.split(r"[.!?]\s", answer) if words_of(part)][:number]
            return len(starts) == number == len(set(starts))

        return correct

    for topic, number in topics:
        yield Item(
            f"Write a paragraph about {topic}, of at least {number} sentences. Every sentence must begin with another "
            "word.", grade(number),
        )  # fmt: skip


OPENINGS = (
    "Write the opening of a story about {}.", "Write a short poem about {}.", "Invent a product that helps with {}.",
)  # fmt: skip
SUBJECTS = (
    "a lighthouse", "a lost letter", "winter", "a talking dog", "the last train", "a garden on the moon", "old clocks",
    "a baker who cannot taste", "two brothers", "the sea",
)  # fmt: skip


def creative_items(rng: random.Random) -> Iterator[Item]:
    pairs = list(itertools.product(OPENINGS, SUBJECTS))
    rng.shuffle(pairs)
    for opening, subject in pairs:
        yield Item(opening.format(subject))


KINDS_OF_TEXT = (
    "Write the first lines of a play about {}.", "Write a diary entry about {}.", "Describe a painting of {}.",
    "Write a letter to a friend about {}.", "Tell a fable about {}.", "Write a radio advertisement for {}.",
)  # fmt: skip
SCENES = (
    "a bridge in fog", "an empty theatre", "a market at night", "the first snow", "a stubborn goat", "a hidden stair",
    "two rival cooks", "a ship in a bottle", "an honest thief", "a clock without hands", "the smell of rain",
    "a school for robots", "an island of cats", "a very small king",
)  # fmt: skip


def scenes_items(rng: random.Random) -> Iterator[Item]:
    pairs = list(itertools.product(KINDS_OF_TEXT, SCENES))
    rng.shuffle(pairs)
    for kind, scene in pairs:
        yield Item(kind.format(scene))


WORK = (
    few_shot("gcd", gcd, 8),
    few_shot("lcm", lcm, 8),
    few_shot("equation", equation, 8),
    few_shot("sums", sums, 8),
    few_shot("letters", letters, 8),
    few_shot("binary", binary, 12),
    few_shot("countdown", countdown, 16),
    few_shot("sorting", sorting, 32),
    few_shot("product", product, 48),
    few_shot("euclid", euclid, 64),
    Work("chat", "chat", 64, chat_items),
    Work("story", "chat", 180, story_items, long=True),
    Work("sentences", "chat", 200, sentences_items, long=True),
    Work("creative", "creative", 96, creative_items, long=True),
    Work("scenes", "creative", 96, scenes_items),
)
