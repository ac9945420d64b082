"""Pass@k and diversity of samplers, by command: ``python -m bench.passk run``, then ``table``.

Every (sampler, seed, n) is one JSON file, so that a run can be interrupted, split over machines and continued.
Independent samplers are run once with n = 32 siblings, and Pass@k is the unbiased estimator.  Where siblings influence
each other (ESamp, memories, arithmetic) k of 32 siblings are not what a run of k would have drawn: those samplers are
run with exactly k siblings for every k.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.quality_decode import Batch, Sampler, decode, request_seeds
from bench.quality_plan import options as sibling_options
from bench.quality_plan import studies
from bench.quality_tasks import Pool, Source, Task, disjoint_problems, load_source, load_task
from bench.results import commit, told
from esamp_core.base.environment import installed, machine
from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import write_text
from esamp_core.report.metrics import distinct_n, self_bleu

KS = (1, 2, 4, 8, 16, 32)
ROWS = 1024  # sequences at a time; like the seed it decides, through rounding, which samples come out
SHOWN = 3  # problems whose samples a result keeps as text, for reports


@dataclass(frozen=True)
class Unit:
    """One file of results."""

    model: str
    task: str
    pool: Pool
    problems: int
    sampler: str
    n: int
    seed: int

    @property
    def file(self) -> str:
        plain = "".join(c if c.isalnum() or c in ".-" else "_" for c in self.sampler)
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]
        return f"{plain}-n{self.n}-s{self.seed}-{digest}.json"


def units(
    samplers: Sequence[Sampler], model: str, task: str, pool: Pool, problems: int, ks: Sequence[int], seeds: int
) -> Iterator[Unit]:
    """Everything to run: seed by seed, so that an interrupted run still compares all samplers."""
    for seed in range(seeds):
        for sampler in samplers:
            for k in ks if sampler.dependent else [max(ks)]:
                yield Unit(model, task, pool, problems, sampler.name, k, seed)


def run_unit(source: Source, task: Task, sampler: Sampler, unit: Unit) -> dict[str, Any]:
    """Sample and judge; the result as it is written."""
    problems = disjoint_problems(task, unit.pool, unit.problems)
    at_a_time = max(1, ROWS // unit.n)
    start, cpu = time.perf_counter(), time.process_time()
    records: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    losses: list[list[float]] = []
    step_sums = torch.zeros(2, task.max_new_tokens)  # KL and tokens at each step
    for first in range(0, len(problems), at_a_time):
        part = problems[first : first + at_a_time]
        prompts = [source.encode(task.prompt(p)) for p in part]
        seeds = request_seeds(unit.seed, first, len(part))
        batch = decode(source, sampler, prompts, unit.n, seeds, task.max_new_tokens)
        losses.append(batch.losses)
        on = batch.token_ids >= 0
        kl = (batch.logprob - batch.base_logprob) * on
        step_sums[:, : on.shape[1]] += torch.stack([kl.sum(0), on.sum(0).float()])
        for i, problem in enumerate(part):
            rows = slice(i * unit.n, (i + 1) * unit.n)
            record, texts = judge(source, task, problem, Batch(*(t[rows] for t in batch[:-1]), []))
            records.append(record)
            if len(shown) < SHOWN:
                shown.append({"prompt": task.prompt(problem), "samples": texts})
    return {
        "unit": asdict(unit),
        "dependent": sampler.dependent,
        "commit": commit(),
        "machine": machine(),
        "versions": installed("python", "torch", "transformers"),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "problems": records,
        "kl_per_step": (step_sums[0] / step_sums[1].clamp_min(1)).tolist(),
        "tokens_per_step": step_sums[1].int().tolist(),
        "loss_per_step": mean_ragged(losses),
        "shown": shown,
    }


def judge(source: Source, task: Task, problem: Any, batch: Batch) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One problem's numbers, and its samples as text."""
    lengths = (batch.token_ids >= 0).sum(1).tolist()
    samples = [row[:length] for row, length in zip(batch.token_ids.tolist(), lengths, strict=True)]
    words = [s[:-1] if s[-1] in source.stop_ids else s for s in samples]
    verdicts = [task.check(problem, text) for text in source.tokenizer.batch_decode(words)]
    tokens = sum(lengths)
    on = batch.token_ids >= 0
    record = {
        "correct": sum(v.correct for v in verdicts),
        "distinct": len({v.key for v in verdicts if v.correct}),
        "valid": sum(v.valid for v in verdicts) / len(verdicts),
        "tokens": tokens,
        "distinct_2": distinct_n(words, 2),
        "distinct_4": distinct_n(words, 4),
        "self_bleu": self_bleu(words) if len(words) > 1 and all(words) else None,
        # Means over drawn tokens.  The second is -log p of what was drawn: an unbiased sample of the entropy.
        "entropy_model": float(batch.entropy.sum()) / tokens,
        "entropy_sampled": float(-batch.logprob.sum()) / tokens,
        "kl": float((batch.logprob - batch.base_logprob)[on].sum()) / tokens,
    }
    texts = [
        {
            "tokens": source.tokenizer.convert_ids_to_tokens(sample),
            "novelty": [round(x, 3) for x in batch.novelty[i, : len(sample)].tolist()],
            "correct": bool(verdict.correct),
        }
        for i, (sample, verdict) in enumerate(zip(samples, verdicts, strict=True))
    ]
    return record, texts


def mean_ragged(rows: Sequence[Sequence[float]]) -> list[float]:
    """Column means of rows of different lengths."""
    longest = max(map(len, rows), default=0)
    columns = [[row[i] for row in rows if len(row) > i] for i in range(longest)]
    return [sum(c) / len(c) for c in columns]


_worker: dict[str, Any] = {}


def _start_worker(model: str, task: str, study: str, device: str) -> None:
    torch.set_num_threads(1)  # the workers fill the cores
    torch.set_default_device(device)
    _worker.update(source=load_source(model, device), task=load_task(task), samplers=studies()[study])


def _work(job: tuple[Unit, str]) -> None:
    unit, out = job
    result = run_unit(_worker["source"], _worker["task"], _worker["samplers"][unit.sampler], unit)
    write_whole(Path(out) / unit.file, result)


def write_whole(path: Path, result: dict[str, Any]) -> None:
    """As JSON, in one move: an interrupted run leaves no half of a file under this name."""
    write_text(path, json.dumps(result), str(path))


def run_study(
    out: Path, study: str, model: str, task: str, pool: Pool, problems: int, seeds: int, ks: Sequence[int],
    workers: int, device: str = "cpu",
) -> None:  # fmt: skip
    """Run what ``out`` does not hold yet.  Raises ArgumentError."""
    if study not in studies():
        raise ArgumentError(f"--study must be one of {', '.join(studies())}, got {study!r}")
    if not ks or not set(ks) <= set(KS):
        raise ArgumentError(f"--ks must be some of {KS}, got {ks}")
    out.mkdir(parents=True, exist_ok=True)
    everything = list(units(list(studies()[study].values()), model, task, pool, problems, ks, seeds))
    todo = [unit for unit in everything if not (out / unit.file).exists()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, TimeRemainingColumn(), disable=not sys.stderr.isatty()) as progress,
        context.Pool(max(1, min(workers, len(todo))), _start_worker, (model, task, study, device)) as pool_of_workers,
    ):
        bar = progress.add_task(study, total=len(everything), completed=len(everything) - len(todo))
        for _ in pool_of_workers.imap_unordered(_work, [(unit, str(out)) for unit in todo]):
            progress.advance(bar)


def show(text: str, doc: Path | None, marker: str) -> None:
    """Print a table, or write it between its markers in a file."""
    from bench.quality_table import write_between

    if doc is None:
        print(text)
    else:
        write_between(doc, marker, text)


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of result files; what it holds already is kept.")],
    study: Annotated[str, typer.Option(help="Which samplers; see bench/quality_plan.py.")] = "main",
    model: Annotated[str, typer.Option(help="'countdown', or a folder or hub name.")] = "countdown",
    task: Annotated[str, typer.Option(help="'countdown', or a module with bench.quality_tasks.Task's names.")] = (
        "countdown"
    ),
    pool: Annotated[str, typer.Option(help="'tune' or 'report'.")] = "tune",
    problems: Annotated[int, typer.Option(min=1)] = 200,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    ks: Annotated[str, typer.Option(help="Numbers of siblings; independent samplers run with the largest.")] = (
        ",".join(map(str, KS))
    ),
    workers: Annotated[int, typer.Option(min=1)] = 2,
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'; which samples come out depends on it.")] = "cpu",
) -> None:
    """Sample and judge."""
    run_study(out, study, model, task, pool, problems, seeds, [int(k) for k in ks.split(",")], workers, device)  # type: ignore[arg-type]


@app.command()
def table(
    out: Annotated[Path, typer.Argument(help="Folder of result files.")],
    doc: Annotated[Path | None, typer.Option(help="Markdown file to write into; default stdout.")] = None,
    marker: Annotated[str, typer.Option(help="Name of the markers in --doc.")] = "main-table",
    seeds: Annotated[int | None, typer.Option(min=1, help="Only the first so many, of an interrupted run.")] = None,
    run_json: Annotated[Path | None, typer.Option(help="Also write what `esamp report` shows.")] = None,
) -> None:
    """The table of what a folder holds."""
    from bench.quality_table import load_results, markdown, write_run_json

    results = load_results(out, seeds)
    show(markdown(results, list(dict.fromkeys(name for study in studies().values() for name in study))), doc, marker)
    if run_json is not None:
        write_run_json(results, run_json)


@app.command()
def options(
    folders: Annotated[list[Path], typer.Argument(help="Folders of result files, one per table.")],
    reference: Annotated[str, typer.Option(help="The sampler to compare with.")] = "min-p .05",
    doc: Annotated[Path | None, typer.Option(help="Markdown file to write into; default stdout.")] = None,
    marker: Annotated[str, typer.Option(help="Name of the markers in --doc.")] = "options-table",
) -> None:
    """Which sibling options hold: their differences from one sampler in all tables side by side."""
    from bench.quality_table import load_results, options_table

    chosen = [name for name in sibling_options() if name != reference]
    show(options_table([load_results(folder) for folder in folders], chosen, reference), doc, marker)


if __name__ == "__main__":
    told(app)
