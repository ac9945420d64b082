"""Nested dictionaries and lists of tensors and plain values, such as optimizers' states, as safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import read_safetensors, write_safetensors
from esamp_core.base.schema import read_json

DEEPEST = 16  # levels


def write_tree(path: Path, tree: Any, kind: str) -> None:
    """kind: what the file is, which ``read_tree`` asks for."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().clone()
            return {"tensor": len(tensors) - 1}
        if isinstance(value, Mapping):  # as pairs: JSON would make texts of an optimizer's numbers
            return {"pairs": [[plain(key), plain(item)] for key, item in value.items()]}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [plain(item) for item in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"a tree holds tensors and plain values, got {type(value).__name__}")

    text = json.dumps(plain(tree))
    write_safetensors(path, tensors, {"format": kind, "tree": text})


def read_tree(path: Path, kind: str) -> Any:
    """What ``write_tree`` wrote, tuples as lists.  Raises ArgumentError."""
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != kind:
        raise ArgumentError(f"{path} must be a file of the kind {kind}")

    def filled(value: Any, level: int) -> Any:
        if level > DEEPEST:
            raise ArgumentError(f"{path} must not be nested more than {DEEPEST} times")
        if isinstance(value, list):
            return [filled(item, level + 1) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"tensor"} and str(value["tensor"]) in tensors:
            return tensors[str(value["tensor"])]
        pairs = value.get("pairs")
        if value.keys() != {"pairs"} or not isinstance(pairs, list):
            raise ArgumentError(f"{path} is damaged: it must hold tensors and pairs, got {sorted(value)[:4]}")
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], (str, int)) for pair in pairs):
            raise ArgumentError(f"{path} is damaged: keys must be texts or integers")
        return {key: filled(item, level + 1) for key, item in pairs}

    return filled(read_json(metadata.get("tree", ""), str(path)), 0)
