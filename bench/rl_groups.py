"""What a policy-gradient trainer gets of samplers: ``python -m bench.rl_groups run``, then ``table`` (make rl-groups).

SmolLM2-135M-Instruct answers verifiable work of the bed, 8 siblings a group, as a GRPO rollout does.  A group whose
rewards are all equal teaches nothing; one with different rewards is informative.  A trainer that scores the answers by
a forward of its own, at the sampler's temperature, sees the ratios p_model / p_rollout that are recorded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from bench.bed import OUT as BED_OUT
from bench.bed import Bed
from bench.bed_tasks import WORK, Work
from bench.passk import show
from bench.quality_table import grid
from bench.results import RESULTS, continued, load, report, save, spoken, told
from esamp_core.base.seeds import prompt_seed
from esamp_core.decoder import Decoder, Generation
from esamp_core.models.parts import cache_argument
from esamp_core.report.metrics import paired_bootstrap
from esamp_core.sample import DistillerConfig, SamplingParams

SIBLINGS, GROUPS = 8, 16
PROMPTS_AT_A_TIME = 8
# Verifiable, answered in a line or a few, and seldom solved at the first try.  The items are those after the bed's own.
TASKS = ("gcd", "sums", "equation", "binary", "sorting", "euclid", "chat")
AFTER = 32
POOL = "tune"


@dataclass(frozen=True)
class Sampler:
    name: str
    params: SamplingParams
    config: DistillerConfig = field(default_factory=DistillerConfig)

    @property
    def policy(self) -> bool:
        """Whether the reported log-probabilities are those of each sample alone."""
        return not self.params.distinct


PLAIN = SamplingParams(beta=0.0, distinct=False)
STRATIFIED = replace(PLAIN, stratified=True)
UNGATED = DistillerConfig(gate=False, lr=0.3)
SAMPLERS = (
    Sampler("vanilla", PLAIN),
    Sampler("min-p .05", replace(PLAIN, min_p=0.05)),
    Sampler("T 1.3", replace(PLAIN, temperature=1.3)),
    Sampler("control: sharpened, T .8", replace(PLAIN, temperature=0.8)),
    Sampler("stratified", STRATIFIED),
    Sampler("stratified, min-p .05", replace(STRATIFIED, min_p=0.05)),
    Sampler("stratified, T 1.3", replace(STRATIFIED, temperature=1.3)),
    Sampler("exploration, .1", replace(PLAIN, beta=0.1)),
    Sampler("exploration, .25", replace(PLAIN, beta=0.25)),
    Sampler("exploration, ungated, .25", replace(PLAIN, beta=0.25), UNGATED),
    Sampler("stratified, exploration, .25", replace(STRATIFIED, beta=0.25)),
    Sampler("distinct", replace(PLAIN, distinct=True)),
)


def run_unit(bed: Bed, sampler: Sampler, work: Work, seed: int) -> dict[str, Any]:
    """The groups of a work, judged and scored."""
    items = work.pool(POOL, AFTER + GROUPS)[AFTER:]
    source = bed.source_of(work)
    decoder = Decoder(source.model, source.tokenizer, config=sampler.config)
    groups = []
    for first in range(0, len(items), PROMPTS_AT_A_TIME):
        part = items[first : first + PROMPTS_AT_A_TIME]
        found = decoder.generate(
            [bed.encode(work, item) for item in part],
            n=SIBLINGS,
            params=[replace(sampler.params, seed=prompt_seed(seed, 1 + first + i)) for i in range(len(part))],
            max_new_tokens=work.new_tokens,
            stop_token_ids=source.stop_ids,
        )
        for i, item in enumerate(part):
            siblings = found[i * SIBLINGS : (i + 1) * SIBLINGS]
            ratios = log_ratios(source.model, siblings, sampler.params.temperature)
            tokens = torch.cat(ratios).exp()
            groups.append({
                "rewards": [int(item.correct((g.text or "").strip())) for g in siblings],
                "distinct": len({(g.text or "").strip() for g in siblings}),
                "tokens": len(tokens),
                "ratio": [float(tokens.sum()), float(tokens.min()), float(tokens.max())],
                "log_weights": [float(r.sum()) for r in ratios],
            })  # fmt: skip
    return {"sampler": sampler.name, "work": work.name, "seed": seed, "policy": sampler.policy, "groups": groups}


@torch.no_grad()
def log_ratios(model: Any, siblings: Sequence[Generation], temperature: float) -> list[torch.Tensor]:
    """[T] of each sample, nats: its tokens' log-probability, as a trainer computes it, less the rollout's."""
    rows = [torch.tensor(g.token_ids) for g in siblings]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)  # what follows a row changes nothing
    prompt = model(torch.tensor([siblings[0].prompt_token_ids], device=model.device), use_cache=True, logits_to_keep=1)
    prompt.past_key_values.batch_repeat_interleave(len(siblings))
    logits = [prompt.logits.expand(len(siblings), 1, -1)]
    if ids.shape[1] > 1:
        logits.append(model(ids[:, :-1], **{cache_argument(model): prompt.past_key_values}).logits)
    scores = (torch.cat(logits, 1).float() / temperature).log_softmax(-1)
    drawn = scores.gather(-1, ids[..., None])[..., 0].cpu()
    return [row[: len(g.token_ids)] - torch.tensor(g.logprobs) for row, g in zip(drawn, siblings, strict=True)]


def informative(group: dict[str, Any]) -> bool:
    return len(set(group["rewards"])) > 1


def effective_share(log_weights: np.ndarray) -> float:
    """(sum w)^2 / (n sum w^2) of importance weights: how much of n samples is left, in 0..1."""
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))


def markdown(cases: list[dict[str, Any]]) -> str:
    """The table: groups of all works, intervals over groups (an item's seeds averaged), of units that all have run."""
    present = {c["sampler"] for c in cases}
    order = [s.name for s in SAMPLERS if s.name in present]
    ran: dict[tuple[str, int], set[str]] = {}
    for case in cases:
        ran.setdefault((case["work"], case["seed"]), set()).add(case["sampler"])
    whole = [c for c in cases if ran[c["work"], c["seed"]] == present]
    of = {name: [c for c in whole if c["sampler"] == name] for name in order}
    share = {name: _informative(of[name]) for name in order}
    reference = share[order[0]]
    rows = []
    for name in share:
        groups = [g for case in of[name] for g in case["groups"]]
        mean = 100 * share[name].mean()
        apart = paired_bootstrap(100 * share[name], 100 * reference)
        less = "" if name == order[0] else f"{apart.mean:+.1f} [{apart.low:+.1f}, {apart.high:+.1f}]"
        reward = 100 * np.mean([np.mean(g["rewards"]) for g in groups])
        solved = 100 * np.mean([max(g["rewards"]) for g in groups])
        numbers = [
            f"{np.mean([g[key] for g in groups]):.{digits}f}" for key, digits in (("distinct", 2), ("tokens", 0))
        ]
        rows.append([name, f"{mean:.1f}", less, f"{reward:.1f}", f"{solved:.1f}", *numbers, *_ratios(of[name], groups)])
    head = (
        "sampler", "informative, %", "less vanilla", "mean reward, %", "solved by one of 8, %", "different of 8",
        "tokens a group", "ratio: mean", "largest", "smallest", "ESS, sequences, %",
    )  # fmt: skip
    return grid(head, rows)


def _informative(cases: list[dict[str, Any]]) -> np.ndarray:
    """The share of each item's groups, averaged over seeds, in the order of works."""
    works = sorted({c["work"] for c in cases})
    runs = [[c for c in cases if c["work"] == work] for work in works]
    return np.concatenate([np.mean([[float(informative(g)) for g in c["groups"]] for c in same], 0) for same in runs])


def _ratios(cases: list[dict[str, Any]], groups: list[dict[str, Any]]) -> list[str]:
    if not cases[0]["policy"]:
        return ["not a policy's"] + ["–"] * 3
    total, least, most = (np.array([g["ratio"][i] for g in groups]) for i in range(3))
    mean = total.sum() / sum(g["tokens"] for g in groups)
    ess = effective_share(np.concatenate([g["log_weights"] for g in groups]))
    return [f"{mean:.4f}", f"{most.max():.3g}", f"{least.min():.3g}", f"{100 * ess:.1f}"]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="The JSON file, written after every unit and continued.")],
    only: Annotated[str, typer.Option(help="Samplers, by name, separated by ';'; default all.")] = "",
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0,1",
    works: Annotated[str, typer.Option(help="Works, separated by commas.")] = ",".join(TASKS),
) -> None:
    """Sample, judge and score every unit that the file does not hold yet."""
    torch.set_num_threads(1)
    bed, wanted = Bed(BED_OUT, "cpu"), [s for s in SAMPLERS if not only or s.name in only.split(";")]
    cases = continued(out, "rl-groups")
    done = {(c["sampler"], c["work"], c["seed"]) for c in cases}
    for seed in map(int, seeds.split(",")):
        for work in (w for name in works.split(",") for w in WORK if w.name == name):
            for sampler in wanted:
                if (sampler.name, work.name, seed) in done:
                    continue
                cases.append(run_unit(bed, sampler, work, seed))
                save(report("rl-groups", spoken("bench.rl_groups", None), cases, dry=False), out)
                print(seed, work.name, sampler.name, sum(map(informative, cases[-1]["groups"])), flush=True)


@app.command()
def table(
    files: Annotated[list[Path] | None, typer.Argument(help="Default: rl-groups-*.json of bench/results.")] = None,
    doc: Annotated[Path | None, typer.Option(help="Write it between its marks in this file.")] = None,
) -> None:
    """The table of what was run, as markdown."""
    found = files or sorted(RESULTS.glob("rl-groups-*.json"))
    show(markdown([case for file in found for case in load(file)["cases"]]), doc, "rl-groups")


if __name__ == "__main__":
    told(app)
