"""What one row's sampling step must give for finite logits of any size, in float64, and how far float32 may be from it.

Written from docs/semantics.md alone.  Beside every number goes a bound on its error, propagated from the rounding of
each operation that the documents name: never a figure that was seen.  Where the bound is vacuous (logits of 1e38 have
gaps of 1e31) a number need only be finite and within its range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.oracles import GUMBEL_TOLERANCE, NEG_INF, Exact, gumbel_float64, philox_numpy
from tests.oracles import log_sum_exp as plain_log_sum_exp

Array = np.ndarray

U = 2.0**-24  # what rounding to float32 may change, relatively
TINY = 2.0**-148  # and absolutely, where numbers are denormal: twice, as halves are
LARGEST = float(np.finfo(np.float32).max)
FUNCTION = 4 * U  # relative error of exp and log: 2 units in the last place
# Of a sum of at most 300 terms, relative to the sum of their sizes: every implementation here has several partial sums
# (8 in numpy, 32 in torch, a tree on a GPU), so that no term goes through more additions.
SUM = 48 * U
LOG_SUM = SUM + 2 * FUNCTION + 8 * U  # absolute, of log sum exp of numbers whose largest is 0, but for their own errors
FLAT = 1e-6  # the variance of logits under which neutral novelty has no slope, by the documents


def log_sum_exp(z: Array) -> float:
    with np.errstate(under="ignore", over="ignore"):
        return plain_log_sum_exp(z) if len(z) else NEG_INF


def spread(z: Array, error: Array) -> float:
    """How far log sum exp of z can move when each z moves by its error."""
    return max(log_sum_exp(z + error) - log_sum_exp(z), log_sum_exp(z) - log_sum_exp(z - error))


def over(x: Array, divisor: float) -> Array:
    """Quotients of differences; what is less than the least float32 counts as that, and has no probability."""
    return np.maximum(x / divisor, -LARGEST)


@dataclass(frozen=True)
class Row:
    """One row's problem; all numbers as the op gets them."""

    x: Array  # float32 [V], NaN-free, at most float32's largest
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    beta: float
    order: str
    cap: int
    projection: Array | None = None  # float32 [V], None: not explored
    model: Array | None = None  # float32 [V] model_logits
    model_weight: float = 1.0
    neutral: bool = False

    @property
    def t(self) -> float:
        return float(np.float32(self.temperature)) if self.temperature > 0 else 1.0

    @property
    def scaled(self) -> Array:
        """logit / temperature, rounded to float32, finite: filters compare these very numbers."""
        with np.errstate(over="ignore", under="ignore"):
            quotient = self.x / np.float32(self.t)
        return np.where(self.x == NEG_INF, NEG_INF, np.clip(quotient, -LARGEST, LARGEST)) + 0.0


def supports(row: Row) -> tuple[Array, Array]:
    """bool [V] twice: what must be kept, and what may be, because a threshold is that near."""
    s = row.scaled.astype(np.float64)
    ids, real = np.arange(len(s)), s > NEG_INF
    if not real.any():
        return real, real
    top = s.max()
    floors = [np.full_like(real, True)] * 2
    if row.min_p > 0:
        log = float(np.log(np.float64(np.float32(row.min_p))))
        error = 0.0 if log == 0 else U * abs(top + log) + FUNCTION * abs(log)
        # The top itself stays however it is rounded.
        floors = [(s >= top + log + error) | (s == top), s >= top + log - error]

    def cut(within: Array) -> Array:
        """top-k: everything from the k-th on, ties too."""
        if not 0 < row.top_k < within.sum():
            return within
        return within & (s >= np.sort(s[within])[-row.top_k])

    def nucleus(within: Array) -> tuple[Array, Array]:
        if row.top_p >= 1:
            return within, within
        order = [i for i in np.lexsort((-ids, -s)) if within[i]]  # of equals the highest id stays longest
        d = s[order] - top
        weight = np.exp(d)
        above = (np.cumsum(weight) - weight) / weight.sum()
        # Two sums, of weights whose exponents were rounded.
        error = 2 * (SUM + FUNCTION + U * float((weight * -np.maximum(d, -1e3)).sum() / weight.sum()))
        both = []
        for edge in (-error, error):
            stays = above < np.float64(np.float32(row.top_p)) + edge
            stays[0] = True
            mask = np.zeros_like(within)
            mask[np.array(order)[stays]] = True
            both.append(mask)
        return both[0], both[1]

    if row.order == "vllm":
        found = [nucleus(cut(real & floor)) for floor in floors]
        return found[0][0] & found[1][0], found[0][1] | found[1][1]
    must, may = nucleus(cut(real))
    return must & floors[0], may & floors[1]


@dataclass
class Bounded(Exact):
    """Exact numbers of a row with errors of the same names; flag: whether exploration must (1), must not (0) or may
    (None) have failed for numbers that float32 does not hold."""

    z: Array  # no less than the least float32
    beyond: Array  # bool [V]: z is less than that for sure
    reached: Array  # bool [V]: z is not
    z_error: Array
    logprob_error: Array
    base_logprob_error: Array
    novelty_error: Array
    new_error: Array
    kl_error: float
    flag: bool | None


def neutral_novelty(row: Row, x: Array, n: Array, e: Array) -> tuple[Array, Array, bool]:
    """What the regression leaves of novelty n with errors e, its errors, and whether float32 may leave its range."""
    b, t = x - x.max(), row.t
    p = np.exp(b / t) / np.exp(b / t).sum()
    relative = 3 * U * np.minimum(-b / t, 200) + 2 * (SUM + FUNCTION)
    e = e + e[n.argmax()] + U * np.abs(n - n.max())
    n = n - n.max()

    def centred(v: Array, error: Array) -> tuple[Array, Array]:
        mean_error = (p * np.abs(v) * (relative + 2 * U + SUM) + p * error).sum()
        v = v - (p * v).sum()
        return v, error + mean_error + U * np.abs(v) + (1 + len(v)) * TINY  # each product may be denormal

    b, e_b = centred(b, U * np.abs(b))
    n, e_n = centred(n, e)
    factor = relative + 4 * U + SUM
    cov = (p * n * b).sum()
    e_cov = (p * (np.abs(n * b) * factor + e_n * np.abs(b) + (np.abs(n) + e_n) * e_b)).sum()
    var = (p * b * b).sum()
    e_var = (p * (b * b * factor + 2 * e_b * np.abs(b) + e_b**2)).sum()
    slope = cov / max(var, FLAT)
    e_slope = (e_cov + abs(slope) * e_var) / max(var - e_var, FLAT * (1 - U)) + 4 * U * abs(slope)
    error = e_n + abs(slope) * e_b + e_slope * (np.abs(b) + e_b) + 4 * U * (np.abs(n) + np.abs(slope * b))
    limit = LARGEST / 2
    close = bool((p * np.abs(n * b)).sum() > limit or (p * b * b).sum() > limit or (np.abs(slope * b) > limit).any())
    return n - slope * b, error, close or abs(slope) > limit


def exact_row(row: Row, kept: Array, listed: Array) -> Bounded:
    """The step, given which tokens were kept and which of them listed, in order."""
    x = row.x.astype(np.float64)
    raw = x if row.model is None else row.model.astype(np.float64)
    t, size = row.t, len(x)
    # Not of all: quotients by the temperature may be one number, and those of the lowest ids are listed.  The others,
    # as all that they tie with, are no likelier than what is.
    top = x[listed].max()
    explored = row.beta != 0 and row.projection is not None
    capped, greedy = kept.sum() > row.cap, row.temperature == 0
    new, e_new = np.where(kept, x, NEG_INF), np.zeros(size)
    novelty, e_nov = np.zeros(size), np.zeros(size)
    flag: bool | None = False
    if explored:
        assert row.projection is not None
        product = row.model_weight * raw[listed]
        n = product - row.projection[listed]
        e = U * np.abs(n) + (0.0 if row.model_weight in (0, 1) else U * np.abs(product)) + TINY
        beyond = ~np.isfinite(n)
        flag = bool(beyond.any())
        if not flag:
            unsure = bool((np.abs(product) > LARGEST).any())
            if row.neutral and not (np.abs(n) > LARGEST).any():
                n, e, close = neutral_novelty(row, x[listed], n, e)
                unsure |= close
            y = x[listed] + row.beta * n
            e_y = abs(row.beta) * e + U * np.abs(row.beta * n) + U * np.abs(y) + TINY
            at = y.argmax()
            surely = (np.abs(n) - e > LARGEST * (1 + U)).any() or (y - e_y > LARGEST * (1 + U)).any()
            surely = surely or (y + e_y < -LARGEST * (1 + U)).all()
            perhaps = (np.abs(n) + e >= LARGEST).any() or (np.abs(y[at]) + e_y[at] >= LARGEST).any()
            perhaps = perhaps or (y + e_y >= LARGEST).any()
            flag = None if unsure or (perhaps and not surely) else bool(surely)
            if flag is not True:
                y = np.maximum(y, -LARGEST)
                if capped and not greedy:
                    below = over(x[listed] - top, t)
                    lost = log_sum_exp(below) - log_sum_exp(over(y - y.max(), t))
                    moved = over(y - y.max(), t)
                    e_moved = (e_y + U * (y.max() - y)) / t + U * np.abs(moved)
                    e_lost = spread(moved, e_moved) + spread(below, 2 * U * np.abs(below)) + 2 * LOG_SUM + U * abs(lost)
                    shift = top + t * lost
                    e_y = e_y + U * (y.max() - y) + t * e_lost + 2 * U * t * abs(lost) + U * abs(shift)
                    y = np.maximum(y - y.max() + shift, -LARGEST)
                    e_y = e_y + U * np.abs(y)
                new[listed], e_new[listed], novelty[listed], e_nov[listed] = y, e_y, n, e

    with np.errstate(invalid="ignore"):
        base = np.where(kept, np.minimum(over(x - top, t), 0), NEG_INF)
        z = np.where(kept, over(new - (top if capped else new[kept].max()), t), NEG_INF)
        z = np.where(np.isin(np.arange(size), listed), z, base)
        distance = np.where(np.isin(np.arange(size), listed), new - (top if capped else new[kept].max()), x - top) / t
        uncertain = e_new / t + 4 * U * LARGEST
    beyond, reached = distance + uncertain < -LARGEST, distance - uncertain > -LARGEST
    e_base = np.where(kept, 2 * U * np.abs(np.where(kept, base, 0)), 0)
    distance = np.where(kept, np.abs(np.where(kept, z, 0)), 0)
    e_z = np.where(kept, e_new / t + 2 * U * distance, 0)
    mass, base_mass = log_sum_exp(z[kept]), log_sum_exp(base[kept])
    e_mass = spread(z[kept], e_z[kept]) + LOG_SUM + 2 * U * abs(mass)
    e_base_mass = spread(base[kept], e_base[kept]) + LOG_SUM + 2 * U * abs(base_mass)
    logprob = np.where(kept, np.maximum(z - mass, -LARGEST), NEG_INF)
    e_logprob = np.where(kept, e_z + e_mass + U * (distance + abs(mass)), 0)

    gain = np.where(kept, z - np.where(kept, base, 0), 0)
    p = np.exp(logprob)
    with np.errstate(over="ignore"):
        high, low = np.exp(np.minimum(logprob + e_logprob, 0)), np.exp(logprob - e_logprob)
    high, low = high * (1 + 2 * FUNCTION), low * (1 - 2 * FUNCTION)
    seen = kept & (high > 0)
    total = float((p[seen] * gain[seen]).sum())
    e_kl = ((high - low) * np.abs(gain) + high * (e_z + e_base + U * np.abs(gain)))[seen].sum()
    e_kl += SUM * float((high * np.abs(gain))[seen].sum()) + e_mass + e_base_mass
    e_kl += 2 * U * (abs(total) + abs(base_mass) + abs(mass))
    kl = 0.0 if greedy or not explored else float(np.clip(total + base_mass - mass, 0, LARGEST))

    raw_top = raw.max() if raw.max() > NEG_INF else 0.0
    raw_rest = log_sum_exp(raw - raw_top) if raw.max() > NEG_INF else 0.0
    with np.errstate(invalid="ignore"):
        base_logprob = np.where(raw > NEG_INF, np.maximum(raw - raw_top - raw_rest, -LARGEST), NEG_INF)
    size_of = np.where(raw > NEG_INF, np.abs(raw - raw_top), 0)
    e_base_logprob = 2 * U * size_of + LOG_SUM + 2 * U * raw_rest + spread_of_raw(raw, raw_top)
    return Bounded(
        p, logprob, base_logprob, novelty, new, kl, int(kept.sum()), np.isin(np.arange(size), listed),
        z, kept & beyond, kept & reached, e_z, e_logprob, e_base_logprob, e_nov, e_new, float(e_kl), flag,
    )  # fmt: skip


def spread_of_raw(raw: Array, top: float) -> float:
    real = raw[raw > NEG_INF] - top
    return spread(real, 2 * U * np.abs(real)) if len(real) else 0.0


def noise(seed: int, position: int, vocab: int) -> Array:
    """float64 [V]: the Gumbel noise of every token, from the documented layout of counter and key."""
    blocks = np.arange((vocab + 3) // 4, dtype=np.uint64)
    words = [position % 2**32, (position // 2**32) % 2**32]
    counter = np.stack([blocks, blocks * 0, blocks * 0 + np.uint64(words[0]), blocks * 0 + np.uint64(words[1])], -1)
    key = np.array([seed % 2**32, (seed // 2**32) % 2**32], dtype=np.uint64)
    return gumbel_float64(philox_numpy(counter, np.broadcast_to(key, (len(blocks), 2))).reshape(-1)[:vocab])


def can_win(exact: Bounded, row: Row, kept: Array, g: Array) -> Array:
    """bool [V]: the tokens that the draw may give, which is one alone unless two are nearer than rounding."""
    if row.temperature == 0:
        score, error = np.where(exact.scored, exact.new, NEG_INF), exact.new_error
    else:
        score = np.where(kept, exact.z, NEG_INF) + g
        distance = np.where(kept, np.abs(np.where(kept, exact.z, 0)) + np.abs(g), 0)
        error = exact.z_error + GUMBEL_TOLERANCE + U * distance
    with np.errstate(invalid="ignore"):
        winners = score + error >= (score - error).max()
    if row.temperature == 0 and not error.any():  # of equals the lowest id
        winners = np.arange(len(score)) == score.argmax()
    return winners & (exact.scored if row.temperature == 0 else kept)
