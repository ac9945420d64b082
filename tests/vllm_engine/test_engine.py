"""The plugin in a real engine, on the V1 model runner: who is touched, what reaches the draw, what is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import PROMPTS, check_rows, generate, params, tokenise
from vllm import SamplingParams

from esamp_core.decoder import generate as decode
from esamp_core.sample import SamplingParams as OurParams

COUNT = 10


def keyed(i: int, beta: float = 1.0, **given: Any) -> SamplingParams:
    return params(i, extra_args={"esamp": {"group": f"r{i}", "beta": beta}}, **given)


@pytest.fixture(scope="module")
def untouched(plain: Any) -> list[list[list[int]]]:
    return generate(plain, [params(i, n=1 + 2 * (i % 3 == 0)) for i in range(COUNT)])


def test_without_the_key_and_with_beta_0_the_engine_is_untouched(exploring: Any, untouched: Any, captured: Any) -> None:
    sampling = [params(i, n=1 + 2 * (i % 3 == 0)) for i in range(COUNT)]
    assert generate(exploring, sampling) == untouched
    for given in sampling:
        given.extra_args = {"esamp": {"beta": 0}}
    assert generate(exploring, sampling) == untouched
    assert not captured


def test_only_keyed_requests_change(exploring: Any, untouched: Any, captured: Any) -> None:
    sampling = [params(i, n=1 + 2 * (i % 3 == 0)) for i in range(COUNT)]
    for i in range(0, COUNT, 2):
        sampling[i].extra_args = {"esamp": {"beta": 4.0}}
    outputs = generate(exploring, sampling)
    assert outputs[1::2] == untouched[1::2]
    assert all(now != before for now, before in zip(outputs[::2], untouched[::2], strict=True))
    assert len(captured) == sum(len(sample) for output in outputs[::2] for sample in output)


def test_rows_are_those_of_transformers(exploring: Any, reference: Any, captured: Any) -> None:
    outputs = generate(exploring, [keyed(i) for i in range(COUNT)])
    prompts = [tokenise(PROMPTS[i % len(PROMPTS)]) for i in range(COUNT)]
    check_rows(captured, reference, {f"r{i}": (prompts[i], outputs[i][0]) for i in range(COUNT)})


def test_tokens_are_those_of_our_decoder(exploring: Any, reference: Any) -> None:
    """Four siblings, seeds, learning and draw included, against the thin decoder on the transformers model."""
    given = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "seed": 11}
    sampling = [
        SamplingParams(
            **given,
            max_tokens=20,
            ignore_eos=True,
            extra_args={"esamp": {"group": "g", "beta": 1.0, "sample_index": i}},
        )
        for i in range(4)
    ]
    outputs = generate(exploring, sampling, ["hello"] * 4)
    decoded = decode(
        reference,
        torch.tensor([tokenise("hello")]),
        n=4,
        params=OurParams(**given, beta=1.0),
        max_new_tokens=20,
        stop_token_ids=(),
        filter_order="vllm",
    )
    assert [output[0] for output in outputs] == [list(sample.token_ids) for sample in decoded]


def test_second_generate_starts_clean(exploring: Any) -> None:
    sampling = [params(2, n=3, extra_args={"esamp": {"group": "same", "beta": 2.0}}) for _ in range(2)]
    assert generate(exploring, sampling) == generate(exploring, sampling)


def test_siblings_share_a_distiller_and_strangers_do_not(exploring: Any) -> None:
    """By default the group is the prompt."""
    sampling = [
        params(2, seed=5, extra_args={"esamp": {"beta": 3.0}}),
        params(2, seed=6, extra_args={"esamp": {"beta": 3.0}}),
    ]
    together = generate(exploring, sampling, ["hello", "hello"])
    apart = generate(
        exploring,
        [params(2, seed=s.seed, extra_args={"esamp": {"beta": 3.0, "group": s.seed}}) for s in sampling],
        ["hello"] * 2,
    )
    alone = [generate(exploring, [s], ["hello"])[0] for s in sampling]
    assert apart == alone
    assert together != alone
    assert generate(exploring, sampling, ["hello", "world"])[0] == alone[0]
