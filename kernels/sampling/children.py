"""children: of every row the W tokens with the largest z + Gumbel noise: what W draws without putting back would give.

One program per row.  Its listed candidates are sorted by perturbed z, which is all that most rows need.  A capped row
is then read in tiles, as in `tail` for the kept tokens that are not listed, and what beats the W-th best pushes it out,
one token after the other.  Noise is made only for tiles in which some z could be lifted that far.

    logprob     of the draw, plus z less that of the first child, which is the drawn token; z as in `draw`
    perturbed   the same of z + noise
    novelty     0 for tokens that were not listed

By perturbed descending, of equals the lowest id first; -1, -inf, -inf and 0 where there are fewer.  A greedy row has
one child, its draw; a row that draws nothing has none.  Moves a few KB per row, and V * itemsize bytes per capped row.
"""

import torch
import triton
import triton.language as tl

from esamp_core.kernels.philox import gumbel, tile_bits, token_bits
from esamp_core.kernels.sampling.row import (
    CAPPED,
    LEAST_KEY,
    NO_KEY,
    NO_PACKED,
    POS_INF_LOGITS,
    as_float32,
    clean,
    filter_temperature,
    load_logits,
    ordered,
    pack,
    packed_id,
    packed_key,
    relative,
    scale,
    unordered,
)
from esamp_core.kernels.tuning import Config, power_of_2

LARGEST_GUMBEL = tl.constexpr(22.9)  # a little above 33 log 2, as in esamp_core/base/philox.py


@triton.jit
def _tail_z(x, ids, t, top, threshold_key, tie_id, last_key, last_id):
    """z of the kept tokens that are not listed, as `tail` has it; -inf of all others."""
    keys = ordered(scale(x, t))
    kept = (keys > threshold_key) | ((keys == threshold_key) & (ids >= tie_id))
    after_list = (keys < last_key) | ((keys == last_key) & (ids > last_id))
    z = relative(x, top, t)
    z = tl.where(z > 0.0, 0.0, z)  # where scaling rounded or clamped logits to one number
    return tl.where(kept & after_list & (keys > NO_KEY), z, float("-inf"))


@triton.jit
def _place(best, packed, WIDTH: tl.constexpr):
    """How many of `best`, which descends, come before each; WIDTH - 1 at most."""
    place = tl.zeros_like(packed).to(tl.int32)
    step = tl.full((), WIDTH // 2, tl.int32)
    while step > 0:
        place = tl.where(tl.gather(best, place + (step - 1), 0) > packed, place + step, place)
        step = step >> 1
    return place


@triton.jit(do_not_specialize=["W"])  # it follows the number of siblings
def _children_kernel(
    ids_ptr, chosen_ptr, threshold_ptr, tie_id_ptr, status_ptr, new_ptr, novelty_ptr, logits_ptr, stride_lr,
    temperature_ptr, seed_ptr, position_ptr, drawn_ptr, drawn_logprob_ptr, drawn_novelty_ptr,
    token_ptr, logprob_ptr, perturbed_ptr, token_novelty_ptr,
    V, width, W,
    LISTED: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    child = tl.arange(0, WIDTH)
    out = row * W + child
    inside = child < W
    raw_t = tl.load(temperature_ptr + row)
    drawn = tl.load(drawn_ptr + row)
    if (drawn < 0) | (raw_t == 0.0):
        is_draw = (child == 0) & (drawn >= 0)
        tl.store(token_ptr + out, tl.where(is_draw, drawn, -1), mask=inside)
        tl.store(logprob_ptr + out, tl.where(is_draw, 0.0, float("-inf")), mask=inside)
        tl.store(perturbed_ptr + out, tl.where(is_draw, 0.0, float("-inf")), mask=inside)
        drawn_novelty = tl.load(drawn_novelty_ptr + row)
        tl.store(token_novelty_ptr + out, tl.where(is_draw, drawn_novelty, 0.0), mask=inside)
        return
    t = filter_temperature(raw_t)
    seed = tl.load(seed_ptr + row)
    position = tl.load(position_ptr + row)
    status = tl.load(status_ptr + row)

    # The listed candidates.
    lane = tl.arange(0, LISTED)
    at = row * width + lane
    ids = tl.load(ids_ptr + at, mask=lane < width, other=-1).to(tl.int32)
    present = ids >= 0
    top = tl.max(tl.load(chosen_ptr + at, mask=lane < width, other=float("-inf")), 0)
    new = tl.load(new_ptr + at, mask=present, other=float("-inf"))
    novelty = tl.load(novelty_ptr + at, mask=present, other=0.0)
    z_top = tl.where((status & CAPPED) != 0, top, tl.max(new, 0))
    z = tl.where(present & (new != float("-inf")), relative(new, z_top, t), float("-inf"))
    noise = gumbel(token_bits(tl.where(present, ids, 0), seed, position))
    packed = tl.where(z > float("-inf"), pack(ordered(z + noise), ids), NO_PACKED)
    best = tl.sort(packed, descending=True)
    if LISTED > WIDTH:
        # Its first WIDTH: as it descends, each of them is the largest of its column.
        best = tl.max(tl.reshape(best, (LISTED // WIDTH, WIDTH)), 0)

    tail_z = tl.full((WIDTH,), float("-inf"), tl.float32)  # of the children that are not listed
    if (status & CAPPED) != 0:
        row_ptr = logits_ptr + row * stride_lr
        has_pos_inf = (status & POS_INF_LOGITS) != 0
        threshold = tl.load(threshold_ptr + row)
        threshold_key = ordered(tl.where(threshold == 0.0, 0.0, threshold))
        tie_id = tl.load(tie_id_ptr + row)
        last_key = ordered(scale(tl.load(chosen_ptr + row * width + width - 1), t))
        last_id = tl.load(ids_ptr + row * width + width - 1)
        above = tl.maximum(child - 1, 0)
        least = tl.max(tl.where(child == W - 1, best, NO_PACKED), 0)
        start = tl.full((), 0, tl.int32)
        while start < V:
            tile_ids = start + tl.arange(0, TILE)
            # Loaded anew: what philox makes of them beforehand would fill a wave's scalar registers.
            seed = tl.load(seed_ptr + row, volatile=True)
            x = clean(load_logits(row_ptr, tile_ids, tile_ids < V), has_pos_inf)
            tile_z = _tail_z(x, tile_ids, t, top, threshold_key, tie_id, last_key, last_id)
            to_beat = unordered(tl.maximum(packed_key(least), NO_KEY))
            near = (tile_z > float("-inf")) & (tile_z >= to_beat - LARGEST_GUMBEL)
            if tl.max(near.to(tl.int32), 0) > 0:
                tile_noise = gumbel(tile_bits(start, seed, position, TILE))
                rivals = tl.where(near, pack(ordered(tile_z + tile_noise), tile_ids), NO_PACKED)
                rival = tl.max(rivals, 0)
                while rival > least:
                    # Those that it beats move down by one.
                    upper = tl.where(child == 0, rival, tl.gather(best, above, 0))
                    best = tl.maximum(best, tl.minimum(upper, rival))
                    least = tl.max(tl.where(child == W - 1, best, NO_PACKED), 0)
                    rivals = tl.where(rivals == rival, NO_PACKED, rivals)
                    rival = tl.max(rivals, 0)
            start += TILE
        is_token = packed_key(best) >= LEAST_KEY
        tokens = packed_id(best)
        x = as_float32(tl.load(row_ptr + tokens, mask=is_token, other=float("-inf")))
        tail_z = _tail_z(clean(x, has_pos_inf), tokens, t, top, threshold_key, tie_id, last_key, last_id)

    is_token = inside & (packed_key(best) >= LEAST_KEY)
    place = _place(best, packed, WIDTH)
    is_child = (packed != NO_PACKED) & (tl.gather(best, place, 0) == packed) & (place < W)
    is_tail = tail_z > float("-inf")
    first = tl.max(tl.where(is_child & (place == 0), z, float("-inf")), 0)
    first = tl.maximum(first, tl.max(tl.where(child == 0, tail_z, float("-inf")), 0))
    known = tl.load(drawn_logprob_ptr + row)
    tl.store(token_ptr + out, tl.where(is_token, packed_id(best), -1).to(tl.int64), mask=inside)
    perturbed = known + (unordered(packed_key(best)) - first)
    tl.store(perturbed_ptr + out, tl.where(is_token, perturbed, float("-inf")), mask=inside)
    # Children are written by the candidates that they are, the others by their places.
    not_listed = inside & (is_tail | (is_token == 0))
    tl.store(logprob_ptr + out, tl.where(is_tail, known + (tail_z - first), float("-inf")), mask=not_listed)
    tl.store(token_novelty_ptr + out, tl.zeros_like(tail_z), mask=not_listed)
    tl.store(logprob_ptr + row * W + place, known + (z - first), mask=is_child)
    tl.store(token_novelty_ptr + row * W + place, novelty, mask=is_child)


def children_triton(
    token_ids: torch.Tensor,
    chosen: torch.Tensor,
    threshold: torch.Tensor,
    tie_id: torch.Tensor,
    status: torch.Tensor,
    new: torch.Tensor,
    novelty: torch.Tensor,
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    drawn: torch.Tensor,
    drawn_logprob: torch.Tensor,
    drawn_novelty: torch.Tensor,
    config: Config,
    *,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """token_ids int64 [R, width]; logprob, perturbed, novelty float32 [R, width].

    token_ids, chosen, threshold, tie_id, status: of the candidates, [R, C] and [R].  new, novelty: [R, C].
    drawn, drawn_logprob, drawn_novelty: of the rows' draws, [R].
    """
    rows, listed = token_ids.shape
    assert all(t.is_contiguous() for t in (token_ids, chosen, new, novelty))
    result = token_ids.new_empty((rows, width))
    logprob, perturbed, child_novelty = (chosen.new_empty((rows, width)) for _ in range(3))
    padded = power_of_2(width, 16)
    _children_kernel[(rows,)](
        token_ids, chosen, threshold, tie_id, status, new, novelty, logits, logits.stride(0),
        temperature, seed, position, drawn, drawn_logprob, drawn_novelty,
        result, logprob, perturbed, child_novelty, logits.shape[1], listed, width,
        LISTED=max(power_of_2(listed), padded), WIDTH=padded, TILE=min(config.tail_elements, config.beyond_elements),
        num_warps=config.sort_warps, enable_fp_fusion=False, **config.register_bound,
    )  # fmt: skip
    return result, logprob, perturbed, child_novelty
