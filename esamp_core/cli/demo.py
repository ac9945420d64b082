"""``esamp demo``: the embedded Countdown model, sampled independently and by default, answers checked by a program."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from esamp_core import countdown
from esamp_core.base.config import DistillerConfig, SamplingParams
from esamp_core.ops import backend_name
from esamp_core.report.metrics import Difference, paired_bootstrap, pass_at_k

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from esamp_core.decoder import Decoder, Generation

KS = (1, 4, 8, 16)
MAX_ROWS = 256
SHADES = ("grey50", "cyan", "green", "yellow", "orange1", "red")


@dataclass(frozen=True)
class Outcome:
    """What one way of sampling gave, per problem."""

    generations: list[list[Generation]]
    verdicts: list[list[countdown.Verdict]]
    seconds: float
    first_loss: float  # mean relative squared error of the Distillers at their first step; NaN without Distillers
    loss: float  # at their last
    distinct_siblings: bool = False

    @property
    def samples(self) -> int:
        return len(self.verdicts[0])

    def passed(self, k: int) -> list[float]:
        """Chance that one of k samples is correct; of distinct siblings the first k are what k of them would be."""
        if self.distinct_siblings:
            return [float(any(v.correct for v in vs[:k])) for vs in self.verdicts]
        chances: list[float] = pass_at_k([sum(v.correct for v in vs) for vs in self.verdicts], self.samples, k).tolist()
        return chances

    def different(self) -> list[int]:
        """Different samples per problem."""
        return [len({g.token_ids for g in group}) for group in self.generations]

    def distinct(self) -> list[int]:
        """Different correct solutions per problem."""
        return [len({v.key for v in vs if v.correct}) for vs in self.verdicts]

    def valid(self) -> list[float]:
        """Share of samples that obey the rules, right or wrong."""
        return [float(np.mean([v.valid for v in vs])) for vs in self.verdicts]


def solve_problems(
    decoder: Decoder,
    problems: Sequence[countdown.Problem],
    samples: int,
    params: SamplingParams,
    progress: Progress | None = None,
    title: str = "",
) -> Outcome:
    """Let the model solve every problem ``samples`` times, and check what it wrote."""
    task = None if progress is None else progress.add_task(title, total=len(problems) * samples)
    finished = [0] * len(problems)
    losses: list[tuple[float, float]] = []

    def on_result(generation: Generation) -> None:
        index = generation.prompt_index
        finished[index] += 1
        if finished[index] == samples and params.beta != 0:
            assert decoder.explorer is not None
            stats = decoder.explorer.stats()[("prompt", index)]
            losses.append((stats.first_loss, stats.loss))
        if progress is not None and task is not None:
            progress.advance(task)

    start = time.perf_counter()
    flat = decoder.generate(
        [p.prompt for p in problems],
        n=samples,
        params=params,
        max_new_tokens=countdown.MAX_NEW_TOKENS,
        max_batch_rows=max(MAX_ROWS, samples),
        on_result=on_result,
    )
    seconds = time.perf_counter() - start
    generations = [flat[i : i + samples] for i in range(0, len(flat), samples)]
    verdicts = [
        [countdown.check(problem, generation.text or "") for generation in group]
        for problem, group in zip(problems, generations, strict=True)
    ]
    first_loss, loss = np.mean(losses, axis=0) if losses else (np.nan, np.nan)
    distinct = params.distinct is not False and samples > 1
    return Outcome(generations, verdicts, seconds, float(first_loss), float(loss), distinct)


def run_demo(console: Console, *, problems: int, samples: int, params: SamplingParams, config: DistillerConfig) -> None:
    """Print the comparison.  The same problems, seeds and filters; independent samples without exploration, and what
    ``generate`` does by itself: distinct siblings, and exploration."""
    from transformers.utils import logging

    from esamp_core.decoder import Decoder

    logging.disable_progress_bar()  # of loading 2 MB of weights
    model, tokenizer = countdown.load()
    decoder = Decoder(model, tokenizer, config=config)
    chosen = countdown.held_out_problems("tune", problems)
    console.print(
        f"[bold]Countdown[/bold]: four numbers and a target; a program checks every answer. {problems} problems that "
        f"the model never trained on, {samples} samples each, temperature {params.temperature:g}, min_p "
        f"{params.min_p:g}, seed {params.seed}."
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        plain = replace(params, beta=0.0, distinct=False)
        vanilla = solve_problems(decoder, chosen, samples, plain, progress, "independent")
        explored = solve_problems(decoder, chosen, samples, params, progress, "default    ")
    console.print(comparison(vanilla, explored, params.beta))
    console.print(
        f"Distiller error (relative, mean over {problems} prompts): {explored.first_loss:.2f} at its first step, "
        f"{explored.loss:.2f} at its last."
    )
    backend = backend_name("cpu")
    console.print(
        f"Time: independent {vanilla.seconds:.1f} s, default {explored.seconds:.1f} s ({backend} on the CPU)."
    )
    console.print(conclusion(vanilla, explored))
    show_novelty(console, chosen, explored, tokenizer)


def comparison(vanilla: Outcome, explored: Outcome, beta: float) -> Table:
    n = vanilla.samples
    table = Table(title="In brackets: 95 % paired bootstrap interval over problems", title_style="dim")
    for heading in ("", "independent", f"default: distinct, beta {beta:g}", "difference"):
        table.add_column(heading, justify="left" if not heading else "right")
    for k in (k for k in KS if k <= n):
        a, b = ([100 * p for p in o.passed(k)] for o in (vanilla, explored))
        _add_row(table, f"pass@{k} (%)", a, b)
    _add_row(table, "different samples", vanilla.different(), explored.different())
    _add_row(table, "distinct correct solutions", vanilla.distinct(), explored.distinct())
    _add_row(table, "valid answers (%)", *([100 * v for v in o.valid()] for o in (vanilla, explored)))
    return table


def _add_row(table: Table, name: str, vanilla: Sequence[float], explored: Sequence[float]) -> None:
    d = paired_bootstrap(explored, vanilla)
    difference = f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]"
    table.add_row(name, f"{np.mean(vanilla):.2f}", f"{np.mean(explored):.2f}", difference)


def conclusion(vanilla: Outcome, explored: Outcome) -> str:
    """One honest sentence."""
    k = max(k for k in KS if k <= vanilla.samples)
    d: Difference = paired_bootstrap(*(o.passed(k) for o in (explored, vanilla)))
    if d.low > 0:
        return f"On these problems the default raised pass@{k}."
    if d.high < 0:
        return f"On these problems the default lowered pass@{k}."
    repeated = vanilla.samples - float(np.mean(vanilla.different()))
    return (
        f"On these problems the difference in pass@{k} is within chance: of {vanilla.samples} independent samples only "
        f"{repeated:.1f} repeat another. Where answers are short and samples repeat, it is not (docs/quality.md)."
    )


def show_novelty(
    console: Console, problems: Sequence[countdown.Problem], explored: Outcome, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Samples of the problem with the most different solutions, tokens coloured by their novelty."""
    index = int(np.argmax(explored.distinct()))
    values = np.concatenate([g.novelty for g in explored.generations[index]])
    edges = np.quantile(values, np.linspace(0, 1, len(SHADES) + 1)[1:-1])
    console.print(f"\n[bold]{escape(problems[index].prompt)}[/bold]  tokens by novelty, from low to high: ", end="")
    console.print(Text(" ").join(Text(shade, style=shade) for shade in SHADES))
    shown: set[object] = set()
    for generation, v in zip(explored.generations[index], explored.verdicts[index], strict=True):
        if v.key in shown or len(shown) == 4:
            continue
        shown.add(v.key)
        line = Text("right " if v.correct else "wrong ", style="bold")
        for token, novelty in zip(generation.token_ids, generation.novelty, strict=True):
            line.append(tokenizer.decode([token]) + " ", style=SHADES[int(np.searchsorted(edges, novelty))])
        console.print(line)
