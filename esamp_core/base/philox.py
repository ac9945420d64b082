"""Counter-based randomness: Philox4x32-10 in PyTorch, and the Gumbel noise made from it.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

A draw is a pure function of (row seed, position, token id), so it does not depend on the batch, the backend or the
device.  Words are 32 bits, carried in int64 tensors because PyTorch has no full unsigned arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_MASK = 0xFFFFFFFF
_MUL = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# Second counter word: what the bits are for, so that no two uses share a stream.
DOMAIN_DRAW, DOMAIN_ROW_SEED, DOMAIN_ROUNDING, DOMAIN_CODE, DOMAIN_PROMPT = 0, 1, 2, 3, 4
CODE_BELOW = 1 - 2.0**-53  # the largest arithmetic code, a float64

# Below this v, -log1p(-v) is summed as a series: 1 - v would lose v's last bits, and fast GPU logarithms have a
# constant absolute error near 1.  Above it the float32 logarithm is good to 1e-5 relative.
SERIES_BELOW = 2.0**-5
LARGEST_GUMBEL = 22.9  # a little above 33 log 2


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of counters c0..c3 (int64 holding 32-bit words) under a 64-bit key.

    All arguments broadcast.  ``seed`` is int64 (its bits are the key).  Returns four int64 tensors in 0..2^32-1.
    """
    k0, k1 = seed & WORD_MASK, (seed >> 32) & WORD_MASK
    for _ in range(10):
        # Products wrap modulo 2^64, which keeps both halves right.  The low halves, c1 and c3, are only xored: what
        # stands above their 32 bits may stay until then.
        product0, product1 = _MUL[0] * c0, _MUL[1] * c2
        c0, c1 = ((product1 >> 32) ^ c1 ^ k0) & WORD_MASK, product1
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & WORD_MASK, product0
        k0, k1 = (k0 + _WEYL[0]) & WORD_MASK, (k1 + _WEYL[1]) & WORD_MASK
    return c0, c1 & WORD_MASK, c2, c3 & WORD_MASK


def token_bits(seed: Tensor, position: Tensor, token_ids: Tensor) -> Tensor:
    """Random 32-bit words (int64) of tokens ``token_ids`` [R, C] for row seeds and positions [R] (int64).

    One Philox block serves four neighbouring token ids: the block is ``id // 4`` and the word ``id % 4``.
    """
    seed, position = seed[:, None], position[:, None]
    domain = torch.full_like(position, DOMAIN_DRAW)
    words = philox(token_ids >> 2, domain, position & WORD_MASK, (position >> 32) & WORD_MASK, seed)
    return torch.stack(words, -1).gather(-1, (token_ids & 3)[..., None])[..., 0]


def vocabulary_bits(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """``token_bits`` of the tokens 0..V-1 for every row, [R, V], a fourth of the work."""
    block = torch.arange((vocab_size + 3) // 4, device=seed.device)[None]
    seed, position = seed[:, None], position[:, None]
    domain = torch.full_like(position, DOMAIN_DRAW)
    words = philox(block, domain, position & WORD_MASK, (position >> 32) & WORD_MASK, seed)
    return torch.stack(words, -1).flatten(1)[:, :vocab_size]


def gumbel(bits: Tensor) -> Tensor:
    """float32 standard Gumbel noise of 32-bit words (int64): ``-log(-log1p(-v))``, v uniform in (0, 1).

    Large noise comes from v near 0, where float32 is finest: the largest value is 22.87 (the other way round it
    would be 16.6, and a tail of a hundred thousand tokens could not win as often as it should).
    """
    v = ((bits.float() + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)
    series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5)))))
    exponential = torch.where(v < SERIES_BELOW, series, -torch.log(1 - v))
    return -torch.log(exponential)


def code_uniform(seed: Tensor, position: Tensor) -> Tensor:
    """float64 uniform numbers in [0, 1) of 53 bits, for row seeds and positions (int64, same shape)."""
    zero = torch.zeros_like(position)
    words = philox(zero, zero + DOMAIN_CODE, position & WORD_MASK, (position >> 32) & WORD_MASK, seed)
    return ((words[0] << 21) | (words[1] >> 11)).double() * 2.0**-53
