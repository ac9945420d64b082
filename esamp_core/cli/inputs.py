"""What several commands read: prompts, models, and whether a file can be written."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from esamp_core import countdown
from esamp_core.base.errors import ArgumentError

EMBEDDED = "countdown"  # what --model calls the embedded model
DTYPES = ("auto", "float32", "bfloat16", "float16")


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """Prompts from arguments, else one per line of a file, else of stdin.  Raises ArgumentError."""
    if prompts and file is not None:
        raise ArgumentError("prompts must come as arguments or with --prompts, not both")
    if prompts:
        return list(prompts)
    if file is not None:
        try:
            text, source = file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"--prompts cannot be read: {error}") from None
    elif sys.stdin.isatty():
        raise ArgumentError("prompts must be given as arguments, with --prompts FILE, or on stdin")
    else:
        text, source = sys.stdin.read(), "stdin"
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ArgumentError(f"prompts must not be empty, got no line in {source}")
    return lines


def check_writable(path: Path, option: str) -> None:
    """Before any work is done: a file can be written there.  Raises ArgumentError."""
    existing = path if path.exists() else path.parent
    if path.is_dir() or not existing.exists() or not os.access(existing, os.W_OK):
        reason = "is a folder" if path.is_dir() else "no such folder" if not existing.exists() else "not allowed"
        raise ArgumentError(f"{option} cannot be written: {path}: {reason}")


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
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(f"--model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    return model.to(place).eval(), tokenizer
