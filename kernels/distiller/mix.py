"""mix: the Distiller's LayerNorm, and its prediction mixed into the deep hidden states, in one launch.

    hidden = (1 + beta) * deep - beta * scale * (w * LayerNorm(y) + c)

One program per row, in the groups of `forward`.  What is not mixed is copied bit for bit: rows with beta 0, in no group
or switched off, and rows whose mixed state is not finite, which are flagged.  mean and rstd are kept for the step.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from esamp_core.kernels.distiller.forward import group_of, layer_norm_statistics, prediction, tiles
from esamp_core.kernels.distiller.rounding import FLOAT_MAX
from esamp_core.kernels.tuning import Config

NONFINITE_NOVELTY = tl.constexpr(32)  # of base.tensors.Status


@triton.jit
def copy_row(deep_ptr, stride_dr, out_ptr, stride_or, row, H: tl.constexpr, WIDE: tl.constexpr):
    for start in range(0, H, WIDE):
        h = start + tl.arange(0, WIDE)
        deep = tl.load(deep_ptr + row * stride_dr + h, mask=h < H)
        tl.store(out_ptr + row * stride_or + h, deep, mask=h < H)


@triton.jit(do_not_specialize=["num_groups"])
def _mix_kernel(
    deep_ptr, stride_dr, y_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr, beta_ptr, active_ptr,
    order_ptr, slots_ptr, offsets_ptr, num_groups, mean_ptr, rstd_ptr, out_ptr, stride_or, status_ptr,
    H: tl.constexpr, WIDE: tl.constexpr, HAS_ACTIVE: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0)
    row = tl.load(order_ptr + position).to(tl.int64)
    beta = tl.load(beta_ptr + row).to(tl.float32)
    explores = beta != 0.0
    if HAS_ACTIVE:
        explores &= tl.load(active_ptr + row) != 0
    if position < tl.load(offsets_ptr + num_groups):
        mean, rstd = layer_norm_statistics(y_ptr, row, mean_ptr, rstd_ptr, H, WIDE)
        if explores:
            slot = tl.load(slots_ptr + group_of(position, offsets_ptr, num_groups)).to(tl.int64)
            scale = tl.load(scale_ptr).to(tl.float32)
            bad = position * 0  # hidden units that are not finite
            for start in range(0, H, WIDE):
                h = start + tl.arange(0, WIDE)
                deep = tl.load(deep_ptr + row * stride_dr + h, mask=h < H, other=0.0).to(tl.float32)
                pred = prediction(y_ptr, norm_weight_ptr, norm_bias_ptr, row, slot, h, mean, rstd, scale, H)
                mixed = ((1.0 + beta) * deep - beta * pred).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + row * stride_or + h, mixed, mask=h < H)
                finite = tl.abs(mixed.to(tl.float32)) <= FLOAT_MAX  # what left its dtype is inf in it
                bad += tl.sum(((h < H) & (finite == 0)).to(tl.int32), 0)
            if bad > 0:
                tl.store(status_ptr + row, tl.load(status_ptr + row) | NONFINITE_NOVELTY)
                copy_row(deep_ptr, stride_dr, out_ptr, stride_or, row, H, WIDE)
        else:
            copy_row(deep_ptr, stride_dr, out_ptr, stride_or, row, H, WIDE)
    else:
        copy_row(deep_ptr, stride_dr, out_ptr, stride_or, row, H, WIDE)


def mix_triton(
    deep: Tensor, y: Tensor, norm_weight: Tensor, norm_bias: Tensor, scale: Tensor, beta: Tensor, active: Tensor | None,
    groups: Sequence[Tensor], mean: Tensor, rstd: Tensor, out: Tensor, status: Tensor, rank: int, config: Config,
) -> None:  # fmt: skip
    """Write out [R, H], and mean [R] and rstd [R] of rows in a group; add flags to status int32 [R].

    deep, out: [R, H] of one dtype with unit column stride, in different memory; y float32 [R, H], w, c float32 [S, H]
    contiguous; scale 0-d; beta float32 [R]; active bool [R] or None; groups: order [R], slots [G], offsets [G + 1]
    int32; rank: the Distiller's, which decides the tiles.
    """
    rows, hidden = deep.shape
    assert y.shape == out.shape == deep.shape and y.dtype == torch.float32 and out.dtype == deep.dtype
    assert all(t.is_contiguous() for t in (y, norm_weight, norm_bias, beta, status, *groups))
    assert deep.stride(1) == out.stride(1) == 1 or hidden == 1
    if rows == 0:
        return
    order, slots, offsets = groups
    _mix_kernel[(rows,)](
        deep, deep.stride(0), y, norm_weight, norm_bias, scale, beta, active, order, slots, offsets, slots.shape[0],
        mean, rstd, out, out.stride(0), status,
        H=hidden, WIDE=tiles(hidden, rank, config)["wide"], HAS_ACTIVE=active is not None,
        num_warps=config.distiller_row_warps, enable_fp_fusion=True,
    )  # fmt: skip
