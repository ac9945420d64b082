"""Checks of arguments that any room may make.  Each raises ArgumentError with what it received."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Mapping, Set

import torch
from torch import Tensor

from esamp_core.base.errors import ArgumentError

MAX_VOCAB = 2**31 - 1
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, argument: str, must: str, got: object) -> None:
    if not condition:
        raise ArgumentError(f"{argument} must {must}, got {got!r}")


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """A finite number that a float can hold: an integer may be too large for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return repr(value)


def check_tensor(
    name: str, value: object, shape: tuple[int | None, ...], device: torch.device | None, kind: str = "float"
) -> None:
    """shape: None matches any size.  kind: float, int or bool."""
    fits = isinstance(value, Tensor) and value.dim() == len(shape)
    if isinstance(value, Tensor) and fits:
        fits = all(want is None or want == got for want, got in zip(shape, value.shape, strict=True))
        is_float, is_bool = value.is_floating_point(), value.dtype == torch.bool
        fits &= {"float": is_float, "bool": is_bool, "int": not (is_float or is_bool or value.is_complex())}[kind]
        fits &= device is None or value.device == device
    if not fits:
        sizes = ", ".join("any" if s is None else str(s) for s in shape)
        where = "" if device is None else f" on {device}"
        raise ArgumentError(f"{name} must be a {kind} tensor [{sizes}]{where}, got {describe(value)}")


def check_hashables(name: str, values: object, rows: int | None = None) -> list[Hashable | None]:
    """A hashable per row, as a list: a text is one name and not a row per letter, a tensor's elements are numbers."""
    if isinstance(values, Tensor) and values.dim() == 1 and values.device.type == "cpu":
        values = values.tolist()
    if isinstance(values, (str, bytes, Mapping, Set, Tensor)) or not isinstance(values, Iterable):
        raise ArgumentError(f"{name} must be a list with one entry per row, got {describe(values)}")
    entries = list(values)
    for i, entry in enumerate(entries):
        if isinstance(entry, Tensor) or not _has_hash(entry):  # a tensor is hashed by identity
            raise ArgumentError(
                f"{name}[{i}] must be None or hashable, as a number or a text is, got {describe(entry)}"
            )
    if rows is not None and len(entries) != rows:
        raise ArgumentError(f"{name} must have one entry per row ({rows}), got {len(entries)}")
    return entries


def _has_hash(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def check_logits(
    logits: Tensor,
    name: str = "logits",
    like: Tensor | None = None,
    *,
    rows: int | None = None,
    device: torch.device | None = None,
) -> None:
    """rows, device: None is any.  like: logits that were checked, whose shape and device these must have."""
    check_tensor(
        name, logits, (rows, None) if like is None else tuple(like.shape), device if like is None else like.device
    )
    if logits.dtype not in LOGIT_DTYPES:
        raise ArgumentError(f"{name} must be float32, bfloat16 or float16, got {describe(logits)}")
    if not 1 <= logits.shape[1] <= MAX_VOCAB:
        raise ArgumentError(f"{name} must have a vocabulary of 1..{MAX_VOCAB} tokens, got {describe(logits)}")
