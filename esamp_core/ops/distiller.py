"""The Distiller's ops: arguments checked, then sent to a backend.

Letters: R rows, V vocabulary, H hidden size, r Distiller rank, S slots.  R = 0 is allowed everywhere.
Source of the method: arXiv 2604.24927; semantics: docs/semantics.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esamp_core import reference
from esamp_core.base.checks import LOGIT_DTYPES, check_tensor, is_int, require
from esamp_core.base.config import DistillerConfig, check_options
from esamp_core.base.errors import ArgumentError
from esamp_core.base.tensors import Activations, DistillerState, DistillerWeights, Gauge, Head, Mixed, RowGroups
from esamp_core.ops.arguments import (
    check_activations,
    check_active,
    check_gauge,
    check_groups,
    check_mixed_out,
    check_out,
    check_scratch,
    check_target,
    check_weights,
)
from esamp_core.ops.backends import backend


def group_rows(slots: Tensor, num_slots: int, rank: Tensor | None = None) -> RowGroups:
    """Group rows by Distiller slot; call again only when the rows change.

    slots: int [R], -1 (or anything outside 0..S-1) for a row without a slot.  num_slots: S.  rank: int [R], the order
    of rows within a group (default: as they come); sums over rows are taken in it, so that a reordered batch gives
    the same bits.  Returns :class:`RowGroups`.  Never waits for the device.  Raises ArgumentError.
    """
    check_tensor("slots", slots, (None,), None, "int")
    require(is_int(num_slots) and num_slots >= 1, "num_slots", "be an integer >= 1", num_slots)
    if rank is not None:
        check_tensor("rank", rank, tuple(slots.shape), slots.device, "int")
    return reference.group_rows(slots, num_slots, rank)


def distiller_scratch(weights: DistillerWeights, rows: int) -> Tensor:
    """Work space of distiller_forward and distiller_step_ for up to R rows, so that they allocate nothing.

    float32 [N] on the weights' device, about 8 H bytes per row; empty where PyTorch runs.  What it
    holds between calls means nothing.  Calls that may run at the same time need one each.  Raises ArgumentError.
    """
    check_weights(weights)
    require(is_int(rows) and rows >= 0, "rows", "be an integer >= 0", rows)
    return backend(weights.up.device).distiller_scratch(weights, rows)


def distiller_forward(
    shallow: Tensor,
    groups: RowGroups,
    weights: DistillerWeights,
    scale: Tensor,
    *,
    out: Activations | None = None,
    scratch: Tensor | None = None,
) -> Activations:
    """Predict deep hidden states from shallow ones, each row with its group's Distiller.

    ``x = shallow / rms(shallow)``, ``y = x + ((x A) * silu(x G + b)) B``, ``pred = scale * (w * LayerNorm(y) + c)``.
    rms is floored at 1e-6; the LayerNorm's epsilon is 1e-5.

    shallow: [R, H] float.  groups: from :func:`group_rows`.  weights: [S, ...] (see :class:`DistillerWeights`).
    scale: float32 0-d tensor, s.  out: contiguous float32 (float64 for float64 shallow) memory to write into, which
    must not overlap shallow; default new.  scratch: from :func:`distiller_scratch` for at least R rows; default new.
    Returns :class:`Activations`, ``out`` where given; zeros for rows in no group.  Raises ArgumentError.
    """
    slots, hidden = check_weights(weights)
    check_tensor("shallow", shallow, (None, hidden), weights.up.device)
    check_tensor("scale", scale, (), weights.up.device)
    check_groups(groups, shallow.shape[0], slots, shallow.device)
    check_out(out, shallow, weights.up.shape[2])
    check_scratch(scratch, shallow.device)
    return backend(shallow.device).distiller_forward(shallow, groups, weights, scale, out=out, scratch=scratch)


def mix(
    deep: Tensor,
    activations: Activations,
    groups: RowGroups,
    weights: DistillerWeights,
    scale: Tensor,
    beta: Tensor,
    *,
    active: Tensor | None = None,
    out: Tensor | None = None,
    status: Tensor | None = None,
) -> Mixed:
    """Mix the prediction into the deep hidden states, before the model's own head: one launch.

    ``pred = scale * (w * LayerNorm(y) + c)``, ``hidden = (1 + beta) * deep - beta * pred``, in float32, then the dtype
    of deep.  With a linear head the logits are then those of reweighting every token, ``logit + beta * novelty``; with
    a soft-cap they are ``cap((1 + beta) * x - beta * x')`` of the products x and x', which stays within the cap.

    deep: [R, H] float32, bfloat16 or float16, the input of lm_head.  activations: from :func:`distiller_forward` for
    the same rows, groups and weights; its mean and rstd are written again (the same numbers).  scale: float32 0-d
    tensor, s.  beta: float32 [R]; a row with beta 0, or in no group, is deep's bit for bit.  active: bool [R], rows
    that are mixed; default all.  out: [R, H] of deep's dtype, other memory than deep's, to write into; default new.
    status: int32 [R], to which flags are added; default new.
    A row whose mixed state is not finite is left as it is, and flagged (Status.NONFINITE_NOVELTY).
    Returns :class:`Mixed`.  Raises ArgumentError.  Source: arXiv 2604.24927, appendix E.2.
    """
    slots, hidden = check_weights(weights)
    device = weights.up.device
    rows = check_activations("activations", activations, None, hidden, weights.up.shape[2], device)
    check_tensor("deep", deep, (rows, hidden), device)
    require(deep.dtype in LOGIT_DTYPES, "deep", "be float32, bfloat16 or float16", deep.dtype)
    check_tensor("scale", scale, (), device)
    check_groups(groups, rows, slots, device)
    check_tensor("beta", beta, (rows,), device)
    check_active(active, rows, device)
    check_mixed_out(out, status, deep)
    return backend(device).mix(deep, activations, groups, weights, scale, beta, active=active, out=out, status=status)


def distiller_step_(
    state: DistillerState,
    activations: Activations,
    target: Tensor,
    groups: RowGroups,
    scale: Tensor,
    config: DistillerConfig,
    *,
    head: Head | None = None,
    active: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """One SGD step per group, in place, on the mean relative squared error of its active rows.

    ``loss = mean_i |pred_i - target_i|^2 / |target_i|^2``.  Gradients are those of (H / 2) * loss with respect to the
    weights in units of s, each row's contribution scaled down so that the rms of its error gradient, before and
    after the LayerNorm's backward, is at most ``config.clip``; then ``p -= rate * gradient`` with the rates of
    ``reference.distiller.learning_rates``: lr over the squared size of what the tensor multiplies.

    state: :class:`DistillerState`.  activations: from :func:`distiller_forward`, same rows and groups, with the
    weights unchanged since.  target: [R, H] float, the deep hidden states; or int64 [R] token ids, whose targets are
    ``(W[id] - center) * scale`` of ``head`` (its bias, softcap and clip play no part).  head: given with token ids and
    only then; the whole vocabulary's, because shards of it would teach their copies of a Distiller different things.
    active: bool [R], rows that teach; a token id that the head lacks, such as -1, does not.  scratch: as above.
    A group without active rows is left alone; one whose loss or gradient is not finite too, and ``nonfinite`` counts.
    Raises ArgumentError.
    """
    require(isinstance(config, DistillerConfig), "config", "be a DistillerConfig", type(config).__name__)
    require(not config.published, "config.recipe", 'be "default" here: the others learn in an Explorer', config.recipe)
    require(isinstance(state, DistillerState), "state", "be a DistillerState", type(state).__name__)
    slots, hidden = check_weights(state.weights, "state.weights")
    device = state.weights.up.device
    rows = check_activations("activations", activations, None, hidden, state.weights.up.shape[2], device)
    check_target(target, head, rows, hidden, device)
    check_tensor("scale", scale, (), device)
    check_groups(groups, rows, slots, device)
    check_active(active, rows, device)
    if config.momentum > 0 and state.momentum is None:
        raise ArgumentError(f"state.momentum must be a buffer for momentum={config.momentum}, got None")
    check_scratch(scratch, device)
    backend(device).distiller_step_(
        state, activations, target, groups, scale, config, head=head, active=active, scratch=scratch
    )


def gauge_(
    gauge: Gauge,
    activations: Activations,
    target: Tensor,
    groups: RowGroups,
    weights: DistillerWeights,
    scale: Tensor,
    *,
    active: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """Compare each group's Distiller with a constant, in place; call it before :func:`distiller_step_`.

    Both are judged by the mean over the group's active rows of the squared error relative to ``|target|^2``.  The
    constant is the mean of all targets of earlier steps.  ``error`` and ``baseline`` are running means of the step
    errors, each step with a share of 1 / (comparisons so far), at least 1 / 32;
    ``trust = max(0, 1 - error / baseline)`` is what beta is scaled by.  A group's first step has nothing to
    compare with, and leaves trust as it is.

    gauge: :class:`Gauge`.  activations: from :func:`distiller_forward`, same rows and groups, with the weights
    unchanged since.  target: [R, H] float, the deep hidden states.  scale: float32 0-d tensor, s.  active: bool [R],
    rows that count.  scratch: as above.  A group whose errors are not finite is left alone.  Raises ArgumentError.
    """
    slots, hidden = check_weights(weights)
    device = weights.up.device
    check_gauge(gauge, slots, hidden, device)
    rows = check_activations("activations", activations, None, hidden, weights.up.shape[2], device)
    check_target(target, None, rows, hidden, device)
    check_tensor("scale", scale, (), device)
    check_groups(groups, rows, slots, device)
    check_active(active, rows, device)
    check_scratch(scratch, device)
    backend(device).gauge_(gauge, activations, target, groups, weights, scale, active=active, scratch=scratch)


def warm_up(
    head: Head,
    config: DistillerConfig,
    *,
    max_candidates: int = 256,
    dtype: torch.dtype = torch.float32,
    neutral: bool = False,
) -> None:
    """Compile now what the first steps would compile: for logits of this dtype, this head and Distillers of config.

    Only Triton compiles; with the PyTorch backend there is nothing to do.  Raises ArgumentError.
    """
    check_options("transformers", max_candidates)
    require(dtype in LOGIT_DTYPES, "dtype", f"be one of {', '.join(map(str, LOGIT_DTYPES))}", dtype)
    backend(head.weight.device).warm_up(head, config, max_candidates, dtype, neutral)
