"""Estimators for many samples per problem."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from esamp_core.errors import ArgumentError


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
