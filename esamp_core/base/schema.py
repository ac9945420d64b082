"""What a file may hold: values as json reads them, checked against the annotations of a dataclass; and its tensors.

A file's fields are declared once, as a dataclass, and nothing of a file is used that was not checked against it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from esamp_core.base.checks import is_int
from esamp_core.base.errors import ArgumentError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Within:
    """The range of a number, bounds included: ``Annotated[int, Within(0)]``.  nan: whether it may be NaN, not known."""

    least: float = -math.inf
    most: float = math.inf
    nan: bool = False

    def __contains__(self, value: float) -> bool:
        if math.isnan(value):
            return self.nan
        return math.isfinite(value) and self.least <= value <= self.most

    def __str__(self) -> str:
        least = "" if self.least == -math.inf else f" >= {self.least:g}"
        most = "" if self.most == math.inf else f" <= {self.most:g}"
        return " and".join(filter(None, (least, most))) + (" or NaN" if self.nan else "")


POSITIVE = Within(math.ulp(0.0))
INT64 = Within(-(2**63), 2**63 - 1)
COUNT = Within(0, 2**63 - 1)


def read_json(text: str | bytes, where: str) -> Any:
    """What a JSON text says.  Raises ArgumentError in one line: also where it is too deep, or has endless digits."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{where} must be JSON: {_shown(str(error), 120)}") from None


def parse(kind: type[T], value: object, where: str) -> T:
    """A value that json has read, as ``kind``: a dataclass, a list, dict, tuple or union of such, or a plain type.

    Fields without a default must be there, and no others.  Integers are of 64 bits, floats finite, unless ``Within``
    says otherwise.  Raises ArgumentError in one line, which names the place.
    """
    result: T = _parse(kind, value, where)
    return result


def _parse(kind: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        plain, within = inner[0], next((x for x in inner[1:] if isinstance(x, Within)), Within())
        return _number(plain, value, within, where) if plain in (int, float) else _parse(plain, value, where)
    if kind in (int, float):
        return _number(kind, value, Within(), where)
    if kind is Any or (isinstance(kind, type) and kind in (str, bool, dict) and isinstance(value, kind)):
        return value
    if kind in (None, type(None)) and value is None:
        return None
    if dataclasses.is_dataclass(kind):
        return _fields(kind, value, where)
    if origin in (Union, types.UnionType):
        return _one_of(inner, value, where)
    if origin is Literal and any(type(value) is type(choice) and value == choice for choice in inner):
        return value
    if origin is list and isinstance(value, list):
        return [_parse(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(_parse(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _parse(inner[1], item, f"{where}.{_shown(key, 40)}") for key, item in value.items()}
    raise _wrong(where, _name(kind), value)


def _number(kind: type, value: Any, within: Within, where: str) -> Any:
    number = is_int(value) or (kind is float and isinstance(value, float))
    try:
        # Integers are compared as they are: a float would round them.
        if number and value in within and (kind is float or -(2**63) <= value < 2**63):
            return kind(value)
    except OverflowError:  # too large for a float
        pass
    raise _wrong(where, f"{_name(kind)}{within}", value)


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    wrong = []
    for kind in kinds:
        try:
            return _parse(kind, value, where)
        except ArgumentError as error:
            wrong.append(error)
    inside = [error for error in wrong if not str(error).startswith(f"{where} must be")]  # the kind was right
    raise (inside[0] if inside else _wrong(where, " or ".join(map(_name, kinds)), value))


@lru_cache(maxsize=256)
def _annotations(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Field -> its annotation, and whether it must be there."""
    hints = get_type_hints(kind, include_extras=True)
    nothing = dataclasses.MISSING
    return {
        f.name: (hints[f.name], f.default is nothing and f.default_factory is nothing) for f in dataclasses.fields(kind)
    }


def _fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    fields = _annotations(kind)
    lacking = [name for name, (_, needed) in fields.items() if needed and name not in value]
    if lacking:
        raise ArgumentError(f"{where} must have {', '.join(lacking)}, got {_shown(sorted(map(str, value)))}")
    if unknown := [key for key in value if key not in fields]:
        raise ArgumentError(f"{where} must have only {', '.join(fields)}, got {_shown(unknown)}")
    given = {name: _parse(fields[name][0], item, f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**given)
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error}") from None


def _name(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        plain, *others = get_args(kind)
        return _name(plain) + "".join(str(x) for x in others if isinstance(x, Within))
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "an object"}
    names |= {list: "a list", tuple: "a list", type(None): "null"}
    return names.get(get_origin(kind) or (type(None) if kind is None else kind), "an object")


def _wrong(where: str, must: str, value: object) -> ArgumentError:
    return ArgumentError(f"{where} must be {must}, got {_shown(value)}")


def _shown(value: object, most: int = 80) -> str:
    """A hostile value, in a short text."""
    if isinstance(value, (list, dict)) and len(value) > 8:
        return f"{len(value)} entries"
    try:
        text = value if isinstance(value, str) and most != 80 else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a list a thousand deep
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


class Kept(NamedTuple):
    """What a file must hold of one tensor.  shape: None matches any size."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    within: Within = Within()


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Kept], where: str) -> None:
    """Raises ArgumentError, which names the tensor: all of these and no others, each of its shape, dtype and range."""
    if lacking := sorted(wanted.keys() - found.keys()):
        raise ArgumentError(f"{where} must hold {_shown(', '.join(lacking), 120)}")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise ArgumentError(f"{where} must hold only {', '.join(wanted)}, got {_shown(unknown)} too")
    for name, kept in wanted.items():
        tensor = found[name]
        fits = tensor.dtype == kept.dtype and tensor.dim() == len(kept.shape)
        if not fits or any(want not in (None, got) for want, got in zip(kept.shape, tensor.shape, strict=True)):
            sizes = ", ".join("any" if size is None else str(size) for size in kept.shape)
            got = f"{_dtype(tensor.dtype)} {list(tensor.shape)}"
            raise ArgumentError(f"{name} in {where} must be {_dtype(kept.dtype)} [{sizes}], got {got}")
        if tensor.numel() and (outside := _outside(tensor, kept.within)) is not None:
            raise ArgumentError(f"{name} in {where} must be finite{kept.within}, got {outside:g}")


def _outside(tensor: Tensor, within: Within) -> float | None:
    """One number that is not within, if there is one."""
    if not tensor.is_floating_point():
        low, high = int(tensor.min()), int(tensor.max())
        return next((float(x) for x in (low, high) if x not in within), None)
    numbers = tensor.detach().double().flatten()
    ok = torch.isfinite(numbers) & (numbers >= within.least) & (numbers <= within.most)
    if within.nan:
        ok |= torch.isnan(numbers)
    return None if bool(ok.all()) else float(numbers[~ok][0])


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
