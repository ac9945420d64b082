"""Samplers on a real model: ``python -m bench.bed run``, then ``table`` (make bed, make bed-table).

SmolLM2-135M-Instruct answers the work of bench/bed_tasks.py, n siblings an item.  Every (sampler, work, seed) is one
JSON file in --out, so that a run can be interrupted and continued; ``table`` reads them, or the one file that
``pack`` makes of them for bench/results.  All samplers draw with the same noise at a seed, and none gets more tokens.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer

from bench import bed_table
from bench.bed_model import NAME, converted
from bench.bed_tasks import WORK, Item, Work
from bench.decoded import Beams, Decoded
from bench.learning_rule import Recipe, constant_errors, record_prompts, relearn
from bench.passk import show, write_whole
from bench.quality_decode import Batch, Sampler, decode, request_seeds
from bench.quality_plan import BASE, esamp, kernel, ridge, with_arithmetic, with_rounds
from bench.quality_table import grid
from bench.quality_tasks import Pool, Source, load_source
from bench.results import RESULTS, ROOT, commit, load, read_object, report, told
from bench.samplers import Explored, Filter, Plain, by_name, forget
from esamp_core.base.environment import installed, machine
from esamp_core.base.files import write_text
from esamp_core.report.metrics import distinct_n
from esamp_core.sample import PRESETS, DistillerConfig, SamplingParams

OUT = ROOT / "bench" / "out" / "bed"
START = "start.safetensors"  # calibrated, in the run's folder
SIBLINGS, ROWS = 16, 128
MOST_ITEMS = 32  # of a work that a run may use
RATES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
BASE_PARAMS = SamplingParams(min_p=0.05)


KERNEL = with_rounds(kernel(2.0, 1024), 4)
# What else was looked at for siblings, before distinct ones were chosen; on short answers.
SEARCHED = (
    KERNEL,
    with_arithmetic(KERNEL),
    with_rounds(ridge(2.0), 4),
    Plain("min-p .02", Filter(min_p=0.02)),
    Plain("stratified, min-p .02", Filter(min_p=0.02), arithmetic=True),
    Plain("stratified, by embedding", BASE, arithmetic=True, by_embedding=True),
    Plain("stratified, T 1.3", Filter(temperature=1.3, min_p=0.05), arithmetic=True),
)


def samplers(start: str) -> dict[str, Sampler | Decoded | Beams]:
    """Baselines, controls, the library's default, what a calibrated start (its file) makes of it, and the presets."""

    def explored(
        name: str, beta: float, config: DistillerConfig, stratified: bool = False, **options: bool
    ) -> Explored:
        return Explored(name, replace(BASE_PARAMS, beta=beta, stratified=stratified), config, **options)

    fresh, calibrated = DistillerConfig(), DistillerConfig(start=start)
    paper, release = PRESETS["paper"], PRESETS["release"]
    return by_name([
        Plain("min-p .05", BASE),
        Plain("vanilla", Filter()),
        Plain("T 1.3, min-p .05", Filter(temperature=1.3, min_p=0.05)),
        Plain("first token at T 4 (FIRE), min-p .05", replace(BASE, first_temperature=4.0)),
        Plain("top-n-sigma 1", Filter(top_n_sigma=1.0)),
        Plain("p-less", Filter(p_less=True)),
        Plain("top-H .4", Filter(top_h=0.4)),
        Plain("stratified", BASE, arithmetic=True),
        Decoded(SHIPPED, replace(BASE_PARAMS, distinct=True)),
        Beams("control: beam search"),
        *SEARCHED,
        Plain("control: sharpened 1.25", Filter(min_p=0.05, sharpen=1.25)),
        esamp(0.25, "control: random direction", random=True),
        explored("control: untrained, .25", 0.25, replace(fresh, lr=0.0, gate=False)),
        explored("control: calibrated and frozen, .25", 0.25, replace(calibrated, lr=0.0, gate=False)),
        explored("ungated lr .3, .25", 0.25, replace(fresh, lr=0.3, gate=False)),
        explored("ungated, .25", 0.25, replace(fresh, gate=False)),
        explored("default, .1", 0.1, fresh),
        explored("default, .25", 0.25, fresh),
        explored("default, .25, one for all prompts", 0.25, fresh, shared=True),
        explored("calibrated, .25", 0.25, calibrated),
        explored("calibrated, neutral, .5", 0.5, calibrated, neutral=True),
        explored("stratified, default, .25", 0.25, fresh, stratified=True),
        explored("stratified, calibrated, neutral, .5", 0.5, calibrated, stratified=True, neutral=True),
        Explored("preset paper", paper.params, paper.config, shared=paper.one_for_all),
        Explored("preset paper, one for each prompt", paper.params, paper.config),
        explored("recipe paper, one for each prompt, min-p .05, .25", 0.25, paper.config),
        Explored("preset release", release.params, release.config, shared=release.one_for_all),
    ])  # fmt: skip


SHIPPED = "distinct, default, .1"  # what generate does when it is told nothing
POOLS = {"tune": "bed", "report": "bed-report"}  # what files of a pool's results begin with
QUICK = (
    "min-p .05", SHIPPED, "stratified", "control: untrained, .25", "ungated lr .3, .25", "default, .25",
    "calibrated, .25", "calibrated, neutral, .5", "stratified, calibrated, neutral, .5",
)  # fmt: skip


# Whose long answers are not worth their time: filters that lose on short ones, and variants of other samplers.
SHORT = (
    *(sampler.name for sampler in SEARCHED),
    "first token at T 4 (FIRE), min-p .05", "top-n-sigma 1", "p-less", "top-H .4", "stratified, default, .25",
    "preset paper, one for each prompt", "recipe paper, one for each prompt, min-p .05, .25",
)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    sampler: str
    work: str
    pool: Pool
    items: int
    seed: int

    @property
    def file(self) -> str:
        plain = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{self.work}-{self.sampler}")
        return f"{plain}-{self.pool}-{self.items}-s{self.seed}.json"


def line_source(source: Source) -> Source:
    """The same model, whose answers end with their line."""
    words = source.tokenizer.batch_decode([[i] for i in range(len(source.tokenizer))])
    ends = {i for i, word in enumerate(words) if "\n" in word}
    found = Source(source.name, source.model, source.tokenizer)
    vars(found)["stop_ids"] = sorted(ends | set(source.stop_ids))
    return found


class Bed:
    """The model, ready for each kind of work."""

    def __init__(self, folder: Path, device: str) -> None:
        self.source = load_source(str(converted(folder)), device)
        self.lines = line_source(self.source)

    def source_of(self, work: Work) -> Source:
        return self.lines if work.kind == "few-shot" else self.source

    def text(self, work: Work, item: Item) -> str:
        if work.kind == "few-shot":
            return item.prompt
        chat = [{"role": "user", "content": item.prompt}]
        return str(self.source.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))

    def encode(self, work: Work, item: Item) -> list[int]:
        return list(self.source.tokenizer(self.text(work, item), add_special_tokens=False)["input_ids"])


def run_unit(bed: Bed, sampler: Sampler | Decoded | Beams, unit: Unit) -> dict[str, Any]:
    """Sample and judge; the result as it is written."""
    work = next(work for work in WORK if work.name == unit.work)
    items, source, start = work.pool(unit.pool, unit.items), bed.source_of(work), time.perf_counter()
    records, at_a_time = [], max(1, ROWS // SIBLINGS)
    forget()  # or a Distiller would bring what it learned in the units that this worker happened to run before
    for first in range(0, len(items), at_a_time):
        part = items[first : first + at_a_time]
        prompts = [bed.encode(work, item) for item in part]
        seeds = request_seeds(unit.seed, first, len(part))
        drawn = None
        if isinstance(sampler, (Decoded, Beams)):
            batch, drawn = sampler.decode(source, prompts, SIBLINGS, seeds, work.new_tokens)
        else:
            batch = decode(source, sampler, prompts, SIBLINGS, seeds, work.new_tokens)
        for i, item in enumerate(part):
            rows = slice(i * SIBLINGS, (i + 1) * SIBLINGS)
            record = judge(source, item, Batch(*(t[rows].cpu() for t in batch[:-1]), []))
            if drawn is not None:
                record |= {"drawn": drawn, "nested": isinstance(sampler, Decoded) and sampler.params.distinct}
            records.append(record)
    return {
        "unit": unit.__dict__,
        "kind": work.kind,
        "long": work.long,
        "commit": commit(),
        "machine": machine(),
        "versions": installed("python", "torch", "transformers"),
        "seconds": round(time.perf_counter() - start, 1),
        "items": records,
    }


def judge(source: Source, item: Item, batch: Batch) -> dict[str, Any]:
    """One item's numbers, and its answers."""
    on = batch.token_ids >= 0
    samples = [row[: int(length)] for row, length in zip(batch.token_ids.tolist(), on.sum(1), strict=True)]
    words = [s[:-1] if s[-1] in source.stop_ids else s for s in samples]
    answers = [text.strip() for text in source.tokenizer.batch_decode(words, skip_special_tokens=True)]
    right = [item.correct(answer) for answer in answers]
    tokens = int(on.sum())
    return {
        "correct": sum(right),
        "right": right,
        "distinct": len(set(answers)),
        "distinct_correct": len({a for a, ok in zip(answers, right, strict=True) if ok}),
        "tokens": tokens,
        "base_logprob": float(batch.base_logprob[on].sum()) / tokens,
        "kl": float((batch.logprob - batch.base_logprob)[on].sum()) / tokens,
        "distinct_2": distinct_n(words, 2),
        "distinct_4": distinct_n(words, 4),
        "repeated_4": sum(repeated(w, 4) for w in words) / len(words),
        "answers": answers,
    }


def repeated(words: Sequence[int], order: int) -> float:
    """Share of a text's n-grams that it has said before."""
    grams = [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


_worker: dict[str, Any] = {}


def _start_worker(out: str, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_default_device(device)
    _worker.update(bed=Bed(Path(out), device), samplers=samplers(str(Path(out) / START)))


def _work(job: tuple[Unit, str]) -> str:
    unit, out = job
    result = run_unit(_worker["bed"], _worker["samplers"][unit.sampler], unit)
    write_whole(Path(out) / "runs" / unit.file, result)
    return unit.file


def calibrate_start(out: Path, device: str) -> None:
    """The start that the table's samplers share, fitted on prompts that the table does not use; about two minutes."""
    from esamp_core.calibration import CalibrationConfig, calibrate, save_start

    bed = Bed(out, device)
    prompts = [bed.text(work, item) for work in WORK for item in work.pool("tune", MOST_ITEMS + 6)[MOST_ITEMS:]]
    config = CalibrationConfig(samples=2, max_new_tokens=64, steps=400)

    def quiet(what: str, done: int, total: int) -> None:
        pass

    found = calibrate(bed.source.model, bed.source.tokenizer, prompts, config, out / f"{START}.work", quiet)
    save_start(out / START, found, NAME, bed.source.model)
    print(f"calibrated: relative error {found.before:.2f} -> {found.after:.2f}, of the mean state {found.baseline:.2f}")


app = typer.Typer(add_completion=False, no_args_is_help=True)
Out = Annotated[Path, typer.Option(help="Folder of the model, the start, and the run's files.")]


@app.command()
def run(
    out: Out = OUT,
    pool: Annotated[str, typer.Option(help="tune, or report: touched once, after a choice is written down.")] = "tune",
    items: Annotated[int, typer.Option(help="Of each work, half as many of those with long answers.")] = 16,
    seeds: Annotated[int, typer.Option()] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Nine samplers, 4 items, one seed.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Samplers; default all, most of them on long answers.")] = None,
    work: Annotated[list[str] | None, typer.Option(help="Kinds of work; default all.")] = None,
    short: Annotated[bool, typer.Option("--short", help="Without the works with long answers.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; cuda takes one worker.")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = 2,
) -> None:
    """Run what --out does not hold yet."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    converted(out)
    if not (out / START).exists():
        calibrate_start(out, device)
    names = list(samplers(str(out / START)))
    chosen = only or (list(QUICK) if quick else names)
    if unknown := sorted(set(chosen) - set(names)):
        raise typer.BadParameter(f"--only must be some of {names}, got {unknown}")
    if unknown := sorted(set(work or ()) - {w.name for w in WORK}):
        raise typer.BadParameter(f"--work must be some of {[w.name for w in WORK]}, got {unknown}")
    size, repeats = (4, 1) if quick else (items, seeds)
    if not 1 <= size <= MOST_ITEMS:
        raise typer.BadParameter(f"--items must be in 1..{MOST_ITEMS}, got {items}")
    units = [
        Unit(name, w.name, pool, max(1, size // 2) if w.long else size, seed)  # type: ignore[arg-type]
        for seed in range(repeats)
        for w in WORK
        for name in chosen
        if w.name in (work or [w.name]) and not (w.long and (short or (name in SHORT and not only)))
    ]
    todo = [unit for unit in units if not (out / "runs" / unit.file).exists()]
    workers = 1 if device != "cpu" else max(1, min(workers, len(todo)))
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_worker, (str(out), device, 1 if workers > 1 else os.cpu_count() or 1)) as crew:
        for number, name in enumerate(crew.imap_unordered(_work, [(unit, str(out)) for unit in todo]), 1):
            print(f"{number}/{len(todo)} {name}", flush=True)


@app.command()
def rates(
    out: Out = OUT,
    doc: Annotated[Path | None, typer.Option(help="Write the table between its marks in this file.")] = None,
) -> None:
    """Errors of online learning by rate on the model's own long answers, beside those of a constant: the gate's two."""
    bed, windows = Bed(out, "cpu"), ((1, 9), (9, 33), (33, 65), (65, 129), (129, 200))
    works = [work for work in WORK if work.name in ("story", "sentences")]
    rows: list[list[str]] = []
    for work in works:
        prompts = [bed.encode(work, item) for item in work.pool("tune", 3)]
        recording = record_prompts(bed.source, prompts, SIBLINGS, 0, 200)
        learned = {f"lr {lr:g}": relearn(recording, Recipe("", DistillerConfig(lr=lr, gate=False))) for lr in RATES}
        for name, errors in ({"the mean so far": constant_errors(recording)} | learned).items():
            cells = [f"{float(errors[a:b].nanmean()):.3f}" if a < len(errors) else "" for a, b in windows]
            rows.append([work.name, name, *cells])
    head = ["work", "predicted by", *(f"steps {a + 1}-{b}" for a, b in windows)]
    caption = f"3 prompts of 16 siblings each, until 200 tokens; commit {commit()}, torch {torch.__version__}."
    show(f"{caption}\n\n{grid(head, rows)}", doc, "bed-rates")


@app.command()
def pack(
    out: Out = OUT,
    pool: Annotated[str, typer.Option(help="Whose runs.")] = "tune",
    to: Annotated[
        Path | None, typer.Option(help="Default bench/results/bed-DATE.json, or bed-report-DATE.json.")
    ] = None,
) -> None:
    """One file of the runs in --out, similarities included and answers left out: where a work was run with several
    numbers of items, the most, which hold the others."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted((out / "runs").glob("*.json")):
        one = read_object(path, ("unit", "kind", "items"))
        key = tuple(str(one["unit"][name]) for name in ("sampler", "work", "seed"))
        if one["unit"]["pool"] != pool:
            continue
        if key not in found or one["unit"]["items"] > found[key]["unit"]["items"]:
            found[key] = one
    runs = bed_table.packed(list(found.values()))
    body = report("bed", "make bed", runs, dry=False)
    target = to or RESULTS / f"{POOLS[pool]}-{body['date']}.json"
    write_text(target, json.dumps(body, separators=(",", ":")) + "\n", "--to")
    print(target)


@app.command()
def table(
    results: Annotated[Path | None, typer.Argument(help="A file that pack wrote; default: the pool's latest.")] = None,
    pool: Annotated[str, typer.Option(help="tune or report.")] = "tune",
    doc: Annotated[Path | None, typer.Option(help="Write it between its marks in this file.")] = None,
) -> None:
    """Print the tables of a packed run."""
    found = results or max(RESULTS.glob(f"{POOLS[pool]}-2*.json"))
    show(bed_table.markdown(load(found)["cases"], SHIPPED), doc, {"tune": "bed-table", "report": "bed-report"}[pool])


if __name__ == "__main__":
    told(app)
