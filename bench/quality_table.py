"""Results into tables: Pass@k, paired intervals over problems, and the run.json that `esamp report` shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.results import read_object
from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import read_text, write_text
from esamp_core.report import ESTIMATED_KL, Curve, PromptSamples, RunFile, SampleText, StepSeries
from esamp_core.report.metrics import Difference, paired_bootstrap, pass_at_k

KS = (1, 2, 4, 8, 16, 32)
REFERENCES = ("vanilla", "min-p .05")  # what every other sampler is compared with
SHIPPING_KS = (16, 32)
CONTROL = "control: "  # how the names of ESamp's controls begin


class Column(NamedTuple):
    """A number per problem, averaged over seeds, from the runs with most siblings."""

    title: str
    of: Callable[[dict[str, Any], int], float | None]  # a problem's record and n
    text: str


COLUMNS = (
    Column("correct %", lambda r, n: 100 * r["correct"] / n, "{:.1f}"),
    Column("valid %", lambda r, n: 100 * r["valid"], "{:.1f}"),
    Column("distinct correct", lambda r, n: r["distinct"], "{:.2f}"),
    Column("distinct-4", lambda r, n: r["distinct_4"], "{:.3f}"),
    Column("self-BLEU", lambda r, n: r["self_bleu"], "{:.3f}"),
    Column("entropy before", lambda r, n: r["entropy_model"], "{:.3f}"),
    Column("after", lambda r, n: r["entropy_sampled"], "{:.3f}"),
    Column("KL", lambda r, n: r["kl"], "{:.4f}"),
    Column("tokens per sample", lambda r, n: r["tokens"] / n, "{:.1f}"),
)


@dataclass(frozen=True)
class SamplerResults:
    """Everything that was run of one sampler: ``runs[n][seed]`` is a result file's content."""

    name: str
    dependent: bool
    runs: dict[int, dict[int, dict[str, Any]]]

    @property
    def largest(self) -> int:
        return max(self.runs)

    @property
    def seeds(self) -> list[int]:
        return sorted(self.runs[self.largest])

    def pass_at(self, k: int) -> NDArray[np.float64] | None:
        """Pass@k per problem, averaged over seeds; None if it was not run."""
        n = k if self.dependent else self.largest
        if n not in self.runs or k > n:
            return None
        runs = self.runs[n].values()
        return np.mean([pass_at_k([p["correct"] for p in run["problems"]], n, k) for run in runs], axis=0)

    def column(self, column: Column) -> float | None:
        values = [column.of(p, self.largest) for run in self.runs[self.largest].values() for p in run["problems"]]
        known = [v for v in values if v is not None]
        return float(np.mean(known)) if known else None


@dataclass(frozen=True)
class Results:
    """A folder of result files, all of one model, task, pool and problem list."""

    samplers: list[SamplerResults]
    about: dict[str, Any]  # model, task, pool, problems
    commits: list[str]
    machines: list[str]
    cpu_seconds: float

    def by_name(self, name: str) -> SamplerResults | None:
        return next((s for s in self.samplers if s.name == name), None)


def load_results(folder: Path, seeds: int | None = None) -> Results:
    """Read a folder that ``passk run`` wrote.

    seeds: only the first so many; of an interrupted run, those that are complete.
    Raises ArgumentError if the folder is empty, holds different studies, or a seed was not run with every n.
    """
    needed = ("unit", "dependent", "commit", "machine", "cpu_seconds", "problems")
    files = [read_object(path, needed) for path in sorted(folder.glob("*.json"))]
    files = [f for f in files if seeds is None or f["unit"]["seed"] < seeds]
    if not files:
        raise ArgumentError(f"{folder} holds no result files")
    about = {key: files[0]["unit"][key] for key in ("model", "task", "pool", "problems")}
    runs: dict[str, dict[int, dict[int, dict[str, Any]]]] = {}
    dependent: dict[str, bool] = {}
    for file in files:
        unit = file["unit"]
        if any(unit[key] != value for key, value in about.items()):
            raise ArgumentError(f"{folder} holds results of different studies: {about} and {unit}")
        runs.setdefault(unit["sampler"], {}).setdefault(unit["n"], {})[unit["seed"]] = file
        dependent[unit["sampler"]] = file["dependent"]
    samplers = [SamplerResults(name, dependent[name], by_n) for name, by_n in runs.items()]
    for sampler in samplers:
        for n, by_seed in sampler.runs.items():
            if set(by_seed) != set(sampler.runs[sampler.largest]):
                raise ArgumentError(f"{sampler.name}, n={n} lacks a seed: continue the run, or show fewer seeds")
    machines = {_ran_on(f) for f in files}
    return Results(
        samplers,
        about,
        sorted({f["commit"] for f in files}),
        sorted(machines),
        sum(f["cpu_seconds"] for f in files),
    )


def _ran_on(file: dict[str, Any]) -> str:
    machine = file["machine"]
    versions = file.get("versions", machine)  # older files have both in one
    return f"{machine.get('gpu') or machine.get('cpu') or machine['processor']}, torch {versions['torch']}"


def markdown(results: Results, order: Sequence[str] = ()) -> str:
    """All tables, in the order of ``order``, then by name."""
    place = {name: i for i, name in enumerate(order)}
    samplers = sorted(results.samplers, key=lambda s: (place.get(s.name, len(place)), s.name))
    seeds = sorted({len(s.seeds) for s in samplers})
    about = results.about
    caption = (
        f"Model {about['model']}, task {about['task']}, pool {about['pool']}: {about['problems']} problems, "
        f"n = {max(s.largest for s in samplers)}, {' or '.join(map(str, seeds))} seeds, commit "
        f"{', '.join(results.commits)}; {results.cpu_seconds / 60:.0f} CPU minutes on {', '.join(results.machines)}."
    )
    parts = [caption, "Pass@k, %. Dependent samplers (D) were run with exactly k siblings.", _pass_table(samplers)]
    for name in REFERENCES:
        reference = results.by_name(name)
        if reference is not None:
            parts += [
                f"Difference in Pass@k from **{name}**, points, with 95 % paired bootstrap intervals over problems "
                "(bold: zero is outside):",
                _difference_table(samplers, reference),
            ]
    controls = [s for s in samplers if s.name.startswith(CONTROL)]
    explored = [s for s in samplers if s.name.startswith("ESamp")]
    if controls and explored:
        parts += ["Difference in Pass@k of ESamp from its controls:", _control_table(explored, controls)]
    parts += ["At the largest n:", _column_table(samplers)]
    return "\n\n".join(parts)


def _ks(samplers: Sequence[SamplerResults]) -> list[int]:
    return [k for k in KS if any(s.pass_at(k) is not None for s in samplers)]


def _pass_table(samplers: Sequence[SamplerResults]) -> str:
    ks = _ks(samplers)
    rows = []
    for s in samplers:
        values = (s.pass_at(k) for k in ks)
        cells = ["" if v is None else f"{100 * v.mean():.1f}" for v in values]
        rows.append([s.name + (" (D)" if s.dependent else ""), *cells])
    return grid(["sampler", *(f"@{k}" for k in ks)], rows)


def difference(a: SamplerResults, b: SamplerResults, k: int) -> Difference | None:
    """Pass@k of a minus that of b, in points."""
    x, y = a.pass_at(k), b.pass_at(k)
    return None if x is None or y is None else paired_bootstrap(100 * x, 100 * y)


def _difference_table(samplers: Sequence[SamplerResults], reference: SamplerResults) -> str:
    ks = _ks(samplers)
    rows = [[s.name, *_differences(s, reference, ks)] for s in samplers if s is not reference]
    return grid(["sampler", *(f"@{k}" for k in ks)], rows)


def _control_table(explored: Sequence[SamplerResults], controls: Sequence[SamplerResults]) -> str:
    ks = _ks(explored)
    rows = [[s.name, c.name.removeprefix(CONTROL), *_differences(s, c, ks)] for s in explored for c in controls]
    return grid(["sampler", "minus control", *(f"@{k}" for k in ks)], rows)


def _differences(a: SamplerResults, b: SamplerResults, ks: Sequence[int]) -> list[str]:
    """One cell per k; bold where zero is outside the interval."""
    cells = []
    for d in (difference(a, b, k) for k in ks):
        text = "" if d is None else f"{d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}]"
        cells.append(f"**{text}**" if d is not None and (d.low > 0 or d.high < 0) else text)
    return cells


def _column_table(samplers: Sequence[SamplerResults]) -> str:
    rows = []
    for s in samplers:
        values = [(c.text, s.column(c)) for c in COLUMNS]
        rows.append([s.name, *("" if v is None else text.format(v) for text, v in values)])
    return grid(["sampler", *(c.title for c in COLUMNS)], rows)


def options_table(
    tables: Sequence[Results],
    options: Sequence[str],
    reference: str,
    ks: Sequence[int] = SHIPPING_KS,
) -> str:
    """What decides about shipping: each option's difference from one in every table; how many are above, the mean."""
    places = [(results, k) for results in tables for k in ks]
    titles = [f"{Path(r.about['model']).name}, {r.about['task']} @{k}" for r, k in places]
    rows = []
    for name in options:
        found = [(r.by_name(name), r.by_name(reference), k) for r, k in places]
        cells = [[""] if a is None or b is None else _differences(a, b, [k]) for a, b, k in found]
        means = [d.mean for a, b, k in found if a and b and (d := difference(a, b, k)) is not None]
        above = f"{sum(m > 0 for m in means)} of {len(means)}"
        rows.append([name, *(cell for (cell,) in cells), above, f"{np.mean(means):+.1f}" if means else ""])
    return grid(["option", *titles, "above", "mean"], rows)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands between ``<!-- begin marker -->`` and ``<!-- end marker -->``.  Raises ArgumentError."""
    begin, end = f"<!-- begin {marker} -->", f"<!-- end {marker} -->"
    old = read_text(path, "--doc")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise ArgumentError(f"{path} must have the markers {begin} and {end} once")
    head, rest = old.split(begin)
    write_text(path, f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}", "--doc")


def write_run_json(results: Results, path: Path, shown: int = 8) -> None:
    """What ``esamp report`` turns into a page; of every sampler and prompt at most ``shown`` samples."""
    ks = _ks(results.samplers)
    curves, steps = [], []
    prompts: dict[str, list[SampleText]] = {}
    for s in results.samplers:
        points = [(k, paired_bootstrap(v, np.zeros_like(v))) for k in ks if (v := s.pass_at(k)) is not None]
        columns = zip(*((d.mean, d.low, d.high) for _, d in points), strict=True)
        curves.append(Curve(s.name, [k for k, _ in points], *map(list, columns)))
        first = s.runs[s.largest][s.seeds[0]]
        steps.append(StepSeries(s.name, first["kl_per_step"], first["loss_per_step"]))
        for prompt in first["shown"]:
            prompts.setdefault(prompt["prompt"], []).extend(
                SampleText(s.name, x["tokens"], x["novelty"], x["correct"]) for x in prompt["samples"][:shown]
            )
    about = results.about
    RunFile(
        title=f"{about['model']}: {len(results.samplers)} samplers on {about['problems']} problems",
        about={**{k: str(v) for k, v in about.items()}, "commit": ", ".join(results.commits)},
        prompts=[PromptSamples(prompt, samples) for prompt, samples in prompts.items()],
        curves=curves,
        steps=steps,
        kl_is=ESTIMATED_KL,
    ).write(path)
