"""Where the randomness of a draw begins: request seeds, the rows' own seeds, and the codes of stratified rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from esamp_core.base.config import SamplingParams
from esamp_core.base.errors import ArgumentError
from esamp_core.base.philox import CODE_BELOW, DOMAIN_ROW_SEED, WORD_MASK, code_uniform, philox


def seeded_params(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    """One SamplingParams with a seed for every prompt; see ``Decoder.generate``.  Raises ArgumentError."""
    if params is not None and not isinstance(params, SamplingParams):
        if len(params) != prompts or not all(isinstance(p, SamplingParams) for p in params):
            raise ArgumentError(f"params must be one SamplingParams or one per prompt ({prompts}), got {params!r}")
        return [p if p.seed is not None else replace(p, seed=_fresh_seed()) for p in params]
    params = params or SamplingParams()
    seed = _fresh_seed() if params.seed is None else params.seed
    return [replace(params, seed=(seed + i) % 2**64) for i in range(prompts)]


def _fresh_seed() -> int:
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


def stratified_codes(seed: Tensor, ordinal: Tensor, siblings: Tensor) -> Tensor:
    """Codes to begin with: ``frac(ordinal / siblings + U)``, so that n siblings have one in each n-th of [0, 1).

    seed: int64 [R], the same for all rows of a set, which U is drawn with (at position -1, which no row draws at).
    ordinal, siblings: int64 [R], a row's number within its set, and the size of the set.

    Returns float64 [R, 2]: the code, and how many siblings are expected to begin as the row does, which is all n.
    """
    code = (ordinal.double() / siblings + code_uniform(seed, torch.full_like(seed, -1))) % 1.0
    return torch.stack([code.clamp_max(CODE_BELOW), siblings.double().expand_as(code)], -1)
