"""``esamp generate``: prompts in, one JSON object per sample out, resumable."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import torch

from esamp_core.config import SamplingParams
from esamp_core.decoder import Decoder, Generation
from esamp_core.decoder_text import seeded_params
from esamp_core.errors import ArgumentError, EncodingError
from esamp_core.report import EXACT_KL, PromptSamples, RunFile, SampleText, StepSeries

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

    from esamp_core import countdown

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


def finished_prompts(out: Path, prompts: Sequence[str], n: int) -> tuple[set[int], list[str]]:
    """Prompts whose n samples an output file holds, and the lines to keep.  Raises ArgumentError."""
    samples: dict[int, dict[int, str]] = {}
    if not out.exists():
        return set(), []
    lines = out.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            index, sample, prompt = entry["prompt_index"], entry["sample_index"], entry["prompt"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                continue  # the line that an interrupted run was writing
            raise ArgumentError(f"--resume cannot read line {number} of {out}") from None
        if not 0 <= index < len(prompts) or prompts[index] != prompt:
            raise ArgumentError(f"--resume: line {number} of {out} is of another prompt list ({prompt!r})")
        samples.setdefault(index, {})[sample] = line
    done = {index for index, have in samples.items() if set(range(n)) <= set(have)}
    return done, [line for index in sorted(done) for _, line in sorted(samples[index].items())]


@contextmanager
def open_output(out: Path | None, kept: list[str], resume: bool) -> Iterator[IO[str]]:
    """The JSONL to write to.  Raises ArgumentError before any work is done."""
    if out is None:
        yield sys.stdout
        return
    try:
        if resume and kept:
            partial = out.with_name(out.name + ".partial")
            partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            partial.replace(out)  # in one move: an interruption here loses nothing
        with out.open("a" if resume and kept else "w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise ArgumentError(f"--out cannot be written: {error}") from None


def run_generate(
    *,
    prompts: Sequence[str],
    prompts_file: Path | None,
    model_name: str,
    out: Path | None,
    resume: bool,
    n: int,
    params: SamplingParams,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_rows: int | None,
    cache: str,
    dtype: str,
    device: str,
    run_json: Path | None = None,
) -> None:
    """The command.  Every finished sample is written and flushed at once.  Raises ArgumentError.

    run_json: also write what ``esamp report`` shows, of this call's samples.
    """
    texts = read_prompts(prompts, prompts_file)
    if run_json is not None:
        check_writable(run_json, "--run-json")
    if resume and out is None:
        raise ArgumentError("--resume needs --out FILE")
    done, kept = finished_prompts(out, texts, n) if resume and out is not None else (set(), [])
    todo = [i for i in range(len(texts)) if i not in done]
    with open_output(out, kept, resume) as file:
        if not todo:
            print(f"esamp: all {len(texts)} prompts are finished in {out}", file=sys.stderr)
            return
        model, tokenizer = load_model(model_name, dtype, device)

        def write(generation: Generation) -> None:
            entry = asdict(replace(generation, prompt_index=todo[generation.prompt_index]))
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()

        per_prompt = seeded_params(params, len(texts))
        try:
            generations = Decoder(model, tokenizer).generate(
                [texts[i] for i in todo],
                n=n,
                # By place in the whole list, so that a resumed run draws what an uninterrupted one would have drawn.
                params=[per_prompt[i] for i in todo],
                max_new_tokens=max_new_tokens,
                stop_strings=tuple(stop),
                max_batch_rows=batch_rows,
                cache=cache,  # type: ignore[arg-type]  # Decoder.generate says what it may be
                progress=sys.stderr.isatty(),
                on_result=write,
            )
        except EncodingError as error:
            if model_name != EMBEDDED:
                raise
            raise ArgumentError(
                f"{error}; the embedded model reads '3 7 3 5 -> 41 :', --model names another"
            ) from error
        if run_json is not None:
            _run_file(generations, tokenizer, model_name, params).write(run_json)


def _run_file(generations: Sequence[Generation], tokenizer: Any, model_name: str, params: SamplingParams) -> RunFile:
    """What ``esamp report`` shows of generated samples: texts with their novelty, and each step's mean KL."""
    name = "vanilla" if params.beta == 0 else f"beta {params.beta:g}"
    prompts: dict[int, PromptSamples] = {}
    for g in generations:
        label = g.prompt if g.prompt is not None else f"prompt {g.prompt_index}"
        tokens = [tokenizer.decode([t]) for t in g.token_ids]
        sample = SampleText(name, tokens, list(g.novelty))
        prompts.setdefault(g.prompt_index, PromptSamples(label, [])).samples.append(sample)
    steps = max((len(g.token_ids) for g in generations), default=0)
    columns = [[g.kl[t] for g in generations if len(g.kl) > t] for t in range(steps)]
    return RunFile(
        title=f"{model_name}: {len(generations)} samples of {len(prompts)} prompts",
        about={k: str(v) for k, v in asdict(params).items()},
        prompts=list(prompts.values()),
        steps=[StepSeries(name, [sum(c) / len(c) for c in columns], [])],
        kl_is=EXACT_KL,
    )
