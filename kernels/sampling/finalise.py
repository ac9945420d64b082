"""finalise: sort a row's survivors and let top-k, top-p and min-p cut them.

One program per row.  The survivors are all tokens with key >= bound, so whatever the filters cut inside them is exact:

    top-k    the key of the k-th; everything tied with it stays
    top-p    a token stays while the mass above it is below top_p of the total; the total is that of the survivors
             that top-k left, or, without top-k, the whole row's from block_max.  Of tied tokens the lowest ids go first
    min-p    key >= ordered(top + log min_p), before ("vllm") or after ("transformers") the two

A row whose cut lies beyond the survivors (its nucleus or its top-k is larger, nothing filters it, or too many tokens
tie) is flagged and left to `beyond`.  Moves a few KB per row.
"""

import torch
import triton
import triton.language as tl

from esamp_core.kernels.sampling.row import (
    CAPPED,
    LAST_ID,
    LEAST_KEY,
    NO_PACKED,
    POS_INF_LOGITS,
    as_float32,
    clean,
    ordered,
    packed_id,
    packed_key,
    unordered,
)
from esamp_core.kernels.tuning import Config


@triton.jit
def store_listing(
    logits_row_ptr, packed, threshold_key, tie_id, has_pos_inf, ids_ptr, chosen_ptr, width, SORT: tl.constexpr
):  # fmt: skip
    """List what is kept of sorted survivors, the first `width` of it, with cleaned logits; -1 and -inf after it."""
    keys = packed_key(packed)
    ids = packed_id(packed)
    kept = (packed != NO_PACKED) & ((keys > threshold_key) | ((keys == threshold_key) & (ids >= tie_id)))
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    listed = kept & (place < width)
    x = as_float32(tl.load(logits_row_ptr + tl.where(listed, ids, 0), mask=listed, other=0.0))
    x = clean(x, has_pos_inf)
    tl.store(ids_ptr + place, ids.to(tl.int64), mask=listed)
    tl.store(chosen_ptr + place, x, mask=listed)
    lane = tl.arange(0, SORT)
    empty = (lane >= tl.sum(kept.to(tl.int32), 0)) & (lane < width)
    tl.store(ids_ptr + lane, lane.to(tl.int64) * 0 - 1, mask=empty)
    tl.store(chosen_ptr + lane, tl.full((SORT,), float("-inf"), tl.float32), mask=empty)


@triton.jit
def _finalise_kernel(
    logits_ptr, stride_lr, top_k_ptr, top_p_ptr, min_p_ptr, log_min_p_ptr,
    survivors_ptr, num_survivors_ptr, bound_ptr, top_ptr, mass_ptr, status_ptr,
    ids_ptr, chosen_ptr, count_ptr, threshold_ptr, tie_id_ptr, beyond_ptr,
    width,
    VLLM: tl.constexpr, SORT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(num_survivors_ptr + row)
    status = tl.load(status_ptr + row)
    has_pos_inf = (status & POS_INF_LOGITS) != 0
    row_ptr = logits_ptr + row * stride_lr
    lane = tl.arange(0, SORT)
    if n == 0:
        store_listing(
            row_ptr, tl.full((SORT,), NO_PACKED, tl.int64), LEAST_KEY, 0, has_pos_inf,
            ids_ptr + row * width, chosen_ptr + row * width, width, SORT,
        )  # fmt: skip
        tl.store(count_ptr + row, 0)
        tl.store(threshold_ptr + row, float("inf"))
        tl.store(tie_id_ptr + row, LAST_ID)
        tl.store(beyond_ptr + row, 0)
        return
    if n > SORT:
        tl.store(beyond_ptr + row, 1)
        return
    bound = tl.load(bound_ptr + row)
    top = tl.load(top_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    floor = tl.full((), LEAST_KEY, tl.int32)
    if tl.load(min_p_ptr + row) > 0.0:
        floor = tl.maximum(ordered(top + tl.load(log_min_p_ptr + row)), LEAST_KEY)

    packed = tl.load(survivors_ptr + row * SORT + lane, mask=lane < n, other=NO_PACKED)
    packed = tl.sort(packed, descending=True)
    tl.store(survivors_ptr + row * SORT + lane, packed)
    present = lane < n
    keys = packed_key(packed)

    # What top-p is renormalised over, and whether all of it is here.
    kth_is_here = (top_k > 0) & (top_k <= n)
    kth = tl.where(kth_is_here, tl.max(tl.where(lane == top_k - 1, keys, LEAST_KEY), 0), LEAST_KEY)
    in_set = present & (keys >= kth)
    whole = (bound == LEAST_KEY) | kth_is_here
    total_known = whole | (top_p >= 1.0) | (top_k == 0)
    if VLLM:
        in_set &= keys >= floor
        whole |= floor == bound
        total_known = whole | (top_p >= 1.0) | ((top_k == 0) & (floor == LEAST_KEY))
    members = tl.sum(in_set.to(tl.int32), 0)

    # top-p.  Tied tokens weigh the same, so how many stay does not depend on their order.
    kept_n = members
    if top_p < 1.0:
        weight = tl.where(in_set, tl.exp(unordered(keys) - top), 0.0).to(tl.float64)
        above = tl.cumsum(weight, 0) - weight
        total = tl.where(whole, tl.sum(weight, 0), tl.load(mass_ptr + row).to(tl.float64))
        kept_n = tl.sum((in_set & (above < top_p.to(tl.float64) * total)).to(tl.int32), 0)
    inside = whole | (total_known & (kept_n < members))
    kept_n = tl.maximum(kept_n, 1)
    last_key = tl.min(tl.where(present & (lane < kept_n), keys, ordered(top)), 0)
    higher = tl.sum((in_set & (keys > last_key)).to(tl.int32), 0)
    tied = tl.sum((in_set & (keys == last_key)).to(tl.int32), 0)
    dropped = tied - (kept_n - higher)  # ids ascend within a tie, so its first ones go
    kept = in_set & ((keys > last_key) | ((keys == last_key) & (lane >= higher + dropped)))
    if not VLLM:
        kept &= keys >= floor
        inside |= total_known & (floor >= bound)
    tl.store(beyond_ptr + row, tl.where(inside, 0, 1))
    if inside:
        count = tl.sum(kept.to(tl.int32), 0)
        least = tl.min(tl.where(kept, keys, ordered(top)), 0)
        tie_id = tl.min(tl.where(kept & (keys == least), packed_id(packed), LAST_ID), 0)
        store_listing(
            row_ptr, packed, least, tie_id, has_pos_inf, ids_ptr + row * width, chosen_ptr + row * width, width, SORT
        )
        tl.store(count_ptr + row, count.to(tl.int64))
        tl.store(threshold_ptr + row, unordered(least))
        tl.store(tie_id_ptr + row, tie_id.to(tl.int64))
        tl.store(status_ptr + row, status | tl.where(count > width, CAPPED, 0))


def finalise_triton(
    logits: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    survivors: dict[str, torch.Tensor],
    config: Config,
    *,
    width: int,
    vllm: bool,
) -> dict[str, torch.Tensor]:
    """Candidates of logits [R, V], given what select_triton left; sorts its survivors in place.

    Returns token_ids int64 [R, width], logits float32 [R, width], count int64 [R], threshold float32 [R],
    tie_id int64 [R], status int32 [R] as `sample.Candidates` describes them, and beyond int32 [R]: rows of which
    nothing is written yet.
    """
    rows, _ = logits.shape
    sort = survivors["survivors"].shape[1]
    assert width <= sort
    new = logits.new_empty
    result = {
        "token_ids": new((rows, width), dtype=torch.int64),
        "logits": new((rows, width), dtype=torch.float32),
        "count": new(rows, dtype=torch.int64),
        "threshold": new(rows, dtype=torch.float32),
        "tie_id": new(rows, dtype=torch.int64),
        "status": survivors["status"],
        "beyond": new(rows, dtype=torch.int32),
    }
    _finalise_kernel[(rows,)](
        logits, logits.stride(0), top_k, top_p, min_p, survivors["log_min_p"],
        survivors["survivors"], survivors["num_survivors"], survivors["bound"], survivors["top"], survivors["mass"],
        result["status"], result["token_ids"], result["logits"], result["count"], result["threshold"],
        result["tie_id"], result["beyond"], width,
        VLLM=vllm, SORT=sort, num_warps=config.sort_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return result
