"""distiller_step: one SGD step per slot, from the activations that the forward kept; gradients never reach memory.

    error   grid (rows)                              loss, g = dL/dpred and dy = dL/dy, clipped; whether the row teaches
    back    grid (groups, splits of H, tiles of r)   partial dh = dy B' of each split
    gates   grid (rows)                              sum over the splits; h, d_up, d_gate of the row, or its loss is NaN
    settle  grid (groups)                            decides: loss, counters, db and b -= rate db, or nothing
    update  grid (groups, tiles of H, tiles of r)    tiles of dA, dG, dB, dw, dc, each applied where it was formed

A slot whose loss or gradient is not finite keeps every bit, so that is decided before the first weight is written.
It takes row sums: products of finite numbers below LARGEST add up to finite gradients.  (Gradients between 1e30 and
float32's largest are refused as well.)  A gradient is a sum over rows in their group's order; there are no atomics.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from esamp_core.kernels.distiller.error import error_triton
from esamp_core.kernels.distiller.forward import ROWS, dot, precision_of, tiles
from esamp_core.kernels.distiller.rounding import FLOAT_MAX, stochastic_round
from esamp_core.kernels.distiller.scratch import Shape, cut
from esamp_core.kernels.tuning import Config, power_of_2

LARGEST = tl.constexpr(1e30)
UP, GATE, DOWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # places in DistillerWeights: they key the rounding


@triton.jit
def taught_rows(order_ptr, teach_ptr, at, end, TILE: tl.constexpr):
    """The rows of order[at : at + TILE] and which of them are in the group and teach."""
    lane = at + tl.arange(0, TILE)
    teach = lane < end
    row = tl.load(order_ptr + lane, mask=teach, other=0).to(tl.int64)
    return row, teach & (tl.load(teach_ptr + row, mask=teach, other=0.0) != 0.0)


@triton.jit
def descend(weight_ptr, velocity_ptr, place, mask, grad, rate, momentum, HAS_MOMENTUM: tl.constexpr):
    """The weights at `place` after one step, in float32; the caller writes them, the velocity is written here."""
    if HAS_MOMENTUM:
        grad = momentum * tl.load(velocity_ptr + place, mask=mask, other=0.0) + grad
        tl.store(velocity_ptr + place, grad, mask=mask)
    return tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32) - rate * grad


@triton.jit
def step_matrix(
    weight_ptr, velocity_ptr, slot, first, inside, grad, rate, momentum, tensor_index, seed, update,
    SIZE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Apply a tile of one matrix's gradient; first: element number of each of its rows."""
    place = slot * SIZE + first[:, None] + tl.arange(0, grad.shape[1])[None, :]
    new = descend(weight_ptr, velocity_ptr, place, inside, grad, rate, momentum, HAS_MOMENTUM)
    if weight_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(weight_ptr + place, stochastic_round(new, first, tensor_index, seed, update, ALIGNED), mask=inside)
    else:
        tl.store(weight_ptr + place, new, mask=inside)


@triton.jit
def _back_kernel(
    dy_ptr, down_ptr, teach_ptr, order_ptr, slots_ptr, offsets_ptr, part_dh_ptr,
    H: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, HIDDEN: tl.constexpr,
    RANKS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    split = tl.program_id(1)
    slot = tl.load(slots_ptr + group).to(tl.int64)
    if slot < 0:
        return
    j = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    at = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    while at < end:
        row, teach = taught_rows(order_ptr, teach_ptr, at, end, TILE)
        dh = tl.zeros((TILE, RANKS), tl.float32)
        for start in range(0, SPLIT, HIDDEN):
            h = split * SPLIT + start + tl.arange(0, HIDDEN)
            dy = tl.load(dy_ptr + row[:, None] * H + h[None, :], mask=teach[:, None] & (h < H)[None, :], other=0.0)
            place = slot * (H * RANK) + j[:, None] * H + h[None, :]
            down = tl.load(down_ptr + place, mask=(j < RANK)[:, None] & (h < H)[None, :], other=0.0)
            dh = dot(dy, tl.trans(down), dh, PRECISION)
        place = (row * SPLITS + split)[:, None] * RANK + j[None, :]
        tl.store(part_dh_ptr + place, dh, mask=teach[:, None] & (j < RANK)[None, :])
        at += TILE


@triton.jit(do_not_specialize=["num_groups"])  # it follows R
def _gates_kernel(
    part_dh_ptr, up_ptr, gate_ptr, teach_ptr, order_ptr, offsets_ptr, num_groups, peak_ptr,
    feature_ptr, d_up_ptr, d_gate_ptr, loss_ptr,
    RANK: tl.constexpr, SPLITS: tl.constexpr, SPLITS_TILE: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0)
    if position >= tl.load(offsets_ptr + num_groups):
        return
    row = tl.load(order_ptr + position).to(tl.int64)
    if tl.load(teach_ptr + row) == 0.0:
        return
    split = tl.arange(0, SPLITS_TILE)
    peak = tl.load(peak_ptr + row)
    bad = tl.zeros((RANKS,), tl.int32)
    for start in range(0, RANK, RANKS):
        j = start + tl.arange(0, RANKS)
        place = (row * SPLITS + split)[:, None] * RANK + j[None, :]
        known = (split < SPLITS)[:, None] & (j < RANK)[None, :]
        dh = tl.sum(tl.load(part_dh_ptr + place, mask=known, other=0.0), 0)
        up = tl.load(up_ptr + row * RANK + j, mask=j < RANK, other=0.0)
        gate = tl.load(gate_ptr + row * RANK + j, mask=j < RANK, other=0.0)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        d_up = dh * silu
        d_gate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
        feature = up * silu
        good = (tl.abs(d_up) < LARGEST) & (tl.abs(d_gate) < LARGEST) & (tl.abs(feature) < LARGEST)
        bad += 1 - (good & (tl.abs(feature) * peak < LARGEST)).to(tl.int32)
        tl.store(feature_ptr + row * RANK + j, feature, mask=j < RANK)
        tl.store(d_up_ptr + row * RANK + j, d_up, mask=j < RANK)
        tl.store(d_gate_ptr + row * RANK + j, d_gate, mask=j < RANK)
    if tl.sum(bad, 0) > 0:
        tl.store(loss_ptr + row, float("nan"))


@triton.jit
def _settle_kernel(
    row_loss_ptr, d_gate_ptr, teach_ptr, order_ptr, slots_ptr, offsets_ptr, share_ptr,
    bias_ptr, velocity_ptr, updates_ptr, loss_ptr, first_loss_ptr, nonfinite_ptr, rate, momentum,
    RANK: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    slot = tl.load(slots_ptr + group).to(tl.int64)
    tl.store(share_ptr + group, 0.0)  # nothing to update, until all is known to be finite
    if slot < 0:
        return
    first = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    counts = tl.zeros((TILE,), tl.int32)
    losses = tl.zeros((TILE,), tl.float32)
    at = first
    while at < end:
        row, teach = taught_rows(order_ptr, teach_ptr, at, end, TILE)
        counts += teach.to(tl.int32)
        losses += tl.load(row_loss_ptr + row, mask=teach, other=0.0)
        at += TILE
    count = tl.sum(counts, 0)
    if count == 0:
        return
    loss = tl.div_rn(tl.sum(losses, 0), count.to(tl.float32))
    if (loss <= FLOAT_MAX) & (loss >= 0.0):
        share = tl.div_rn(loss * 0.0 + 1.0, count.to(tl.float32))
        tl.store(share_ptr + group, share)
        updates = tl.load(updates_ptr + slot)
        tl.store(updates_ptr + slot, updates + 1)
        tl.store(loss_ptr + slot, loss)
        if updates == 0:
            tl.store(first_loss_ptr + slot, loss)
        for start in range(0, RANK, RANKS):
            j = start + tl.arange(0, RANKS)
            sums = tl.zeros((RANKS,), tl.float32)
            at = first
            while at < end:
                row, teach = taught_rows(order_ptr, teach_ptr, at, end, TILE)
                known = teach[:, None] & (j < RANK)[None, :]
                sums += tl.sum(tl.load(d_gate_ptr + row[:, None] * RANK + j[None, :], mask=known, other=0.0), 0)
                at += TILE
            place = slot * RANK + j
            new = descend(bias_ptr, velocity_ptr, place, j < RANK, sums * share, rate, momentum, HAS_MOMENTUM)
            tl.store(bias_ptr + place, new, mask=j < RANK)
    else:
        tl.store(nonfinite_ptr + slot, tl.load(nonfinite_ptr + slot) + 1)


@triton.jit
def _update_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, g_ptr, dy_ptr, feature_ptr, d_up_ptr, d_gate_ptr,
    teach_ptr, order_ptr, slots_ptr, offsets_ptr, share_ptr, seed_ptr, updates_ptr,
    up_ptr, gate_ptr, down_ptr, w_ptr, c_ptr, v_up_ptr, v_gate_ptr, v_down_ptr, v_w_ptr, v_c_ptr,
    rate_up, rate_gate, rate_down, rate_w, rate_c, momentum,
    H: tl.constexpr, RANK: tl.constexpr, HIDDEN: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    share = tl.load(share_ptr + group)
    if share == 0.0:
        return
    slot = tl.load(slots_ptr + group).to(tl.int64)
    seed = tl.load(seed_ptr + slot)
    update = tl.load(updates_ptr + slot) - 1  # the number of this step: settle has counted it already
    first = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    first_h = tl.program_id(1) * HIDDEN
    h = first_h + tl.arange(0, HIDDEN)

    if tl.program_id(2) == 0:
        d_w = tl.zeros((HIDDEN,), tl.float32)
        d_c = tl.zeros((HIDDEN,), tl.float32)
        at = first
        while at < end:
            row, teach = taught_rows(order_ptr, teach_ptr, at, end, TILE)
            inside = teach[:, None] & (h < H)[None, :]
            mean = tl.load(mean_ptr + row, mask=teach, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=teach, other=0.0)
            place = row[:, None] * H + h[None, :]
            y = tl.load(y_ptr + place, mask=inside, other=0.0)
            g = tl.load(g_ptr + place, mask=inside, other=0.0)
            d_w += tl.sum(g * ((y - mean[:, None]) * rstd[:, None]), 0)
            d_c += tl.sum(g, 0)
            at += TILE
        unit = slot * H + h
        w = descend(w_ptr, v_w_ptr, unit, h < H, d_w * share, rate_w, momentum, HAS_MOMENTUM)
        tl.store(w_ptr + unit, w, mask=h < H)
        c = descend(c_ptr, v_c_ptr, unit, h < H, d_c * share, rate_c, momentum, HAS_MOMENTUM)
        tl.store(c_ptr + unit, c, mask=h < H)

    first_j = tl.program_id(2) * RANKS
    j = first_j + tl.arange(0, RANKS)
    d_up = tl.zeros((HIDDEN, RANKS), tl.float32)
    d_gate = tl.zeros((HIDDEN, RANKS), tl.float32)
    d_down = tl.zeros((RANKS, HIDDEN), tl.float32)
    at = first
    while at < end:
        row, teach = taught_rows(order_ptr, teach_ptr, at, end, TILE)
        place = row[:, None] * H + h[None, :]
        inside = teach[:, None] & (h < H)[None, :]
        x = tl.trans(tl.load(x_ptr + place, mask=inside, other=0.0))
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0)
        place = row[:, None] * RANK + j[None, :]
        inside = teach[:, None] & (j < RANK)[None, :]
        d_up = dot(x, tl.load(d_up_ptr + place, mask=inside, other=0.0), d_up, PRECISION)
        d_gate = dot(x, tl.load(d_gate_ptr + place, mask=inside, other=0.0), d_gate, PRECISION)
        feature = tl.trans(tl.load(feature_ptr + place, mask=inside, other=0.0))
        d_down = dot(feature, dy, d_down, PRECISION)
        at += TILE
    inside = (h < H)[:, None] & (j < RANK)[None, :]
    step_matrix(
        up_ptr, v_up_ptr, slot, h * RANK + first_j, inside, d_up * share, rate_up, momentum, UP, seed, update,
        H * RANK, HAS_MOMENTUM, RANK % 4 == 0,
    )  # fmt: skip
    step_matrix(
        gate_ptr, v_gate_ptr, slot, h * RANK + first_j, inside, d_gate * share, rate_gate, momentum, GATE, seed, update,
        H * RANK, HAS_MOMENTUM, RANK % 4 == 0,
    )  # fmt: skip
    inside = (j < RANK)[:, None] & (h < H)[None, :]
    step_matrix(
        down_ptr, v_down_ptr, slot, j * H + first_h, inside, d_down * share, rate_down, momentum, DOWN, seed, update,
        H * RANK, HAS_MOMENTUM, H % 4 == 0,
    )  # fmt: skip


def step_scratch(rows: int, groups: int, hidden: int, rank: int, config: Config) -> tuple[Shape, ...]:
    """g, dy; peak, loss and whether it teaches, of each row; feature, d_up, d_gate; partial dh; share of each group."""
    wide, narrow, column = (rows, hidden), (rows, rank), (rows,)
    part = (rows, tiles(hidden, rank, config)["splits"], rank)
    return wide, wide, column, column, column, narrow, narrow, narrow, part, (groups,)


def distiller_step_triton(
    weights: Sequence[Tensor],
    velocities: Sequence[Tensor],
    seed: Tensor,
    columns: Sequence[Tensor],
    saved: Sequence[Tensor],
    target: Tensor,
    token_ids: Tensor | None,
    center: Tensor | None,
    head_scale: float,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    scale: Tensor,
    active: Tensor | None,
    rates: Sequence[float],
    momentum: float,
    clip: float,
    scratch: Tensor,
    config: Config,
) -> None:
    """Update weights (as for distiller_forward_triton), velocities (float32, the same shapes; or none) and columns:
    updates int64 [S], loss, first_loss float32 [S], nonfinite int64 [S].  seed: int64 [S], keys the rounding.

    saved: what distiller_forward_triton wrote.  target, token_ids, center, head_scale, active: as for error_triton.
    rates: six numbers, one per tensor of weights.  scratch: float32 [N], room for step_scratch.
    """
    x, row_up, row_gate, y, mean, rstd, _ = saved
    (rows, hidden), rank, num_groups = x.shape, row_up.shape[1], slots.shape[0]
    up, gate, down, bias, norm_weight, norm_bias = weights
    v_up, v_gate, v_down, v_bias, v_weight, v_norm_bias = velocities or (None,) * 6
    updates, loss, first_loss, nonfinite = columns
    assert all(t.is_contiguous() for t in (*weights, *velocities, seed, *columns, *saved, order, slots, offsets))
    if rows == 0:
        return

    size = tiles(hidden, rank, config)
    splits, ranks = size["splits"], size["ranks"]
    pieces = cut(scratch, step_scratch(rows, num_groups, hidden, rank, config))
    g, dy, peak, row_loss, teach, feature, d_up, d_gate, part_dh, share = pieces
    groups = (order, slots, offsets)
    has_momentum = {"HAS_MOMENTUM": len(velocities) > 0}
    matrix: dict[str, object] = {"H": hidden, "RANK": rank, "RANKS": ranks, "TILE": ROWS, "HIDDEN": size["hidden"]}
    matrix["PRECISION"] = precision_of(up)
    launch = {"num_warps": config.distiller_warps, "num_stages": config.distiller_stages, "enable_fp_fusion": True}
    row_launch = {"num_warps": config.distiller_row_warps, "enable_fp_fusion": True}
    error_triton(
        y, mean, rstd, target, token_ids, center, head_scale, scale, norm_weight, norm_bias, active, *groups,
        (g, dy, peak, row_loss, teach), clip, config,
    )  # fmt: skip
    _back_kernel[(num_groups, splits, -(-rank // ranks))](
        dy, down, teach, *groups, part_dh, SPLIT=size["split"], SPLITS=splits, **matrix, **launch
    )
    _gates_kernel[(rows,)](
        part_dh, row_up, row_gate, teach, order, offsets, num_groups, peak, feature, d_up, d_gate, row_loss,
        RANK=rank, SPLITS=splits, SPLITS_TILE=power_of_2(splits), RANKS=ranks, **row_launch,
    )  # fmt: skip
    _settle_kernel[(num_groups,)](
        row_loss, d_gate, teach, *groups, share, bias, v_bias, updates, loss, first_loss, nonfinite,
        float(rates[3]), float(momentum), RANK=rank, RANKS=ranks, TILE=ROWS, **has_momentum, **launch,
    )  # fmt: skip
    _update_kernel[(num_groups, -(-hidden // size["hidden"]), -(-rank // ranks))](
        x, y, mean, rstd, g, dy, feature, d_up, d_gate, teach, *groups, share, seed, updates,
        up, gate, down, norm_weight, norm_bias, v_up, v_gate, v_down, v_weight, v_norm_bias,
        *(float(rates[i]) for i in (0, 1, 2, 4, 5)), float(momentum), **matrix, **has_momentum, **launch,
    )  # fmt: skip
