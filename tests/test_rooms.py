"""The library's rooms: which stands on which, that none is entered by a back door, and what one decode step visits."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from floor_plan import ROOT, File, files, imports_of, is_under
from visits import Visits

from esamp_core import SamplingParams, countdown
from esamp_core.decoder import Decoder, loop

# What each room imports of the others, no more and no less, at any time: also within functions, and for types alone.
# "esamp_core" is the package's own face, "sample" the public face for custom decoders.
STANDS_ON = {
    "base": set(),
    "reference": {"base"},
    "ops": {"base", "reference", "kernels"},
    "models": {"base", "reference"},
    "explorer": {"base", "reference", "ops"},
    "report": {"base"},
    "countdown": {"base", "models"},
    "decoder": {"base", "ops", "models", "explorer"},
    "sample": {"base", "ops", "explorer"},
    "esamp_core": {"decoder", "sample"},
    "calibration": {"base", "reference", "models", "explorer", "decoder"},
    "cli": {"base", "ops", "models", "report", "countdown", "decoder", "calibration", "esamp_core"},
    "bindings": {"base", "models", "explorer", "decoder"},
    "kernels": set(),
}
MOST_FLOORS = 8
FACES = 50  # lines of a room's __init__.py, which only hands names on
LIBRARY = [file for file in files() if file.room in ("kernels", "esamp_core", "bindings")]
MODULES = {file.module: file for file in LIBRARY}
# Underscored names of others that are meant to be used.
NO_SECRETS = {"_replace", "_asdict", "_fields", "_make", "_orig_mod", "_getframe", "_version"}
# And one that is not, for want of another way: the LoRA adapters of vLLM's V1 batch stand nowhere else.
NO_SECRETS |= {"_last_mapping"}


def room_of(module: str) -> str:
    """The library's room that a module of it is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def modules_named(file: File) -> set[str]:
    """The library's modules that a file imports; a name that is no module is looked for in its package."""
    found = set()
    for entry in imports_of(file.source, file.module, file.is_package):
        if is_under(entry.name, "esamp_core"):
            name = entry.name if entry.name in MODULES else entry.name.rpartition(".")[0]
            found.add(name if name in MODULES else name.rpartition(".")[0])
    return found - {file.module}


def arrows(of: Iterable[File]) -> dict[str, set[str]]:
    """Room -> the other rooms that its files import."""
    result: dict[str, set[str]] = {}
    for file in of:
        here = result.setdefault(room_of(file.module), set())
        here |= {room_of(name) for name in modules_named(file)} - {room_of(file.module)}
    return result


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Room -> its floor: one above the highest that it stands on.  Raises CycleError."""
    result: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        result[room] = 1 + max((result[below] for below in graph.get(room, ())), default=0)
    return result


def test_rooms_stand_on_what_the_plan_says() -> None:
    assert arrows(LIBRARY) == STANDS_ON


def test_the_house_is_low() -> None:
    assert max(floors(STANDS_ON).values()) <= MOST_FLOORS


def test_the_readme_draws_the_same_house() -> None:
    """Its table of rooms: their floors, and what each stands on beside the ground floor."""
    rows = re.findall(r"^\| (\d) \| `([\w.]+)/?` \| .* \|([^|]*)\|$", (ROOT / "README.md").read_text("utf-8"), re.M)
    names = {"__init__.py": "esamp_core", "sample.py": "sample"}
    drawn = {names.get(room, room): (int(floor), set(re.findall(r"[\w.]+", below))) for floor, room, below in rows}
    want = {
        room: (floors(STANDS_ON)[room], below - {"base"})
        for room, below in STANDS_ON.items()
        if room not in ("kernels", "bindings")
    }
    assert {room: (floor, {names.get(b, b) for b in below}) for room, (floor, below) in drawn.items()} == want


def test_no_circle_of_files() -> None:
    floors({file.module: modules_named(file) for file in LIBRARY})


def test_kernels_of_the_two_kinds_do_not_meet() -> None:
    for kind, other in (("sampling", "distiller"), ("distiller", "sampling")):
        mine = [file for file in LIBRARY if is_under(file.module, f"esamp_core.kernels.{kind}")]
        assert mine and not [
            file.module
            for file in mine
            for name in modules_named(file)
            if is_under(name, f"esamp_core.kernels.{other}")
        ]


def test_faces_are_small() -> None:
    for file in LIBRARY:
        if file.is_package and room_of(file.module) not in ("countdown", "esamp_core"):
            assert len(file.source.splitlines()) <= FACES, file.module


def secrets_used(source: str) -> list[str]:
    """Underscored names of others that a source text uses, with their lines; its own, it may."""
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in ("self", "cls")}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if node.module != "__future__"]
        else:
            continue
        secret = [n for n in names if n.startswith("_") and not n.startswith("__") and n not in own | NO_SECRETS]
        found += [f"line {node.lineno}: {name}" for name in secret]
    return found


def test_all_hooks_are_set_in_one_place() -> None:
    """A model is tapped by ``models.taps`` alone."""
    hooking = {file.module for file in files() if file.room != "tests" and "register_forward" in file.source}
    assert hooking == {"esamp_core.models.taps"}


def test_no_room_reaches_into_another() -> None:
    looked_at = [*LIBRARY, *(file for file in files() if file.room == "bench")]
    assert not {file.module: found for file in looked_at if (found := secrets_used(file.source))}


def test_the_checks_can_fail(tmp_path: Path) -> None:
    assert secrets_used("explorer._bank.stats()") == ["line 1: _bank"]
    assert secrets_used("from x import _y, z") == ["line 1: _y"]
    assert secrets_used("class A:\n    def f(self, other):\n        self._x = other._x; other._replace()") == []
    (tmp_path / "esamp_core").mkdir()
    (tmp_path / "esamp_core" / "base").mkdir()
    (tmp_path / "esamp_core" / "base" / "tensors.py").write_text("def f():\n    from esamp_core.explorer import rows")
    assert arrows(files(tmp_path)) == {"base": {"explorer"}}
    with pytest.raises(ValueError, match="cycle"):
        floors({"a": {"b"}, "b": {"a"}})


def test_one_decode_step_visits_each_room_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted as calls from a room's code into another's: every one is the only one of its name in the step.

    The step's tensors go one way: the model's forward is tapped (models), its shallow state predicts in the middle of
    it (explorer), the logits are drawn from, the deep state is staged; each of the four ops reaches the backend that
    ``ops`` had chosen (here the reference) once.
    """
    original, steps = loop.Run._step, []

    def watched(*arguments: Any) -> Any:
        with Visits() as visits:
            receipt = original(*arguments)
        steps.append(visits)
        return receipt

    monkeypatch.setenv("ESAMP_BACKEND", "torch")
    monkeypatch.setattr(loop.Run, "_step", watched)
    model, tokenizer = countdown.load()
    params = SamplingParams(min_p=0.05, seed=1, distinct=False)
    Decoder(model, tokenizer).generate(["3 7 3 5 -> 41 :"], n=4, params=params, max_new_tokens=8, stop_token_ids=())
    assert len(steps) == 7
    for visits in steps[1:]:
        assert dict(visits.calls) == {
            ("decoder", "models", "step"): 1,
            ("models", "explorer", "predict"): 1,
            ("explorer", "reference", "gauge_"): 1,
            ("explorer", "reference", "distiller_step_"): 1,
            ("explorer", "reference", "distiller_forward"): 1,
            ("decoder", "explorer", "sample"): 1,
            ("explorer", "reference", "explore"): 1,
            ("decoder", "explorer", "learn"): 1,
        }
        names = [name for name, _ in visits.checked]
        assert sorted(names) == ["active", "codes", "deep", "logits", "positions", "shallow"]
        assert len({tensor for _, tensor in visits.checked}) == len(names)
