"""Reading files that may be broken, and writing them so that an interruption leaves the old one or the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from esamp_core.base.errors import ArgumentError

LARGEST_TEXT = 2**30  # bytes of a text file: one that is larger was named by mistake


def read_safetensors(path: str | Path, name: str = "path") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and what it says of itself.  name: the argument that errors are to name.

    Raises ArgumentError, in one line.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # of the operating system, or of safetensors, which has a class of its own in Rust
        raise ArgumentError(f"{name} cannot be read from {str(path)!r}: {one_line(error)}") from None


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Whole, or not at all."""
    with replaced(Path(path)) as partial:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata=dict(metadata))


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name to write to, beside path: it takes path's place in one move at the end, and is removed after an error."""
    target = path.resolve()  # a link stays a link
    if target.exists() and not target.is_file():
        yield target  # a pipe or a terminal cannot be replaced
        return
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        with suppress(OSError):
            partial.unlink()


def read_text(path: Path, name: str) -> str:
    """A text file as people have them.  name: the option or argument that errors are to name.

    Raises ArgumentError in one line: missing, larger than 1 GiB, or not UTF-8.
    """
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= LARGEST_TEXT else b""
    except OSError as error:
        raise ArgumentError(f"{name} cannot be read: {error}") from None
    if size > LARGEST_TEXT:
        raise ArgumentError(f"{name} must be at most 1 GiB, got {size} bytes in {path}")
    return decoded(raw, f"{name} {path}")


def decoded(raw: bytes, where: str) -> str:
    """UTF-8, with or without a byte order mark.  Raises ArgumentError, which names the first line that is not."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ArgumentError(f"{where} must be UTF-8, got byte 0x{raw[error.start]:02x} in line {line}") from None


def lines_of(text: str) -> list[str]:
    """Lines end with a line feed, or a carriage return and one; the last may have no end.

    Not ``str.splitlines``: form feeds and U+0085, U+2028, U+2029 may stand within a prompt or a JSON text.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
