"""Which versions of Python, PyTorch, Triton, transformers and vLLM were tried together, and how.

``esamp doctor`` shows it beside what is installed; docs/versions.md lists it, and a test keeps the two and the
constraints files the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Environment:
    """Versions that tests have passed with; how: which tests, and when.  vllm: None where it is not installed."""

    python: str
    torch: str
    triton: str
    transformers: str
    vllm: str | None
    how: str

    def version(self, package: str) -> str | None:
        return getattr(self, package, None)


TRIED = (
    Environment("3.11", "2.13.0", "3.9.0", "5.24.0", None, "make test, at every change"),
    Environment("3.11", "2.13.0", "3.6.0", "5.10.1", None, "make test-oldest, at every change; all tests, 2026-11-26"),
    Environment("3.11", "2.13.0", "3.9.0", "5.19.0", "0.32.0", "make test-vllm, at every change"),
    Environment("3.12", "2.11.0", "3.6.0", "5.17.0", None, "make rehearse-gpu, at every change; all tests, 2026-11-26"),
    Environment("3.13", "2.14.1", "3.8.0", "5.24.0", None, "all tests, 2026-11-26"),
)
"""On the CPU, without a GPU, each of them."""


def tried_versions(package: str) -> list[str]:
    """Of one package, the oldest first."""
    return sorted({version for e in TRIED if (version := e.version(package)) is not None}, key=release)


def release(version: str) -> tuple[int, int]:
    """Major and minor: (2, 13) of "2.13.0+cpu"; (0, 0) of what is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def untried(versions: Mapping[str, str]) -> list[str]:
    """Packages whose installed release is older, or newer, than all that were tried."""
    spans = {package: sorted(map(release, tried_versions(package))) for package in versions}
    return [p for p, version in versions.items() if not spans[p][0] <= release(version) <= spans[p][-1]]
