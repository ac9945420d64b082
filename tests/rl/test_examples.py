"""The examples of docs/examples run, and say what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
GRPO = "docs/examples/grpo.py"


def printed(*arguments: Path | str, cwd: Path = ROOT) -> str:
    run = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_the_example_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs/rl.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "from trl import" in b)
    script = tmp_path / "example.py"
    script.write_text(block, encoding="utf-8")
    out = printed(script, cwd=tmp_path)
    assert len(re.findall("frac_reward_zero_std", out)) == 2
    # The loss is of completions that were drawn from the very weights: nothing is clipped.
    assert len(re.findall("'clip_ratio/region_mean': '0'", out)) == 2


@pytest.mark.parametrize("beta", ["0", "0.5"])
def test_grpo_on_the_embedded_model(beta: str) -> None:
    out = printed(GRPO, "--steps", "2", "--prompts", "2", "--siblings", "4", "--beta", beta)
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+)% +([\d.]+)%$", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "2"]
    assert all(float(row[2]) in (0, 50, 100) for row in rows)  # of two groups
    if beta == "0":
        assert all(row[3] == "0.0" for row in rows)  # on policy: no ratio to clip


def test_grpo_on_a_task_of_reasoning_gym(tmp_path: Path) -> None:
    tiny_model(max_position_embeddings=512).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    sizes = ("--steps", "2", "--prompts", "2", "--siblings", "4", "--tokens", "4")
    out = printed(GRPO, "--model", str(tmp_path), "--task", "gcd", *sizes)
    assert "informative groups" in out and len(re.findall(r"%$", out, re.MULTILINE)) == 2


def test_the_command_of_the_evaluation_page() -> None:
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    (command,) = re.findall(
        r"^    python (-m esamp_core.bindings.lm_eval run .*\\\n.* --tasks countdown)$", page, re.MULTILINE
    )
    out = printed(*command.replace("\\\n", " ").split())
    one, several = (
        float(re.search(rf"{name} *\|[^|]*\| *([\d.]+)", out)[1]) for name in ("solved_by_one", "solved_by_any")
    )
    assert 0 < one < several < 1
