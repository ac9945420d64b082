"""beyond: the exact cut of rows whose candidates do not end among the survivors.

One program per row; unflagged rows leave at once.  A flagged row is read several times (from L2), in tiles:

1. top-k: the largest key that at least k tokens reach, by bisection on the int32 keys.
2. top-p: the smallest key such that the mass strictly above it is below top_p of the total, by bisection; then how
   many of the tokens tied at that key stay (the highest ids), and which id is the lowest of them.
3. min-p, then one pass for the number of kept tokens, the least key and the least id at it.
4. If too many tied tokens kept `select` from collecting survivors, they are collected now: everything above the bound,
   and the lowest kept ids at it.

Only the listing needs the survivors; a tail without end needs no sort.  Up to ~70 reads of a flagged row with top-k
and top-p; 1 of a row that nothing filters.
"""

import torch
import triton
import triton.language as tl

from esamp_core.kernels.sampling.finalise import store_listing
from esamp_core.kernels.sampling.row import (
    CAPPED,
    LAST_ID,
    LEAST_KEY,
    NO_KEY,
    NO_PACKED,
    POS_INF_LOGITS,
    clean,
    filter_temperature,
    load_logits,
    ordered,
    pack,
    scale,
    unordered,
)
from esamp_core.kernels.tuning import Config


@triton.jit
def _tile(row_ptr, start, has_pos_inf, t, V, TILE: tl.constexpr):
    """Keys (NO_KEY beyond the row) and ids of one tile."""
    ids = start + tl.arange(0, TILE)
    x = clean(load_logits(row_ptr, ids, ids < V), has_pos_inf)
    return ordered(scale(x, t)), ids


@triton.jit
def _count_at_least(row_ptr, key, has_pos_inf, t, V, TILE: tl.constexpr):
    n = tl.full((), 0, tl.int32)
    start = tl.full((), 0, tl.int32)
    while start < V:
        keys, _ = _tile(row_ptr, start, has_pos_inf, t, V, TILE)
        n += tl.sum((keys >= key).to(tl.int32), 0)
        start += TILE
    return n


@triton.jit
def _mass_at_least(row_ptr, key, top, has_pos_inf, t, V, TILE: tl.constexpr):
    """sum exp(scaled - top) over the tokens with key >= `key`."""
    mass = tl.full((), 0.0, tl.float64)
    start = tl.full((), 0, tl.int32)
    while start < V:
        keys, _ = _tile(row_ptr, start, has_pos_inf, t, V, TILE)
        mass += tl.sum(tl.where(keys >= key, tl.exp(unordered(keys) - top), 0.0), 0).to(tl.float64)
        start += TILE
    return mass


@triton.jit
def _tie_id(row_ptr, key, dropped, has_pos_inf, t, V, TILE: tl.constexpr):
    """The id that comes after the `dropped` lowest ids of the tokens tied at `key`."""
    seen = tl.full((), 0, tl.int32)
    found = tl.full((), LAST_ID, tl.int32)
    start = tl.full((), 0, tl.int32)
    while start < V:
        keys, ids = _tile(row_ptr, start, has_pos_inf, t, V, TILE)
        tied = keys == key
        rank = seen + tl.cumsum(tied.to(tl.int32), 0) - 1
        found = tl.minimum(found, tl.min(tl.where(tied & (rank == dropped), ids, LAST_ID), 0))
        seen += tl.sum(tied.to(tl.int32), 0)
        start += TILE
    return found


@triton.jit
def _collect(
    row_ptr, survivors_ptr, key, tie_id, has_pos_inf, t, V, TILE: tl.constexpr, SORT: tl.constexpr
):  # fmt: skip
    """Store all tokens above `key` and then, as far as there is room, the lowest ids >= tie_id at it."""
    above = tl.full((), 0, tl.int32)
    ties = _count_at_least(row_ptr, key + 1, has_pos_inf, t, V, TILE)
    start = tl.full((), 0, tl.int32)
    while start < V:
        keys, ids = _tile(row_ptr, start, has_pos_inf, t, V, TILE)
        is_above = keys > key
        is_tie = (keys == key) & (ids >= tie_id)
        place = above + tl.cumsum(is_above.to(tl.int32), 0) - 1
        tl.store(survivors_ptr + place, pack(keys, ids), mask=is_above & (place < SORT))
        place = ties + tl.cumsum(is_tie.to(tl.int32), 0) - 1
        tl.store(survivors_ptr + place, pack(keys, ids), mask=is_tie & (place < SORT))
        above += tl.sum(is_above.to(tl.int32), 0)
        ties += tl.sum(is_tie.to(tl.int32), 0)
        start += TILE
    return tl.minimum(ties, SORT)


@triton.jit
def _beyond_kernel(
    logits_ptr, stride_lr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, log_min_p_ptr,
    survivors_ptr, num_survivors_ptr, bound_ptr, top_ptr, status_ptr,
    ids_ptr, chosen_ptr, count_ptr, threshold_ptr, tie_id_ptr, beyond_ptr,
    V, width,
    VLLM: tl.constexpr, SORT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(beyond_ptr + row) == 0:
        return
    t = filter_temperature(tl.load(temperature_ptr + row))
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row).to(tl.float64)
    top = tl.load(top_ptr + row)
    status = tl.load(status_ptr + row)
    has_pos_inf = (status & POS_INF_LOGITS) != 0
    row_ptr = logits_ptr + row * stride_lr
    highest = ordered(top)
    floor = tl.full((), LEAST_KEY, tl.int32)
    if tl.load(min_p_ptr + row) > 0.0:
        floor = tl.maximum(ordered(top + tl.load(log_min_p_ptr + row)), LEAST_KEY)

    # 1. `cut` is the least key that stays.
    cut = tl.full((), LEAST_KEY, tl.int32)
    if (top_k > 0) & (top_k < V):
        if _count_at_least(row_ptr, LEAST_KEY, has_pos_inf, t, V, TILE) > top_k:
            low = cut.to(tl.int64)  # at least k tokens reach it; fewer reach high + 1
            high = highest.to(tl.int64)
            while low < high:
                middle = (low + high + 1) >> 1
                enough = _count_at_least(row_ptr, middle.to(tl.int32), has_pos_inf, t, V, TILE) >= top_k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
            cut = low.to(tl.int32)
    if VLLM:
        cut = tl.maximum(cut, floor)

    # 2. Of the tokens at `cut` those with an id below `tie_id` go.
    tie_id = tl.full((), 0, tl.int32)
    if top_p < 1.0:
        wanted = top_p * _mass_at_least(row_ptr, cut, top, has_pos_inf, t, V, TILE)
        low = cut.to(tl.int64)
        high = highest.to(tl.int64)  # the mass above it is 0
        while low < high:
            middle = (low + high) >> 1
            below = _mass_at_least(row_ptr, middle.to(tl.int32) + 1, top, has_pos_inf, t, V, TILE) < wanted
            high = tl.where(below, middle, high)
            low = tl.where(below, low, middle + 1)
        cut = low.to(tl.int32)
        above = _mass_at_least(row_ptr, cut + 1, top, has_pos_inf, t, V, TILE)
        tied = _count_at_least(row_ptr, cut, has_pos_inf, t, V, TILE)
        tied -= _count_at_least(row_ptr, cut + 1, has_pos_inf, t, V, TILE)
        weight = tl.exp(unordered(cut) - top).to(tl.float64)
        room = tl.where(weight > 0.0, (wanted - above) / tl.where(weight > 0.0, weight, 1.0), 2147483647.0)
        room = tl.minimum(tl.maximum(room, 1.0), tied.to(tl.float64))
        stay = room.to(tl.int32)
        stay += (stay.to(tl.float64) < room).to(tl.int32)  # rounded up
        if stay < tied:
            tie_id = _tie_id(row_ptr, cut, tied - stay, has_pos_inf, t, V, TILE)

    # 3. Without floor nothing below `cut` stays; with it, nothing below the higher of the two.
    if not VLLM:
        tie_id = tl.where(floor > cut, 0, tie_id)
        cut = tl.maximum(cut, floor)
    count = tl.full((), 0, tl.int32)
    least = tl.full((), 2**63 - 1, tl.int64)  # key << 32 | id
    start = tl.full((), 0, tl.int32)
    while start < V:
        keys, ids = _tile(row_ptr, start, has_pos_inf, t, V, TILE)
        kept = (keys > cut) | ((keys == cut) & (ids >= tie_id))
        kept &= keys > NO_KEY
        count += tl.sum(kept.to(tl.int32), 0)
        least = tl.minimum(least, tl.min(tl.where(kept, (keys.to(tl.int64) << 32) | ids, 2**63 - 1), 0))
        start += TILE
    threshold = (least >> 32).to(tl.int32)
    tie_id = (least & 0x7FFFFFFF).to(tl.int32)

    # 4. The listing.
    lane = tl.arange(0, SORT)
    row_survivors_ptr = survivors_ptr + row * SORT
    if tl.load(num_survivors_ptr + row) > SORT:
        bound = tl.load(bound_ptr + row)
        least_tie = tl.where(bound == threshold, tie_id, 0)
        n = _collect(row_ptr, row_survivors_ptr, bound, least_tie, has_pos_inf, t, V, TILE, SORT)
        tl.debug_barrier()  # see select
        packed = tl.load(row_survivors_ptr + lane, mask=lane < n, other=NO_PACKED)
        packed = tl.sort(packed, descending=True)
    else:
        packed = tl.load(row_survivors_ptr + lane)
    store_listing(
        row_ptr, packed, threshold, tie_id, has_pos_inf, ids_ptr + row * width, chosen_ptr + row * width, width, SORT
    )
    tl.store(count_ptr + row, count.to(tl.int64))
    tl.store(threshold_ptr + row, unordered(threshold))
    tl.store(tie_id_ptr + row, tie_id.to(tl.int64))
    tl.store(status_ptr + row, status | tl.where(count > width, CAPPED, 0))


def beyond_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    survivors: dict[str, torch.Tensor],
    candidates: dict[str, torch.Tensor],
    config: Config,
    *,
    vllm: bool,
) -> None:
    """Fill in the flagged rows of finalise_triton's candidates, in place."""
    rows, vocab = logits.shape
    width = candidates["token_ids"].shape[1]
    _beyond_kernel[(rows,)](
        logits, logits.stride(0), temperature, top_k, top_p, min_p, survivors["log_min_p"],
        survivors["survivors"], survivors["num_survivors"], survivors["bound"], survivors["top"],
        candidates["status"], candidates["token_ids"], candidates["logits"], candidates["count"],
        candidates["threshold"], candidates["tie_id"], candidates["beyond"], vocab, width,
        VLLM=vllm, SORT=survivors["survivors"].shape[1], TILE=config.beyond_elements,
        num_warps=config.beyond_warps, enable_fp_fusion=False, **config.register_bound,
    )  # fmt: skip
