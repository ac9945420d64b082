"""distiller_forward: one Distiller per slot, rows grouped by slot, each slot's weights read once per tile of its rows.

    x = shallow / rms(shallow);  y = x + ((x A) * silu(x G + b)) B;  pred = s * (w * LayerNorm(y) + c)

    project   grid (groups, splits of H, tiles of r)   partial shallow A, shallow G and |shallow|^2 of each split
    reduce    grid (rows)                              sums over the splits, divided by the rms: up, gate; rms
    expand    grid (groups, tiles of H)                x, and y = x + (up * silu(gate)) B
    norm      grid (rows)                              mean, rstd and pred

A group is rows order[offsets[g]:offsets[g + 1]] in slot slots[g], -1 if it is unused.  Rows behind the last group have
no slot: `reduce` writes zeros for them.  Tiles and the order of every sum depend on H, r and the weights' dtype only.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from esamp_core.kernels.distiller.scratch import Shape, cut
from esamp_core.kernels.tuning import Config, power_of_2

ROWS = 16  # rows of one tl.dot, whatever the group's size: the instruction it becomes decides the rounding
MOST_SPLITS = 32  # partial sums take splits * R * r * 8 bytes
LAYER_NORM_EPS = tl.constexpr(1e-5)
RMS_FLOOR = tl.constexpr(1e-6)
INDICES = tl.constexpr(256)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a b.  "bf16": bfloat16 operands; "bf16 upcast": their values in float32, for Triton's interpreter."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)
    elif PRECISION == "bf16 upcast":
        a, b = a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32)
        return tl.dot(a, b, sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def group_of(position, offsets_ptr, num_groups):
    """The group whose rows include order[position]."""
    group = position * 0
    start = position * 0
    while start < num_groups:
        i = start + tl.arange(0, INDICES)
        end = tl.load(offsets_ptr + 1 + i, mask=i < num_groups, other=2147483647)
        group += tl.sum((end <= position).to(tl.int32), 0)
        start += INDICES
    return group


@triton.jit
def _project_kernel(
    shallow_ptr, stride_sr, order_ptr, slots_ptr, offsets_ptr, up_ptr, gate_ptr,
    part_up_ptr, part_gate_ptr, part_square_ptr,
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
        lane = at + tl.arange(0, TILE)
        here = lane < end
        row = tl.load(order_ptr + lane, mask=here, other=0).to(tl.int64)
        up = tl.zeros((TILE, RANKS), tl.float32)
        gate = tl.zeros((TILE, RANKS), tl.float32)
        square = tl.zeros((TILE, HIDDEN), tl.float32)
        for start in range(0, SPLIT, HIDDEN):
            h = split * SPLIT + start + tl.arange(0, HIDDEN)
            inside = here[:, None] & (h < H)[None, :]
            x = tl.load(shallow_ptr + row[:, None] * stride_sr + h[None, :], mask=inside, other=0.0).to(tl.float32)
            square += x * x
            place = slot * (H * RANK) + h[:, None] * RANK + j[None, :]
            known = (h < H)[:, None] & (j < RANK)[None, :]
            up = dot(x, tl.load(up_ptr + place, mask=known, other=0.0), up, PRECISION)
            gate = dot(x, tl.load(gate_ptr + place, mask=known, other=0.0), gate, PRECISION)
        part = row * SPLITS + split
        place = part[:, None] * RANK + j[None, :]
        keep = here[:, None] & (j < RANK)[None, :]
        tl.store(part_up_ptr + place, up, mask=keep)
        tl.store(part_gate_ptr + place, gate, mask=keep)
        if tl.program_id(2) == 0:
            tl.store(part_square_ptr + part, tl.sum(square, 1), mask=here)
        at += TILE


@triton.jit(do_not_specialize=["num_groups"])  # it follows R
def _reduce_kernel(
    part_up_ptr, part_gate_ptr, part_square_ptr, bias_ptr, order_ptr, slots_ptr, offsets_ptr, num_groups,
    x_ptr, up_ptr, gate_ptr, y_ptr, mean_ptr, rstd_ptr, pred_ptr, rms_ptr,
    H: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, SPLITS_TILE: tl.constexpr, RANKS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0)
    row = tl.load(order_ptr + position).to(tl.int64)
    if position >= tl.load(offsets_ptr + num_groups):
        for start in range(0, RANK, RANKS):
            j = start + tl.arange(0, RANKS)
            tl.store(up_ptr + row * RANK + j, tl.zeros((RANKS,), tl.float32), mask=j < RANK)
            tl.store(gate_ptr + row * RANK + j, tl.zeros((RANKS,), tl.float32), mask=j < RANK)
        for start in range(0, H, WIDE):
            h = start + tl.arange(0, WIDE)
            tl.store(x_ptr + row * H + h, tl.zeros((WIDE,), tl.float32), mask=h < H)
            tl.store(y_ptr + row * H + h, tl.zeros((WIDE,), tl.float32), mask=h < H)
            tl.store(pred_ptr + row * H + h, tl.zeros((WIDE,), tl.float32), mask=h < H)
        tl.store(mean_ptr + row, 0.0)
        tl.store(rstd_ptr + row, 0.0)
        return
    slot = tl.load(slots_ptr + group_of(position, offsets_ptr, num_groups)).to(tl.int64)
    split = tl.arange(0, SPLITS_TILE)
    square = tl.sum(tl.load(part_square_ptr + row * SPLITS + split, mask=split < SPLITS, other=0.0), 0)
    rms = tl.sqrt(square / H)
    rms = tl.where(rms < RMS_FLOOR, RMS_FLOOR, rms)
    tl.store(rms_ptr + row, rms)
    for start in range(0, RANK, RANKS):
        j = start + tl.arange(0, RANKS)
        place = (row * SPLITS + split)[:, None] * RANK + j[None, :]
        known = (split < SPLITS)[:, None] & (j < RANK)[None, :]
        up = tl.sum(tl.load(part_up_ptr + place, mask=known, other=0.0), 0) / rms
        gate = tl.sum(tl.load(part_gate_ptr + place, mask=known, other=0.0), 0) / rms
        gate += tl.load(bias_ptr + slot * RANK + j, mask=j < RANK, other=0.0)
        tl.store(up_ptr + row * RANK + j, up, mask=j < RANK)
        tl.store(gate_ptr + row * RANK + j, gate, mask=j < RANK)


@triton.jit
def _expand_kernel(
    shallow_ptr, stride_sr, rms_ptr, up_ptr, gate_ptr, down_ptr, order_ptr, slots_ptr, offsets_ptr, x_ptr, y_ptr,
    H: tl.constexpr, RANK: tl.constexpr, HIDDEN: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    slot = tl.load(slots_ptr + group).to(tl.int64)
    if slot < 0:
        return
    h = tl.program_id(1) * HIDDEN + tl.arange(0, HIDDEN)
    at = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    while at < end:
        lane = at + tl.arange(0, TILE)
        here = lane < end
        row = tl.load(order_ptr + lane, mask=here, other=0).to(tl.int64)
        rms = tl.load(rms_ptr + row, mask=here, other=1.0)
        inside = here[:, None] & (h < H)[None, :]
        x = tl.load(shallow_ptr + row[:, None] * stride_sr + h[None, :], mask=inside, other=0.0).to(tl.float32)
        change = tl.zeros((TILE, HIDDEN), tl.float32)
        for start in range(0, RANK, RANKS):
            j = start + tl.arange(0, RANKS)
            place = row[:, None] * RANK + j[None, :]
            known = here[:, None] & (j < RANK)[None, :]
            up = tl.load(up_ptr + place, mask=known, other=0.0)
            gate = tl.load(gate_ptr + place, mask=known, other=0.0)
            place = slot * (H * RANK) + j[:, None] * H + h[None, :]
            down = tl.load(down_ptr + place, mask=(j < RANK)[:, None] & (h < H)[None, :], other=0.0)
            change = dot(up * gate * tl.sigmoid(gate), down, change, PRECISION)
        x = x / rms[:, None]
        place = row[:, None] * H + h[None, :]
        tl.store(x_ptr + place, x, mask=inside)
        tl.store(y_ptr + place, x + change, mask=inside)
        at += TILE


@triton.jit
def layer_norm_statistics(y_ptr, row, mean_ptr, rstd_ptr, H: tl.constexpr, WIDE: tl.constexpr):
    """mean and rstd of a row of y, kept too."""
    sums = tl.zeros((WIDE,), tl.float32)
    for start in range(0, H, WIDE):
        h = start + tl.arange(0, WIDE)
        sums += tl.load(y_ptr + row * H + h, mask=h < H, other=0.0)
    mean = tl.sum(sums, 0) / H
    sums = tl.zeros((WIDE,), tl.float32)
    for start in range(0, H, WIDE):
        h = start + tl.arange(0, WIDE)
        off = tl.where(h < H, tl.load(y_ptr + row * H + h, mask=h < H, other=0.0) - mean, 0.0)
        sums += off * off
    rstd = 1.0 / tl.sqrt(tl.sum(sums, 0) / H + LAYER_NORM_EPS)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    return mean, rstd


@triton.jit
def prediction(y_ptr, norm_weight_ptr, norm_bias_ptr, row, slot, h, mean, rstd, scale, H: tl.constexpr):
    """pred at the hidden units h of a row: scale * (w * LayerNorm(y) + c)."""
    normed = (tl.load(y_ptr + row * H + h, mask=h < H, other=0.0) - mean) * rstd
    w = tl.load(norm_weight_ptr + slot * H + h, mask=h < H, other=0.0)
    c = tl.load(norm_bias_ptr + slot * H + h, mask=h < H, other=0.0)
    return scale * (w * normed + c)


@triton.jit(do_not_specialize=["num_groups"])
def _norm_kernel(
    y_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr, order_ptr, slots_ptr, offsets_ptr, num_groups,
    mean_ptr, rstd_ptr, pred_ptr,
    H: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0)
    if position >= tl.load(offsets_ptr + num_groups):
        return
    row = tl.load(order_ptr + position).to(tl.int64)
    slot = tl.load(slots_ptr + group_of(position, offsets_ptr, num_groups)).to(tl.int64)
    scale = tl.load(scale_ptr).to(tl.float32)
    mean, rstd = layer_norm_statistics(y_ptr, row, mean_ptr, rstd_ptr, H, WIDE)
    for start in range(0, H, WIDE):
        h = start + tl.arange(0, WIDE)
        pred = prediction(y_ptr, norm_weight_ptr, norm_bias_ptr, row, slot, h, mean, rstd, scale, H)
        tl.store(pred_ptr + row * H + h, pred, mask=h < H)


def precision_of(weights: Tensor) -> str:
    """How tl.dot multiplies: float32 to float32's accuracy, on tensor cores; bfloat16 weights with bf16 operands."""
    if weights.dtype == torch.bfloat16:
        return "bf16 upcast" if weights.device.type == "cpu" else "bf16"
    backend = triton.runtime.driver.active.get_current_target().backend if weights.device.type != "cpu" else "cpu"
    return "tf32x3" if backend == "cuda" else "ieee"


def tiles(hidden: int, rank: int, config: Config) -> dict[str, int]:
    """What every kernel over (groups, H) shares: HIDDEN x RANKS of a matrix at a time, SPLIT hidden units a program."""
    split = max(config.distiller_split, power_of_2(-(-hidden // MOST_SPLITS)))
    split = min(split, power_of_2(hidden, 16))
    return {
        "split": split,
        "splits": -(-hidden // split),
        "hidden": min(config.distiller_hidden, split),
        "ranks": min(config.distiller_ranks, power_of_2(rank, 16)),
        "wide": min(config.distiller_wide, power_of_2(hidden, 16)),
    }


def forward_scratch(rows: int, hidden: int, rank: int, config: Config) -> tuple[Shape, ...]:
    """Partial sums of up, gate and |shallow|^2; rms."""
    splits = tiles(hidden, rank, config)["splits"]
    return (rows, splits, rank), (rows, splits, rank), (rows, splits), (rows,)


def distiller_forward_triton(
    shallow: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    scale: Tensor,
    out: Sequence[Tensor],
    scratch: Tensor,
    config: Config,
    norm: bool = True,
) -> None:
    """Write float32 x [R, H], up [R, r], gate [R, r], y [R, H], mean [R], rstd [R], pred [R, H] into out; without norm
    not the last three of rows in a group, which mix or distiller_norm_triton writes.

    shallow [R, H] with unit column stride; order [R], slots [G], offsets [G + 1] int32; weights A, G [S, H, r],
    B [S, r, H] of one dtype, b [S, r], w, c [S, H] float32, all contiguous, out too; scale 0-d; scratch: float32 [N],
    room for forward_scratch.
    """
    rows, hidden = shallow.shape
    up, gate, down, bias = weights[:4]
    rank, num_groups = up.shape[2], slots.shape[0]
    assert all(t.is_contiguous() for t in (*weights, order, slots, offsets)) and up.dtype == gate.dtype == down.dtype
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in out)
    assert shallow.stride(1) == 1 or hidden == 1
    x, row_up, row_gate, y, _, _, pred = out
    assert x.shape == y.shape == pred.shape == (rows, hidden) and row_up.shape == row_gate.shape == (rows, rank)
    if rows == 0:
        return
    size = tiles(hidden, rank, config)
    splits = size["splits"]
    part_up, part_gate, part_square, rms = cut(scratch, forward_scratch(rows, hidden, rank, config))
    groups = (order, slots, offsets)
    shape = {"H": hidden, "RANK": rank, "RANKS": size["ranks"]}
    matrix = {"HIDDEN": size["hidden"], "TILE": ROWS, "PRECISION": precision_of(up)}
    launch = {"num_warps": config.distiller_warps, "num_stages": config.distiller_stages, "enable_fp_fusion": True}
    row_launch = {"num_warps": config.distiller_row_warps, "enable_fp_fusion": True}

    _project_kernel[(num_groups, splits, -(-rank // size["ranks"]))](
        shallow, shallow.stride(0), *groups, up, gate, part_up, part_gate, part_square,
        SPLIT=size["split"], SPLITS=splits, **shape, **matrix, **launch,
    )  # fmt: skip
    _reduce_kernel[(rows,)](
        part_up, part_gate, part_square, bias, *groups, num_groups, *out, rms,
        SPLITS=splits, SPLITS_TILE=power_of_2(splits), WIDE=size["wide"], **shape, **row_launch,
    )  # fmt: skip
    _expand_kernel[(num_groups, -(-hidden // size["hidden"]))](
        shallow, shallow.stride(0), rms, row_up, row_gate, down, *groups, x, y, **shape, **matrix, **launch
    )
    if norm:
        distiller_norm_triton(order, slots, offsets, weights, scale, out, config)


def distiller_norm_triton(
    order: Tensor, slots: Tensor, offsets: Tensor, weights: Sequence[Tensor], scale: Tensor, out: Sequence[Tensor],
    config: Config,
) -> None:  # fmt: skip
    """Write mean [R], rstd [R] and pred [R, H] of rows in a group into out, from its y."""
    y, mean, rstd, pred = out[3:]
    rows, hidden = y.shape
    if rows == 0:
        return
    wide = tiles(hidden, weights[0].shape[2], config)["wide"]
    _norm_kernel[(rows,)](
        y, weights[4], weights[5], scale, order, slots, offsets, slots.shape[0], mean, rstd, pred,
        H=hidden, WIDE=wide, num_warps=config.distiller_row_warps, enable_fp_fusion=True,
    )  # fmt: skip
