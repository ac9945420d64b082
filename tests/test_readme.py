"""What the README shows works as shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (block for block in BLOCKS if "countdown.load" in block)
    exec(example, {})
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_transformers_example_runs(embedded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (block for block in BLOCKS if "bindings.hf" in block)
    model, tokenizer = embedded
    exec(example, {"model": model, "tokenizer": tokenizer, "prompts": ["3 7 3 5 -> 41 :", "2 9 4 -> 14 :"]})
    output = capsys.readouterr().out
    assert output.count("3 7 3 5 -> 41 :") == output.count("2 9 4 -> 14 :") == 16


class Model:
    """A stand-in for the reader's own model."""

    def first_block(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens.clamp_min(0), 8).float() + 0.1

    def remaining_blocks(self, shallow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        deep = shallow.roll(1, -1)
        return deep, deep


def test_the_four_verbs_run() -> None:
    (loop,) = (block for block in BLOCKS if "explorer.predict" in block)
    steps = 0

    def still_running(tokens: torch.Tensor) -> list[bool]:
        nonlocal steps
        steps += 1
        return [bool(t != 3) and steps < 12 for t in tokens]

    class LmHead:
        weight = torch.eye(8)

    scope: dict[str, object] = {
        "lm_head": LmHead, "hidden_size": 8, "model": Model(), "still_running": still_running,
        "tokens": torch.zeros(16, dtype=torch.int64),
    }  # fmt: skip
    exec(loop, scope)
    assert steps > 1


def test_links_and_make_targets_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"make ([a-z-]+)", README)) <= set(targets)
