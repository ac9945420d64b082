"""The commands and their options; what each does has a file of its own."""

from __future__ import annotations

import io
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

# Before torch is loaded: on a busy machine, OpenMP threads that spin while they wait cost a factor of ten.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from esamp_core.base.checks import require
from esamp_core.base.config import DistillerConfig, SamplingParams
from esamp_core.base.errors import ArgumentError, EsampError
from esamp_core.base.presets import PRESETS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Exploratory sampling: the parallel samples of one prompt explore different ideas.",
)

Temperature = Annotated[float, typer.Option(help="Divides the logits; 0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens with this much probability; 1 is off.")]
MinP = Annotated[float, typer.Option(help="Keep tokens with this fraction of the top probability; 0 is off.")]
Beta = Annotated[float, typer.Option(help="Strength of exploration; 0 is vanilla sampling.")]


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="8 problems and 8 samples: a few seconds.")] = False,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 64,
    samples: Annotated[int, typer.Option(min=1, help="Samples per problem.")] = 16,
    temperature: Temperature = 1.0,
    min_p: MinP = 0.05,
    beta: Beta = SamplingParams.beta,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
) -> None:
    """Independent samples against the default, with the embedded Countdown model, checked by a program.

    Its Distillers start from calibrated weights, as `esamp calibrate` fits them for any model.
    """
    from esamp_core import countdown
    from esamp_core.cli.demo import run_demo

    if quick:
        problems, samples = 8, 8
    params = SamplingParams(temperature=temperature, min_p=min_p, beta=beta, seed=seed)
    config = DistillerConfig(start=str(countdown.DISTILLER))
    run_demo(Console(), problems=problems, samples=samples, params=params, config=config)


@app.command()
def generate(
    context: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none reads --prompts or stdin.")] = None,
    model: Annotated[
        str, typer.Option(help="Folder or hub name of a model; 'countdown' is the embedded one.")
    ] = "countdown",
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="File with one prompt per line, or .jsonl: one object per line.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSONL file to write; default stdout.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip prompts that --out already holds whole, drawn with these settings.")
    ] = False,
    preset: Annotated[
        str, typer.Option(help="default, or for comparison: paper, release. Options that are given too win over it.")
    ] = "default",
    n: Annotated[int, typer.Option("-n", help="Samples per prompt.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens per sample.")] = 256,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.05,
    beta: Beta = SamplingParams.beta,
    seed: Annotated[int | None, typer.Option(help="Every prompt's own is made from it; default: fresh ones.")] = None,
    stratified: Annotated[
        bool, typer.Option("--stratified", help="The n samples divide every distribution evenly among them.")
    ] = False,
    distinct: Annotated[
        bool | None, typer.Option("--distinct/--no-distinct", help="Draw the n samples without replacement; or not.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Start weights that `esamp calibrate` wrote for this model.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Of the Distillers; that of --start.")] = DistillerConfig.rank,
    gate: Annotated[
        bool, typer.Option(help="Explore as far as a Distiller has predicted better than a constant; or always.")
    ] = True,
    neutral: Annotated[bool, typer.Option("--neutral", help="Only novelty that leaves the entropy as it is.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="End a text before this string; may be repeated.")] = None,
    batch_rows: Annotated[int | None, typer.Option(help="Most rows at once; default 128, or n.")] = None,
    cache: Annotated[str, typer.Option(help="dynamic, or static: waves, and on CUDA one graph per step.")] = "dynamic",
    dtype: Annotated[str, typer.Option(help="Weights: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    run_json: Annotated[Path | None, typer.Option(help="Also write a run file for `esamp report`.")] = None,
) -> None:
    """Sample every prompt n times and write one JSON object per sample."""
    from esamp_core.cli.generate import run_generate

    require(preset in PRESETS, "--preset", f"be one of {', '.join(PRESETS)}", preset)
    chosen = PRESETS[preset]
    # By its name: typer has a copy of click's own class.
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    options: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, beta=beta)
    options |= dict(stratified=stratified, distinct=distinct)
    params = replace(chosen.params, seed=seed, **{k: options[k] for k in given & options.keys()})
    config = DistillerConfig(
        recipe=chosen.config.recipe,
        rank=rank if "rank" in given else chosen.config.rank,
        gate=gate if "gate" in given else chosen.config.gate,
        start=None if start is None else str(start),
    )
    run_generate(
        prompts=prompts or [],
        prompts_file=prompts_file,
        model_name=model,
        out=out,
        resume=resume,
        n=n,
        params=params,
        config=config,
        one_for_all=chosen.one_for_all,
        neutral=neutral,
        max_new_tokens=max_new_tokens,
        stop=stop or [],
        batch_rows=batch_rows,
        cache=cache,
        dtype=dtype,
        device=device,
        run_json=run_json,
    )


@app.command()
def calibrate(
    prompts: Annotated[
        Path, typer.Option(help="As for generate, one prompt per line or .jsonl; the last ones measure the error.")
    ],
    out: Annotated[Path, typer.Option(help="safetensors file to write; OUT.work holds an interrupted run.")],
    model: Annotated[str, typer.Option(help="Folder or hub name; 'countdown' is the embedded one.")] = "countdown",
    rank: Annotated[int, typer.Option(help="Of the Distillers that will start here.")] = 64,
    samples: Annotated[int, typer.Option(help="Generations per prompt.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens per generation.")] = 256,
    steps: Annotated[int, typer.Option(help="AdamW steps.")] = 1000,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of generations, start and batches.")] = 0,
    dtype: Annotated[str, typer.Option(help="Weights: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Fit start weights for a model's Distillers on its own generations; see DistillerConfig(start=...)."""
    from esamp_core.calibration import CalibrationConfig
    from esamp_core.cli.calibrate import run_calibrate

    config = CalibrationConfig(
        rank=rank, samples=samples, max_new_tokens=max_new_tokens, steps=steps, rate=rate, seed=seed
    )
    run_calibrate(
        Console(stderr=True),
        model_name=model,
        prompts_file=prompts,
        out=out,
        dtype=dtype,
        device=device,
        config=config,
    )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="run.json, of `esamp generate --run-json` or `bench.passk table`.")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; default: beside run.json.")] = None,
) -> None:
    """Turn a run file into one self-contained HTML page."""
    from esamp_core.report import run_report

    print(run_report(run, out))


@app.command()
def doctor() -> None:
    """Show versions, the GPU, and which backend will run and why."""
    from esamp_core.cli.doctor import run_doctor

    run_doctor(Console())


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"esamp: warning: {' '.join(str(message).split())}", file=sys.stderr)


def run() -> None:
    """What the user can mend, and every warning, is one line on stderr, never a traceback."""
    for stream, encoding in ((sys.stdout, "utf-8"), (sys.stderr, None)):
        if isinstance(stream, io.TextIOWrapper):  # UTF-8 whatever the terminal has, and nothing that cannot be written
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]  # of its arguments we need the first
            try:
                app()
            except SystemExit:
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, where it can be told that it failed
                raise
    except EsampError as error:
        _refuse("error" if isinstance(error, ArgumentError) else type(error).__name__, error)
    except BrokenPipeError:
        _forget_stdout()
        sys.exit(0)
    except OSError as error:  # a full disk
        _refuse("error", error)


def _refuse(kind: str, error: Exception) -> NoReturn:
    print(f"esamp: {kind}: {' '.join(str(error).split())}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):
        _forget_stdout()
    sys.exit(2)


def _forget_stdout() -> None:
    """What could not be written is not tried again when Python ends."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
