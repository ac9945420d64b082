"""Diversity measures against their definitions, written out, and closed forms."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esamp_core.base.errors import ArgumentError
from esamp_core.report.metrics import distinct_n, self_bleu

SAMPLES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7), min_size=2, max_size=5)


def test_distinct_n_by_hand() -> None:
    assert distinct_n([[1, 2, 1], [1, 2]], 1) == pytest.approx(2 / 5)
    assert distinct_n([[1, 2, 1], [1, 2]], 2) == pytest.approx(2 / 3)  # (1, 2), (2, 1), (1, 2)
    assert distinct_n([[1], [2]], 2) == 0.0
    with pytest.raises(ArgumentError, match="order"):
        distinct_n([[1]], 0)


def bleu(candidate: list[int], references: list[list[int]], order: int) -> float:
    """BLEU as Papineni et al. define it, with +1 for orders above 1, one n-gram at a time."""
    log_score = 0.0
    for n in range(1, order + 1):
        grams = [tuple(candidate[i : i + n]) for i in range(len(candidate) - n + 1)]
        clipped = 0
        for gram, count in Counter(grams).items():
            most = 0
            for reference in references:
                windows = [tuple(reference[i : i + n]) for i in range(len(reference) - n + 1)]
                most = max(most, windows.count(gram))
            clipped += min(count, most)
        smooth = 0 if n == 1 else 1
        if clipped + smooth == 0:
            return 0.0
        log_score += math.log((clipped + smooth) / (len(grams) + smooth)) / order
    gaps = sorted((abs(len(r) - len(candidate)), len(r)) for r in references)
    closest = gaps[0][1]
    penalty = 1.0 if len(candidate) >= closest else math.exp(1 - closest / len(candidate))
    return penalty * math.exp(log_score)


@given(SAMPLES, st.integers(1, 4))
def test_self_bleu_is_the_mean_bleu_against_the_siblings(samples: list[list[int]], order: int) -> None:
    expected = [bleu(s, samples[:i] + samples[i + 1 :], order) for i, s in enumerate(samples)]
    assert self_bleu(samples, order) == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_self_bleu_of_equal_and_of_disjoint_samples() -> None:
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1.0)
    assert self_bleu([[1, 2], [3, 4]]) == 0.0
    with pytest.raises(ArgumentError, match="at least two"):
        self_bleu([[1, 2]])
    with pytest.raises(ArgumentError, match="none of them empty"):
        self_bleu([[1], []])


@given(SAMPLES)
def test_measures_do_not_depend_on_the_order_of_samples(samples: list[list[int]]) -> None:
    assert self_bleu(samples[::-1]) == pytest.approx(self_bleu(samples))
    assert distinct_n(samples[::-1], 2) == distinct_n(samples, 2)
