"""What exploration costs a decoder: on, off, and transformers' own sampling, paired and interleaved in one run.

    python -m bench.bench_decode [--dry] [--peers] [--seconds N] [--rounds N] [--done FILE] [--resume] [--out FILE]

Random-weight Qwen2 models of real shapes, built on the device in bfloat16; P prompts of 64 tokens, n samples each, up
to 256 new tokens.  Rows end unevenly: every step ends a row with a probability of about 1 / 512.  The variants run by
turns; a ratio is the median over rounds of one's time per step over another's, prefill included.  Ours also run to a
quarter of the length: the difference is what a step costs, and the rest what a call does.  Distiller updates are
counted: a run with exploration that made none is an error.

First on and off of every case, then, with --peers, transformers beside on: its static cache is compiled, which takes
minutes.  The file is written after each; a case that fails stays alone; with --resume a run goes on from its file.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.measure import median, median_ratio, spread
from bench.results import continued, dry_by_environment, load, output_folder, report, save, spoken, unproven
from bench.timeline import breakdown, record
from esamp_core.decoder import Decoder
from esamp_core.decoder.cuda_graph import GraphMode
from esamp_core.sample import SamplingParams

PROMPT_TOKENS = 64
PARAMS = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
END_CHANCE = 1 / 512
GRAPH: GraphMode = "auto"  # of the decoder; a result file says it


@dataclass(frozen=True)
class ModelShape:
    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool


QWEN_0_5B = ModelShape("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 151_936, True)
QWEN_1_5B = ModelShape("Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 151_936, True)
QWEN_7B = ModelShape("Qwen2.5-7B", 3584, 18944, 28, 28, 4, 152_064, False)
DRY_MODEL = ModelShape("dry", 32, 64, 2, 4, 2, 300, False)


@dataclass(frozen=True)
class DecodeCase:
    model: ModelShape
    prompts: int
    samples: int
    new_tokens: int = 256
    profiled: bool = False
    target: float | None = None  # least speed with exploration, relative to without

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.prompts}x{self.samples}"


# The most wanted first: a run ends when its time does.
CASES = (
    DecodeCase(QWEN_0_5B, 8, 16, profiled=True, target=0.98),
    DecodeCase(QWEN_7B, 8, 16, new_tokens=128, profiled=True, target=0.995),
    DecodeCase(QWEN_0_5B, 1, 16),
    DecodeCase(QWEN_1_5B, 8, 16),
    DecodeCase(QWEN_7B, 1, 16),
    DecodeCase(QWEN_0_5B, 1, 1),
    DecodeCase(QWEN_0_5B, 32, 16),
    DecodeCase(QWEN_7B, 32, 16),
    DecodeCase(QWEN_7B, 1, 1),
    DecodeCase(QWEN_1_5B, 1, 16),
    DecodeCase(QWEN_1_5B, 32, 16),
    DecodeCase(QWEN_1_5B, 1, 1),
)
DRY_CASES = (DecodeCase(DRY_MODEL, 1, 1, 6), DecodeCase(DRY_MODEL, 2, 3, 6, profiled=True))


def build_model(shape: ModelShape, device: str, dtype: torch.dtype) -> Any:
    """A Qwen2 of this shape with random weights, made where it is used."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def stop_tokens(vocab: int, chance: float) -> list[int]:
    """Enough token ids, evenly spread, that one of them is drawn with about this probability per step."""
    count = max(1, round(vocab * chance))
    return list(range(1, vocab, max(1, vocab // count)))[:count]


@dataclass
class Run:
    """What one call did."""

    seconds: float
    steps: int
    tokens: int
    lengths: list[int]
    updates: int
    peak_bytes: int


def timed(work: Callable[[], tuple[list[int], int]], device: str) -> Run:
    """Run a whole call; it returns each row's length and the Distiller updates made."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    lengths, updates = work()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return Run(seconds, max(lengths), sum(lengths), lengths, updates, peak)


class Work(Protocol):
    def __call__(self, seed: int, new_tokens: int | None = None) -> tuple[list[int], int]:
        """Each row's length, and the Distiller updates made."""


WARM_TOKENS = 8  # compiles every kernel and captures a graph


class Variants:
    """The ways to sample of one model, for one case."""

    def __init__(self, model: Any, case: DecodeCase, device: str) -> None:
        self.model, self.case, self.device = model, case, device
        g = torch.Generator().manual_seed(1)
        self.prompts = torch.randint(1, case.model.vocab, (case.prompts, PROMPT_TOKENS), generator=g)
        self.stops = stop_tokens(case.model.vocab, END_CHANCE)
        self.compiled = device == "cuda" and case.profiled
        self.decoder = Decoder(model)

    def explored(
        self, seed: int, beta: float, new_tokens: int | None = None, distinct: bool = False
    ) -> tuple[list[int], int]:
        rows = self.case.prompts * self.case.samples
        results = self.decoder.generate(
            self.prompts.to(self.device),
            n=self.case.samples,
            params=SamplingParams(seed=seed, beta=beta, distinct=distinct, **PARAMS),  # type: ignore[arg-type]
            max_new_tokens=new_tokens or self.case.new_tokens,
            stop_token_ids=self.stops,
            cache="static",
            max_batch_rows=rows,
            graph=GRAPH,
        )
        explorer = self.decoder.explorer
        assert explorer is not None
        # Read after the run: stats() of a running group would wait for the device within it.
        return [len(r.token_ids) for r in results], explorer.updates()

    def transformers(self, seed: int, new_tokens: int | None = None) -> tuple[list[int], int]:
        """generate(), with a static cache (which it compiles by itself on CUDA) where the case is worth the minute.

        new_tokens is not heeded: what is compiled depends on it.
        """
        torch.manual_seed(seed)
        ids = self.prompts.to(self.device)
        out: Tensor = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            num_return_sequences=self.case.samples,
            max_new_tokens=self.case.new_tokens,
            eos_token_id=self.stops,
            pad_token_id=0,
            cache_implementation="static" if self.compiled else None,
            **PARAMS,
        )
        drawn = out[:, PROMPT_TOKENS:]
        ended = torch.isin(drawn, torch.tensor(self.stops, device=drawn.device)).int()
        running = ended.cumsum(1) - ended == 0
        return running.sum(1).tolist(), 0

    def all(self) -> dict[str, Work]:
        return {
            "on": lambda seed, new_tokens=None: self.explored(seed, 0.25, new_tokens),
            "off": lambda seed, new_tokens=None: self.explored(seed, 0.0, new_tokens),
            "distinct": lambda seed, new_tokens=None: self.explored(seed, 0.25, new_tokens, self.case.samples > 1),
            "transformers": self.transformers,
        }


OURS, PEERS = ("on", "off", "distinct"), ("on", "transformers")  # what runs by turns


def measure_case(
    case: DecodeCase, model: Any, device: str, rounds: int, which: tuple[str, ...] = OURS
) -> list[dict[str, Any]]:
    """Rows of the result file.  Raises RuntimeError where exploration was on and nothing was learned."""
    variants = Variants(model, case, device)
    works = {name: work for name, work in variants.all().items() if name in which}
    for work in works.values():
        work(0, min(WARM_TOKENS, case.new_tokens))
    names, short = list(works), case.new_tokens // 4
    runs: dict[str, list[Run]] = {name: [] for name in names}
    cut: dict[str, list[Run]] = {name: [] for name in names if name in OURS and which == OURS and short}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            runs[name].append(timed(functools.partial(works[name], i + 1), device))
            if name in cut:
                cut[name].append(timed(functools.partial(works[name], i + 1, short), device))
    if any(run.updates == 0 for run in runs["on"]):
        raise RuntimeError(f"{case.name}: exploration was on and no Distiller was updated")
    steps = {name: [run.seconds / run.steps for run in done] for name, done in runs.items()}
    slopes = {name: [slope(a, b) for a, b in zip(runs[name], done, strict=True)] for name, done in cut.items()}
    rows = []
    for name, done in runs.items():
        row: dict[str, Any] = {"name": f"{case.name}: {name}", "case": case.name, "op": name}
        row |= {"model": case.model.name, "prompts": case.prompts, "samples": case.samples}
        row |= {"R": case.prompts * case.samples, "graph": GRAPH}
        row |= {"milliseconds": round(median(steps[name]) * 1e3, 4), "spread": round(spread(steps[name]), 4)}
        if name in slopes:
            calls = [run.seconds - s * run.steps for run, s in zip(done, slopes[name], strict=True)]
            row |= {"step_milliseconds": round(median(slopes[name]) * 1e3, 4)}
            row |= {"call_milliseconds": round(median(calls) * 1e3, 1)}
        row |= {"tokens_per_s": round(median([run.tokens / run.seconds for run in done]), 1)}
        lengths = sorted(n for run in done for n in run.lengths)
        row |= {"lengths": [lengths[0], lengths[len(lengths) // 2], lengths[-1]]}
        row |= {"updates": min(run.updates for run in done), "peak_bytes": max(run.peak_bytes for run in done)}
        if name == "on" and which == PEERS:
            continue  # measured before, beside off
        if name == "on":
            # Speed relative to the other: below 1 exploration costs something.
            row |= {"ratio": round(median_ratio(steps["off"], steps["on"]), 4)}
            if slopes:
                row |= {"step_ratio": round(median_ratio(slopes["off"], slopes["on"]), 4)}
            if case.target is not None:
                row |= {"target": case.target}
        elif name == "distinct" and "on" in steps:
            row |= {"ratio": round(median_ratio(steps["distinct"], steps["on"]), 4)}
        elif name == "transformers":
            row |= {"graph": "static cache, compiled" if variants.compiled else "dynamic cache"}
            row |= {"ratio": round(median_ratio(steps["transformers"], steps["on"]), 4)}
        if case.profiled and name in ("on", "off"):
            beta = 0.25 if name == "on" else 0.0
            row |= {"timeline": profile(functools.partial(variants.explored, 1, beta, min(32, case.new_tokens)))}
        rows.append(row)
    return rows


def slope(long: Run, short: Run) -> float:
    """Seconds of a step, what is once per call taken out."""
    return (long.seconds - short.seconds) / max(1, long.steps - short.steps)


def profile(work: Callable[[], object]) -> dict[str, float]:
    """Device time of a short call, by stream."""
    return {name: round(value, 1) for name, value in breakdown(record(work)).items()}


def run(
    cases: Sequence[DecodeCase], device: str, *, dry: bool, seconds: float, rounds: int, command: str, out: Path,
    peers: bool = False, finished: Collection[tuple[str, str]] = (),
) -> dict[str, Any]:  # fmt: skip
    """Measure cases in order until the time is up; the file is written after each.

    finished: pairs of case and variant that are left out.
    """
    start = time.monotonic()
    rows = continued(out, "decode")
    work = [(case, which) for which in ((OURS, PEERS) if peers else (OURS,)) for case in cases]
    model, built, body = None, None, {}
    for case, which in work:
        if time.monotonic() - start > seconds:
            break
        if (case.name, which[-1]) in {*finished, *((row["case"], row["op"]) for row in rows)}:
            continue
        try:
            if built != case.model:
                model, built = None, None
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
                model, built = build_model(case.model, device, torch.float32 if dry else torch.bfloat16), case.model
            rows += measure_case(case, model, device, rounds, which)
        except Exception as error:
            traceback.print_exc()
            what = f"{type(error).__name__}: {error}"[:300]
            rows.append({"name": f"{case.name}: {which[-1]}", "case": case.name, "op": which[-1], "failed": what})
        print(f"{time.monotonic() - start:6.1f} s  {case.name}: {', '.join(which)}", flush=True)
        done = {*finished, *((row["case"], row["op"]) for row in rows)}
        skipped = [f"{c.name}: {w[-1]}" for c, w in work if (c.name, w[-1]) not in done]
        body = report("decode", command, rows, dry=dry, rounds=rounds, skipped=skipped)
        save(body, out)
    if not body:
        raise SystemExit(f"no time for a single case in {seconds:.0f} s")
    return body


def short_table(body: dict[str, Any]) -> str:
    lines = [] if (why := unproven(body)) is None else [f"UNPROVEN: {why}"]
    shown_as = {
        "milliseconds": "ms/step", "step_milliseconds": "a step", "call_milliseconds": "a call",
        "tokens_per_s": "tokens/s", "ratio": "ratio", "step_ratio": "of steps", "target": "target",
    }  # fmt: skip
    lines.append(f"{'case':36} {' '.join(f'{title:>9}' for title in shown_as.values())} {'updates':>8}")
    for row in body["cases"]:
        shown = ["-" if row.get(k) is None else f"{row[k]:.3f}" for k in shown_as]
        tail = row.get("failed") or row["updates"]
        lines.append(f"{row['name']:36} {' '.join(f'{text:>9}' for text in shown)} {tail:>8}")
        if row.get("timeline"):
            lines.append("    " + ", ".join(f"{k} {v:.0f}" for k, v in row["timeline"].items()))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="a tiny model, no times kept; also without a GPU")
    parser.add_argument("--peers", action="store_true", help="afterwards transformers' generate, which is compiled")
    parser.add_argument("--seconds", type=float, default=200.0, help="start no case after this long")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--done", type=Path, action="append", default=[], help="result file whose cases are left out")
    parser.add_argument("--out", type=Path, help="result file; default decode.json in ESAMP_BENCH_OUT or bench/out")
    parser.add_argument("--resume", action="store_true", help="go on from --out, if this run began it")
    a = parser.parse_args(arguments)
    dry = a.dry or dry_by_environment()
    if not dry and not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing to measure here (--dry runs the same code on tiny shapes)")
    command = spoken("bench.bench_decode", arguments)
    device, out = "cuda" if torch.cuda.is_available() else "cpu", a.out or output_folder() / "decode.json"
    if not a.resume:  # a changed tree has the same commit, but not the same numbers
        out.unlink(missing_ok=True)
    finished = {(row["case"], row["op"]) for path in a.done for row in load(path)["cases"] if not row.get("failed")}
    body = run(
        DRY_CASES if dry else CASES, device, dry=dry, seconds=a.seconds, rounds=a.rounds, command=command,
        out=out, peers=a.peers, finished=finished,
    )  # fmt: skip
    print(short_table(body))
    return int(any(row.get("failed") for row in body["cases"]))


if __name__ == "__main__":
    raise SystemExit(main())
