"""Reading files that may be broken, and writing them so that an interruption leaves the old one or the new one."""

from __future__ import annotations

import codecs
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

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
    target = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not target.is_file():
        yield path  # a pipe or a terminal cannot be replaced, nor what has no name any more
        return
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        with suppress(OSError):  # who may read it stays as it was
            shutil.copymode(target, partial)
        os.replace(partial, target)
    finally:
        with suppress(OSError):
            partial.unlink()


def read_text(path: Path, name: str) -> str:
    """A text file as people have them.  name: the option or argument that errors are to name.

    Raises ArgumentError in one line: missing, larger than 1 GiB, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = read_bytes(file, f"{name} {path}")
    except (OSError, ValueError) as error:  # of a name that no file can have
        raise error if isinstance(error, ArgumentError) else ArgumentError(f"{name} cannot be read: {error}") from None
    return decoded(raw, f"{name} {path}")


def read_bytes(file: IO[bytes], where: str) -> bytes:
    """All of a file or pipe, whose size need not be known.  Raises ArgumentError where it is larger than 1 GiB."""
    parts, size = [], 0
    while part := file.read(2**20):
        parts.append(part)
        size += len(part)
        if size > LARGEST_TEXT:
            raise ArgumentError(f"{where} must be at most 1 GiB, got more")
    return b"".join(parts)


def write_text(path: Path, text: str, name: str) -> None:
    """As UTF-8, whole or not at all.  name: as in :func:`read_text`.  Raises ArgumentError."""
    try:
        with replaced(path) as partial:
            partial.write_bytes(text.encode())
    except OSError as error:
        raise ArgumentError(f"{name} cannot be written: {error}") from None


def decoded(raw: bytes, where: str) -> str:
    """UTF-8, with or without a byte order mark.  Raises ArgumentError, which names the first byte that is not."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text, at = error.object, error.start  # without the mark
        line, first = text.count(b"\n", 0, at) + 1, text.rfind(b"\n", 0, at)
        wide = ": UTF-16?" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
        got = f"byte 0x{text[at]:02x} in line {line} (byte {at - first} of it{wide})"
        raise ArgumentError(f"{where} must be UTF-8, got {got}") from None


def is_utf8(text: str) -> bool:
    """Whether a text can be written: bytes of a command line, and escapes in JSON, may be halves of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def lines_of(text: str) -> list[str]:
    """Lines end with a line feed, or a carriage return and one; the last may have no end.

    Not ``str.splitlines``: form feeds and U+0085, U+2028, U+2029 may stand within a prompt or a JSON text.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
