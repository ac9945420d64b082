"""What the README and the docs show works as shown: each example is a script, run as a reader runs it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from esamp_core.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]
BLOCKS = [(name, block) for name, text in TEXT.items() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def samples_of(stdout: str) -> list[str]:
    """Lines that are attempts at a Countdown problem."""
    return [line for line in stdout.splitlines() if re.search(r"\d [-+*/] \d+ = \d+", line)]


def says_four_samples(stdout: str) -> bool:
    return len(samples_of(stdout)) == len(stdout.splitlines()) == 4 and all(
        s.split()[-1][0] == "-" for s in samples_of(stdout)
    )


def says_sixteen_each(stdout: str) -> bool:
    return stdout.count("3 7 3 5 -> 41 :") == stdout.count("2 9 4 -> 14 :") == 16


def says_sixteen_siblings(stdout: str) -> bool:
    return len(set(samples_of(stdout))) > 1 and len(samples_of(stdout)) == 16


def says_the_same_twice(stdout: str) -> bool:
    pairs = [tuple(map(float, line.split())) for line in stdout.splitlines()]
    return len(pairs) == 4 and all(a < 0 and abs(a - b) < 0.05 for a, b in pairs)


# What marks an example, and what it prints.
EXAMPLES: dict[str, Callable[[str], bool]] = {
    "import SamplingParams, countdown, generate": says_four_samples,
    "bindings.hf import explore": says_sixteen_each,
    "explorer.predict": says_sixteen_siblings,
    "decoder.replay": says_the_same_twice,
}
ELSEWHERE = ("from vllm import", "from trl import")  # run in environments of their own: tests/vllm_engine, tests/rl


def test_every_example_is_known() -> None:
    marks = [*EXAMPLES, *ELSEWHERE]
    assert [sum(mark in block for _, block in BLOCKS) for mark in marks] == [1] * len(marks)
    assert len(BLOCKS) == len(marks)


@pytest.mark.parametrize("mark", EXAMPLES)
def test_examples_run_as_they_stand(mark: str, tmp_path: Path) -> None:
    (block,) = (block for _, block in BLOCKS if mark in block)
    script = tmp_path / "example.py"
    script.write_text(block, encoding="utf-8")
    # A reader's shell: another folder, and none of what the tests set.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert EXAMPLES[mark](run.stdout), run.stdout


def test_links_and_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for name, text in TEXT.items():
        for target in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", text):
            assert ((ROOT / name).parent / target).exists(), (name, target)
        assert set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.MULTILINE)) <= set(targets), name


def test_packages_to_install_exist() -> None:
    """Nothing of ours is on a registry: it is installed from the folder, with extras that it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    commands = [
        c for text in TEXT.values() for c in re.findall(r"^ {4}pip install (.*)$|`pip install ([^`]*)`", text, re.M)
    ]
    assert commands
    for command in commands:
        for word in shlex.split("".join(command)):
            assert not re.match(r"esamp[-_]core", word), word
            if extras := re.fullmatch(r"\.\[(.*)\]", word):
                assert set(extras[1].split(",")) <= set(project["optional-dependencies"]), word


def test_commands_have_the_options_that_are_shown() -> None:
    group = typer.main.get_command(app.app)
    shown = [
        c for text in TEXT.values() for c in re.findall(r"`esamp ([a-z]+[^`]*)`|^ {4}esamp (.*)$", text, re.MULTILINE)
    ]
    assert shown
    for command in shown:
        name, *words = shlex.split("".join(command))
        params = group.commands[name].params  # type: ignore[attr-defined]
        options = {option for p in params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert {word for word in words if re.match(r"-[-a-z]", word)} <= options, command
