"""Philox4x32-10 and the Gumbel noise made from it; bit for bit what esamp_core/base/philox.py specifies.

One block of four words serves four neighbouring token ids: counter (id // 4, purpose, position low, position high),
key seed.
"""

import triton
import triton.language as tl

SERIES_BELOW = tl.constexpr(2.0**-5)
DOMAIN_DRAW = tl.constexpr(0)  # second counter word, as in esamp_core/base/philox.py: no two uses share a stream
DOMAIN_ROUNDING = tl.constexpr(2)
DOMAIN_CODE = tl.constexpr(3)


@triton.jit
def philox(blocks, domain, seed, position):
    """The four uint32 words of the blocks `blocks` (int32) for a purpose and an int64 seed and position."""
    zero = blocks.to(tl.uint32) * 0
    c0 = blocks.to(tl.uint32)
    c1 = zero + domain
    c2 = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = zero + (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = zero + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    m0 = tl.full((), 0xD2511F53, tl.uint32)
    m1 = tl.full((), 0xCD9E8D57, tl.uint32)
    w0 = tl.full((), 0x9E3779B9, tl.uint32)
    w1 = tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, zero + m0)
        high1 = tl.umulhi(c2, zero + m1)
        low0 = c0 * m0
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + w0
        k1 = k1 + w1
    return c0, c1, c2, c3


@triton.jit
def token_bits(token_ids, seed, position):
    """The uint32 words of any token ids >= 0 (int32)."""
    word0, word1, word2, word3 = philox(token_ids >> 2, DOMAIN_DRAW, seed, position)
    word = token_ids & 3
    return tl.where(word < 2, tl.where(word == 0, word0, word1), tl.where(word == 2, word2, word3))


@triton.jit
def tile_bits(first_id, seed, position, TILE: tl.constexpr):
    """The words of the tokens first_id .. first_id + TILE - 1, a fourth of the work; first_id is a multiple of 4."""
    word0, word1, word2, word3 = philox((first_id >> 2) + tl.arange(0, TILE // 4), DOMAIN_DRAW, seed, position)
    return tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), (TILE,))


@triton.jit
def gumbel(bits):
    """-log(-log1p(-v)), v = (bits + 0.5) / 2^32: the large values come from v near 0, where float32 is finest."""
    v = (bits.to(tl.float32) + 0.5) * (2.0**-32)
    v = tl.where(v > 1.0 - 2.0**-24, 1.0 - 2.0**-24, v)
    series = v * (1.0 + v * (1.0 / 2 + v * (1.0 / 3 + v * (1.0 / 4 + v * (1.0 / 5)))))
    return -tl.log(tl.where(v < SERIES_BELOW, series, -tl.log(1.0 - v)))


@triton.jit
def code_uniform(seed, position):
    """A float64 uniform number in [0, 1) of 53 bits."""
    word0, word1, _, _ = philox((position * 0).to(tl.int32), DOMAIN_CODE, seed, position)
    return ((word0.to(tl.int64) << 21) | (word1.to(tl.int64) >> 11)).to(tl.float64) * 2.0**-53
