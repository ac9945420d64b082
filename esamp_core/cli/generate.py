"""``esamp generate``: prompts in, one JSON object per sample out, resumable."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from esamp_core.base.config import DistillerConfig, SamplingParams
from esamp_core.base.errors import ArgumentError, EncodingError
from esamp_core.base.seeds import seeded_params
from esamp_core.cli import outputs
from esamp_core.cli.inputs import EMBEDDED, check_apart, check_utf8, check_writable, load_model, read_prompts
from esamp_core.decoder import Decoder, Generation
from esamp_core.report import EXACT_KL, PromptSamples, RunFile, SampleText, StepSeries


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
    asked = read_prompts(prompts, prompts_file)
    check_utf8("--stop", stop)
    if run_json is not None:
        check_writable(run_json, "--run-json")
    if out is not None:
        check_writable(out, "--out")
    check_apart({"--prompts": prompts_file, "--out": out, "--run-json": run_json})
    if resume and out is None:
        raise ArgumentError("--resume needs --out FILE")
    if resume and one_for_all:
        raise ArgumentError("--resume cannot go on where all prompts share a Distiller, which this preset does")
    settings = outputs.settings_of(
        model_name=model_name,
        params=params,
        config=config,
        neutral=neutral,
        one_for_all=one_for_all,
        n=n,
        max_new_tokens=max_new_tokens,
        stop=stop,
    )
    # By place in the whole list, so that a resumed run draws what an uninterrupted one would have drawn.
    per_prompt = seeded_params(params, len(asked))
    finished = outputs.Finished(set(), [], [])
    if resume and out is not None:
        seeds = None if params.seed is None else [p.seed for p in per_prompt]
        finished = outputs.read_finished(out, asked, settings, seeds)
    todo = [i for i in range(len(asked)) if i not in finished.prompts]
    if todo:
        model, tokenizer = load_model(model_name, dtype, device)
        settings |= outputs.settings_of_model(model)
        outputs.check_models(out, finished, settings)
    if out is not None and finished.places:
        outputs.keep_only(out, finished.places)
    if not todo:
        print(f"esamp: all {len(asked)} prompts are finished in {out}", file=sys.stderr)
        return
    with outputs.open_output(out, append=bool(finished.places)) as write_line:

        def write(generation: Generation) -> None:
            index = todo[generation.prompt_index]
            write_line(outputs.line_of(replace(generation, prompt_index=index), asked[index], settings))

        try:
            generations = Decoder(model, tokenizer, config=config, neutral=neutral).generate(
                [asked[i].prompt for i in todo],
                n=n,
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
        sample = SampleText(name, tokens, [_known(x) for x in g.novelty])
        prompts.setdefault(g.prompt_index, PromptSamples(label, [])).samples.append(sample)
    steps = max((len(g.token_ids) for g in generations), default=0)
    columns = [[_known(g.kl[t]) for g in generations if len(g.kl) > t] for t in range(steps)]
    return RunFile(
        title=f"{model_name}: {len(generations)} samples of {len(prompts)} prompts",
        about={k: str(v) for k, v in asdict(params).items()},
        prompts=list(prompts.values()),
        steps=[StepSeries(name, [sum(c) / len(c) for c in columns], [])],
        kl_is=EXACT_KL,
    )


def _known(number: float) -> float:
    """A run file has no infinite numbers."""
    return number if math.isfinite(number) else math.nan
