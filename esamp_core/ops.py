"""The functional ops: arguments checked, then sent to a backend.

``ESAMP_BACKEND=auto|triton|torch`` is the one switch.  auto (default) takes Triton for CUDA tensors where it is
installed and PyTorch elsewhere.  Every op has a plain-PyTorch twin of the same name in ``esamp_core.reference``.

Letters: R rows, V vocabulary, H hidden size, C scored candidates, r Distiller rank, S slots.
R = 0 is allowed everywhere.  Source of the method: arXiv 2604.24927; semantics: docs/semantics.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esamp_core import reference
from esamp_core.checks import (
    LOGIT_DTYPES,
    Params,
    check_activations,
    check_active,
    check_candidates,
    check_codes,
    check_groups,
    check_head,
    check_logits,
    check_options,
    check_out,
    check_params,
    check_row_integers,
    check_scratch,
    check_target,
    check_tensor,
    check_weights,
)
from esamp_core.config import DistillerConfig, FilterOrder, is_int, is_real, require
from esamp_core.dispatch import backend as _backend
from esamp_core.dispatch import backend_name
from esamp_core.errors import ArgumentError
from esamp_core.structures import (
    Activations,
    Candidates,
    DistillerState,
    DistillerWeights,
    Draw,
    Head,
    Reweighted,
    RowGroups,
)

# ---------------------------------------------------------------------------------------------- sampling


def select_candidates(
    logits: Tensor,
    params: Params,
    *,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    active: Tensor | None = None,
) -> Candidates:
    """The tokens that temperature, top-k, top-p and min-p keep, the most likely first.

    logits: [R, V] float32, bfloat16 or float16, any row stride.
    params: one :class:`SamplingParams`, one per row, or :class:`RowParams` tensors.
    filter_order: "transformers" (temperature, top-k, top-p, min-p; top-p renormalised over the top-k) or "vllm"
        (temperature, min-p, top-k, top-p renormalised over what is left).
    max_candidates: C, 1..1024: how many are listed; the others stay candidates (``count``, Status.CAPPED).
    active: bool [R]; rows that are off have no candidates.  Default all on.

    Top-k keeps all ties with the k-th.  Top-p drops tied tokens lowest id first, as a stable ascending sort does.
    Returns :class:`Candidates`.  Raises ArgumentError.
    """
    check_logits(logits)
    check_options(filter_order, max_candidates)
    check_active(active, logits.shape[0], logits.device)
    resolved = check_params(params, logits.shape[0], logits.device)
    result: Candidates = _backend(logits.device).select_candidates(
        logits, resolved, filter_order=filter_order, max_candidates=max_candidates, active=active
    )
    return result


def score_candidates(direction: Tensor, head: Head, token_ids: Tensor, *, transform: bool = True) -> Tensor:
    """The head's output for chosen tokens only: with direction = pred, their distilled logits.

    direction: [R, H] float.  head: :class:`Head`, weight on the same device.  token_ids: int64 [R, C]; ids outside the
    head's rows (-1, another shard's) score 0 before the transform.  transform: apply scale, softcap and clip; turn off
    for tensor-parallel shards, add the shards' scores up, then :func:`transform_scores`.

    Returns float32 [R, C], logit units.  Raises ArgumentError.
    """
    check_tensor("token_ids", token_ids, (None, None), None, "int")
    check_head(head, direction, token_ids.device)
    check_tensor("direction", direction, (token_ids.shape[0], head.hidden_size), token_ids.device)
    result: Tensor = _backend(token_ids.device).score_candidates(direction, head, token_ids, transform=transform)
    return result


def transform_scores(dots: Tensor, head: Head) -> Tensor:
    """``clip(softcap(scale * dots))`` of float32 [R, C] dot products, as the head says."""
    check_tensor("dots", dots, (None, None), None)
    require(isinstance(head, Head), "head", "be a Head", type(head).__name__)
    return reference.transform_scores(dots, head)


def reweight(
    candidates: Candidates,
    projection: Tensor,
    params: Params,
    *,
    model_logits: Tensor | None = None,
    model_weight: float = 1.0,
) -> Reweighted:
    """The formula: ``novelty = model_weight * model_logit - projection``, ``new = logit + beta * novelty``.

    With model_weight 1 and projection = distilled logits this is the paper's ``(1 + beta) * logit - beta * distilled``.
    In the general form ``logit + a * model_logit + b * (W[c] . v)``: a = beta * model_weight, b = -beta.

    candidates: from :func:`select_candidates`.  projection: float32 [R, C].  model_logits: [R, C] the candidates'
    untouched logits where ``logits`` were edited (penalties, bans); default the candidates' own.
    Rows with beta 0 come back bit-equal.  Rows whose novelty is not finite come back unexplored and flagged.  In
    capped rows the scored logits are shifted by one number that keeps their base probability mass.

    Returns :class:`Reweighted`.  Raises ArgumentError.
    """
    require(is_real(model_weight), "model_weight", "be a finite number", model_weight)
    rows, width, device = check_candidates(candidates)
    check_tensor("projection", projection, (rows, width), device)
    if model_logits is not None:
        check_tensor("model_logits", model_logits, (rows, width), device)
    resolved = check_params(params, rows, device)
    result: Reweighted = _backend(device).reweight(
        candidates, projection, resolved, model_logits=model_logits, model_weight=model_weight
    )
    return result


def draw(
    candidates: Candidates,
    reweighted: Reweighted,
    logits: Tensor,
    params: Params,
    seed: Tensor | int,
    position: Tensor | int,
    *,
    codes: Tensor | None = None,
    model_logits: Tensor | None = None,
) -> Draw:
    """Draw one token per row from ``softmax(reweighted / temperature)`` over everything the filters kept.

    The draw is the argmax of the tempered logits plus Gumbel noise, which is a pure function of (seed, position,
    token id) through Philox4x32-10.  At temperature 0 it is the argmax; of equals the lowest id wins.

    candidates, reweighted: from the ops above.  logits: [R, V] as given to select_candidates.  seed: int64 [R], 64-bit
    row seeds that differ between siblings (``row_seeds``).  position: int64 [R], tokens drawn so far.
    codes: contiguous float64 [R, 2] for stratified rows, from ``stratified_codes``: a code in [0, 1) picks the token
    by the inverse CDF in the order of token ids, all unlisted ones together last (of these the noise picks); then it
    becomes, in place, its place within that token's share, or, where no sibling is expected to have drawn the same
    tokens, a fresh one.  Second, that expected number of siblings.  Negative codes draw as without.
    model_logits: [R, V] the untouched logits, for base_logprob.  Default ``logits``.

    Returns :class:`Draw`.  Raises ArgumentError.
    """
    rows, width, device = check_candidates(candidates)
    check_logits(logits)
    check_tensor("logits", logits, (rows, None), device)
    require(isinstance(reweighted, Reweighted), "reweighted", "come from reweight", type(reweighted).__name__)
    check_tensor("reweighted.logits", reweighted.logits, (rows, width), device)
    check_tensor("reweighted.novelty", reweighted.novelty, (rows, width), device)
    check_tensor("reweighted.status", reweighted.status, (rows,), device, "int")
    check_codes(codes, params, rows, device)
    if model_logits is not None:
        check_logits(model_logits, "model_logits", logits)
    result: Draw = _backend(device).draw(
        candidates,
        reweighted,
        logits,
        check_params(params, rows, device),
        check_row_integers("seed", seed, rows, device),
        check_row_integers("position", position, rows, device),
        codes=codes,
        model_logits=model_logits,
    )
    return result


def explore(
    logits: Tensor,
    params: Params,
    seed: Tensor | int,
    position: Tensor | int,
    *,
    codes: Tensor | None = None,
    direction: Tensor | None = None,
    head: Head | None = None,
    model_logits: Tensor | None = None,
    model_weight: float = 1.0,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    active: Tensor | None = None,
) -> Draw:
    """The whole step, fused: select_candidates, score_candidates, reweight and draw.

    direction: [R, H], the Distiller's prediction of the deep hidden state (or another direction v); None, or beta 0,
    is vanilla sampling, bit for bit.  head: needed with direction.  model_logits: [R, V].  The rest as above.

    Returns :class:`Draw`.  Raises ArgumentError.
    """
    check_logits(logits)
    require(is_real(model_weight), "model_weight", "be a finite number", model_weight)
    rows, vocab_size = logits.shape
    check_options(filter_order, max_candidates)
    check_active(active, rows, logits.device)
    check_codes(codes, params, rows, logits.device)
    if model_logits is not None:
        check_logits(model_logits, "model_logits", logits)
    if (direction is None) != (head is None):
        raise ArgumentError("direction and head must be given together, got only one of them")
    if direction is not None and head is not None:
        check_head(head, direction, logits.device)
        check_tensor("direction", direction, (rows, head.hidden_size), logits.device)
        # A padded vocabulary may have more logits than tokens, never more logits than head rows.
        has = f"{head.vocab_size} from {head.vocab_start}"  # not the head itself: its repr would print the weights
        require(head.vocab_size >= vocab_size and head.vocab_start == 0, "head", f"have all {vocab_size} rows", has)
    result: Draw = _backend(logits.device).explore(
        logits,
        check_params(params, rows, logits.device),
        check_row_integers("seed", seed, rows, logits.device),
        check_row_integers("position", position, rows, logits.device),
        codes=codes,
        direction=direction,
        head=head,
        model_logits=model_logits,
        model_weight=model_weight,
        filter_order=filter_order,
        max_candidates=max_candidates,
        active=active,
    )
    return result


def replay(
    logits: Tensor,
    distilled: Tensor,
    token_ids: Tensor,
    params: Params,
    *,
    model_logits: Tensor | None = None,
    model_weight: float = 1.0,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
) -> Tensor:
    """``Draw.logprob`` of given tokens again, for RL trainers; differentiable in logits, distilled and model_logits.

    logits: [R, V].  distilled: [R, V] the head's output for the prediction (or another projection).  token_ids: int64
    [R].  params and options: those of the draw.  Always runs in PyTorch.

    Returns float32 [R], nats; -inf for a token that could not be drawn; 0 at temperature 0.  Raises ArgumentError.
    """
    check_logits(logits)
    rows, device = logits.shape[0], logits.device
    check_logits(distilled, "distilled", logits)
    require(is_real(model_weight), "model_weight", "be a finite number", model_weight)
    check_options(filter_order, max_candidates)
    if model_logits is not None:
        check_logits(model_logits, "model_logits", logits)
    return reference.replay(
        logits,
        distilled,
        check_row_integers("token_ids", token_ids, rows, device),
        check_params(params, rows, device),
        model_logits=model_logits,
        model_weight=model_weight,
        filter_order=filter_order,
        max_candidates=max_candidates,
    )


# ---------------------------------------------------------------------------------------------- Distiller


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
    device = weights.up.device
    empty = backend_name(device) == "torch"
    return torch.empty(0, device=device) if empty else _backend(device).distiller_scratch(weights, rows)


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
    result: Activations = _backend(shallow.device).distiller_forward(
        shallow, groups, weights, scale, out=out, scratch=scratch
    )
    return result


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
    ``reference_distiller.learning_rates``: lr over the squared size of what the tensor multiplies.

    state: :class:`DistillerState`.  activations: from :func:`distiller_forward`, same rows and groups, with the
    weights unchanged since.  target: [R, H] float, the deep hidden states; or int64 [R] token ids, whose targets are
    ``(W[id] - center) * scale`` of ``head`` (its bias, softcap and clip play no part).  head: given with token ids and
    only then; the whole vocabulary's, because shards of it would teach their copies of a Distiller different things.
    active: bool [R], rows that teach; a token id that the head lacks, such as -1, does not.  scratch: as above.
    A group without active rows is left alone; one whose loss or gradient is not finite too, and ``nonfinite`` counts.
    Raises ArgumentError.
    """
    require(isinstance(config, DistillerConfig), "config", "be a DistillerConfig", type(config).__name__)
    require(isinstance(state, DistillerState), "state", "be a DistillerState", type(state).__name__)
    slots, hidden = check_weights(state.weights, "state.weights")
    device = state.weights.up.device
    rows = check_activations("activations", activations, hidden, state.weights.up.shape[2], device)
    check_target(target, head, rows, hidden, device)
    check_tensor("scale", scale, (), device)
    check_groups(groups, rows, slots, device)
    check_active(active, rows, device)
    if config.momentum > 0 and state.momentum is None:
        raise ArgumentError(f"state.momentum must be a buffer for momentum={config.momentum}, got None")
    check_scratch(scratch, device)
    _backend(device).distiller_step_(
        state, activations, target, groups, scale, config, head=head, active=active, scratch=scratch
    )


# ---------------------------------------------------------------------------------------------- start-up


def warm_up(
    head: Head, config: DistillerConfig, *, max_candidates: int = 256, dtype: torch.dtype = torch.float32
) -> None:
    """Compile now what the first steps would compile: for logits of this dtype, this head and Distillers of config.

    Only Triton compiles; with the PyTorch backend there is nothing to do.  Raises ArgumentError.
    """
    check_options("transformers", max_candidates)
    require(dtype in LOGIT_DTYPES, "dtype", f"be one of {', '.join(map(str, LOGIT_DTYPES))}", dtype)
    device = head.weight.device
    if backend_name(device) == "triton":
        _backend(device).warm_up_head(head, config, max_candidates, dtype)
