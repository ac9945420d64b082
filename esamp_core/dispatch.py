"""Which backend runs: the one switch between the Triton kernels and their plain-PyTorch twins."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from esamp_core import reference
from esamp_core.config import require
from esamp_core.errors import ArgumentError

BACKENDS = ("auto", "triton", "torch")


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def backend_name(device: torch.device | str) -> str:
    """ "triton" or "torch": what runs for tensors on this device, by ``ESAMP_BACKEND``."""
    choice = os.environ.get("ESAMP_BACKEND", "auto")
    require(choice in BACKENDS, "ESAMP_BACKEND", f"be one of {', '.join(BACKENDS)}", choice)
    if choice == "triton" and not _installed("triton"):
        raise ArgumentError("ESAMP_BACKEND=triton, but triton is not installed")
    if choice == "auto":
        choice = "triton" if torch.device(device).type == "cuda" and _installed("triton") else "torch"
    return choice


def backend(device: torch.device) -> ModuleType:
    """The module whose ops take tensors of this device."""
    if backend_name(device) == "torch":
        return reference
    return importlib.import_module("esamp_core.triton_backend")
