"""Safetensors files, and what becomes of them where something in them is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from esamp_core.sample import ArgumentError

Tensors, Metadata = dict[str, Tensor], dict[str, str]


def refused(run: Callable[[], object], *errors: type[Exception]) -> str:
    """What it raised: one of ours, in one short line."""
    with pytest.raises(errors or (ArgumentError,)) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000, message
    return message


def read(path: Path) -> tuple[Tensors, Metadata]:
    with safe_open(path, "pt") as file:
        return load_file(path), dict(file.metadata() or {})


def with_tensor(
    name: str, change: Callable[[Tensor], Tensor]
) -> Callable[[Tensors, Metadata], tuple[Tensors, Metadata]]:
    return lambda t, m: ({**t, name: change(t[name])}, m)


def like(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t, value)
