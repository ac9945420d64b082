"""The bench of what a trainer gets: its ratios against a whole forward, its shares against counts by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bench.rl_groups import PLAIN, SAMPLERS, effective_share, informative, log_ratios, markdown
from esamp_core.decoder import Decoder
from esamp_core.sample import SamplingParams
from tests.test_decoder_models import PROMPTS, build


@pytest.mark.parametrize("params", [PLAIN, SamplingParams(beta=0.0, distinct=False, temperature=1.7, min_p=0.3)])
def test_ratios_are_those_of_a_whole_forward(params: SamplingParams) -> None:
    model = build("llama")
    siblings = Decoder(model).generate(PROMPTS[1:2], n=4, params=params, max_new_tokens=9, stop_token_ids=range(3, 30))
    assert len({len(g.token_ids) for g in siblings}) > 1
    with torch.no_grad():
        for sample, ratios in zip(siblings, log_ratios(model, siblings, params.temperature), strict=True):
            logits = model(torch.tensor([[*sample.prompt_token_ids, *sample.token_ids]])).logits[0].double()
            drawn = logits[len(sample.prompt_token_ids) - 1 : -1] / params.temperature
            policy = drawn.log_softmax(-1)[range(len(sample.token_ids)), list(sample.token_ids)]
            want = policy - torch.tensor(sample.logprobs, dtype=torch.float64)
            torch.testing.assert_close(ratios.double(), want, atol=1e-4, rtol=0)
            assert (want <= 1e-5).all() and ((want < -0.1).any() or params.min_p == 0)  # what the filter took away


def test_effective_share() -> None:
    assert effective_share(np.full(7, -300.0)) == pytest.approx(1)
    assert effective_share(np.array([0.0, -200.0, -200.0, -200.0])) == pytest.approx(0.25)
    assert effective_share(np.log([1.0, 3.0])) == pytest.approx(16 / (2 * 10))


def case(sampler: str, work: str, seed: int, *rewards: list[int]) -> dict[str, Any]:
    groups = [
        {"rewards": r, "distinct": 2, "tokens": 10, "ratio": [9.0, 0.5, 1.5], "log_weights": [0.0, 0.0]}
        for r in rewards
    ]
    return {"sampler": sampler, "work": work, "seed": seed, "policy": True, "groups": groups}


def test_table() -> None:
    assert [informative({"rewards": r}) for r in ([0, 0], [1, 1], [0, 1])] == [False, False, True]
    first, other = SAMPLERS[0].name, SAMPLERS[4].name
    cases = [case(first, "a", seed, [0, 0], [0, 1], [1, 1], [0, 0]) for seed in (0, 1)]
    cases += [case(other, "a", 0, [0, 1], [0, 1], [1, 0], [0, 0]), case(other, "a", 1, [0, 1], [0, 0], [1, 0], [0, 0])]
    cases += [case(first, "b", 0, [0, 1])]  # which the other has not run
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(cases).splitlines()[2:]]
    assert [row[0] for row in rows] == [first, other]
    assert rows[0][1:5] == ["25.0", "", "37.5", "50.0"]
    assert rows[1][1] == "62.5" and rows[1][2].startswith("+37.5 [") and rows[1][3] == "31.2"
    assert rows[0][5:] == ["2.00", "10", "0.9000", "1.5", "0.5", "100.0"]
