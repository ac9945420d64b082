"""``esamp generate``: prompts in, one JSON object per sample out, resumable."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from esamp_core.base.config import DistillerConfig, SamplingParams
from esamp_core.base.errors import ArgumentError, EncodingError
from esamp_core.base.seeds import seeded_params
from esamp_core.cli.inputs import EMBEDDED, check_writable, load_model, read_prompts
from esamp_core.decoder import Decoder, Generation
from esamp_core.report import EXACT_KL, PromptSamples, RunFile, SampleText, StepSeries


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
    config: DistillerConfig,
    one_for_all: bool,
    neutral: bool,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_rows: int | None,
    cache: str,
    dtype: str,
    device: str,
    run_json: Path | None = None,
) -> None:
    """The command.  Every finished sample is written and flushed at once.  Raises ArgumentError.

    one_for_all: all prompts share a Distiller.
    run_json: also write what ``esamp report`` shows, of this call's samples.
    """
    texts = read_prompts(prompts, prompts_file)
    if run_json is not None:
        check_writable(run_json, "--run-json")
    if resume and out is None:
        raise ArgumentError("--resume needs --out FILE")
    if resume and one_for_all:
        raise ArgumentError("--resume cannot go on where all prompts share a Distiller, which this preset does")
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
            generations = Decoder(model, tokenizer, config=config, neutral=neutral).generate(
                [texts[i] for i in todo],
                n=n,
                # By place in the whole list, so that a resumed run draws what an uninterrupted one would have drawn.
                params=[per_prompt[i] for i in todo],
                groups=["all"] * len(todo) if one_for_all else None,
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
