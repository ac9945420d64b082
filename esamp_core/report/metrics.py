"""Estimators for many samples per problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from esamp_core.base.errors import ArgumentError


def pass_at_k(correct: ArrayLike, samples: int, k: int) -> NDArray[np.float64]:
    """Unbiased probability, per problem, that k of its samples hold a correct one: ``1 - C(n - c, k) / C(n, k)``.

    correct: [problems] how many of ``samples`` were correct.  Only for samples that are exchangeable; dependent
    samplers need runs of exactly k samples.  Source: Chen et al. 2021, arXiv 2107.03374.  Raises ArgumentError.
    """
    c = np.asarray(correct, dtype=np.int64)
    if not 1 <= k <= samples:
        raise ArgumentError(f"k must be in 1..{samples} (samples), got {k}")
    if c.size and (c.min() < 0 or c.max() > samples):
        raise ArgumentError(f"correct must be in 0..{samples}, got {c.min()}..{c.max()}")
    # C(n - c, k) / C(n, k) as a product: of the factors, one is 0 as soon as n - c < k.
    i = np.arange(k)
    missed: NDArray[np.float64] = np.clip((samples - c[:, None] - i) / (samples - i), 0.0, None).prod(axis=1)
    return 1.0 - missed


class Difference(NamedTuple):
    """A mean difference over paired problems, and its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(a: ArrayLike, b: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> Difference:
    """Mean of a - b over problems, with a percentile bootstrap over problems.  Raises ArgumentError."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or x.size == 0:
        raise ArgumentError(f"a and b must be [problems] of equal length, got {x.shape} and {y.shape}")
    d = x - y
    means = d[np.random.default_rng(seed).integers(0, d.size, (resamples, d.size))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(d.mean()), float(low), float(high))


def distinct_n(samples: Sequence[Sequence[int]], order: int) -> float:
    """Different n-grams over all n-grams of a problem's samples (Li et al. 2016, arXiv 1510.03055); 0 without any.

    samples: token ids of each sample.  order: n, >= 1.
    """
    if order < 1:
        raise ArgumentError(f"order must be >= 1, got {order}")
    grams = [gram for sample in samples for gram in _ngrams(sample, order)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(samples: Sequence[Sequence[int]], order: int = 4) -> float:
    """Mean BLEU of each sample against its siblings (Zhu et al. 2018, arXiv 1802.01886): 1 is no diversity.

    BLEU as by Papineni et al. 2002, with every order up to ``order`` weighted equally, each count smoothed by one for
    orders above 1 (Lin and Och 2004), and the brevity penalty against the sibling closest in length.
    Raises ArgumentError for fewer than two samples, or empty ones.
    """
    if len(samples) < 2 or not all(len(s) for s in samples):
        raise ArgumentError(f"samples must be at least two, none of them empty, got {list(map(len, samples))}")
    log_scores = np.zeros(len(samples))
    for n in range(1, order + 1):
        counts = [Counter(_ngrams(s, n)) for s in samples]
        most = _two_largest(counts)
        for i, mine in enumerate(counts):
            # The most any sibling has: the largest count, or the second largest where this sample holds the largest.
            found = sum(min(c, most[g][1] if most[g][2] == i else most[g][0]) for g, c in mine.items())
            smooth = 0 if n == 1 else 1
            total = sum(mine.values())
            # At n = 1 nothing in common is a BLEU of 0; there the total is the length, and never 0.
            with np.errstate(divide="ignore"):
                log_scores[i] += np.log(np.float64(found + smooth) / (total + smooth)) / order
    lengths = np.array([len(s) for s in samples])
    for i, length in enumerate(lengths):
        others = np.delete(lengths, i)
        closest = min(others.tolist(), key=lambda other: (abs(other - length), other))
        log_scores[i] += min(0.0, 1.0 - closest / length)
    return float(np.exp(log_scores).mean())


def _ngrams(sample: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(sample[i : i + n]) for i in range(len(sample) - n + 1)]


def _two_largest(counts: list[Counter[tuple[int, ...]]]) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """For every n-gram: the largest count of any sample, the largest of the others, and who holds the first."""
    most: dict[tuple[int, ...], tuple[int, int, int]] = {}
    for i, mine in enumerate(counts):
        for gram, count in mine.items():
            first, second, holder = most.get(gram, (0, 0, -1))
            if count > first:
                most[gram] = (count, first, i)
            elif count > second:
                most[gram] = (first, count, holder)
    return most
