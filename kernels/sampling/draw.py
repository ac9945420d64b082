"""draw: one token per row, the argmax of z + Gumbel noise, z = (new logit - largest new logit) / temperature.

In a capped row it is the largest logit, which the logits of the tail are compared with.

One program per row, over its listed candidates and what `tail` left of the others.  With a projection the candidates
are reweighted here first (`explore`); without one their new logits are read (`draw`).  Also the row's numbers:

    logprob       z[token] - log sum exp z over all that could be drawn
    kl            of that distribution from the one before reweighting
    base_logprob  raw logit[token] - log sum exp of the raw logits (whole vocabulary, temperature 1)

A row with a code (>= 0) draws by it instead: the token whose share of [0, 1) holds it, shares in the order of token ids
and the tail's last; in the tail the noise picks. It becomes its place within that share, or a fresh one.
Temperature 0 is the argmax of the new logits.  Of equals the lowest id wins.  Moves a few KB per row.
"""

import torch
import triton
import triton.language as tl

from esamp_core.kernels.philox import code_uniform, gumbel, token_bits
from esamp_core.kernels.sampling.reweight import reweight
from esamp_core.kernels.sampling.row import (
    CAPPED,
    FLOAT_MAX,
    LAST_ID,
    as_float32,
    clean,
    filter_temperature,
    log_sum,
    relative,
)
from esamp_core.kernels.tuning import Config, power_of_2


@triton.jit
def by_code(code, siblings, scored, scored_max, ids, present, rest, fresh):
    """The token, LAST_ID for the tail of weight `rest`; the new code, and the siblings that it is shared with.

    All in float64, as codes are.
    """
    weight = tl.where(present, tl.exp(scored.to(tl.float64) - scored_max.to(tl.float64)), 0.0)
    listed = tl.sum(weight, 0)
    total = listed + rest
    aim = code * total
    can = weight > 0.0
    # The lowest id with more than `aim` at and below it, bit by bit; rounding must not lead beyond the last token.
    token = tl.max(tl.where(can, ids, 0), 0)
    if aim < listed:
        below = tl.full((), 0, tl.int32)
        bit = tl.full((), 1 << 30, tl.int32)
        while bit > 0:
            short = tl.sum(tl.where(ids < (below | bit), weight, 0.0), 0) <= aim
            below = tl.where(short, below | bit, below)
            bit = bit >> 1
        token = below
    in_tail = (aim >= listed) & (rest > 0.0)
    share = tl.where(in_tail, rest, tl.sum(tl.where(ids == token, weight, 0.0), 0))
    start = tl.where(in_tail, listed, tl.sum(tl.where(ids < token, weight, 0.0), 0))
    left = (aim - start) / share
    left = tl.minimum(tl.maximum(left, 0.0), 1.0 - 2.0**-53)
    siblings = siblings * (share / total)
    return tl.where(in_tail, LAST_ID, token), tl.where(siblings > 1.0, left, fresh), siblings


@triton.jit
def _draw_kernel(
    ids_ptr, logits_ptr, count_ptr, status_ptr,
    new_ptr, novelty_ptr, projection_ptr, beta_ptr, model_weight,
    raw_ptr, stride_rr, raw_max_ptr, raw_sum_ptr, temperature_ptr, seed_ptr, position_ptr, codes_ptr,
    best_ptr, best_id_ptr, best_z_ptr, mass_max_ptr, mass_sum_ptr,
    token_ptr, logprob_ptr, base_logprob_ptr, token_novelty_ptr, kl_ptr, new_status_ptr,
    V, width, splits, tiles,
    HAS_PROJECTION: tl.constexpr, HAS_NEW: tl.constexpr, HAS_MODEL: tl.constexpr, HAS_CODES: tl.constexpr,
    NEUTRAL: tl.constexpr,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    status = tl.load(status_ptr + row)
    if tl.load(count_ptr + row) == 0:
        tl.store(token_ptr + row, -1)
        tl.store(logprob_ptr + row, 0.0)
        tl.store(base_logprob_ptr + row, 0.0)
        tl.store(token_novelty_ptr + row, 0.0)
        tl.store(kl_ptr + row, 0.0)
        tl.store(new_status_ptr + row, status)
        return
    raw_t = tl.load(temperature_ptr + row)
    t = filter_temperature(raw_t)
    greedy = raw_t == 0.0
    lane = tl.arange(0, WIDTH)
    inside = lane < width
    at = row * width + lane
    ids = tl.load(ids_ptr + at, mask=inside, other=-1).to(tl.int32)
    present = ids >= 0
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf"))
    new = logits
    novelty = tl.zeros_like(logits)
    if HAS_PROJECTION:
        original = logits
        if HAS_MODEL:
            safe_ids = tl.where(present & (ids < V), ids, 0)
            original = as_float32(tl.load(raw_ptr + row * stride_rr + safe_ids, mask=present, other=0.0))
        projection = tl.load(projection_ptr + at, mask=present, other=0.0)
        beta = tl.load(beta_ptr + row)
        new, novelty, status = reweight(
            logits, original, projection, present, beta, model_weight, raw_t, status, NEUTRAL
        )
    if HAS_NEW:
        new = tl.load(new_ptr + at, mask=inside, other=float("-inf"))
        novelty = tl.load(novelty_ptr + at, mask=inside, other=0.0)
    tl.store(new_status_ptr + row, status)

    top = tl.max(logits, 0)  # the first need not be it: scaling may round or clamp logits to one number
    base = relative(logits, top, t)
    # Finite: what was too far below for float32 may be likely now, and KL tells from how far.
    base = tl.where(present, tl.where(base < -FLOAT_MAX, -FLOAT_MAX, base), float("-inf"))
    # New logits have a top of their own, or what novelty has in common would swallow the noise and log sum exp.
    # A tail is compared with them, and they were shifted so that they can be.
    has_tail = ((status & CAPPED) != 0) & (greedy == 0)
    new_top = tl.where(has_tail, top, tl.max(tl.where(present, new, float("-inf")), 0))
    scored = tl.where(present & (new != float("-inf")), relative(new, new_top, t), float("-inf"))
    base_max = tl.max(base, 0)
    scored_max = tl.max(scored, 0)
    scored_ref = tl.where(scored_max == float("-inf"), 0.0, scored_max)
    base_sum = tl.sum(tl.exp(base - base_max), 0)
    scored_sum = tl.sum(tl.exp(scored - scored_ref), 0)

    noise = gumbel(token_bits(tl.where(present, ids, 0), tl.load(seed_ptr + row), tl.load(position_ptr + row)))
    perturbed = tl.where(present, tl.where(greedy, new, scored + noise), float("-inf"))
    best = tl.max(perturbed, 0)
    token = tl.min(tl.where(present & (perturbed == best), ids, LAST_ID), 0)

    base_mass = base_max + tl.log(base_sum)
    mass = scored_ref + tl.log(scored_sum)
    tail_wins = tl.full((), 0, tl.int1)
    tail_z = best
    tail_token = token
    rest = tl.full((), 0.0, tl.float64)
    if has_tail:
        tile = tl.arange(0, TILES)
        in_tiles = tile < tiles
        tail_best = tl.load(best_ptr + row * tiles + tile, mask=in_tiles, other=float("-inf"))
        tail_id = tl.load(best_id_ptr + row * tiles + tile, mask=in_tiles, other=LAST_ID)
        tail_max = tl.load(mass_max_ptr + row * tiles + tile, mask=in_tiles, other=float("-inf"))
        tail_sum = tl.load(mass_sum_ptr + row * tiles + tile, mask=in_tiles, other=0.0)
        top_best = tl.max(tail_best, 0)
        top_id = tl.min(tl.where(tail_best == top_best, tail_id, LAST_ID), 0)
        tail_z = tl.load(best_z_ptr + row * tiles + tile, mask=in_tiles, other=float("-inf"))
        tail_z = tl.max(tl.where((tail_best == top_best) & (tail_id == top_id), tail_z, float("-inf")), 0)
        tail_wins = (top_best > best) | ((top_best == best) & (top_id < token))
        tail_token = top_id
        token = tl.where(tail_wins, top_id, token)
        # log sum exp of each set with the tail.
        tail_top, tail_rest = log_sum(tail_max, tail_sum)
        tail_mass = tail_top + tail_rest
        rest = tl.exp(tail_mass.to(tl.float64) - scored_ref.to(tl.float64))
        high = tl.maximum(base_mass, tail_mass)
        base_mass = high + tl.log(tl.exp(base_mass - high) + tl.exp(tail_mass - high))
        high = tl.maximum(mass, tail_mass)
        mass = high + tl.log(tl.exp(mass - high) + tl.exp(tail_mass - high))

    if HAS_CODES:
        code = tl.load(codes_ptr + 2 * row)
        if (code >= 0.0) & (greedy == 0):
            siblings = tl.load(codes_ptr + 2 * row + 1)
            fresh = code_uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row))
            picked, left, siblings = by_code(code, siblings, scored, scored_ref, ids, present, rest, fresh)
            tl.store(codes_ptr + 2 * row, left)
            tl.store(codes_ptr + 2 * row + 1, siblings)
            tail_wins = picked == LAST_ID
            token = tl.where(tail_wins, tail_token, picked)

    in_vocabulary = (token >= 0) & (token < V)
    safe_token = tl.where(in_vocabulary, token, 0)
    split = tl.arange(0, SPLITS)
    raw_max = tl.load(raw_max_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    raw_sum = tl.load(raw_sum_ptr + row * splits + split, mask=split < splits, other=0.0)
    raw = clean(as_float32(tl.load(raw_ptr + row * stride_rr + safe_token)), tl.max(raw_max, 0) == float("inf"))
    raw_top, raw_rest = log_sum(raw_max, raw_sum)
    # model_logits may be -inf, of the token or throughout: no -inf - -inf
    base_logprob = relative(raw, raw_top, 1.0) - raw_rest
    base_logprob = tl.where(base_logprob < -FLOAT_MAX, -FLOAT_MAX, base_logprob)
    base_logprob = tl.where(raw == float("-inf"), raw, base_logprob)

    drawn = present & (ids == token)
    z = tl.max(tl.where(drawn, scored, float("-inf")), 0)
    z = tl.where(tail_wins, tail_z, z)
    p = tl.exp(scored - mass)
    # Clamped: where the tokens likely now were 1e38 nats below the top, their mean may be more than float32 holds.
    kl = tl.sum(tl.where(p > 0.0, p * (scored - base), 0.0), 0) + base_mass - mass
    kl = tl.where(kl > FLOAT_MAX, FLOAT_MAX, kl)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, tl.where(greedy, 0.0, z - mass))
    tl.store(base_logprob_ptr + row, base_logprob)
    tl.store(token_novelty_ptr + row, tl.sum(tl.where(drawn, novelty, 0.0), 0))
    tl.store(kl_ptr + row, tl.where(greedy | (kl < 0.0), 0.0, kl))


def draw_triton(
    token_ids: torch.Tensor,
    logits: torch.Tensor,
    count: torch.Tensor,
    status: torch.Tensor,
    raw: torch.Tensor,
    scan: dict[str, torch.Tensor],
    tail: dict[str, torch.Tensor],
    temperature: torch.Tensor,
    beta: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    config: Config,
    *,
    codes: torch.Tensor | None = None,
    new: torch.Tensor | None = None,
    novelty: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    model_weight: float = 1.0,
    neutral: bool = False,
    raw_is_model: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """token int64 [R]; logprob, base_logprob, novelty, kl float32 [R]; status int32 [R].

    token_ids, logits: candidates [R, C].  raw: [R, V], for base_logprob, with part_max and part_sum of it in scan.
    tail: from tail_triton.  Either new and novelty [R, C], or projection [R, C] for reweighting here, or neither.
    raw_is_model: novelty uses raw at the candidates rather than their own logits.
    codes: contiguous float64 [R, 2], replaced in place where >= 0.
    """
    rows, width = token_ids.shape
    splits, tiles = scan["part_max"].shape[1], tail["best"].shape[1]
    assert token_ids.is_contiguous() and logits.is_contiguous()
    token = torch.empty_like(count)
    logprob, base_logprob, token_novelty, kl = (torch.empty_like(temperature) for _ in range(4))
    new_status = torch.empty_like(status)
    _draw_kernel[(rows,)](
        token_ids, logits, count, status, new, novelty, projection, beta, float(model_weight),
        raw, raw.stride(0), scan["part_max"], scan["part_sum"], temperature, seed, position, codes,
        tail["best"], tail["best_id"], tail["best_z"], tail["mass_max"], tail["mass_sum"],
        token, logprob, base_logprob, token_novelty, kl, new_status, raw.shape[1], width, splits, tiles,
        HAS_PROJECTION=projection is not None, HAS_NEW=new is not None, HAS_MODEL=raw_is_model,
        HAS_CODES=codes is not None, NEUTRAL=neutral,
        WIDTH=power_of_2(width, 16), SPLITS=power_of_2(splits, 16), TILES=power_of_2(tiles, 16),
        num_warps=config.draw_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return token, logprob, base_logprob, token_novelty, kl, new_status
