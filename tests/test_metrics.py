"""Estimators against brute force and closed forms."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esamp_core.base.errors import ArgumentError
from esamp_core.report.metrics import paired_bootstrap, pass_at_k


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples: int, data: st.DataObject) -> None:
    k, correct = data.draw(st.integers(1, samples)), data.draw(st.integers(0, samples))
    subsets = list(combinations([i < correct for i in range(samples)], k))
    assert pass_at_k([correct], samples, k)[0] == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_closed_form_for_large_n() -> None:
    assert pass_at_k([3], 1000, 64)[0] == pytest.approx(1 - comb(997, 64) / comb(1000, 64))


def test_pass_at_k_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    correct = rng.binomial(16, 0.2, 40_000)
    for k in (1, 4, 8):
        estimates = pass_at_k(correct, 16, k)
        z = (estimates.mean() - (1 - 0.8**k)) / (estimates.std() / 200)
        assert abs(z) < 4


@pytest.mark.parametrize(("correct", "samples", "k"), [([1], 4, 5), ([1], 4, 0), ([5], 4, 1), ([-1], 4, 1)])
def test_pass_at_k_refuses_nonsense(correct: list[int], samples: int, k: int) -> None:
    with pytest.raises(ArgumentError, match="must be in"):
        pass_at_k(correct, samples, k)


def test_bootstrap_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        x = rng.normal(0.3, 1.0, 100)
        d = paired_bootstrap(x, np.zeros(100), resamples=400, seed=trial)
        covered += d.low <= 0.3 <= d.high
        assert d.mean == pytest.approx(x.mean())
    assert 177 <= covered <= 199  # 95 % of 200, four standard deviations


def test_bootstrap_is_paired() -> None:
    problem_difficulty = np.random.default_rng(2).normal(0, 100, 50)
    d = paired_bootstrap(problem_difficulty + 1.0, problem_difficulty)
    assert (d.low, d.high) == pytest.approx((1.0, 1.0))
    with pytest.raises(ArgumentError, match="equal length"):
        paired_bootstrap([1.0], [1.0, 2.0])
