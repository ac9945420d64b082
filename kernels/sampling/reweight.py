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
    INVALID_PARAMS,
    NONFINITE_NOVELTY,
    POS_INF_LOGITS,
    filter_temperature,
)
from esamp_core.kernels.tuning import Config, power_of_2

FLAT = tl.constexpr(1e-6)  # variance of logits under which a row has no slope


@triton.jit
def _is_finite(x):
    return (x == x) & (x != float("inf")) & (x != float("-inf"))


@triton.jit
def _log_sum_exp(x):
    top = tl.max(x, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log(tl.sum(tl.exp(x - top), 0))


@triton.jit
def _neutral(novelty, below, t, present):
    """Novelty less its regression on the logits; below: logits less the largest."""
    below = tl.where(present, below, 0.0)
    novelty = tl.where(present, novelty, 0.0)
    weight = tl.where(present, tl.exp(tl.div_rn(below, t)), 0.0)
    total = tl.sum(weight, 0)
    p = weight / tl.where(total < 1.0, 1.0, total)
    below = below - tl.sum(p * below, 0)
    novelty = novelty - tl.sum(p * novelty, 0)
    variance = tl.sum(p * below * below, 0)
    return novelty - tl.sum(p * novelty * below, 0) / tl.where(variance < FLAT, FLAT, variance) * below


@triton.jit
def reweight(
    logits, original, projection, present, beta, model_weight, temperature, status, NEUTRAL: tl.constexpr
):  # fmt: skip
    """New logits, novelty and status of one row; candidates that are not `present` have logit -inf."""
    novelty = model_weight * original - projection
    t = tl.zeros_like(logits) + filter_temperature(temperature)
    top = tl.max(logits, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    finite = _is_finite(novelty)
    if NEUTRAL:
        novelty = tl.where(finite, _neutral(novelty, logits - top, t, present & finite), novelty)
    new = logits + beta * novelty
    explored = (beta != 0.0) & ((status & (POS_INF_LOGITS | INVALID_PARAMS)) == 0)
    # What the draw exponentiates must be finite too: a finite novelty may overflow when divided by the temperature.
    finite = finite & _is_finite(novelty) & _is_finite(tl.div_rn(new - top, t))
    broken = explored & (tl.max((present & (finite == 0)).to(tl.int32), 0) != 0)
    status = status | tl.where(broken, NONFINITE_NOVELTY, 0)
    use = tl.where(explored & (broken == 0), present, False)
    new = tl.where(use, new, logits)
    novelty = tl.where(use, novelty, 0.0)
    if ((status & CAPPED) != 0) & (temperature > 0.0):
        new_top = tl.max(new, 0)
        lost = _log_sum_exp(tl.div_rn(logits - top, t)) - _log_sum_exp(tl.div_rn(new - new_top, t))
        # The offset goes first: added last, a huge one would swallow the differences between candidates.
        new = tl.where(use, (new - new_top) + (top + t * lost), new)
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
        original = tl.load(original_ptr + row * stride_or + lane * stride_oc, mask=inside, other=0.0).to(tl.float32)
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
