"""Siblings that depend on each other and a policy gradient: each keeps its own policy, so its mean stays exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny import tiny_model

from esamp_core.decoder import Decoder
from esamp_core.sample import SamplingParams

SETS, SIBLINGS, PROMPT = 600, 8, [3, 9, 14, 4]


def first_tokens(stratified: bool) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of many sets of siblings, [sets, siblings], and the exact probabilities, float64 [V]."""
    model = tiny_model().eval()
    params = SamplingParams(beta=0.0, stratified=stratified, distinct=False, seed=5)
    found = Decoder(model).generate(
        [PROMPT] * SETS, n=SIBLINGS, params=params, max_new_tokens=1, stop_token_ids=(), max_batch_rows=2048
    )
    with torch.no_grad():
        p = model(torch.tensor([PROMPT])).logits[0, -1].double().softmax(-1).numpy()
    return np.array([g.token_ids[0] for g in found]).reshape(SETS, SIBLINGS), p


def test_each_sibling_is_a_sample_of_the_policy() -> None:
    tokens, p = first_tokens(stratified=True)
    common = p * SETS >= 5
    for sibling in tokens.T:
        counts = np.bincount(sibling, minlength=len(p))
        seen = [*counts[common], counts[~common].sum()]
        assert chisquare(seen, [*(SETS * p[common]), SETS * p[~common].sum()]).pvalue > 1e-4


@pytest.mark.parametrize("stratified", [False, True])
def test_the_gradient_has_the_exact_mean(stratified: bool) -> None:
    """mean over siblings of reward * d log p / d logits; the exact one is p * (reward - mean reward)."""
    tokens, p = first_tokens(stratified)
    reward = np.random.default_rng(1).normal(size=len(p))
    scores = np.eye(len(p))[tokens] - p  # [sets, siblings, V]
    estimates = (reward[tokens][..., None] * scores).mean(1)
    error = estimates.std(0, ddof=1) / np.sqrt(SETS)
    exact = p * (reward - p @ reward)
    z = (estimates.mean(0) - exact)[error > 0] / error[error > 0]
    assert len(z) > 20 and np.abs(z).max() < 5


def test_stratified_siblings_estimate_it_with_less_variance() -> None:
    """And the group's mean reward, which is no baseline that is independent of them, takes less of it away."""
    spread, taken = {}, {}
    for stratified in (False, True):
        tokens, p = first_tokens(stratified)
        reward = np.random.default_rng(1).normal(size=len(p))
        scores = np.eye(len(p))[tokens] - p
        estimates = (reward[tokens][..., None] * scores).mean(1)
        spread[stratified] = float(estimates.var(0, ddof=1).sum())
        baseline = (reward[tokens].mean(1)[:, None] * scores.mean(1)).mean(0)
        exact = p * (reward - p @ reward)
        taken[stratified] = float(baseline @ exact / (exact @ exact))
    assert spread[True] < 0.5 * spread[False]
    assert abs(taken[False] - 1 / SIBLINGS) < 0.05 and taken[True] < 0.5 * taken[False]
