"""error: each row's loss and error gradient, clipped; the first launch of distiller_step.

    error  = w * normed + c - target / s          target: a row of numbers, or (W[token] - center) * head_scale
    loss   = |error|^2 / |target / s|^2
    g, dy  = d(H/2 loss) / d(pred / s), d(H/2 loss) / dy, both times one factor per row that bounds their rms by clip

Grid (rows).  A row teaches if it is active and, where tokens teach, its token is one of the head's: what says so is
written for the launches behind.  Head rows are read where they lie, in their own dtype; no [R, H] copy is made.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from esamp_core.kernels.distiller.forward import group_of, tiles
from esamp_core.kernels.tuning import Config


@triton.jit
def row_error(
    y_ptr, target_ptr, stride_th, center_ptr, head_scale, w_ptr, c_ptr, h, inside, mean, rstd, scale,
    HAS_TOKENS: tl.constexpr, HAS_CENTER: tl.constexpr,
):  # fmt: skip
    """normed, w, target / s, and the error in units of s, of some hidden units of one row; zeros outside."""
    normed = tl.where(inside, (tl.load(y_ptr + h, mask=inside, other=0.0) - mean) * rstd, 0.0)
    w = tl.load(w_ptr + h, mask=inside, other=0.0)
    target = tl.load(target_ptr + h * stride_th, mask=inside, other=0.0).to(tl.float32)
    if HAS_CENTER:
        target -= tl.load(center_ptr + h, mask=inside, other=0.0).to(tl.float32)
    if HAS_TOKENS:
        target = target * head_scale
    target = target / scale
    return normed, w, target, w * normed + tl.load(c_ptr + h, mask=inside, other=0.0) - target


@triton.jit(do_not_specialize=["num_groups"])  # it follows R
def _error_kernel(
    y_ptr, mean_ptr, rstd_ptr, target_ptr, stride_tr, stride_th, token_ptr, vocab, center_ptr, head_scale, scale_ptr,
    w_ptr, c_ptr, active_ptr, order_ptr, slots_ptr, offsets_ptr, num_groups,
    g_ptr, dy_ptr, peak_ptr, loss_ptr, teach_ptr, clip,
    H: tl.constexpr, WIDE: tl.constexpr, HAS_ACTIVE: tl.constexpr, HAS_TOKENS: tl.constexpr, HAS_CENTER: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0)
    if position >= tl.load(offsets_ptr + num_groups):
        return
    row = tl.load(order_ptr + position).to(tl.int64)
    teach = position * 0 + 1
    target_row = row
    if HAS_TOKENS:
        target_row = tl.load(token_ptr + row)
        teach = ((target_row >= 0) & (target_row < vocab)).to(tl.int32)
    if HAS_ACTIVE:
        teach = teach * (tl.load(active_ptr + row) != 0).to(tl.int32)
    tl.store(teach_ptr + row, teach.to(tl.float32))
    if teach == 0:
        return
    slot = tl.load(slots_ptr + group_of(position, offsets_ptr, num_groups)).to(tl.int64)
    w_ptr += slot * H
    c_ptr += slot * H
    y_ptr += row * H
    target_ptr += target_row * stride_tr
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    scale = tl.load(scale_ptr).to(tl.float32)

    energies = tl.zeros((WIDE,), tl.float32)
    squares = tl.zeros((WIDE,), tl.float32)
    for start in range(0, H, WIDE):
        h = start + tl.arange(0, WIDE)
        normed, w, target, error = row_error(
            y_ptr, target_ptr, stride_th, center_ptr, head_scale, w_ptr, c_ptr, h, h < H, mean, rstd, scale,
            HAS_TOKENS, HAS_CENTER,
        )  # fmt: skip
        energies += target * target
        squares += error * error
    energy = tl.sum(energies, 0)
    tl.store(loss_ptr + row, tl.div_rn(tl.sum(squares, 0), energy))
    per_error = tl.div_rn(energy * 0.0 + H, energy)

    sums = tl.zeros((WIDE,), tl.float32)
    products = tl.zeros((WIDE,), tl.float32)
    squares = tl.zeros((WIDE,), tl.float32)
    for start in range(0, H, WIDE):
        h = start + tl.arange(0, WIDE)
        normed, w, target, error = row_error(
            y_ptr, target_ptr, stride_th, center_ptr, head_scale, w_ptr, c_ptr, h, h < H, mean, rstd, scale,
            HAS_TOKENS, HAS_CENTER,
        )  # fmt: skip
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
        normed, w, target, error = row_error(
            y_ptr, target_ptr, stride_th, center_ptr, head_scale, w_ptr, c_ptr, h, h < H, mean, rstd, scale,
            HAS_TOKENS, HAS_CENTER,
        )  # fmt: skip
        dy = (error * per_error * w - mean_d - normed * mean_product) * rstd
        squares += tl.where(h < H, dy * dy, 0.0)
    dy_size = tl.sum(squares, 0) / H
    # One factor for the whole row, so that no single row can throw the weights away.  NaN must stay NaN.
    factor = tl.div_rn(clip, tl.sqrt(tl.where(g_size > dy_size, g_size, dy_size)))
    factor = tl.where(factor >= 1.0, 1.0, factor)

    peaks = tl.zeros((WIDE,), tl.float32)
    for start in range(0, H, WIDE):
        h = start + tl.arange(0, WIDE)
        normed, w, target, error = row_error(
            y_ptr, target_ptr, stride_th, center_ptr, head_scale, w_ptr, c_ptr, h, h < H, mean, rstd, scale,
            HAS_TOKENS, HAS_CENTER,
        )  # fmt: skip
        g = error * per_error
        dy = (g * w - mean_d - normed * mean_product) * rstd * factor
        peaks = tl.where((tl.abs(dy) > peaks) & (h < H), tl.abs(dy), peaks)
        tl.store(g_ptr + row * H + h, g * factor, mask=h < H)
        tl.store(dy_ptr + row * H + h, dy, mask=h < H)
    tl.store(peak_ptr + row, tl.max(peaks, 0))


def error_triton(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    target: Tensor,
    token_ids: Tensor | None,
    center: Tensor | None,
    head_scale: float,
    scale: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    active: Tensor | None,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    out: Sequence[Tensor],
    clip: float,
    config: Config,
) -> None:
    """Write float32 g, dy [R, H], the largest |dy|, the loss, and 1 or 0 for whether the row teaches [R] into out.

    target: [R, H] of any float dtype and strides; with token_ids (int64 [R]) the head's weight [V, H], of which
    center [H] may be subtracted.  active: bool [R] or None.  Of rows that do not teach only the last is written.
    """
    rows, hidden = y.shape
    assert target.shape[1] == hidden and (token_ids is not None or target.shape[0] == rows)
    assert token_ids is None or (token_ids.is_contiguous() and token_ids.shape == (rows,))
    assert center is None or (token_ids is not None and center.is_contiguous())
    assert active is None or active.is_contiguous()
    wide = tiles(hidden, 1, config)["wide"]
    if token_ids is not None:
        wide = min(wide, config.distiller_wide // 2)  # head rows take more registers
    _error_kernel[(rows,)](
        y, mean, rstd, target, target.stride(0), target.stride(1),
        token_ids, 0 if token_ids is None else target.shape[0], center, float(head_scale), scale,
        norm_weight, norm_bias, active, order, slots, offsets, slots.shape[0], *out, float(min(clip, 1e38)),
        H=hidden, WIDE=wide, HAS_ACTIVE=active is not None,
        HAS_TOKENS=token_ids is not None, HAS_CENTER=center is not None,
        num_warps=config.distiller_row_warps, enable_fp_fusion=True,
    )  # fmt: skip
