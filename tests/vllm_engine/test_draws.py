"""The distribution of the tokens that an engine returns, against the formula in float64."""

from __future__ import annotations

from typing import Any

import torch
from engines import forward, make_llm, tokenise
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

DRAWS, REQUESTS, BETA, TEMPERATURE = 20_000, 20, 0.5, 2.0


@torch.no_grad()
def expected(model: Any, prompt: list[int]) -> Tensor:
    """float64 [V]: the paper's formula with a Distiller that has not learned yet, whose prediction is s * LayerNorm."""
    shallow, _, logits = (states[-1].double() for states in forward(model, prompt))
    scale = model.model.norm.weight.double().square().mean().sqrt()
    unit = shallow / shallow.square().mean().sqrt()
    pred = scale * (unit - unit.mean()) / (unit.var(unbiased=False) + 1e-5).sqrt()
    distilled = model.lm_head.weight.double() @ pred
    new = (1 + BETA) * logits - BETA * distilled
    return torch.softmax(new / TEMPERATURE, dim=-1)


def test_distribution_of_one_step(qwen3: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen3, attn_implementation="eager").float().eval()
    prompt = tokenise("hello")
    # lr 0: the Distiller stays as it is, so every step of every batch draws from one distribution.
    llm = make_llm(qwen3, {"distiller": {"lr": 0}}, max_num_seqs=256, num_gpu_blocks_override=256)
    sampling = [
        SamplingParams(
            n=DRAWS // REQUESTS,
            max_tokens=1,
            temperature=TEMPERATURE,
            seed=i * DRAWS,
            detokenize=False,
            extra_args={"esamp": {"group": "g", "beta": BETA}},
        )
        for i in range(REQUESTS)
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt}] * REQUESTS, sampling, use_tqdm=False)
    tokens = torch.tensor([sample.token_ids[0] for output in outputs for sample in output.outputs])
    counts = torch.bincount(tokens, minlength=260).double()
    assert counts.sum() == DRAWS

    want = expected(model, prompt) * DRAWS
    often = want >= 5
    observed = torch.cat((counts[often], counts[~often].sum()[None]))
    predicted = torch.cat((want[often], want[~often].sum()[None]))
    assert often.sum() > 50  # or there would be little to test
    assert chisquare(observed.numpy(), predicted.numpy()).pvalue > 1e-3
    # The test can tell exploration from none: the plain distribution does not fit.
    plain = torch.softmax(forward(model, prompt)[2][-1].double() / TEMPERATURE, dim=-1) * DRAWS
    rest = torch.cat((plain[often], plain[~often].sum()[None]))
    assert chisquare(observed.numpy(), rest.numpy()).pvalue < 1e-12
