"""Stochastic rounding to bfloat16, keyed by (slot seed, update, tensor, element); bit for bit the reference's."""

import triton
import triton.language as tl

from esamp_core.kernels.philox import DOMAIN_ROUNDING, philox

FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def stochastic_round(x, first, tensor_index, seed, update, ALIGNED: tl.constexpr):
    """float32 [N, M] to bfloat16, up or down at random so that the mean is x; bit for bit the reference's.

    first: int32 [N], the element number of each row's first entry; ALIGNED: all are multiples of 4, so that one
    Philox block serves four neighbours.
    """
    M: tl.constexpr = x.shape[1]
    domain = tensor_index * 256 + DOMAIN_ROUNDING
    if ALIGNED:
        blocks = (first >> 2)[:, None] + tl.arange(0, M // 4)[None, :]
        word0, word1, word2, word3 = philox(blocks, domain, seed, update)
        noise = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), (x.shape[0], M))
    else:
        element = first[:, None] + tl.arange(0, M)[None, :]
        word0, word1, word2, word3 = philox(element >> 2, domain, seed, update)
        word = element & 3
        noise = tl.where(word < 2, tl.where(word == 0, word0, word1), tl.where(word == 2, word2, word3))
    bits = x.to(tl.int32, bitcast=True) + (noise & 0xFFFF).to(tl.int32)
    rounded = (bits & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) <= FLOAT_MAX, rounded, x).to(tl.bfloat16)
