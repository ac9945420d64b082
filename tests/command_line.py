"""``esamp`` in this process, and inputs as people and attackers have them."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import strategies as st

from esamp_core import cli


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Esamp = Callable[..., Finished]


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Esamp:
    """For a fixture: loading torch and transformers anew for every mistake would take minutes."""

    def run(*arguments: str, stdin: str | bytes = "", **environment: str) -> Finished:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["esamp", *arguments])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="ascii"))
            for name, value in {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb", **environment}.items():
                patch.setenv(name, value)
            try:
                cli.main()
                code: object = 0
            except SystemExit as stop:
                code = stop.code
        assert code is None or isinstance(code, int)
        return Finished(code or 0, *capsys.readouterr())

    return run


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*_: object) -> None:
        raise AssertionError("a model was loaded")

    for name in ("generate", "calibrate"):
        monkeypatch.setattr(f"esamp_core.cli.{name}.load_model", load_model)


def is_one_line(run: Finished, message: str) -> None:
    assert run.returncode == 2 and message in run.stderr, run
    assert run.stderr.startswith("esamp: error: ") and run.stderr.count("\n") == 1, run.stderr


HOSTILE = [
    None, True, False, 0, 1, -1, 2**62, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "\ud800", "\x00", "\u202e\u2066</script><script>", "y" * 3000, [], {}, [[]], [None], ["a", 1], {"a": {}},
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, content: Any) -> Any:
    """A JSON value with one or two places changed: another value, nothing, or one field more."""
    whole = [copy.deepcopy(content)]
    for _ in range(draw(st.integers(1, 2))):
        node: Any = whole
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw(st.sampled_from(keys))
            deeper = isinstance(node[key], (dict, list)) and len(node[key]) > 0
            if not deeper or draw(st.integers(0, 3)) == 0:
                break
            node = node[key]
        what = draw(st.sampled_from(["change", "change", "drop", "more"]))
        value = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        if what == "drop" and node is not whole:
            del node[key]
        elif what == "more" and isinstance(node, dict):
            node["more"] = value
        elif what == "more" and node is not whole:
            node.append(value)
        else:
            node[key] = value
        if not isinstance(whole[0], (dict, list)) or not whole[0]:
            break
    return whole[0]
