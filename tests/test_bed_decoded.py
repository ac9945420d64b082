"""The bed's samplers that bring their own loop: what they say of their samples is what the model says of them."""

from __future__ import annotations

import pytest
import torch

from bench.decoded import Beams, Decoded, batch_of
from bench.quality_decode import Batch, request_seeds
from bench.quality_tasks import Source, load_source
from esamp_core.sample import SamplingParams

PROMPTS = ("3 7 3 5 -> 41 :", "2 9 4 -> 14 :")
N, NEW = 4, 12


@pytest.fixture(scope="module")
def source() -> Source:
    return load_source("countdown")


def check(source: Source, batch: Batch) -> None:
    """By a forward of each sample."""
    assert len(batch.token_ids) == len(PROMPTS) * N
    for row, tokens in enumerate(batch.token_ids.tolist()):
        drawn = [token for token in tokens if token >= 0]
        assert tokens == drawn + [-1] * (len(tokens) - len(drawn))
        prompt = source.encode(PROMPTS[row // N])
        with torch.no_grad():
            logprob = source.model(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        want = logprob.gather(-1, torch.tensor(drawn)[:, None])[:, 0]
        torch.testing.assert_close(batch.base_logprob[row, : len(drawn)], want, atol=1e-3, rtol=1e-3)
        assert bool((batch.base_logprob[row, len(drawn) :] == 0).all())


def test_generate_as_it_is_shipped(source: Source) -> None:
    prompts, seeds = [source.encode(p) for p in PROMPTS], request_seeds(0, 0, 2)
    batch, drawn = Decoded("d", SamplingParams(distinct=True)).decode(source, prompts, N, seeds, NEW)
    check(source, batch)
    for first in (0, N):
        assert len({tuple(row) for row in batch.token_ids[first : first + N].tolist()}) == N
    # Beginnings that siblings share are drawn once, those that are lost count.
    assert NEW <= drawn <= N * NEW
    plain, alone = Decoded("p", SamplingParams(distinct=False)).decode(source, prompts, N, seeds, NEW)
    check(source, plain)
    assert torch.equal(plain.token_ids[::N, :NEW], batch.token_ids[::N, :NEW])
    assert alone == int((plain.token_ids >= 0).sum()) / len(PROMPTS)


def test_beams_are_the_likeliest(source: Source) -> None:
    prompts = [source.encode(p) for p in PROMPTS]
    batch, drawn = Beams("b").decode(source, prompts, N, request_seeds(0, 0, 2), NEW)
    check(source, batch)
    assert drawn <= N * NEW
    sums = batch.base_logprob.sum(1).view(len(PROMPTS), N)
    assert torch.equal(sums, sums.sort(1, descending=True).values)
    greedy = source.model.generate(torch.tensor(prompts[:1]), do_sample=False, max_new_tokens=NEW)
    ids = torch.tensor([greedy[0].tolist()])
    with torch.no_grad():
        logprob = source.model(ids).logits[0, len(prompts[0]) - 1 : -1].log_softmax(-1)
    assert float(sums[0, 0]) >= float(logprob.gather(-1, ids[0, len(prompts[0]) :, None]).sum()) - 1e-3


def test_a_batch_by_hand() -> None:
    batch = batch_of([[5, 6], [7]], [[[-1.0, -2.0], [-3.0, -4.0], [0.5, 0.0]], [[-5.0], [-6.0], [0.0]]])
    assert batch.token_ids.tolist() == [[5, 6], [7, -1]]
    assert batch.logprob.tolist() == [[-1.0, -2.0], [-5.0, 0.0]] and batch.novelty.tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert batch.base_logprob.tolist() == [[-3.0, -4.0], [-6.0, 0.0]] and bool(batch.entropy.isnan().all())
