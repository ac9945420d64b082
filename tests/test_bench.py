"""The benchmark's own arithmetic: rotation and medians, bytes and floors, timelines, comparisons, tables, dry runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_cpu, compare, plot, table
from bench.bench_decode import (
    CASES,
    DRY_MODEL,
    QWEN_0_5B,
    QWEN_1_5B,
    QWEN_7B,
    DecodeCase,
    Run,
    build_model,
    slope,
    stop_tokens,
)
from bench.bench_decode import run as run_decode
from bench.bench_kernels import dry_cases, faults
from bench.bench_kernels import run as run_kernels
from bench.cases import DRY_SHAPE, ROWS, SHAPES, TOP_K, DistillerCase, SamplingCase, kernel_cases, make_sampling_inputs
from bench.kernel_ops import DistillerInputs, check, sampling_ops
from bench.measure import HostClock, floor_seconds, interleaved, median_ratio, spread
from bench.peers import eager
from bench.results import ROOT, load, report, save, without_times
from bench.timeline import DISTILLER_KERNELS, Interval, breakdown, device_intervals, kernel_medians, overlap, union


class FakeTime:
    """A clock that advances by what a call costs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def call(self, name: str, number: int, cost: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append((name, number))
            self.now += cost

        return run


def test_variants_take_turns_and_inputs_rotate() -> None:
    time = FakeTime()
    variants = {
        "a": [time.call("a", i, 1.0 + i) for i in range(2)],
        "b": [time.call("b", i, 10.0) for i in range(2)],
        "c": [time.call("c", i, 100.0) for i in range(2)],
    }
    times = interleaved(variants, HostClock(lambda: time.now, warm_ups=1), rounds=4)
    warm_up, measured = time.calls[:6], time.calls[6:]
    assert sorted(warm_up) == [(n, i) for n in "abc" for i in range(2)]
    # Each round uses one input for all, and starts with the next variant.
    assert measured == [(n, r % 2) for r, order in enumerate(["abc", "bca", "cab", "abc"]) for n in order]
    assert times == {"a": [1, 2, 1, 2], "b": [10] * 4, "c": [100] * 4}


def test_ratio_of_a_pair_ignores_what_both_suffer() -> None:
    base = [1.0, 9.0, 1.0, 50.0, 1.0]
    assert median_ratio([2 * t for t in base], base) == 2.0
    assert spread([5.0, 5.0, 5.0]) == 0.0 and spread([4.0]) == 0.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)


def test_the_larger_floor_counts() -> None:
    assert floor_seconds(4e12, 1e12, 4e12, 1e15) == 1.0
    assert floor_seconds(4e9, 2e15, 4e12, 1e15) == 2.0


def test_cases_cover_what_is_asked() -> None:
    cases = [c for c in kernel_cases() if isinstance(c, SamplingCase)]
    assert {c.shape for c in cases} == set(SHAPES)
    assert {c.rows for c in cases} == set(ROWS) and {c.top_k for c in cases} == set(TOP_K)
    assert {c.kind for c in cases} == {"random", "clustered", "peaked"}
    assert len({c.name for c in kernel_cases()}) == len(kernel_cases())
    assert set(kernel_cases(quick=True)) < set(kernel_cases())
    grid = {(c.prompts, c.samples) for c in CASES}
    assert grid == {(1, 1), (1, 16), (8, 16), (32, 16)} and {c.model for c in CASES} == {QWEN_0_5B, QWEN_1_5B, QWEN_7B}
    assert len(CASES) == 12 and {c.new_tokens for c in CASES} == {128, 256}


def test_bytes_are_those_of_the_tensors() -> None:
    """The formulas against the sizes of what an op is really given and gives."""
    case = SamplingCase(DRY_SHAPE, 3, 20, torch.bfloat16)
    calls, costs = sampling_ops(case, "cpu")
    given = make_sampling_inputs(case, "cpu", 3)[-1]
    found = calls["select_candidates"][-1]()
    candidates = int((found.token_ids >= 0).sum())  # type: ignore[attr-defined]
    read_heads = given.head.weight.element_size() * given.head.hidden_size * candidates
    logits = given.logits.numel() * given.logits.element_size()
    listing = sum(t.numel() * t.element_size() for t in found[:2])  # type: ignore[index]
    assert costs["select_candidates"][0] == logits + listing
    assert costs["explore"][0] == logits + read_heads + given.direction.numel() * given.direction.element_size()
    assert costs["vanilla"][0] == logits

    distiller = DistillerCase(DRY_SHAPE, 2, 3, rank=4)
    inputs = DistillerInputs(distiller, "cpu", 0)
    assert distiller.weight_bytes == sum(w.numel() * w.element_size() for w in inputs.state.weights)
    w = inputs.state.weights
    products = [(distiller.rows, *m.shape[1:]) for m in (w.up, w.gate, w.down)]
    assert distiller.forward_flops == sum(2 * a * b * c for a, b, c in products)


def test_peaked_logits_are_those_of_real_steps() -> None:
    from bench.cases import decode_step_logits, make_logits

    steps = decode_step_logits()
    assert steps.shape[1] == 113 and (steps[:, 0] == 0).all() and (steps.diff(dim=1) <= 0).all()
    case = SamplingCase(DRY_SHAPE, 4, 20, torch.float32, "peaked")
    for row in make_logits(case, torch.Generator().manual_seed(1)):
        # Some real step's 113 logits are all there.
        assert any(torch.isin(step, row).all() for step in steps)


def test_models_have_the_shapes() -> None:
    for shape, parameters in ((QWEN_0_5B, 0.494e9), (QWEN_1_5B, 1.544e9), (QWEN_7B, 7.616e9)):
        with torch.device("meta"):
            model = build_model(shape, "meta", torch.bfloat16)
        count = sum(p.numel() for p in model.parameters())
        assert count == pytest.approx(parameters, rel=0.002)  # as the models' cards say
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training


def test_stop_tokens_are_as_likely_as_asked() -> None:
    assert len(stop_tokens(152_064, 1 / 512)) == 297
    assert len(set(stop_tokens(300, 1 / 512))) == 1


def test_eager_peer_draws_from_the_filtered_distribution() -> None:
    from scipy.stats import chisquare

    from esamp_core.sample import RowParams, SamplingParams

    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03]))
    params = RowParams.of(SamplingParams(top_k=4, top_p=0.9, min_p=0.1), 4000, "cpu")
    torch.manual_seed(0)
    counts = torch.bincount(eager(logits.expand(4000, -1), params), minlength=5)
    assert counts[3:].sum() == 0  # .97 of mass are left by top-k; the fourth lies above .9 of it
    assert chisquare(counts[:3].numpy(), [4000 * p / 0.9 for p in (0.4, 0.3, 0.2)]).pvalue > 1e-4


def test_a_wrong_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dry_cases()[0]
    assert check(case, "cpu") is None
    import bench.kernel_ops as module

    right = module.explore

    def wrong(*arguments: Any, **options: Any) -> Any:
        drawn = right(*arguments, **options)
        return drawn._replace(token_ids=drawn.token_ids + 1)

    monkeypatch.setattr(module, "explore", wrong)
    assert "expected" in (check(case, "cpu") or "")


@pytest.mark.parametrize("case", [c for c in dry_cases() if isinstance(c, DistillerCase)])
def test_per_row_peer_learns_the_same(case: DistillerCase) -> None:
    ours, theirs = DistillerInputs(case, "cpu", 3), DistillerInputs(case, "cpu", 3)
    ours.step()
    theirs.peer_step()
    for a, b in zip(ours.state.weights, theirs.state.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_vocabulary_sized_temporaries_are_a_fault() -> None:
    row = {"name": "x", "op": "explore", "R": 32, "V": 1000, "peak_bytes": 32_000}
    assert len(faults([row])) == 1
    assert faults([{**row, "peak_bytes": 31_999}, {**row, "op": "eager"}, {**row, "R": 8}]) == []


def test_no_update_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.bench_decode as module

    case = DecodeCase(DRY_MODEL, 1, 1, 3)
    monkeypatch.setattr(module.Variants, "all", lambda self: dict.fromkeys(("on", "off"), lambda *_: ([3], 0)))
    with pytest.raises(RuntimeError, match="no Distiller was updated"):
        module.measure_case(case, build_model(DRY_MODEL, "cpu", torch.float32), "cpu", 1)


def test_a_step_without_what_a_call_costs() -> None:
    def run(steps: int) -> Run:
        return Run(0.05 + 0.002 * steps, steps, 0, [steps], 0, 0)

    assert slope(run(100), run(25)) == pytest.approx(0.002)
    assert slope(run(1), run(1)) == 0.0


def test_breakdown_by_hand() -> None:
    """The model 0-10, 12-20; learning 5-8 (hidden), 9-11 (half hidden), 25-26 (alone); on whatever stream."""
    spans = [("k", 0, 6), ("k", 6, 10), ("k", 12, 20), ("_back_kernel", 5, 8), ("_mix_kernel", 9, 11)]
    spans.append(("_update_kernel", 25, 26))
    got = breakdown([Interval(name, i % 2, float(a), float(b)) for i, (name, a, b) in enumerate(spans)])
    assert got == {
        "wall_us": 26, "busy_us": 20, "gaps_us": 6, "distiller_us": 6, "distiller_hidden_us": 4,
        "distiller_exposed_us": 2, "streams": 2,
    }  # fmt: skip
    assert breakdown([]) == {}


def test_distiller_kernels_are_those_of_the_room() -> None:
    texts = [path.read_text() for path in (ROOT / "kernels" / "distiller").glob("*.py")]
    assert {name for text in texts for name in re.findall(r"def (_\w+_kernel)\(", text)} == DISTILLER_KERNELS


def test_spans() -> None:
    assert union([(3, 4), (0, 2), (1, 2.5), (4, 5)]) == [(0, 2.5), (3, 5)]
    assert overlap([(0, 4)], [(1, 2), (3, 9)]) == 2


def test_trace_reading() -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": "_draw_kernel", "ts": 5, "dur": 2, "args": {"stream": 7}}
    events = [
        kernel,
        {**kernel, "dur": 4},
        {**kernel, "dur": 9},
        {**kernel, "name": "void at::fill", "cat": "gpu_memset"},
        {**kernel, "cat": "cpu_op", "args": {}},
        {"ph": "M", "name": "process_name"},
    ]
    intervals = device_intervals({"traceEvents": events})
    assert [i.end - i.start for i in intervals] == [2, 4, 9, 2] and {i.stream for i in intervals} == {7}
    assert kernel_medians(intervals) == {"_draw_kernel": 4}


def result(kind: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return report(kind, "make test", rows, dry=False, **more) | {"machine": {"gpu": "H", "cpu": "C", "threads": 1}}


def test_compare_finds_what_grew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def file(name: str, values: dict[str, float], **changes: Any) -> str:
        rows = [{"name": n, "op": n, "microseconds": v, "spread": 0.02} for n, v in values.items()]
        save(result("kernels", rows) | changes, tmp_path / name)
        return str(tmp_path / name)

    old = file("old.json", {"a": 10.0, "b": 5.0, "peer x": 1.0})
    assert compare.main([old, file("same.json", {"a": 10.9, "b": 4.0, "peer x": 9.0, "c": 1.0})]) == 0
    assert compare.main([old, file("slow.json", {"a": 11.2, "b": 5.0})]) == 1
    out = capsys.readouterr().out
    assert "SLOWER" in out and "1 of 2 cases" in out
    assert compare.main([old, str(tmp_path / "slow.json"), "--threshold", "0.2"]) == 0
    assert compare.main([old, file("other.json", {"a": 1.0}, machine={"gpu": "another"})]) == 2
    assert compare.main([old, file("dry.json", {"a": 1.0}, dry=True)]) == 2
    assert compare.main([old, file("none.json", {"z": 1.0})]) == 2
    noisy = {"name": "a", "op": "a", "microseconds": 12.5, "spread": 0.3}
    save(result("kernels", [noisy]), tmp_path / "noisy.json")
    assert compare.main([old, str(tmp_path / "noisy.json")]) == 0  # within its own spread


def test_dry_runs_keep_no_times(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    with torch.no_grad():
        run_kernels(dry_cases(), "cpu", dry=True, seconds=60, command="test", out=out, wrong=lambda case: None)
    decode = run_decode(
        [DecodeCase(DRY_MODEL, 2, 2, 4, profiled=True)], "cpu", dry=True, seconds=60, rounds=1, command="test",
        out=tmp_path / "decode.json", peers=True,
    )  # fmt: skip
    assert {row["op"] for row in decode["cases"]} == {"on", "off", "distinct", "transformers"}
    assert next(row for row in decode["cases"] if row["op"] == "on")["updates"] == 2 * 4
    cpu = report("cpu", "test", bench_cpu.measure(DRY_SHAPE, 2, 1), dry=True)
    for body in (load(out), load(tmp_path / "decode.json"), cpu):
        assert body["dry"] and body["cases"] and not any(row.get("failed") for row in body["cases"])
        text = json.dumps(body)
        assert without_times(body) == body and '"microseconds": 0' not in text and '"milliseconds": 0' not in text
        assert plot.draw(body, tmp_path) == []


def fake_results() -> dict[str, dict[str, Any]]:
    kernels = [
        {"name": f"c{r}: explore", "case": f"c{r}", "op": "explore", "R": r, "V": 10, "H": 4, "K": 5, "dtype": "b",
         "kind": "random", "microseconds": 12.34, "gb_per_s": 99.0, "of_floor": 1.5, "bytes": 8.0, "flops": 2.0}
        for r in (1, 8)
    ]  # fmt: skip
    kernels.append({"name": "c8: peer", "case": "c8", "op": "peer flashinfer", "R": 8, "V": 10, "microseconds": 45.6})
    decode = [
        {"name": f"m: {op}", "case": "m 1x1", "op": op, "model": "m", "R": 1, "milliseconds": 3.21,
         "tokens_per_s": 77.0, "ratio": 0.991, "target": 0.98}
        for op in ("on", "off", "distinct", "transformers")
    ]  # fmt: skip
    cpu = [
        {"name": op, "op": op, "kind": "peaked", "setting": "none", "candidates": 5, "milliseconds": 1.0, "ratio": 0.5}
        for op in ("explore", "transformers")
    ]
    floors = {"bytes_per_s": 4e12, "bf16_flops": 8e14}
    return {
        "kernels": result("kernels", kernels, floors=floors) | {"machine": {"gpu": "H", "driver": "1", "cpu": "C"}},
        "decode": result("decode", decode) | {"machine": {"gpu": "H", "driver": "1", "cpu": "C"}},
        "cpu": result("cpu", cpu),
    }


def test_table_is_made_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, body in fake_results().items():
        save(body, tmp_path / f"{kind}-2.json")
        save({**body, "date": "1999-01-01", "cases": []}, tmp_path / f"{kind}-1.json")
    text = table.markdown(table.newest(tmp_path))
    for shown in ("| c8 | 12 |  | 46 |", "12.3 | 99 | 1.50", "3.210 | 77", "0.991", "0.50 |", "kernels-2.json"):
        assert shown in text, shown
    assert "1999" not in text and "not run" not in text
    assert text.count("**Unproven**: no tests ran before") == 2  # of a CPU's numbers there are none to run
    assert table.markdown({}).count("not run yet") == 3

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.START}\ntyped by hand\n{table.END}\nafter\n")
    monkeypatch.setattr(table, "newest", lambda: {})
    assert table.main(["--check", "--readme", str(readme)]) == 1
    assert table.main(["--readme", str(readme)]) == 0
    assert table.main(["--check", "--readme", str(readme)]) == 0
    assert readme.read_text().startswith("before") and readme.read_text().endswith("after\n")
    with pytest.raises(SystemExit, match="once each"):
        table.replaced("no markers", "x")


def test_dry_runs_are_refused_as_results(tmp_path: Path) -> None:
    save(fake_results()["cpu"] | {"dry": True}, tmp_path / "cpu.json")
    with pytest.raises(SystemExit, match="dry run"):
        table.newest(tmp_path)


def test_readme_says_what_the_files_say() -> None:
    assert table.main(["--check"]) == 0


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = {path.name for body in fake_results().values() for path in plot.draw(body, tmp_path)}
    assert names == {"roofline.png", "scaling.png", "overhead.png", "cpu.png"}
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)
