"""distiller_step: one SGD step per slot, from the activations that the forward kept; gradients never reach memory.

    error   grid (rows)                              loss, g = dL/dpred and dy = dL/dy, clipped by one factor per row
    back    grid (groups, splits of H, tiles of r)   partial dh = dy B' of each split
    gates   grid (rows)                              sum over the splits; h, d_up, d_gate of the row, or its loss is NaN
    settle  grid (groups)                            the verdict: loss, counters, db and b -= rate db, or nothing at all
    update  grid (groups, tiles of H, tiles of r)    tiles of dA, dG, dB, dw, dc, each applied where it was formed

A slot whose loss or gradient is not finite keeps every bit, so the verdict falls before the first weight is written.
It takes row sums: products of finite numbers below LARGEST add up to finite gradients.  (Gradients between 1e30 and
float32's largest are refused as well.)  A gradient is a sum over rows in their group's order; there are no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from esamp_core.kernels.distiller_forward import ROWS, dot, group_of, precision_of, tiles
from esamp_core.kernels.rounding import FLOAT_MAX, stochastic_round
from esamp_core.kernels.tuning import Config, power_of_2

LARGEST = tl.constexpr(1e30)
UP, GATE, DOWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # places in DistillerWeights: they key the rounding


@triton.jit
def taught_rows(order_ptr, active_ptr, at, end, TILE: tl.constexpr, HAS_ACTIVE: tl.constexpr):
    """The rows of order[at : at + TILE] and which of them are in the group and teach."""
    lane = at + tl.arange(0, TILE)
    teach = lane < end
    row = tl.load(order_ptr + lane, mask=teach, other=0).to(tl.int64)
    if HAS_ACTIVE:
        teach = teach & (tl.load(active_ptr + row, mask=teach, other=0) != 0)
    return row, teach


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
def row_error(y_ptr, target_ptr, w_ptr, c_ptr, h, inside, mean, rstd, scale):
    """normed, w, target / s, and the error in units of s, of some hidden units of one row; zeros outside."""
    normed = tl.where(inside, (tl.load(y_ptr + h, mask=inside, other=0.0) - mean) * rstd, 0.0)
    w = tl.load(w_ptr + h, mask=inside, other=0.0)
    deep = tl.load(target_ptr + h, mask=inside, other=0.0).to(tl.float32) / scale
    return normed, w, deep, w * normed + tl.load(c_ptr + h, mask=inside, other=0.0) - deep


@triton.jit
def _error_kernel(
    y_ptr, mean_ptr, rstd_ptr, target_ptr, stride_tr, scale_ptr, w_ptr, c_ptr, active_ptr,
    order_ptr, slots_ptr, offsets_ptr, num_groups, g_ptr, dy_ptr, peak_ptr, loss_ptr, clip,
    H: tl.constexpr, WIDE: tl.constexpr, HAS_ACTIVE: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0)
    if position >= tl.load(offsets_ptr + num_groups):
        return
    row = tl.load(order_ptr + position).to(tl.int64)
    if HAS_ACTIVE:
        if tl.load(active_ptr + row) == 0:
            return
    slot = tl.load(slots_ptr + group_of(position, offsets_ptr, num_groups)).to(tl.int64)
    w_ptr += slot * H
    c_ptr += slot * H
    y_ptr += row * H
    target_ptr += row * stride_tr
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    scale = tl.load(scale_ptr).to(tl.float32)

    energies = tl.zeros((WIDE,), tl.float32)
    squares = tl.zeros((WIDE,), tl.float32)
    for start in range(0, H, WIDE):
        h = start + tl.arange(0, WIDE)
        normed, w, deep, error = row_error(y_ptr, target_ptr, w_ptr, c_ptr, h, h < H, mean, rstd, scale)
        energies += deep * deep
        squares += error * error
    energy = tl.sum(energies, 0)
    tl.store(loss_ptr + row, tl.div_rn(tl.sum(squares, 0), energy))
    per_error = tl.div_rn(energy * 0.0 + H, energy)

    sums = tl.zeros((WIDE,), tl.float32)
    products = tl.zeros((WIDE,), tl.float32)
    squares = tl.zeros((WIDE,), tl.float32)
    for start in range(0, H, WIDE):
        h = start + tl.arange(0, WIDE)
        normed, w, deep, error = row_error(y_ptr, target_ptr, w_ptr, c_ptr, h, h < H, mean, rstd, scale)
        g = error * per_error
        sums += g * w
        products += g * w * normed
        squares += g * g
    mean_d = tl.sum(sums, 0) / H
    mean_product = tl.sum(products, 0) / H
    g_size = tl.sum(squares, 0) / H

    squares = tl.zeros((WIDE,), tl.float32)
    for start in range(0, H, WIDE):
        h = start + tl.arange(0, WIDE)
        normed, w, deep, error = row_error(y_ptr, target_ptr, w_ptr, c_ptr, h, h < H, mean, rstd, scale)
        dy = (error * per_error * w - mean_d - normed * mean_product) * rstd
        squares += tl.where(h < H, dy * dy, 0.0)
    dy_size = tl.sum(squares, 0) / H
    # One factor for the whole row, so that no single row can throw the weights away.  NaN must stay NaN.
    factor = tl.div_rn(clip, tl.sqrt(tl.where(g_size > dy_size, g_size, dy_size)))
    factor = tl.where(factor >= 1.0, 1.0, factor)

    peaks = tl.zeros((WIDE,), tl.float32)
    for start in range(0, H, WIDE):
        h = start + tl.arange(0, WIDE)
        normed, w, deep, error = row_error(y_ptr, target_ptr, w_ptr, c_ptr, h, h < H, mean, rstd, scale)
        g = error * per_error
        dy = (g * w - mean_d - normed * mean_product) * rstd * factor
        peaks = tl.where((tl.abs(dy) > peaks) & (h < H), tl.abs(dy), peaks)
        tl.store(g_ptr + row * H + h, g * factor, mask=h < H)
        tl.store(dy_ptr + row * H + h, dy, mask=h < H)
    tl.store(peak_ptr + row, tl.max(peaks, 0))


@triton.jit
def _back_kernel(
    dy_ptr, down_ptr, active_ptr, order_ptr, slots_ptr, offsets_ptr, part_dh_ptr,
    H: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, HIDDEN: tl.constexpr,
    RANKS: tl.constexpr, TILE: tl.constexpr, HAS_ACTIVE: tl.constexpr, PRECISION: tl.constexpr,
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
        row, teach = taught_rows(order_ptr, active_ptr, at, end, TILE, HAS_ACTIVE)
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


@triton.jit
def _gates_kernel(
    part_dh_ptr, up_ptr, gate_ptr, active_ptr, order_ptr, offsets_ptr, num_groups, peak_ptr,
    feature_ptr, d_up_ptr, d_gate_ptr, loss_ptr,
    RANK: tl.constexpr, SPLITS: tl.constexpr, SPLITS_TILE: tl.constexpr, RANKS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0)
    if position >= tl.load(offsets_ptr + num_groups):
        return
    row = tl.load(order_ptr + position).to(tl.int64)
    if HAS_ACTIVE:
        if tl.load(active_ptr + row) == 0:
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
    row_loss_ptr, d_gate_ptr, active_ptr, order_ptr, slots_ptr, offsets_ptr, share_ptr,
    bias_ptr, velocity_ptr, updates_ptr, loss_ptr, first_loss_ptr, nonfinite_ptr, rate, momentum,
    RANK: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr, HAS_ACTIVE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
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
        row, teach = taught_rows(order_ptr, active_ptr, at, end, TILE, HAS_ACTIVE)
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
                row, teach = taught_rows(order_ptr, active_ptr, at, end, TILE, HAS_ACTIVE)
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
    active_ptr, order_ptr, slots_ptr, offsets_ptr, share_ptr, seed_ptr, updates_ptr,
    up_ptr, gate_ptr, down_ptr, w_ptr, c_ptr, v_up_ptr, v_gate_ptr, v_down_ptr, v_w_ptr, v_c_ptr,
    rate_up, rate_gate, rate_down, rate_w, rate_c, momentum,
    H: tl.constexpr, RANK: tl.constexpr, HIDDEN: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr,
    HAS_ACTIVE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
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
            row, teach = taught_rows(order_ptr, active_ptr, at, end, TILE, HAS_ACTIVE)
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
        row, teach = taught_rows(order_ptr, active_ptr, at, end, TILE, HAS_ACTIVE)
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


def distiller_step_triton(
    weights: tuple[Tensor, ...],
    velocities: tuple[Tensor, ...] | None,
    seed: Tensor,
    updates: Tensor,
    loss: Tensor,
    first_loss: Tensor,
    nonfinite: Tensor,
    saved: tuple[Tensor, ...],
    target: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    scale: Tensor,
    active: Tensor | None,
    rates: tuple[float, ...],
    momentum: float,
    clip: float,
    config: Config,
) -> None:
    """Update weights (as for distiller_forward_triton), velocities (float32, the same shapes) and the [S] columns.

    saved: what distiller_forward_triton returned.  target [R, H] with unit column stride.  active: bool [R] or None.
    rates: six numbers, one per tensor of weights.
    """
    x, row_up, row_gate, y, mean, rstd, _ = saved
    (rows, hidden), rank, num_groups = x.shape, row_up.shape[1], slots.shape[0]
    up, gate, down, bias, norm_weight, norm_bias = weights
    v_up, v_gate, v_down, v_bias, v_weight, v_norm_bias = velocities or (None,) * 6
    columns = (seed, updates, loss, first_loss, nonfinite, order, slots, offsets)
    assert all(t.is_contiguous() for t in (*weights, *(velocities or ()), *columns, *saved))
    assert target.shape == x.shape and (target.stride(1) == 1 or hidden == 1)
    assert active is None or active.is_contiguous()
    if rows == 0:
        return

    def new(*shape: int) -> Tensor:
        return x.new_empty(shape)

    size = tiles(hidden, rank, config)
    splits, ranks = size["splits"], size["ranks"]
    g, dy, peak, row_loss = new(rows, hidden), new(rows, hidden), new(rows), new(rows)
    feature, d_up, d_gate, part_dh = new(rows, rank), new(rows, rank), new(rows, rank), new(rows, splits, rank)
    share = new(num_groups)
    groups = (order, slots, offsets)
    has, has_momentum = {"HAS_ACTIVE": active is not None}, {"HAS_MOMENTUM": velocities is not None}
    matrix: dict[str, object] = {"H": hidden, "RANK": rank, "RANKS": ranks, "TILE": ROWS, "HIDDEN": size["hidden"]}
    matrix["PRECISION"] = precision_of(up)
    launch = {"num_warps": config.distiller_warps, "num_stages": config.distiller_stages, "enable_fp_fusion": True}
    row_launch = {"num_warps": config.distiller_row_warps, "enable_fp_fusion": True}
    _error_kernel[(rows,)](
        y, mean, rstd, target, target.stride(0), scale, norm_weight, norm_bias, active, *groups, num_groups,
        g, dy, peak, row_loss, float(min(clip, 1e38)), H=hidden, WIDE=size["wide"], **has, **row_launch,
    )  # fmt: skip
    _back_kernel[(num_groups, splits, -(-rank // ranks))](
        dy, down, active, *groups, part_dh, SPLIT=size["split"], SPLITS=splits, **matrix, **has, **launch
    )
    _gates_kernel[(rows,)](
        part_dh, row_up, row_gate, active, order, offsets, num_groups, peak, feature, d_up, d_gate, row_loss,
        RANK=rank, SPLITS=splits, SPLITS_TILE=power_of_2(splits), RANKS=ranks, **has, **row_launch,
    )  # fmt: skip
    _settle_kernel[(num_groups,)](
        row_loss, d_gate, active, *groups, share, bias, v_bias, updates, loss, first_loss, nonfinite,
        float(rates[3]), float(momentum), RANK=rank, RANKS=ranks, TILE=ROWS, **has, **has_momentum, **launch,
    )  # fmt: skip
    _update_kernel[(num_groups, -(-hidden // size["hidden"]), -(-rank // ranks))](
        x, y, mean, rstd, g, dy, feature, d_up, d_gate, active, *groups, share, seed, updates,
        up, gate, down, norm_weight, norm_bias, v_up, v_gate, v_down, v_weight, v_norm_bias,
        *(float(rates[i]) for i in (0, 1, 2, 4, 5)), float(momentum), **matrix, **has, **has_momentum, **launch,
    )  # fmt: skip
