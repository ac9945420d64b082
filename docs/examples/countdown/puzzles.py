"""What countdown.yaml calls."""

from typing import Any

from datasets import Dataset

from esamp_core import countdown


def puzzles(count: int = 16, **_: Any) -> dict[str, Dataset]:
    problems = countdown.held_out_problems("tune", count)
    return {"test": Dataset.from_dict({"prompt": [p.prompt for p in problems]})}


def judged(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    (answers,) = results
    problem = countdown.Problem.parse(doc["prompt"])
    solved = [countdown.check(problem, answer).correct for answer in answers]
    return {"solved_by_one": sum(solved) / len(solved), "solved_by_any": float(any(solved))}
