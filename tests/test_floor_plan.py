"""The floor plan: who may import whom, how long a file may be, where the links point; and what conftest.py promises."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from floor_plan import ROOMS, ROOT, files, import_without, imports_of, is_under, loaded_with

MAX_LINES = 400

# What each room may import of the others: kernels <- esamp_core <- bindings <- bench, tests.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "esamp_core": {"kernels", "esamp_core"},
    "bindings": {"kernels", "esamp_core", "bindings"},
    "bench": {"kernels", "esamp_core", "bindings", "bench"},
    "tests": set(ROOMS),
}
KERNEL_LIBRARIES = ("__future__", "collections", "dataclasses", "functools", "math", "os", "torch", "triton", "typing")
# The one door to the kernels; esamp_core.ops opens it only when the triton backend is chosen.
OPS_LAYER = ("esamp_core.ops.triton_sampling", "esamp_core.ops.triton_distiller")
# `import esamp_core.sample` needs none of these.
OPTIONAL = ("transformers", "triton", "typer", "rich")


def room_of(module: str) -> str | None:
    """The room of a dotted module name, None for someone else's module. The bare folder names are not ours."""
    for room in ("kernels", "bindings"):
        if is_under(module, f"esamp_core.{room}"):
            return room
    top = module.split(".")[0]
    return top if top in ("esamp_core", "bench", "tests") else None


USE_VLLM = ("tests.vllm_engine", "bench.peers")  # its tests, and what is measured beside it


def check_imports(source: str, module: str, room: str, is_package: bool = False) -> list[str]:
    """Every breach of the floor plan by one file, as text."""
    breaches = []
    for name, line, _ in imports_of(source, module, is_package):
        where = f"{module}:{line} imports {name}"
        target = room_of(name)
        if is_under(name, "kernels") or is_under(name, "bindings"):
            breaches.append(f"{where}: the bare name is another project's package")
        elif target is not None and target not in MAY_IMPORT[room]:
            breaches.append(f"{where}: {room} may not import {target}")
        elif target == "kernels" and room == "esamp_core" and module not in OPS_LAYER:
            breaches.append(f"{where}: only {', '.join(OPS_LAYER)} may import kernels")
        elif target is None and room == "kernels" and name.split(".")[0] not in KERNEL_LIBRARIES:
            breaches.append(f"{where}: kernels import only {', '.join(KERNEL_LIBRARIES)} and each other")
        elif is_under(name, "vllm") and room != "bindings" and not any(is_under(module, m) for m in USE_VLLM):
            breaches.append(f"{where}: only bindings may import vllm")
    return breaches


def check_length(source: str, name: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{name} has {lines} lines, more than {MAX_LINES}"] if lines > MAX_LINES else []


FILES = list(files())


def breach_texts(breaches: Iterable[str]) -> str:
    return "\n".join(breaches)


def test_files_are_found() -> None:
    modules = {file.module for file in FILES}
    assert {"esamp_core", "esamp_core.sample", "tests.test_floor_plan"} <= modules
    assert len(modules) == len(FILES)


def test_imports_go_one_way() -> None:
    breaches = [text for file in FILES for text in check_imports(file.source, file.module, file.room, file.is_package)]
    assert not breaches, breach_texts(breaches)


def test_no_file_is_long() -> None:
    breaches = [text for file in FILES for text in check_length(file.source, str(file.path.relative_to(ROOT)))]
    assert not breaches, breach_texts(breaches)


def test_no_file_is_cut_by_banners() -> None:
    """What needs a line of dashes to be found belongs in a file of its own."""
    assert not [file.module for file in FILES if re.search(r"^\s*# ?[-=]{3,}", file.source, re.MULTILINE)]


def test_files_that_are_named_are_there() -> None:
    """Paths in code and docs, of this tree's files: none is left behind when a file moves."""
    texts = [*(file.path for file in FILES), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[bk]*/*.md")]
    named = re.compile(r"(?<![\w/.-])((?:esamp_core|kernels|bindings|bench|tests|docs)/[\w/]+\.(?:py|md))\b")
    found = [(path.name, name) for path in texts for name in named.findall(path.read_text(encoding="utf-8"))]
    assert len(found) > 20
    assert not [(where, name) for where, name in found if not (ROOT / name).exists()]


def test_sample_reaches_no_optional_package() -> None:
    modules = {file.module: imports_of(file.source, file.module, file.is_package) for file in FILES}
    reached = loaded_with("esamp_core.sample", modules)
    assert "esamp_core" in reached and "torch" in reached
    found = {name: asker for name, asker in reached.items() if name.split(".")[0] in OPTIONAL}
    assert not found


@pytest.mark.parametrize("room", ["kernels", "bindings"])
def test_linked_folder(room: str) -> None:
    link = ROOT / "esamp_core" / room
    assert link.is_symlink() and os.readlink(link) == f"../{room}"
    assert not (ROOT / room / "__init__.py").exists()


def test_all_packages_are_shipped() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    packages = {file.module for file in FILES if file.is_package and file.room == "esamp_core"}
    folders = {file.module.rpartition(".")[0] for file in FILES if file.room in ("esamp_core", "kernels", "bindings")}
    assert set(declared) == (packages | folders | {"esamp_core.kernels", "esamp_core.bindings"}) - {""}


def test_sample_needs_no_optional_package() -> None:
    result = import_without(OPTIONAL, "import esamp_core.sample")
    assert result.returncode == 0, result.stderr


def test_blocker_blocks() -> None:
    result = import_without(["fractions"], "import fractions")
    assert result.returncode != 0 and "fractions is blocked" in result.stderr


OFFENDERS = [
    ("kernels", "esamp_core.kernels.x", "import numpy", "kernels import only"),
    ("kernels", "esamp_core.kernels.x", "from esamp_core.base.errors import ShapeError", "may not import esamp_core"),
    ("kernels", "esamp_core.kernels.x", "from ..errors import ShapeError", "may not import esamp_core"),
    ("esamp_core", "esamp_core.sample", "from esamp_core.kernels.draw import draw_triton", "may import kernels"),
    ("esamp_core", "esamp_core.ops", "from .kernels import draw", "may import kernels"),
    ("esamp_core", "esamp_core.sample", "class A:\n    import esamp_core.kernels.draw", "may import kernels"),
    ("esamp_core", "esamp_core.sample", "try:\n    from esamp_core import kernels\nfinally: pass", "import kernels"),
    ("esamp_core", "esamp_core.reference", "def f():\n    import esamp_core.kernels.draw", "may import kernels"),
    ("esamp_core", "esamp_core.decoder", "from importlib import import_module as i\nimport kernels.x", "bare name"),
    ("esamp_core", "esamp_core.cli", "def f():\n    from esamp_core.bindings import hf", "may not import bindings"),
    ("esamp_core", "esamp_core.cli", "def f(n):\n    import_module(f'esamp_core.bindings.{n}')", "import bindings"),
    ("esamp_core", "esamp_core.cli", "def f():\n    importlib.import_module('.bindings.hf', __package__)", "bindings"),
    ("esamp_core", "esamp_core.cli", "import tests.conftest", "may not import tests"),
    ("esamp_core", "esamp_core.cli", "if TYPE_CHECKING:\n    from vllm import LLM", "only bindings may import vllm"),
    ("bindings", "esamp_core.bindings.hf", "from bench import peers", "may not import bench"),
    ("bindings", "esamp_core.bindings.hf", "import bindings.common", "bare name"),
    ("bench", "bench.overhead", "from tests.conftest import poison_", "may not import tests"),
    ("tests", "tests.test_x", "def test():\n    from kernels import draw", "bare name"),
]

RESIDENTS = [
    ("kernels", "esamp_core.kernels.x", "import triton.language as tl\nimport math, torch\nfrom . import common"),
    ("esamp_core", "esamp_core.ops.triton_sampling", "from esamp_core.kernels.draw import draw_triton"),
    ("esamp_core", "esamp_core.sample", "import kernelsmith"),
    ("bindings", "esamp_core.bindings.vllm_plugin", "from vllm import LLM\nfrom esamp_core.sample import Explorer"),
    ("tests", "tests.test_x", "import esamp_core.kernels.draw\nfrom bench import overhead"),
    ("tests", "tests.vllm_engine.engines", "from vllm import LLM"),
    ("bench", "bench.peers", "from vllm.v1.sample.ops import topk_topp_triton"),
]


@pytest.mark.parametrize(("room", "module", "source", "complaint"), OFFENDERS)
def test_offender_is_caught(room: str, module: str, source: str, complaint: str) -> None:
    breaches = check_imports(source, module, room)
    assert len(breaches) == 1 and complaint in breaches[0], breaches


@pytest.mark.parametrize(("room", "module", "source"), RESIDENTS)
def test_resident_is_left_alone(room: str, module: str, source: str) -> None:
    assert check_imports(source, module, room) == []


def test_long_file_is_caught() -> None:
    assert check_length("x = 1\n" * MAX_LINES, "x.py") == []
    assert check_length("x = 1\n" * (MAX_LINES + 1), "x.py") == ["x.py has 401 lines, more than 400"]


def test_reachability_finds_indirect_imports() -> None:
    sources = {
        "esamp_core": "",
        "esamp_core.sample": "from esamp_core.bank import Bank\ndef f():\n    import rich",
        "esamp_core.bank": "if TYPE_CHECKING:\n    import typer\nimport transformers.utils",
    }
    reached = loaded_with("esamp_core.sample", {name: imports_of(text, name) for name, text in sources.items()})
    assert reached["transformers.utils"] == "esamp_core.bank"
    assert "rich" not in reached and "typer" not in reached


def test_links_are_not_walked_twice(tmp_path: Path) -> None:
    for room in ("kernels", "esamp_core"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "x.py").write_text("")
    (tmp_path / "esamp_core" / "kernels").symlink_to("../kernels")
    assert [file.module for file in files(tmp_path)] == ["esamp_core.kernels.x", "esamp_core.x"]


def test_uninitialised_memory_is_nan(device: str) -> None:
    like = torch.zeros(3, 5, device=device)
    for tensor in (
        torch.empty(3, 5, device=device),
        torch.empty(3, device=device, dtype=torch.bfloat16, requires_grad=True),
        torch.empty_like(like),
        torch.empty_strided((2, 3), (6, 2), device=device),
        like.new_empty(7),
        like.new_empty_strided((2, 3), (3, 1)),
    ):
        assert tensor.isnan().all()
    assert (torch.empty(4, dtype=torch.int64, device=device) == 2**63 - 1).all()
    assert torch.empty(4, dtype=torch.bool, device=device).all()
    assert torch.empty(0, device=device).numel() == 0


def test_poison_keeps_the_meta_device() -> None:
    with torch.device("meta"):
        assert torch.empty(2).is_meta and torch.nn.Linear(2, 3).weight.is_meta


def test_interpreter_without_gpu() -> None:
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"
