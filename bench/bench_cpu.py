"""The CPU path: a whole exploratory step against transformers' warpers, softmax and multinomial on the same logits.

    python -m bench.bench_cpu [--dry] [--rounds N] [--out FILE]

Both sides run by turns in one process on the same inputs, so that what else the machine does cancels in the ratio;
milliseconds alone say little on a shared machine.  R = 16, V = 152064; the head has H = 896.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import DRY_SHAPE, SamplingCase, Shape, make_sampling_inputs
from bench.measure import HostClock, interleaved, median, median_ratio, spread
from bench.results import output_folder, report, save, spoken
from esamp_core.sample import RowParams, SamplingParams, explore

SHAPE = Shape("V=152064 H=896", 152_064, 896)
ROWS = 16
TEMPERATURE = 0.8
SETTINGS: dict[str, dict[str, float]] = {
    "none": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "all three": {"top_k": 50, "top_p": 0.95, "min_p": 0.05},
}


def warped_draw(logits: Tensor, setting: dict[str, float]) -> Tensor:
    """What transformers' generate does between the logits and the token."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    chain: list[Any] = [TemperatureLogitsWarper(TEMPERATURE)]
    if "top_k" in setting:
        chain.append(TopKLogitsWarper(top_k=int(setting["top_k"])))
    if "top_p" in setting:
        chain.append(TopPLogitsWarper(top_p=setting["top_p"]))
    if "min_p" in setting:
        chain.append(MinPLogitsWarper(min_p=setting["min_p"]))
    scores = logits.float()
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    for warper in chain:
        scores = warper(ids, scores)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def measure(shape: Shape, rows: int, rounds: int) -> list[dict[str, Any]]:
    result = []
    for kind in ("peaked", "random"):
        case = SamplingCase(shape, rows, 50, torch.float32, kind)  # type: ignore[arg-type]
        inputs = make_sampling_inputs(case, "cpu", 3)
        for name, setting in SETTINGS.items():
            params = SamplingParams(temperature=TEMPERATURE, **setting)  # type: ignore[arg-type]
            columns = RowParams.of(params, rows, "cpu")
            vanilla = columns._replace(beta=torch.zeros(rows))
            whole = [
                functools.partial(explore, i.logits, columns, i.seed, i.position, direction=i.direction, head=i.head)
                for i in inputs
            ]
            codes = torch.linspace(0, 0.999, 2 * rows, dtype=torch.float64).view(rows, 2)
            variants = {
                "explore": whole,
                "explore, stratified": [functools.partial(step, codes=codes) for step in whole],
                "vanilla": [functools.partial(explore, i.logits, vanilla, i.seed, i.position) for i in inputs],
                "transformers": [functools.partial(warped_draw, i.logits, setting) for i in inputs],
            }
            candidates = int(variants["explore"][0]().count.float().median())
            times = interleaved(variants, HostClock(), rounds)
            for op, seconds in times.items():
                row: dict[str, Any] = {"name": f"{kind}, {name}: {op}", "op": op, "kind": kind, "setting": name}
                row |= {"R": rows, "V": shape.vocab, "candidates": candidates}
                row |= {"milliseconds": round(median(seconds) * 1e3, 2), "spread": round(spread(seconds), 3)}
                if op != "transformers":
                    row |= {"ratio": round(median_ratio(seconds, times["transformers"]), 3)}
                    row |= {"target": 1.0} if op == "explore" else {}
                result.append(row)
            print(f"{kind:8} {name:12} {candidates:7} candidates", flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, no times kept")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="result file; default cpu.json in ESAMP_BENCH_OUT or bench/out")
    a = parser.parse_args(arguments)
    with torch.no_grad():
        cases = measure(DRY_SHAPE, 3, 2) if a.dry else measure(SHAPE, ROWS, a.rounds)
    body = report("cpu", spoken("bench.bench_cpu", arguments), cases, dry=a.dry, rounds=a.rounds)
    save(body, a.out or output_folder() / "cpu.json")
    for row in body["cases"]:
        shown = "-" if row.get("ratio") is None else f"{row['ratio']:.2f} x transformers"
        print(f"{row['name']:40} {row['milliseconds'] or 0:9.1f} ms  {shown}")


if __name__ == "__main__":
    main()
