"""What several commands read: prompts, models, and whether a file can be written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from esamp_core import countdown
from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import decoded, is_utf8, lines_of, one_line, read_bytes, read_text
from esamp_core.base.schema import check_plain, parse, read_json

EMBEDDED = "countdown"  # what --model calls the embedded model
DTYPES = ("auto", "float32", "bfloat16", "float16")
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Asked:
    """A prompt, and what its line of JSON says beside it: its name, and fields that are handed on as they are."""

    prompt: str
    id: str | int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[Asked]:
    """Prompts from arguments, else of a file, else one per line of stdin.  Raises ArgumentError, in one line.

    file: a prompt per line; with the suffix .jsonl or .ndjson an object per line, see docs/files.md.
    """
    if prompts and file is not None:
        raise ArgumentError("prompts must come as arguments or with --prompts, not both")
    if prompts:
        check_utf8("prompts", prompts)
        return [Asked(prompt) for prompt in prompts]
    if file is not None and file.suffix.lower() in JSON_LINES:
        source = f"--prompts {file}"
        asked = list(_of_json_lines(read_text(file, "--prompts"), source))
    else:
        source = "stdin" if file is None else f"--prompts {file}"
        text = _stdin() if file is None else read_text(file, "--prompts")
        asked = [Asked(line) for number, line in _lines(text) if _is_text(line, number, source)]
    if not asked:
        raise ArgumentError(f"prompts must not be empty, got no line in {source}")
    return asked


def check_utf8(name: str, texts: Sequence[str]) -> None:
    """Raises ArgumentError: bytes of the command line that are not UTF-8 arrive as halves of characters."""
    for number, text in enumerate(texts, 1):
        if not is_utf8(text):
            raise ArgumentError(f"{name} must be UTF-8, got {text[:80]!r} as number {number}")


def _stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise ArgumentError("prompts must be given as arguments, with --prompts FILE, or on stdin")
    # Its bytes: as text it would be read in whatever encoding the terminal has.
    raw = getattr(sys.stdin, "buffer", None)
    try:
        return sys.stdin.read() if raw is None else decoded(read_bytes(raw, "stdin"), "stdin")
    except OSError as error:
        raise ArgumentError(f"stdin cannot be read: {error}") from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers."""
    return ((number, line) for number, line in enumerate(lines_of(text), 1) if line.strip())


def _is_text(line: str, number: int, source: str) -> bool:
    if "\0" in line:  # a program's file, or UTF-16 without a mark
        raise ArgumentError(f"{source} must be text in UTF-8, got a byte 0x00 in line {number}")
    return True


def _of_json_lines(text: str, source: str) -> Iterator[Asked]:
    lines: dict[str | int, int] = {}  # of ids
    for number, line in _lines(text):
        where = f"line {number} of {source}"
        fields = parse(dict, read_json(line, where, strict=True), where)
        if "prompt" not in fields:
            raise ArgumentError(f"{where} must have a prompt, got {', '.join(map(repr, fields))[:80] or 'nothing'}")
        check_plain(fields, where)
        name = None
        if "id" in fields:
            # A union as typing has it, for which mypy has no type.
            name = parse(str | int, fields.pop("id"), f"id in {where}")  # type: ignore[arg-type]
            if lines.setdefault(name, number) != number:
                raise ArgumentError(f"id in {where} must be unique, got {repr(name)[:80]} of line {lines[name]} again")
        yield Asked(parse(str, fields.pop("prompt"), f"prompt in {where}"), name, fields)


def check_writable(path: Path, option: str) -> None:
    """Before any work is done: a file can be written there.  Raises ArgumentError."""
    # A file is replaced by another, which is written beside it; a pipe or a terminal is written to.
    target = Path(os.path.realpath(path))
    needed = path if path.exists() and not path.is_file() else target.parent
    allowed = os.access(needed, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    if path.is_dir() or not needed.exists() or not allowed:
        reason = "is a folder" if path.is_dir() else "no such folder" if not needed.exists() else "not allowed"
        raise ArgumentError(f"{option} cannot be written: {path}: {reason}")


def check_apart(files: Mapping[str, Path | None]) -> None:
    """No option names the file of another, which would be lost.  Raises ArgumentError."""
    named = [(option, path) for option, path in files.items() if path is not None]
    for (one, a), (other, b) in combinations(named, 2):
        if os.path.realpath(a) == os.path.realpath(b) and not (a.exists() and not a.is_file()):
            raise ArgumentError(f"{one} and {other} must be different files, got {a} for both")


def load_model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """A model and its tokenizer, ready for the decoder.  Raises ArgumentError in one line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is wrong with a prompt, the decoder says in its own words
    if dtype not in DTYPES:
        raise ArgumentError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device not in ("auto", "cpu", "cuda"):
        raise ArgumentError(f"--device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device cuda needs a CUDA device, and none was found")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == EMBEDDED:
        model, tokenizer = countdown.load()
        return model.to(place), tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    except Exception as error:  # a folder's files may be broken in many ways, and each reader has errors of its own
        raise ArgumentError(f"--model {name!r} cannot be loaded: {one_line(error)}") from None
    return model.to(place).eval(), tokenizer
