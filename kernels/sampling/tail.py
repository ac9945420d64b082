"""tail: what a capped row can draw beyond its listed candidates.

Grid (R, tiles); rows that are not capped, and greedy ones, leave at once.  A program reads one tile of the row and
leaves, of the kept tokens that are not listed,

    best, best_id        the largest z + Gumbel noise, and the lowest id that has it; best_z is its z
    mass_max, mass_sum   max z, and sum exp(z - max)                         z = (logit - largest logit) / temperature

A token is listed if it does not come after the last listed one (by key, then lowest id): the list is a prefix.
Moves V * itemsize bytes per capped row.
"""

import torch
import triton
import triton.language as tl

from esamp_core.kernels.philox import gumbel, tile_bits
from esamp_core.kernels.sampling.row import (
    CAPPED,
    LAST_ID,
    NO_KEY,
    POS_INF_LOGITS,
    clean,
    filter_temperature,
    load_logits,
    ordered,
    relative,
    scale,
)
from esamp_core.kernels.tuning import Config, power_of_2


@triton.jit
def _tail_kernel(
    logits_ptr, stride_lr, temperature_ptr, seed_ptr, position_ptr,
    ids_ptr, chosen_ptr, threshold_ptr, tie_id_ptr, status_ptr,
    best_ptr, best_id_ptr, best_z_ptr, mass_max_ptr, mass_sum_ptr,
    V, width,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    status = tl.load(status_ptr + row)
    raw_t = tl.load(temperature_ptr + row)
    if ((status & CAPPED) == 0) | (raw_t == 0.0):
        return
    t = filter_temperature(raw_t)
    first_id = tl.program_id(1) * TILE
    ids = first_id + tl.arange(0, TILE)
    x = clean(load_logits(logits_ptr + row * stride_lr, ids, ids < V), (status & POS_INF_LOGITS) != 0)
    keys = ordered(scale(x, t))

    threshold = tl.load(threshold_ptr + row)
    threshold_key = ordered(tl.where(threshold == 0.0, 0.0, threshold))
    tie_id = tl.load(tie_id_ptr + row)
    last_key = ordered(scale(tl.load(chosen_ptr + row * width + width - 1), t))
    last_id = tl.load(ids_ptr + row * width + width - 1)
    kept = (keys > threshold_key) | ((keys == threshold_key) & (ids >= tie_id))
    after_list = (keys < last_key) | ((keys == last_key) & (ids > last_id))
    in_tail = kept & after_list & (keys > NO_KEY)

    lane = tl.arange(0, WIDTH)
    top = tl.max(tl.load(chosen_ptr + row * width + lane, mask=lane < width, other=float("-inf")), 0)
    z = relative(x, top, t)
    z = tl.where(z > 0.0, 0.0, z)  # where scaling rounded or clamped logits to one number
    z = tl.where(in_tail, z, float("-inf"))
    noise = gumbel(tile_bits(first_id, tl.load(seed_ptr + row), tl.load(position_ptr + row), TILE))
    perturbed = tl.where(in_tail, z + noise, float("-inf"))
    best = tl.max(perturbed, 0)
    best_id = tl.min(tl.where(in_tail & (perturbed == best), ids, LAST_ID), 0)
    mass_max = tl.max(z, 0)
    mass_sum = tl.sum(tl.where(in_tail, tl.exp(z - mass_max), 0.0), 0)

    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + part, best)
    tl.store(best_id_ptr + part, best_id)
    tl.store(best_z_ptr + part, tl.max(tl.where(ids == best_id, z, float("-inf")), 0))
    tl.store(mass_max_ptr + part, mass_max)
    tl.store(mass_sum_ptr + part, mass_sum)


def tail_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    token_ids: torch.Tensor,
    chosen: torch.Tensor,
    threshold: torch.Tensor,
    tie_id: torch.Tensor,
    status: torch.Tensor,
    config: Config,
) -> dict[str, torch.Tensor]:
    """best_id int32; best, best_z, mass_max and mass_sum float32 [R, tiles]; anything in rows without a tail."""
    rows, vocab = logits.shape
    width = token_ids.shape[1]
    tiles = -(-vocab // config.tail_elements)
    result = {
        name: logits.new_empty((rows, tiles), dtype=torch.int32 if name == "best_id" else torch.float32)
        for name in ("best", "best_id", "best_z", "mass_max", "mass_sum")
    }
    _tail_kernel[(rows, tiles)](
        logits, logits.stride(0), temperature, seed, position, token_ids, chosen, threshold, tie_id, status,
        result["best"], result["best_id"], result["best_z"], result["mass_max"], result["mass_sum"],
        vocab, width,
        TILE=config.tail_elements, WIDTH=power_of_2(width, 16), num_warps=config.tail_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return result
