"""block_max: the one full read of the logits.

Grid (R, splits).  A program reads BLOCKS * BLOCK neighbouring logits of one row and leaves

    block_max[row, block] = max of the cleaned logits of each block          (+inf stays +inf)
    part_nan[row, split]  = 1 if some logit was NaN
    part_sum_t            = sum exp(scaled - part's largest scaled)           for top-p, only where a row asks for it
    part_max, part_sum    = max, and sum exp(logit - max), at temperature 1   for base_logprob

so that no later kernel of an ordinary row reads more than the few blocks that can hold candidates.
Moves R * V * itemsize bytes; writes 1 / BLOCK of that.
"""

import torch
import triton
import triton.language as tl

from esamp_core.kernels.sampling.row import clean, filter_temperature, load_logits, scale
from esamp_core.kernels.tuning import Config, Layout


@triton.jit
def _block_max_kernel(
    logits_ptr, stride_lr, temperature_ptr, top_p_ptr, active_ptr,
    block_max_ptr, part_nan_ptr, part_sum_t_ptr, part_max_ptr, part_sum_ptr,
    V, num_blocks,
    FILTER: tl.constexpr, LOG_SUM: tl.constexpr, HAS_ACTIVE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    part = row * tl.num_programs(1) + split
    if HAS_ACTIVE:
        if tl.load(active_ptr + row) == 0:
            return
    blocks = split * BLOCKS + tl.arange(0, BLOCKS)
    offsets = split * (BLOCKS * BLOCK) + tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    raw = load_logits(logits_ptr + row * stride_lr, offsets, offsets < V)
    x = clean(raw, False)
    maxima = tl.max(x, 1)
    top = tl.max(maxima, 0)
    if FILTER:
        tl.store(block_max_ptr + row * num_blocks + blocks, maxima, mask=blocks < num_blocks)
        tl.store(part_nan_ptr + part, tl.max(tl.max((raw != raw).to(tl.int32), 1), 0))
        if tl.load(top_p_ptr + row) < 1.0:
            t = filter_temperature(tl.load(temperature_ptr + row))
            # Where the top is +inf the row's only finite candidates are those tokens, each of weight 1.
            weight = tl.where(x == top, 1.0, tl.exp(scale(x, t) - scale(top, t)))
            weight = tl.where(x == float("-inf"), 0.0, weight)
            tl.store(part_sum_t_ptr + part, tl.sum(tl.sum(weight, 1), 0))
    if LOG_SUM:
        weight = tl.where(x == top, 1.0, tl.exp(x - top))
        weight = tl.where(x == float("-inf"), 0.0, weight)
        tl.store(part_sum_ptr + part, tl.sum(tl.sum(weight, 1), 0))
    tl.store(part_max_ptr + part, top)


def block_max_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    top_p: torch.Tensor | None,
    active: torch.Tensor | None,
    config: Config,
    *,
    log_sum: bool,
) -> dict[str, torch.Tensor]:
    """The scan of logits [R, V]: for the filters if temperature and top_p are given, and for base_logprob if asked.

    Returns block_max [R, blocks] and part_nan, part_sum_t, part_max, part_sum [R, splits]; inactive rows hold
    anything.
    """
    rows, vocab = logits.shape
    layout = Layout.of(vocab, config)
    scan_filter = temperature is not None and top_p is not None
    assert logits.stride(1) == 1 or vocab == 1
    new = logits.new_empty
    parts = (rows, layout.splits)
    result = {"part_max": new(parts, dtype=torch.float32)}
    if log_sum:
        result["part_sum"] = new(parts, dtype=torch.float32)
    if scan_filter:
        result["block_max"] = new((rows, layout.blocks), dtype=torch.float32)
        result["part_nan"] = new(parts, dtype=torch.int32)
        result["part_sum_t"] = new(parts, dtype=torch.float32)
    _block_max_kernel[(rows, layout.splits)](
        logits, logits.stride(0), temperature, top_p, active,
        result.get("block_max"), result.get("part_nan"), result.get("part_sum_t"), result["part_max"],
        result.get("part_sum"), vocab, layout.blocks,
        FILTER=scan_filter, LOG_SUM=log_sum, HAS_ACTIVE=active is not None, BLOCK=layout.block,
        BLOCKS=layout.split_blocks, num_warps=config.scan_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return result
