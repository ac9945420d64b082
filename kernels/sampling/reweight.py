"""reweight: the formula, over one row's candidates.

    novelty = model_weight * model_logit - projection
    new     = logit + beta * novelty

NEUTRAL: what is left of novelty after its regression on the logits, under the row's own distribution.

One program per row.  Rows with beta 0, with +inf or with parameters out of range keep their logits; so do rows whose
novelty is not finite, which are flagged.  The scored logits of a capped row are shifted by one number so that they
keep the mass they had at the row's temperature.  Moves a few KB per row.
"""

import torch
import triton
import triton.language as tl

from esamp_core.kernels.sampling.row import (
    CAPPED,
    FLOAT_MAX,
    INVALID_PARAMS,
    NONFINITE_NOVELTY,
    POS_INF_LOGITS,
    as_float32,
    filter_temperature,
    relative,
)
from esamp_core.kernels.tuning import Config, power_of_2

FLAT = tl.constexpr(1e-6)  # variance of logits under which a row has no slope


@triton.jit
def _is_finite(x):
    return (x == x) & (x != float("inf")) & (x != float("-inf"))


@triton.jit
def _top(x):
    top = tl.max(x, 0)
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _log_sum_exp(x):
    top = _top(x)
    return top + tl.log(tl.sum(tl.exp(x - top), 0))


@triton.jit
def _neutral(novelty, below, t, present):
    """Novelty less its regression on the logits; below: half of logits less the largest."""
    # The largest of each is taken off first, or of what they have in common its rounding would be left.
    below = tl.where(present, below, 0.0)
    half = tl.where(present, 0.5 * novelty, float("-inf"))
    half = tl.where(present, half - tl.max(half, 0), 0.0)
    weight = tl.where(present, tl.exp(tl.div_rn(below, tl.zeros_like(below) + 0.5 * t)), 0.0)
    total = tl.sum(weight, 0)
    p = weight / tl.where(total < 1.0, 1.0, total)
    below = below - tl.sum(p * below, 0)
    half = half - tl.sum(p * half, 0)
    # The product first: the square alone may be more than float32 holds where p is 0.
    variance = tl.sum(p * below * below, 0)
    slope = tl.sum(p * half * below, 0) / tl.where(variance < FLAT / 4, FLAT / 4, variance)
    return 2.0 * (half - slope * below)


@triton.jit
def reweight(
    logits, original, projection, present, beta, model_weight, temperature, status, NEUTRAL: tl.constexpr
):  # fmt: skip
    """New logits, novelty and status of one row; candidates that are not `present` have logit -inf."""
    novelty = model_weight * original - projection
    t = filter_temperature(temperature)
    finite = _is_finite(novelty)
    if NEUTRAL:
        top = _top(logits)
        novelty = tl.where(finite, _neutral(novelty, 0.5 * logits - 0.5 * top, t, present & finite), novelty)
    # Here and below of halves, as in `relative`: terms may be more than float32 holds, and their sum less again.
    new = 2.0 * (0.5 * logits + beta * (0.5 * novelty))
    explored = (beta != 0.0) & ((status & (POS_INF_LOGITS | INVALID_PARAMS)) == 0)
    # Others may be too low for float32: they have no probability.  The largest may not, nor too high.
    too_high = present & (new == float("inf"))
    bad = too_high | (present & (_is_finite(novelty) == 0))
    can_be_drawn = present & (new > float("-inf"))
    lost_top = (tl.max(present.to(tl.int32), 0) != 0) & (tl.max(can_be_drawn.to(tl.int32), 0) == 0)
    broken = explored & (lost_top | (tl.max(bad.to(tl.int32), 0) != 0))
    status = status | tl.where(broken, NONFINITE_NOVELTY, 0)
    use = tl.where(explored & (broken == 0), present, False)
    new = tl.where(use, tl.where(new < -FLOAT_MAX, -FLOAT_MAX, new), logits)
    novelty = tl.where(use, novelty, 0.0)
    if ((status & CAPPED) != 0) & (temperature > 0.0):
        top = _top(logits)
        new_top = tl.max(new, 0)
        lost = _log_sum_exp(relative(logits, top, t)) - _log_sum_exp(relative(new, new_top, t))
        # The offset goes first: added last, a huge one would swallow the differences between candidates.
        shifted = 2.0 * ((0.5 * new - 0.5 * new_top) + (0.5 * top + 0.5 * t * lost))
        new = tl.where(use, tl.where(shifted < -FLOAT_MAX, -FLOAT_MAX, shifted), new)
    return new, novelty, status


@triton.jit
def _reweight_kernel(
    ids_ptr, logits_ptr, original_ptr, stride_or, stride_oc, projection_ptr, stride_pr, stride_pc,
    beta_ptr, temperature_ptr, status_ptr, new_ptr, novelty_ptr, new_status_ptr,
    width, model_weight,
    HAS_ORIGINAL: tl.constexpr, NEUTRAL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    inside = lane < width
    at = row * width + lane
    present = tl.load(ids_ptr + at, mask=inside, other=-1) >= 0
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf"))
    original = logits
    if HAS_ORIGINAL:
        original = as_float32(tl.load(original_ptr + row * stride_or + lane * stride_oc, mask=inside, other=0.0))
    projection = tl.load(projection_ptr + row * stride_pr + lane * stride_pc, mask=inside, other=0.0).to(tl.float32)
    new, novelty, status = reweight(
        logits, original, projection, present,
        tl.load(beta_ptr + row), model_weight, tl.load(temperature_ptr + row), tl.load(status_ptr + row),
        NEUTRAL,
    )  # fmt: skip
    tl.store(new_ptr + at, new, mask=inside)
    tl.store(novelty_ptr + at, novelty, mask=inside)
    tl.store(new_status_ptr + row, status)


def reweight_triton(
    token_ids: torch.Tensor,
    logits: torch.Tensor,
    status: torch.Tensor,
    projection: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    original: torch.Tensor | None,
    model_weight: float,
    neutral: bool,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New logits and novelty float32 [R, C], status int32 [R].  original: [R, C] the model's own logits, or None."""
    rows, width = token_ids.shape
    assert token_ids.is_contiguous() and logits.is_contiguous()
    new, novelty, new_status = torch.empty_like(logits), torch.empty_like(logits), torch.empty_like(status)
    stride_or, stride_oc = (0, 0) if original is None else original.stride()
    _reweight_kernel[(rows,)](
        token_ids, logits, original, stride_or, stride_oc, projection, *projection.stride(), beta, temperature, status,
        new, novelty, new_status, width, float(model_weight),
        HAS_ORIGINAL=original is not None, NEUTRAL=neutral, WIDTH=power_of_2(width, 16),
        num_warps=config.draw_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return new, novelty, new_status
