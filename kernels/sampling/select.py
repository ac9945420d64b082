"""select: the few tokens of a row that can be listed as candidates, without reading the row again.

One program per row, over the block maxima that block_max left:

1. The k-th largest block max bounds the k-th largest logit from below (with k larger than the number of non-empty
   blocks there is no bound).  k is top_k, or the number of candidates to list.  The min-p floor tightens the bound
   where it does not change what top-p is renormalised over.
2. Only blocks whose max reaches the bound are read, about k of them; the tokens that reach it survive.
3. If more survive than finalise can sort (clustered vocabularies: up to 128 k), the k-th largest of them is found by
   bisection on ordered keys, over the same blocks, and becomes the bound.  If even then too many survive they tie
   with it; the count says so and `beyond` takes over.

The survivors are *all* tokens with key >= bound.  Moves about k * 128 logits and V / 128 maxima per row.
"""

import torch
import triton
import triton.language as tl

from esamp_core.kernels.sampling.row import (
    EMPTY,
    INACTIVE,
    INVALID_PARAMS,
    LAST_ID,
    LEAST_KEY,
    NAN_LOGITS,
    NO_KEY,
    POS_INF_LOGITS,
    clean,
    filter_temperature,
    load_logits,
    ordered,
    pack,
    scale,
)
from esamp_core.kernels.tuning import Config, Layout, power_of_2

MIN_TEMPERATURE = tl.constexpr(1e-3)


@triton.jit
def _kth_largest(keys, k):
    """The k-th largest of int32 keys, exactly, bit by bit from the top; 1 <= k <= how many there are."""
    bits = keys.to(tl.uint32, bitcast=True) ^ 0x80000000
    answer = tl.zeros((), tl.uint32)
    for i in tl.static_range(32):
        probe = answer | tl.full((), 1 << (31 - i), tl.uint32)
        enough = tl.sum((bits >= probe).to(tl.int32), 0) >= k
        answer = tl.where(enough, probe, answer)
    return (answer ^ tl.full((), 0x80000000, tl.uint32)).to(tl.int32, bitcast=True)


@triton.jit
def _listed_keys(
    row_ptr, list_ptr, start, listed, has_pos_inf, t, V, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Keys and ids of the next BLOCKS blocks of the list, flat; NO_KEY beyond the list or the row."""
    place = start + tl.arange(0, BLOCKS)
    blocks = tl.load(list_ptr + place, mask=place < listed, other=0)
    offsets = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (place < listed)[:, None] & (offsets < V)
    x = clean(load_logits(row_ptr, offsets, inside), has_pos_inf)
    keys = tl.where(inside, ordered(scale(x, t)), NO_KEY)
    return tl.reshape(keys, (BLOCKS * BLOCK,)), tl.reshape(offsets, (BLOCKS * BLOCK,))


@triton.jit
def _count(
    row_ptr, list_ptr, listed, bound, has_pos_inf, t, V, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    n = tl.full((), 0, tl.int32)
    start = tl.full((), 0, tl.int32)
    while start < listed:
        keys, _ = _listed_keys(row_ptr, list_ptr, start, listed, has_pos_inf, t, V, BLOCK, BLOCKS)
        n += tl.sum((keys >= bound).to(tl.int32), 0)
        start += BLOCKS
    return n


@triton.jit
def _gather(
    row_ptr, list_ptr, survivors_ptr, listed, bound, has_pos_inf, t, V,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SORT: tl.constexpr,
):  # fmt: skip
    """Store the packed tokens with key >= bound, as many as fit; return how many there are."""
    n = tl.full((), 0, tl.int32)
    start = tl.full((), 0, tl.int32)
    while start < listed:
        keys, ids = _listed_keys(row_ptr, list_ptr, start, listed, has_pos_inf, t, V, BLOCK, BLOCKS)
        keep = keys >= bound
        place = n + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(survivors_ptr + place, pack(keys, ids), mask=keep & (place < SORT))
        n += tl.sum(keep.to(tl.int32), 0)
        start += BLOCKS
    return n


@triton.jit
def _select_kernel(
    logits_ptr, stride_lr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, log_min_p_ptr, beta_ptr, active_ptr,
    block_max_ptr, part_nan_ptr, part_sum_t_ptr, part_max_ptr,
    list_ptr, survivors_ptr, num_survivors_ptr, bound_ptr, top_ptr, mass_ptr, status_ptr,
    V, num_blocks, splits, width,
    VLLM: tl.constexpr, HAS_ACTIVE: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCKS: tl.constexpr, SORT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if HAS_ACTIVE:
        if tl.load(active_ptr + row) == 0:
            tl.store(status_ptr + row, INACTIVE)
            tl.store(num_survivors_ptr + row, 0)
            tl.store(bound_ptr + row, LEAST_KEY)
            return
    raw_t = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    beta = tl.load(beta_ptr + row)
    t = filter_temperature(raw_t)
    valid = (raw_t == 0.0) | ((raw_t >= MIN_TEMPERATURE) & (raw_t < float("inf")))
    valid &= (top_k >= 0) & (top_p > 0.0) & (top_p <= 1.0) & (min_p >= 0.0) & (min_p <= 1.0)
    valid &= (beta > float("-inf")) & (beta < float("inf"))

    part = tl.arange(0, SPLITS)
    in_parts = part < splits
    part_max = tl.load(part_max_ptr + row * splits + part, mask=in_parts, other=float("-inf"))
    raw_max = tl.max(part_max, 0)
    has_nan = tl.max(tl.load(part_nan_ptr + row * splits + part, mask=in_parts, other=0), 0)
    has_pos_inf = raw_max == float("inf")
    top = scale(clean(raw_max, has_pos_inf), t)
    tl.store(top_ptr + row, top)
    status = tl.where(has_nan != 0, NAN_LOGITS, 0) | tl.where(has_pos_inf, POS_INF_LOGITS, 0)
    status |= tl.where(top == float("-inf"), EMPTY, 0) | tl.where(valid, 0, INVALID_PARAMS)
    tl.store(status_ptr + row, status)
    if top_p < 1.0:
        # The mass of the whole row relative to its top.  With +inf about, parts that have none weigh nothing.
        sums = tl.load(part_sum_t_ptr + row * splits + part, mask=in_parts, other=0.0)
        weight = tl.where(part_max == raw_max, 1.0, tl.exp(scale(part_max, t) - top))
        weight = tl.where(clean(part_max, has_pos_inf) == float("-inf"), 0.0, weight)
        tl.store(mass_ptr + row, tl.sum(tl.where(weight > 0.0, weight * sums, 0.0), 0))

    # 1. The bound.
    block = tl.arange(0, NUM_BLOCKS)
    maxima = tl.load(block_max_ptr + row * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
    block_keys = ordered(scale(clean(maxima, has_pos_inf), t))
    wanted = tl.where((top_k > 0) & (top_k <= width), top_k, width).to(tl.int32)
    bound = tl.full((), LEAST_KEY, tl.int32)
    if wanted <= tl.sum((block_keys > NO_KEY).to(tl.int32), 0):
        bound = _kth_largest(block_keys, wanted)
    if VLLM:
        floor_is_safe = min_p > 0.0
    else:
        floor_is_safe = (min_p > 0.0) & ((top_p >= 1.0) | (top_k == 0))
    if floor_is_safe & valid:
        bound = tl.maximum(bound, ordered(top + tl.load(log_min_p_ptr + row)))
        bound = tl.maximum(bound, LEAST_KEY)

    # 2. The blocks that reach it, and the tokens in them.
    keep = block_keys >= tl.where(valid, bound, LAST_ID)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    listed = tl.sum(keep.to(tl.int32), 0)
    row_list_ptr = list_ptr + row * num_blocks
    tl.store(row_list_ptr + place, block, mask=keep)
    # A barrier orders a program's global memory: by definition on NVIDIA; on gfx942 because the waves of one program
    # share a vector cache that keeps their order (LLVM's memory model for it leaves the waits out too).
    tl.debug_barrier()
    row_ptr = logits_ptr + row * stride_lr
    row_survivors_ptr = survivors_ptr + row * SORT
    n = _gather(row_ptr, row_list_ptr, row_survivors_ptr, listed, bound, has_pos_inf, t, V, BLOCK, BLOCKS, SORT)

    # 3. Too many: the exact `wanted`-th largest.  At least `wanted` tokens reach low, fewer reach high + 1.
    if n > SORT:
        low = bound.to(tl.int64)
        high = ordered(top).to(tl.int64)
        while low < high:
            middle = (low + high + 1) >> 1
            probe = middle.to(tl.int32)
            enough = _count(row_ptr, row_list_ptr, listed, probe, has_pos_inf, t, V, BLOCK, BLOCKS) >= wanted
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        bound = low.to(tl.int32)
        tl.debug_barrier()
        n = _gather(row_ptr, row_list_ptr, row_survivors_ptr, listed, bound, has_pos_inf, t, V, BLOCK, BLOCKS, SORT)
    tl.store(num_survivors_ptr + row, n)
    tl.store(bound_ptr + row, bound)


def select_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    beta: torch.Tensor,
    active: torch.Tensor | None,
    scan: dict[str, torch.Tensor],
    config: Config,
    *,
    width: int,
    sort: int,
    vllm: bool,
) -> dict[str, torch.Tensor]:
    """Survivors of logits [R, V], given what block_max_triton left.

    width: candidates to list.  sort: survivors that fit.  vllm: whether min-p comes before top-k and top-p.
    Returns survivors int64 [R, sort] (packed, in no order), num_survivors int32 [R] (of them; more than sort: they
    did not fit), bound int32 [R], top float32 [R] (largest scaled logit), mass float32 [R] (sum exp(scaled - top) of
    the row, where top_p < 1), status int32 [R], log_min_p float32 [R].
    """
    rows, vocab = logits.shape
    layout = Layout.of(vocab, config)
    new = logits.new_empty
    result = {
        "survivors": new((rows, sort), dtype=torch.int64),
        "num_survivors": new(rows, dtype=torch.int32),
        "bound": new(rows, dtype=torch.int32),
        "top": new(rows, dtype=torch.float32),
        "mass": new(rows, dtype=torch.float32),
        "status": new(rows, dtype=torch.int32),
        "log_min_p": torch.log(min_p),
    }
    block_list = new((rows, layout.blocks), dtype=torch.int32)
    _select_kernel[(rows,)](
        logits, logits.stride(0), temperature, top_k, top_p, min_p, result["log_min_p"], beta, active,
        scan["block_max"], scan["part_nan"], scan["part_sum_t"], scan["part_max"],
        block_list, result["survivors"], result["num_survivors"], result["bound"], result["top"], result["mass"],
        result["status"], vocab, layout.blocks, layout.splits, width,
        VLLM=vllm, HAS_ACTIVE=active is not None, BLOCK=layout.block, NUM_BLOCKS=power_of_2(layout.blocks, 16),
        SPLITS=power_of_2(layout.splits, 16), BLOCKS=max(1, config.select_elements // layout.block), SORT=sort,
        num_warps=config.select_warps, enable_fp_fusion=False, **config.register_bound,
    )  # fmt: skip
    return result
