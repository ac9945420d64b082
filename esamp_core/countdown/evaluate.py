"""Sampling answers from a model, and what share of them is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from esamp_core.base.errors import ArgumentError
from esamp_core.countdown.data import prompt_ids
from esamp_core.countdown.task import EOS, MAX_NEW_TOKENS, PAD, TOKEN_ID, WORDS, Problem, check
from esamp_core.models.parts import cache_argument


@dataclass(frozen=True)
class Evaluation:
    """Measured on ``problems`` problems with ``samples`` independent samples each; shares are in 0..1.

    Attributes:
        pass_at_1: share of correct samples.
        standard_error: of pass_at_1, from the spread between problems.
        pass_at_n: share of problems with at least one correct sample.
        valid: share of samples whose last attempt is legal.
        distinct: different correct solutions found per problem, on average.
    """

    problems: int
    samples: int
    temperature: float
    pass_at_1: float
    standard_error: float
    pass_at_n: float
    valid: float
    distinct: float


@torch.inference_mode()
def sample_tokens(
    model: Any, prompts: Tensor, max_new_tokens: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Plain sampling from a batch of prompts of equal length, with a key/value cache.

    Args:
        model: a transformers decoder.
        prompts: token ids [R, T] int64.
        max_new_tokens: longest continuation.
        temperature: > 0; the logits are divided by it.
        generator: every random number comes from here.

    Returns:
        New token ids [R, <= max_new_tokens] int64; after a row's end of sequence, padding.
    """
    from transformers import DynamicCache

    rows = len(prompts)
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    running = torch.ones(rows, dtype=torch.bool, device="cpu")
    drawn: list[Tensor] = []
    tokens = prompts
    for _ in range(max_new_tokens):
        output = model(input_ids=tokens, **cache, use_cache=True, logits_to_keep=1)
        chances = (output.logits[:, -1].float() / temperature).softmax(-1)
        chosen = torch.multinomial(chances, 1, generator=generator)[:, 0]
        drawn.append(torch.where(running, chosen, TOKEN_ID[PAD]))
        running &= chosen != TOKEN_ID[EOS]
        if not running.any():
            break
        tokens = drawn[-1][:, None]
    return torch.stack(drawn, 1)


def sample_words(
    model: Any,
    problems: list[Problem],
    samples: int,
    seed: int,
    temperature: float = 1.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    rows: int = 1536,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[list[list[str]]]:
    """The words of ``samples`` continuations of each problem's prompt, up to and including the end of sequence.

    Args:
        rows: how many sequences run at a time; like ``seed``, it decides which samples come out.
        on_batch: called with the number of problems done.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[list[list[str]]] = []
    at_a_time = max(1, rows // samples)
    for start in range(0, len(problems), at_a_time):
        batch = problems[start : start + at_a_time]
        prompts = torch.tensor([prompt_ids(problem) for problem in batch], dtype=torch.int64, device="cpu")
        prompts = prompts.repeat_interleave(samples, 0)
        tokens = sample_tokens(model, prompts, max_new_tokens, temperature, generator).tolist()
        words = [[WORDS[token] for token in _until_end(row)] for row in tokens]
        found += [words[row : row + samples] for row in range(0, len(words), samples)]
        on_batch(len(found))
    return found


def _until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(TOKEN_ID[EOS]) + 1] if TOKEN_ID[EOS] in tokens else tokens


def evaluate(model: Any, problems: list[Problem], samples: int, seed: int = 0, temperature: float = 1.0) -> Evaluation:
    """Sample ``samples`` (>= 1) answers to each of at least two problems and judge them."""
    if len(problems) < 2 or samples < 1:
        raise ArgumentError(f"problems and samples must be at least 2 and 1, got {len(problems)} and {samples}")
    answers = sample_words(model, problems, samples, seed, temperature)
    verdicts = [
        [check(problem, " ".join(words)) for words in row] for problem, row in zip(problems, answers, strict=True)
    ]
    shares = [fmean(verdict.correct for verdict in row) for row in verdicts]
    return Evaluation(
        problems=len(problems),
        samples=samples,
        temperature=temperature,
        pass_at_1=fmean(shares),
        standard_error=stdev(shares) / math.sqrt(len(shares)),
        pass_at_n=fmean(share > 0 for share in shares),
        valid=fmean(verdict.valid for row in verdicts for verdict in row),
        distinct=fmean(len({verdict.key for verdict in row if verdict.correct}) for row in verdicts),
    )
