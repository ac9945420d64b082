"""gauge: how much better than a constant each slot's Distiller predicts; two launches, before the step.

    compare   grid (rows)               relative squared errors of the prediction and of the constant, the mean of
                                        earlier targets
    judge     grid (groups, parts of H) the new mean; by a group's first program the errors' running means, and trust =
                                        1 - error / baseline where that is positive

A step whose errors are not finite changes nothing.  Sums over rows are taken in their group's order.  Compare alone
reads the count of steps, and leaves it to each row: judge's first program writes it, and the others must not read it.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from esamp_core.kernels.distiller.error import row_error
from esamp_core.kernels.distiller.forward import ROWS, group_of, tiles
from esamp_core.kernels.distiller.rounding import FLOAT_MAX
from esamp_core.kernels.distiller.scratch import Shape, cut
from esamp_core.kernels.tuning import Config

WINDOW = tl.constexpr(32)  # steps that the running means remember
NARROW = 128  # hidden units of a part
WIDE = 2048  # most hidden units at a time of a row, of which three vectors and three sums are held


@triton.jit(do_not_specialize=["num_groups"])  # it follows R
def _compare_kernel(
    y_ptr, mean_ptr, rstd_ptr, target_ptr, stride_tr, stride_th, scale_ptr, w_ptr, c_ptr, constant_ptr, active_ptr,
    order_ptr, slots_ptr, offsets_ptr, num_groups, steps_ptr, error_ptr, baseline_ptr, row_steps_ptr,
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
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    scale = tl.load(scale_ptr).to(tl.float32)
    energies = tl.zeros((WIDE,), tl.float32)
    squares = tl.zeros((WIDE,), tl.float32)
    constants = tl.zeros((WIDE,), tl.float32)
    for start in range(0, H, WIDE):
        h = start + tl.arange(0, WIDE)
        _, _, target, error = row_error(
            y_ptr + row * H, target_ptr + row * stride_tr, stride_th, target_ptr, 1.0, w_ptr + slot * H,
            c_ptr + slot * H, h, h < H, mean, rstd, scale, False, False,
        )  # fmt: skip
        off = target - tl.load(constant_ptr + slot * H + h, mask=h < H, other=0.0)
        energies += target * target
        squares += error * error
        constants += off * off
    energy = tl.sum(energies, 0)
    tl.store(error_ptr + row, tl.div_rn(tl.sum(squares, 0), energy))
    tl.store(baseline_ptr + row, tl.div_rn(tl.sum(constants, 0), energy))
    tl.store(row_steps_ptr + row, tl.load(steps_ptr + slot).to(tl.float32))


@triton.jit
def _running(pointer, value, steps, share):
    before = tl.load(pointer)
    before = tl.where(steps == 1, value, before)
    after = before + (value - before) * share
    tl.store(pointer, after)
    return after


@triton.jit
def _judge_kernel(
    row_error_ptr, row_baseline_ptr, row_steps_ptr, target_ptr, stride_tr, stride_th, scale_ptr, active_ptr,
    order_ptr, slots_ptr, offsets_ptr, constant_ptr, steps_ptr, error_ptr, baseline_ptr, trust_ptr,
    H: tl.constexpr, TILE: tl.constexpr, NARROW: tl.constexpr, HAS_ACTIVE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    part = tl.program_id(1)
    slot = tl.load(slots_ptr + group).to(tl.int64)
    if slot < 0:
        return
    first = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    h = part * NARROW + tl.arange(0, NARROW)
    scale = tl.load(scale_ptr).to(tl.float32)
    counts = tl.zeros((TILE,), tl.int32)
    errors = tl.zeros((TILE,), tl.float32)
    baselines = tl.zeros((TILE,), tl.float32)
    seen = tl.zeros((TILE,), tl.float32)
    sums = tl.zeros((NARROW,), tl.float32)
    at = first
    while at < end:
        lane = at + tl.arange(0, TILE)
        row = tl.load(order_ptr + lane, mask=lane < end, other=0).to(tl.int64)
        here = lane < end
        if HAS_ACTIVE:
            here &= tl.load(active_ptr + row, mask=here, other=0) != 0
        counts += here.to(tl.int32)
        errors += tl.load(row_error_ptr + row, mask=here, other=0.0)
        baselines += tl.load(row_baseline_ptr + row, mask=here, other=0.0)
        seen = tl.maximum(seen, tl.load(row_steps_ptr + row, mask=here, other=0.0))
        place = row[:, None] * stride_tr + h[None, :] * stride_th
        target = tl.load(target_ptr + place, mask=here[:, None] & (h < H)[None, :], other=0.0).to(tl.float32)
        sums += tl.sum(target / scale, 0)
        at += TILE
    count = tl.sum(counts, 0)
    if count == 0:
        return
    error = tl.div_rn(tl.sum(errors, 0), count.to(tl.float32))
    baseline = tl.div_rn(tl.sum(baselines, 0), count.to(tl.float32))
    if (error <= FLOAT_MAX) & (baseline <= FLOAT_MAX):
        steps = tl.max(seen, 0)
        if part == 0:
            if steps > 0:  # the first step has nothing to compare with
                share = tl.div_rn(steps * 0.0 + 1.0, steps)
                share = tl.where(share * WINDOW < 1.0, 1.0 / WINDOW, share)
                error = _running(error_ptr + slot, error, steps, share)
                baseline = _running(baseline_ptr + slot, baseline, steps, share)
                trust = 1.0 - tl.div_rn(error, baseline)
                tl.store(trust_ptr + slot, tl.where(trust > 0.0, trust, 0.0))  # also where it is NaN
            tl.store(steps_ptr + slot, tl.load(steps_ptr + slot) + 1)
        mean = tl.load(constant_ptr + slot * H + h, mask=h < H, other=0.0)
        mean += (sums / count - mean) / (steps + 1.0)
        tl.store(constant_ptr + slot * H + h, mean, mask=h < H)


def gauge_scratch(rows: int) -> tuple[Shape, ...]:
    """Each row's errors, of the prediction and of the constant; its group's steps so far."""
    return (rows,), (rows,), (rows,)


def gauge_triton(
    gauge: Sequence[Tensor],
    saved: Sequence[Tensor],
    target: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    scale: Tensor,
    active: Tensor | None,
    scratch: Tensor,
    config: Config,
) -> None:
    """Update gauge: mean float32 [S, H], steps int64 [S], error, baseline, trust float32 [S], contiguous.

    saved: what distiller_forward_triton wrote, with LayerNorm.  target: [R, H] of any float dtype and strides.
    active: bool [R] or None.  scratch: float32 [N], room for gauge_scratch.
    """
    _, _, _, y, mean, rstd, _ = saved
    (rows, hidden), constant = y.shape, gauge[0]
    assert target.shape == y.shape and all(t.is_contiguous() for t in (*gauge, *saved, order, slots, offsets))
    assert active is None or active.is_contiguous()
    if rows == 0:
        return
    row_error, row_baseline, row_steps = cut(scratch, gauge_scratch(rows))
    groups, reading = (order, slots, offsets), (target, target.stride(0), target.stride(1), scale)
    _compare_kernel[(rows,)](
        y, mean, rstd, *reading, weights[4], weights[5], constant, active, *groups, slots.shape[0],
        gauge[1], row_error, row_baseline, row_steps,
        H=hidden, WIDE=min(WIDE, tiles(hidden, 1, config)["wide"]), HAS_ACTIVE=active is not None,
        num_warps=config.distiller_row_warps, enable_fp_fusion=True,
    )  # fmt: skip
    _judge_kernel[(slots.shape[0], triton.cdiv(hidden, NARROW))](
        row_error, row_baseline, row_steps, *reading, active, *groups, *gauge,
        H=hidden, TILE=ROWS, NARROW=NARROW, HAS_ACTIVE=active is not None,
        num_warps=config.distiller_warps, enable_fp_fusion=True,
    )  # fmt: skip
