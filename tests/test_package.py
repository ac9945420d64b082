"""The package itself: what can be imported from it, and what importing it costs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from floor_plan import import_without

import esamp_core


def test_names_are_those_of_their_homes() -> None:
    decoder, sample = (importlib.import_module(f"esamp_core.{name}") for name in ("decoder", "sample"))
    for name in esamp_core.__all__:
        found = getattr(esamp_core, name)
        assert found is getattr(decoder if name in ("Decoder", "Generation", "generate") else sample, name)
        assert name in dir(esamp_core)
    with pytest.raises(AttributeError, match="no attribute 'generator'"):
        _ = esamp_core.generator


def test_no_module_hides_a_name() -> None:
    """A submodule becomes an attribute of the package when it is imported, whoever imports it."""
    for name in esamp_core.__all__:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"esamp_core.{name}")


def test_imports_are_lazy() -> None:
    program = (
        "import sys, esamp_core; assert 'torch' not in sys.modules; from esamp_core import Explorer, SamplingParams;"
        "assert 'transformers' not in sys.modules; from esamp_core import generate; import esamp_core.cli.generate;"
        "from esamp_core import generate as again; assert generate is again and callable(generate)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("blocked", "statement", "hint"),
    [
        ("transformers", "from esamp_core import generate", "pip install 'esamp-core[transformers]'"),
        ("typer", "from esamp_core.cli import main; main()", "pip install 'esamp-core[cli]'"),
        ("rich", "from esamp_core.cli import main; main()", "pip install 'esamp-core[cli]'"),
        ("transformers", "import sys; sys.argv[1:] = ['demo']; from esamp_core.cli import main; main()", "[cli]"),
    ],
)
def test_what_an_extra_lacks_is_said(blocked: str, statement: str, hint: str) -> None:
    run = import_without([blocked], statement)
    assert run.returncode != 0 and hint in run.stderr.splitlines()[-1], run.stderr
