"""What a file may hold: values as json reads them, checked against the annotations of a dataclass; and its tensors.

A file's fields are declared once, as a dataclass, and nothing of a file is used that was not checked against it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import types
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from esamp_core.base.checks import is_int
from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import is_utf8

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
        least = " > 0" if self.least == math.ulp(0.0) else least
        most = "" if self.most == math.inf else f" <= {self.most:g}"
        return " and".join(filter(None, (least, most))) + (" or NaN" if self.nan else "")


POSITIVE = Within(math.ulp(0.0))
INT64 = Within(-(2**63), 2**63 - 1)
COUNT = Within(0, 2**63 - 1)


def read_json(text: str | bytes, where: str, *, strict: bool = False) -> Any:
    """What a JSON text says.  Raises ArgumentError in one line: also where it is too deep, or has endless digits.

    strict: also where a key stands twice, or a number is NaN or Infinity, which are not JSON.
    """
    try:
        if strict:
            return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        told = str(error)
        if isinstance(error, json.JSONDecodeError) and error.lineno == 1:  # of a text that may be a line of a file
            told = f"{error.msg} (character {error.colno})"
        raise ArgumentError(f"{where} must be JSON: {_shown(told, 120)}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def to_json(value: Any) -> str:
    """JSON in one line, for every reader: numbers that are NaN or infinite are null.

    What some readers take for the end of a line is escaped, and halves of characters, which UTF-8 has not.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_with_nulls(value), ensure_ascii=False, allow_nan=False)
    return re.sub("[\x85\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_plain(value: Any, where: str, deepest: int = 64) -> None:
    """What json has read, of any kind, can be written again.

    Raises ArgumentError in one line: nested more than ``deepest`` deep, a number that is not finite (1e999 is not), a
    text with half a character.
    """
    items, depth = [value], 0
    while items:
        inner: list[Any] = []
        for item in items:
            if (isinstance(item, float) and not math.isfinite(item)) or (isinstance(item, str) and not is_utf8(item)):
                raise _wrong(where, "of finite numbers and texts of UTF-8", item)
            if isinstance(item, (dict, list)) and depth == deepest:
                raise ArgumentError(f"{where} must be at most {deepest} deep")
            if isinstance(item, dict):
                inner += (*item, *item.values())
            elif isinstance(item, list):
                inner += item
        items, depth = inner, depth + 1


def parse(kind: type[T], value: object, where: str) -> T:
    """A value that json has read, as ``kind``: a dataclass, a list, dict, tuple or union of such, or a plain type.

    Fields without a default must be there, and no others.  Integers are of 64 bits, floats finite, unless ``Within``
    says otherwise; where that has NaN, null is NaN, which JSON lacks.

    Raises ArgumentError in one line, which names the place.
    """
    result: T = _parse(kind, value, where)
    return result


def check_fields(made: Any) -> None:
    """For ``__post_init__``: a dataclass that was made by hand holds what :func:`parse` would take.

    Raises ArgumentError.
    """
    fields = _annotations(type(made))  # type: ignore[arg-type]  # a class has a hash
    for name, (kind, _) in fields.items():
        _parse(kind, getattr(made, name), name)


def _parse(kind: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    number, within = _plain(kind)
    if number is not None:
        return _number(number, value, within, where)
    if origin is Annotated:
        return _parse(inner[0], value, where)
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
        return _items(inner[0], value, where)
    if origin is tuple and isinstance(value, list) and len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(_items(inner[0], value, where))
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _parse(inner[1], item, f"{where}.{_shown(key, 40)}") for key, item in value.items()}
    raise _wrong(where, _name(kind), value)


def _items(kind: Any, values: list[Any], where: str) -> list[Any]:
    plain, within = _plain(kind)
    if plain is None:
        return [_parse(kind, item, f"{where}[{i}]") for i, item in enumerate(values)]
    # Lists of numbers are long: those of the very type, in range, are looked at once.
    edges: tuple[float, float] = (-sys.float_info.max, sys.float_info.max) if plain is float else (-(2**63), 2**63 - 1)
    low = within.least if within.least > -math.inf else edges[0]
    high = within.most if within.most < math.inf else edges[1]
    return [
        item if type(item) is plain and low <= item <= high else _number(plain, item, within, f"{where}[{i}]")
        for i, item in enumerate(values)
    ]


def _plain(kind: Any) -> tuple[Any, Within]:
    """The type and range of a kind of number; None for other kinds."""
    plain, *others = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    within = next((x for x in others if isinstance(x, Within)), Within())
    return (plain if plain in (int, float) else None), within


def _number(kind: type, value: Any, within: Within, where: str) -> Any:
    if value is None and kind is float and within.nan:
        return math.nan
    number = is_int(value) or (kind is float and isinstance(value, float))
    try:
        # Integers are compared as they are: a float would round them.
        if number and value in within and (kind is float or _fits(value, within)):
            return kind(value)
    except OverflowError:  # too large for a float
        pass
    raise _wrong(where, f"{_name(kind)}{within}", value)


def _fits(value: int, within: Within) -> bool:
    """64 bits where no bound is given."""
    return (within.least > -math.inf or value >= -(2**63)) and (within.most < math.inf or value < 2**63)


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
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
    if isinstance(value, kind):
        return value  # and was checked when it was made
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
        text = value if isinstance(value, str) and most != 80 and value.isprintable() else repr(value)
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
