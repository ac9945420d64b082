"""``esamp calibrate``: a model and prompts in, a file of start weights out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from esamp_core.calibration import CalibrationConfig, calibrate, save_start
from esamp_core.cli.inputs import check_writable, load_model, read_prompts


def run_calibrate(
    console: Console,
    *,
    model_name: str,
    prompts_file: Path,
    out: Path,
    dtype: str,
    device: str,
    config: CalibrationConfig,
) -> None:
    """The command.  Raises ArgumentError."""
    check_writable(out, "--out")
    prompts = [asked.prompt for asked in read_prompts([], prompts_file)]
    model, tokenizer = load_model(model_name, dtype, device)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None:
        config = replace(config, max_new_tokens=min(config.max_new_tokens, context))
    work = out.with_name(out.name + ".work")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of)
            progress.update(tasks[what], completed=done)

        result = calibrate(model, tokenizer, prompts, config, work, show)
    save_start(out, result, model_name, model)
    work.unlink(missing_ok=True)
    console.print(
        f"Relative squared error on {result.held_out_tokens} held-out tokens: {result.before:.3f} at the plain start, "
        f"{result.baseline:.3f} of the mean state, {result.after:.3f} calibrated. "
        f"Use it as DistillerConfig(start={str(out)!r}, rank={config.rank})."
    )
