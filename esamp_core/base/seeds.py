"""Where the randomness of a draw begins: request seeds, the rows' own seeds, and the codes of stratified rows."""

from __future__ import annotations

import secrets
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from esamp_core.base.config import SamplingParams
from esamp_core.base.errors import ArgumentError
from esamp_core.base.philox import CODE_BELOW, DOMAIN_PROMPT, DOMAIN_ROW_SEED, WORD_MASK, code_uniform, philox

# Odd 64-bit numbers: the golden ratio's, another, and SplitMix64's two.
_SPLIT = tuple(
    x - 2**64 if x >= 2**63 else x
    for x in (0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def seeded_params(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    """One SamplingParams with a seed for every prompt; see ``Decoder.generate``.  Raises ArgumentError."""
    if params is not None and not isinstance(params, SamplingParams):
        if len(params) != prompts or not all(isinstance(p, SamplingParams) for p in params):
            raise ArgumentError(f"params must be one SamplingParams or one per prompt ({prompts}), got {params!r}")
        return [p if p.seed is not None else replace(p, seed=fresh_seed()) for p in params]
    params = params or SamplingParams()
    seed = fresh_seed() if params.seed is None else params.seed
    return [replace(params, seed=prompt_seed(seed, i)) for i in range(prompts)]


def prompt_seed(seed: int, index: int) -> int:
    """Request seed of the prompt of this index, in 0..2^63-1; the first prompt's is the seed itself, below 2^64.

    Philox of both, so that no prompt of one run draws what a prompt of a run with a neighbouring seed does.
    """
    if index == 0:
        return seed % 2**64
    counter = (index & WORD_MASK, DOMAIN_PROMPT, index >> 32, 0)
    words = [torch.tensor(word, dtype=torch.int64, device="cpu") for word in (*counter, as_int64(seed))]
    low, high, _, _ = philox(*words)
    return int(low) | (int(high) >> 1) << 32


def request_seeds(groups: Sequence[Hashable | None], params: Sequence[SamplingParams]) -> list[int]:
    """Each row's request seed as an int64; a fresh one for each group, where none is given."""
    fresh: dict[Hashable | None, int] = {}
    return [
        as_int64(fresh.setdefault(g, secrets.randbits(64)) if p.seed is None else p.seed)
        for g, p in zip(groups, params, strict=True)
    ]


def fresh_seed() -> int:
    """From torch's generator, so torch.manual_seed fixes it."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def as_int64(seed: int) -> int:
    """A 64-bit integer, signed or unsigned, as the int64 with the same bits."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed


def row_seeds(request_seed: Tensor, sample_index: Tensor) -> Tensor:
    """int64 [R] row seeds from the request's int64 seed [R] and the row's ordinal among its siblings [R]."""
    zero = torch.zeros_like(sample_index)
    low, high, _, _ = philox(sample_index & WORD_MASK, zero + DOMAIN_ROW_SEED, zero, zero, request_seed)
    return low | (high << 32)


def branch_seed(seed: Tensor, position: Tensor, token_ids: Tensor) -> Tensor:
    """int64 row seeds of rows that left their parent's best path with a token; all int64, the same shape.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014): what is drawn after a beginning is a function of it alone.
    """
    x = seed + (position + 1) * _SPLIT[0] + (token_ids + 1) * _SPLIT[1]
    for shift, factor in ((30, _SPLIT[2]), (27, _SPLIT[3]), (31, 1)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x


def root_noise(seed: Tensor) -> Tensor:
    """float64 [R]: standard Gumbel noise that a set of distinct siblings begins with (at position -1)."""
    uniform = code_uniform(seed, torch.full_like(seed, -1))
    return -torch.log(-torch.log(uniform.clamp_min(2.0**-54)))


def stratified_codes(seed: Tensor, ordinal: Tensor, siblings: Tensor) -> Tensor:
    """Codes to begin with: ``frac(ordinal / siblings + U)``, so that n siblings have one in each n-th of [0, 1).

    seed: int64 [R], the same for all rows of a set, which U is drawn with (at position -1, which no row draws at).
    ordinal, siblings: int64 [R], a row's number within its set, and the size of the set.

    Returns float64 [R, 2]: the code, and how many siblings are expected to begin as the row does, which is all n.
    """
    code = (ordinal.double() / siblings + code_uniform(seed, torch.full_like(seed, -1))) % 1.0
    return torch.stack([code.clamp_max(CODE_BELOW), siblings.double().expand_as(code)], -1)
