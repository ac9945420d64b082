"""What every kernel means by a logit: cleaned, divided by the temperature, and as an integer of the same order.

Relative: ``(x - top) / temperature``, what a draw exponentiates; -inf only where that is below float32.

Cleaned: NaN is -inf, -0.0 is +0.0, and in a row that holds +inf those tokens are 0 and all others -inf.
Scaled: ``cleaned / temperature`` rounded as IEEE says, so that every backend compares the very same numbers.
Ordered: the float32 bits as an int32 that compares as the float does; ``NO_KEY`` is -inf and below every finite one.
Packed: ``ordered << 32 | LAST_ID - token id``, an int64 whose descending order is "most likely, then lowest id".
"""

import os

import triton
import triton.language as tl

# Triton's interpreter takes the least bfloat16 numbers for others, or for 0; compiled they are right.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LAST_ID = tl.constexpr(2**31 - 1)
NO_KEY = tl.constexpr(-2139095041)  # ordered(-inf)
LEAST_KEY = tl.constexpr(-2139095040)  # ordered(-float32.max), the least key of a token that can be drawn
NO_PACKED = tl.constexpr(-(2**63))
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)

# esamp_core.sample.Status
NAN_LOGITS = tl.constexpr(1)
POS_INF_LOGITS = tl.constexpr(2)
EMPTY = tl.constexpr(4)
CAPPED = tl.constexpr(8)
INVALID_PARAMS = tl.constexpr(16)
NONFINITE_NOVELTY = tl.constexpr(32)
INACTIVE = tl.constexpr(64)


@triton.jit
def as_float32(x):
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def load_logits(row_ptr, offsets, mask):
    """Raw logits as float32, -inf where masked.  All tiles are read here, where `make check-kernels` looks."""
    return as_float32(tl.load(row_ptr + offsets, mask=mask, other=float("-inf")))


@triton.jit
def clean(x, has_pos_inf):
    x = tl.where(x == x, x, float("-inf"))
    only_pos_inf = tl.where(x == float("inf"), 0.0, float("-inf"))
    x = tl.where(has_pos_inf, only_pos_inf, x)
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def scale(x, temperature):
    scaled = tl.div_rn(x, tl.zeros_like(x) + temperature)
    scaled = tl.where(scaled > FLOAT_MAX, FLOAT_MAX, scaled)
    scaled = tl.where(scaled < -FLOAT_MAX, -FLOAT_MAX, scaled)
    scaled = tl.where(scaled == 0.0, 0.0, scaled)
    return tl.where(x == float("-inf"), float("-inf"), scaled)


@triton.jit
def filter_temperature(temperature):
    """Greedy rows are filtered at temperature 1.  Values out of range become 1 too: their rows draw nothing."""
    return tl.where((temperature > 0.0) & (temperature <= FLOAT_MAX), temperature, 1.0)


@triton.jit
def relative(x, top, temperature):
    """(x - top) / temperature."""
    # Of halves: the difference of two float32 may be twice what float32 holds.  Otherwise the bits are the same.
    return tl.div_rn(0.5 * x - 0.5 * top, tl.zeros_like(x) + 0.5 * temperature)


@triton.jit
def ordered(x):
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(key, token_ids):
    return (key.to(tl.int64) << 32) | (token_ids ^ LAST_ID).to(tl.int64)  # LAST_ID - id, for an id without a sign bit


@triton.jit
def packed_key(packed):
    return (packed >> 32).to(tl.int32)


@triton.jit
def packed_id(packed):
    return (packed & 0x7FFFFFFF).to(tl.int32) ^ LAST_ID


@triton.jit
def log_sum(maxima, sums):
    """The largest x (0 for none) and log sum exp of x less it, from partial sums; their sum may swallow the second.

    Part i holds ``sum exp(x - maxima[i])``; the log is -inf if there is nothing.  Parts whose maximum is +inf hold a
    count of +inf logits, which are 0 once cleaned."""
    top = tl.max(maxima, 0)
    weight = tl.where(maxima == top, 1.0, tl.exp(maxima - top))
    total = tl.sum(tl.where(maxima == float("-inf"), 0.0, weight * sums), 0)
    finite_top = tl.where((top == float("-inf")) | (top == float("inf")), 0.0, top)
    return finite_top, tl.log(total)
