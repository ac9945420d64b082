"""The tree as the floor-plan tests see it: its Python files, and what each of them imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "esamp_core", "bindings", "bench", "tests")


class Import(NamedTuple):
    """One imported name. `when`: "import" (runs with the module), "call" (inside a function), "typing" (never runs)."""

    name: str
    line: int
    when: str


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def absolute(module: str, level: int, package: str) -> str:
    """`from ..x` as seen from `package`, in full."""
    if level == 0:
        return module
    parents = package.split(".")
    return ".".join([*parents[: len(parents) - level + 1], *([module] if module else [])])


def imports_of(source: str, module: str, is_package: bool = False) -> list[Import]:
    """All imports of a source text, `from a import b` as "a.b", and those by importlib with a literal name."""
    package = module if is_package else module.rpartition(".")[0]
    found: list[Import] = []

    def visit(node: ast.AST, when: str) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(node.module or "", node.level, package)
            found.extend(Import(f"{origin}.{alias.name}", node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.Call) and re.search(r"(^|\.)(import_module|__import__)$", ast.unparse(node.func)):
            name = literal_start(node.args[0]) if node.args else ""
            dots = len(name) - len(name.lstrip("."))
            found.append(Import(absolute(name[dots:], dots, package).rstrip("."), node.lineno, when))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, "typing")
            for child in node.orelse:
                visit(child, when)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            # Decorators and defaults run with the module, the body does not.
            body = node.body if isinstance(node.body, list) else [node.body]
            for child in ast.iter_child_nodes(node):
                visit(child, "call" if child in body and when == "import" else when)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, when)

    visit(ast.parse(source), "import")
    return found


def literal_start(node: ast.expr) -> str:
    """The literal text that a string or f-string begins with."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return literal_start(node.values[0])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


class File(NamedTuple):
    path: Path
    room: str
    module: str

    @property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


def files(root: Path = ROOT) -> Iterator[File]:
    """All Python files of the rooms, the linked folders once, where they really are."""
    for room in ROOMS:
        for base, folders, names in os.walk(root / room):  # does not follow links
            folders[:] = [folder for folder in folders if not folder.startswith((".", "__pycache__"))]
            for name in sorted(names):
                path = Path(base, name)
                if path.suffix == ".py":
                    parts = path.relative_to(root).with_suffix("").parts
                    parts = parts[:-1] if parts[-1] == "__init__" else parts
                    prefix = "esamp_core." if room in ("kernels", "bindings") else ""
                    yield File(path, room, prefix + ".".join(parts))


def loaded_with(start: str, modules: dict[str, list[Import]]) -> dict[str, str]:
    """Everything that `import start` imports by way of `modules`, each name with the module that asks for it."""
    reached: dict[str, str] = {start: "the caller"}
    queue = [start]
    while queue:
        module = queue.pop()
        names = [(entry.name, module) for entry in modules.get(module, []) if entry.when == "import"]
        names += [(module.rpartition(".")[0], module)]  # the parent package's __init__ runs too
        for name, asker in names:
            if name and name not in reached:
                reached[name] = asker
                queue.append(name)
    return reached


def import_without(blocked: Iterable[str], statement: str) -> subprocess.CompletedProcess[str]:
    """Run `statement` in a Python where importing a blocked package fails."""
    program = f"""
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {set(blocked)!r}:
                    raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

        sys.meta_path.insert(0, Blocker())
        {statement}
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
