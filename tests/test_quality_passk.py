"""Studies: what is run, that it can be interrupted and repeated, and what the tables make of it."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.passk import KS, Unit, mean_ragged, run_study, run_unit, units
from bench.quality_plan import main, studies
from bench.quality_table import (
    SamplerResults,
    difference,
    load_results,
    markdown,
    options_table,
    write_between,
    write_run_json,
)
from bench.quality_tasks import CountdownTask, HardCountdownTask, Source, disjoint_problems, load_source, load_task
from esamp_core import countdown
from esamp_core.base.errors import ArgumentError
from esamp_core.report import RunFile


@pytest.fixture(scope="module")
def source() -> Source:
    return load_source("countdown")


def unit(sampler: str, n: int = 4, problems: int = 3, seed: int = 0) -> Unit:
    return Unit("countdown", "countdown", "tune", problems, sampler, n, seed)


def test_dependent_samplers_run_with_every_k_and_others_once() -> None:
    everything = list(units(main(), "m", "t", "report", 200, KS, 3))
    runs = {s.name: sorted(u.n for u in everything if u.sampler == s.name and u.seed == 1) for s in main()}
    assert runs["vanilla"] == runs["control: untrained Distiller"] == [32]
    for name in ("arithmetic", "ESamp 0.25", "choice 2", "ridge 2, 4 rounds", "kernel 2, window 1024"):
        assert runs[name] == list(KS)
    assert len({u.file for u in everything}) == len(everything)


def test_pools_are_disjoint_up_to_the_order_of_numbers() -> None:
    tune, report = (disjoint_problems(CountdownTask(), pool, 200) for pool in ("tune", "report"))
    assert not {p.canonical for p in tune} & {p.canonical for p in report}
    assert not any(countdown.held_out_pool(p) is None for p in (*tune, *report))


class _Overlapping:
    max_new_tokens = 1

    def problems(self, pool: str, count: int) -> list[int]:
        return list(range(count)) if pool == "tune" else list(range(count - 1, 2 * count))

    def prompt(self, problem: int) -> str:
        return str(problem)

    def check(self, problem: int, answer: str) -> Any:
        raise AssertionError


def test_hard_problems_have_few_solutions_and_are_not_those_of_the_main_table() -> None:
    task = HardCountdownTask()
    plain = {p.canonical for p in CountdownTask().problems("report", task.skipped)}
    hard = disjoint_problems(task, "report", 40)
    assert len(hard) == 40 and all(1 <= len(countdown.solutions(p)) <= 3 and p.canonical not in plain for p in hard)
    assert hard[:10] == disjoint_problems(task, "report", 10)


def test_overlapping_pools_are_refused() -> None:
    with pytest.raises(ArgumentError, match="disjoint"):
        disjoint_problems(_Overlapping(), "report", 4)


def test_a_module_can_be_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_task")
    monkeypatch.setitem(sys.modules, "my_task", module)
    with pytest.raises(ArgumentError, match="problems, prompt, check"):
        module.max_new_tokens = 3  # type: ignore[attr-defined]
        load_task("my_task")
    for name in ("problems", "prompt", "check"):
        setattr(module, name, lambda *args: None)
    assert load_task("my_task") is module
    with pytest.raises(ArgumentError, match="cannot be imported"):
        load_task("no_such_task")


def test_numbers_of_a_unit_are_those_of_its_samples(source: Source) -> None:
    n, problems = 4, 3
    result = run_unit(source, CountdownTask(), studies()["quick"]["vanilla"], unit("vanilla", n, problems))
    chosen = disjoint_problems(CountdownTask(), "tune", problems)
    for problem, record, shown in zip(chosen, result["problems"], result["shown"], strict=True):
        assert shown["prompt"] == problem.prompt
        texts = [" ".join(sample["tokens"]) for sample in shown["samples"]]
        verdicts = [countdown.check(problem, text) for text in texts]
        assert record["correct"] == sum(v.correct for v in verdicts)
        assert [s["correct"] for s in shown["samples"]] == [v.correct for v in verdicts]
        assert record["valid"] == pytest.approx(np.mean([v.valid for v in verdicts]))
        assert record["distinct"] == len({v.key for v in verdicts if v.correct})
        assert record["tokens"] == sum(len(s["tokens"]) for s in shown["samples"])
        assert record["kl"] == pytest.approx(0.0, abs=1e-6)  # vanilla
    assert sum(result["tokens_per_step"]) == sum(r["tokens"] for r in result["problems"])


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what may differ between two runs of it."""
    return {k: v for k, v in result.items() if k not in ("seconds", "cpu_seconds")}


@pytest.mark.parametrize("name", ["min-p .05", "ESamp 0.25", "control: random direction", "arithmetic"])
def test_the_same_seed_gives_the_same_result_and_another_does_not(source: Source, name: str) -> None:
    sampler = studies()["quick"][name]
    first, second, other = (run_unit(source, CountdownTask(), sampler, unit(name, seed=s)) for s in (5, 5, 6))
    assert numbers(first) == numbers(second)
    assert first["shown"] != other["shown"]


def test_a_study_keeps_what_it_has(tmp_path: Path) -> None:
    def run() -> None:
        run_study(tmp_path, "quick", "countdown", "countdown", "tune", 2, 1, [2], 1)

    first = list(units(list(studies()["quick"].values()), "countdown", "countdown", "tune", 2, [2], 1))
    for u in first[1:]:  # all but one are there already
        (tmp_path / u.file).write_text("{}", encoding="utf-8")
    run()
    assert json.loads((tmp_path / first[0].file).read_text())["unit"]["sampler"] == first[0].sampler
    assert all((tmp_path / u.file).read_text() == "{}" for u in first[1:])
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ArgumentError, match="--study"):
        run_study(tmp_path, "nothing", "countdown", "countdown", "tune", 2, 1, [2], 1)
    with pytest.raises(ArgumentError, match="--ks"):
        run_study(tmp_path, "quick", "countdown", "countdown", "tune", 2, 1, [3], 1)


def test_mean_ragged() -> None:
    assert mean_ragged([[1.0, 2.0, 3.0], [3.0]]) == [2.0, 2.0, 3.0]
    assert mean_ragged([[], []]) == []


def result(sampler: str, n: int, seed: int, correct: list[int], dependent: bool) -> dict[str, Any]:
    record = {"distinct": 1, "valid": 0.5, "tokens": 10 * n, "distinct_2": 0.1, "distinct_4": 0.2, "self_bleu": 0.3}
    record |= {"entropy_model": 1.0, "entropy_sampled": 0.9, "kl": 0.01}
    return {
        "unit": {"model": "m", "task": "t", "pool": "report", "problems": len(correct), "sampler": sampler}
        | {"n": n, "seed": seed},
        "dependent": dependent,
        "commit": "abc",
        "machine": {"cpu": "p"},
        "versions": {"torch": "2"},
        "cpu_seconds": 30.0,
        "problems": [record | {"correct": c} for c in correct],
        "kl_per_step": [0.0, 0.1],
        "loss_per_step": [1.0, 0.5] if dependent else [],
        "shown": [{"prompt": "1 + 1", "samples": [{"tokens": ["2", "</s>"], "novelty": [0.1, 0.0], "correct": True}]}],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    contents = [
        *(result("vanilla", 4, seed, [0, 1, 2, 4], False) for seed in (0, 1)),
        *(result("together", 4, seed, [0, 0, 2, 1], True) for seed in (0, 1)),
        *(result("together", 1, seed, [0, seed, 0, 1], True) for seed in (0, 1)),
    ]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.json").write_text(json.dumps(content), encoding="utf-8")
    yield tmp_path


def by_name(folder: Path, name: str) -> SamplerResults:
    found = load_results(folder).by_name(name)
    assert found is not None
    return found


def test_independent_samplers_get_the_unbiased_estimate(folder: Path) -> None:
    vanilla = by_name(folder, "vanilla")
    np.testing.assert_allclose(vanilla.pass_at(1), [0, 1 / 4, 1 / 2, 1])
    np.testing.assert_allclose(vanilla.pass_at(2), [0, 1 / 2, 1 - 1 / 6, 1])  # of six pairs one has no right sample
    assert vanilla.pass_at(8) is None


def test_dependent_samplers_are_judged_by_runs_of_k_alone(folder: Path) -> None:
    together = by_name(folder, "together")
    np.testing.assert_allclose(together.pass_at(1), [0, 0.5, 0, 1])  # seeds averaged
    np.testing.assert_allclose(together.pass_at(4), [0, 0, 1, 1])
    assert together.pass_at(2) is None  # never run with two siblings
    d = difference(together, by_name(folder, "vanilla"), 4)
    assert d is not None and d.mean == pytest.approx(-25.0)


def test_the_table_says_n_seeds_and_commit(folder: Path) -> None:
    text = markdown(load_results(folder))
    assert "4 problems, n = 4, 2 seeds, commit abc" in text and "3 CPU minutes" in text
    assert "| together (D) | 37.5 |  | 50.0 |" in text
    assert "| vanilla | 43.8 | 58.3 | 75.0 |" in text


def test_esamp_is_set_against_its_controls(folder: Path) -> None:
    assert "minus control" not in markdown(load_results(folder))
    for i, name in enumerate(("ESamp 1", "control: sharpened")):
        for seed in (0, 1):
            content = result(name, 4, seed, [4 * (1 - i)] * 4, False)
            (folder / f"{name[:5]}-{seed}.json").write_text(json.dumps(content), encoding="utf-8")
    row = "| ESamp 1 | sharpened | **+100.0 [+100.0, +100.0]** |"
    assert row in markdown(load_results(folder))


def test_the_options_table_counts_what_is_above(folder: Path) -> None:
    results = load_results(folder)
    tables = [results, replace(results, about={**results.about, "task": "other"})]
    renamed = [replace(s, name="min-p .05") if s.name == "vanilla" else s for s in results.samplers]
    tables[0] = replace(results, samplers=renamed)
    head, _, row, absent = options_table(tables, ["together", "nobody"], "min-p .05", ks=(1, 4)).splitlines()
    assert head.split(" | ")[1:3] == ["m, t @1", "m, t @4"] and "m, other @4" in head
    cells = row.strip("| ").split(" | ")
    # Mean Pass@1 is 37.5 against 43.75, Pass@4 50 against 75; the other table has nothing to compare with.
    assert cells[0] == "together" and cells[1].startswith("-6.2 [") and cells[2].startswith("-25.0 [")
    assert cells[3:] == ["", "", "0 of 2", "-15.6"]
    assert absent.strip("| ").endswith("0 of 0")


def test_a_missing_seed_and_mixed_studies_are_refused(folder: Path) -> None:
    (folder / "5.json").unlink()
    with pytest.raises(ArgumentError, match="together, n=1 lacks a seed"):
        load_results(folder)
    assert len(load_results(folder, seeds=1).samplers) == 2  # the first seed is complete
    other = result("vanilla", 4, 0, [1, 1], False)
    (folder / "6.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(ArgumentError, match="different studies"):
        load_results(folder)
    with pytest.raises(ArgumentError, match="no result files"):
        load_results(folder / "empty")


def test_tables_are_written_between_their_markers(tmp_path: Path) -> None:
    doc = tmp_path / "doc.md"
    doc.write_text("a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n", encoding="utf-8")
    for _ in range(2):  # writing again changes nothing more
        write_between(doc, "x", "new")
        assert doc.read_text() == "a\n<!-- begin x -->\n\nnew\n\n<!-- end x -->\nb\n"
    with pytest.raises(ArgumentError, match="markers"):
        write_between(doc, "y", "new")


def test_a_run_file_holds_curves_steps_and_samples(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.json.out"
    write_run_json(load_results(folder), path)
    run = RunFile.read(path)
    curves = {c.sampler: c for c in run.curves}
    assert curves["together"].k == [1, 4] and curves["vanilla"].k == [1, 2, 4]
    assert curves["vanilla"].mean == pytest.approx([0.4375, 7 / 12, 0.75])
    assert all(c.low[i] <= c.mean[i] <= c.high[i] for c in run.curves for i in range(len(c.k)))
    assert {s.sampler: s.loss for s in run.steps} == {"vanilla": [], "together": [1.0, 0.5]}
    assert sorted(s.sampler for s in run.prompts[0].samples) == ["together", "vanilla"]
