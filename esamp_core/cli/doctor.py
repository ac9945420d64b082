"""``esamp doctor``: what is installed, and which backend will run."""

from __future__ import annotations

import os
import platform

import torch
from rich.console import Console
from rich.table import Table

import esamp_core
from esamp_core.base.environment import PACKAGES, installed
from esamp_core.base.versions import TRIED, tried_versions, untried
from esamp_core.ops import backend_name


def why_backend(device: str) -> str:
    """The backend of a device, and the reason in words."""
    choice = os.environ.get("ESAMP_BACKEND", "auto")
    name = backend_name(device)
    if choice != "auto":
        return f"{name} (ESAMP_BACKEND={choice})"
    if name == "triton":
        return "triton (a CUDA device, and Triton is installed)"
    return "torch (Triton is not installed)" if device == "cuda" else "torch (the tensors are on the CPU)"


def run_doctor(console: Console) -> None:
    """Print the report.  Raises ArgumentError if ESAMP_BACKEND asks for what is not there."""
    table = Table(show_header=False, box=None)
    table.add_row("esamp_core", f"{esamp_core.__version__} in {os.path.dirname(esamp_core.__file__)}")
    table.add_row("machine", platform.platform())
    packages = (*PACKAGES, "numpy", "safetensors")
    found = installed(*packages)
    for package in packages:
        table.add_row(package, found.get(package, "not installed"))
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        table.add_row("GPU", f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
        table.add_row("backend on cuda", why_backend("cuda"))
    else:
        table.add_row("GPU", "none that PyTorch can use")
    table.add_row("backend on cpu", why_backend("cpu"))
    table.add_row("CPU threads", str(torch.get_num_threads()))
    console.print(table)
    console.print()
    tried = Table(title="Versions that were tried together", title_justify="left", box=None, pad_edge=False)
    for package in PACKAGES:
        tried.add_column(package)
    tried.add_column("how")
    for environment in TRIED:
        tried.add_row(*(environment.version(package) or "" for package in PACKAGES), environment.how)
    console.print(tried)
    here = installed()
    for package in untried(here):
        seen = ", ".join(tried_versions(package))
        console.print(f"{package} {here[package]} is beyond what was tried ({seen}): run the tests first")
