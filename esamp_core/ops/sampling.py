"""The sampling ops: arguments checked, then sent to a backend.

Letters: R rows, V vocabulary, H hidden size, C scored candidates.  R = 0 is allowed everywhere.
Source of the method: arXiv 2604.24927; semantics: docs/semantics.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from esamp_core import reference
from esamp_core.base.checks import check_logits, check_tensor, is_real, require
from esamp_core.base.config import FilterOrder, check_options
from esamp_core.base.tensors import Candidates, Draw, Head, Reweighted
from esamp_core.ops.arguments import (
    Params,
    check_active,
    check_candidates,
    check_codes,
    check_head,
    check_params,
    check_row_integers,
    check_step,
)
from esamp_core.ops.backends import backend


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
    return backend(logits.device).select_candidates(
        logits, resolved, filter_order=filter_order, max_candidates=max_candidates, active=active
    )


def score_candidates(direction: Tensor, head: Head, token_ids: Tensor, *, transform: bool = True) -> Tensor:
    """The head's output for chosen tokens only: with direction = pred, their distilled logits.

    direction: [R, H] float.  head: :class:`Head`, weight on the same device.  token_ids: int64 [R, C]; ids outside the
    head's rows (-1, another shard's) score 0 before the transform.  transform: apply scale, softcap and clip; turn off
    for tensor-parallel shards, add the shards' scores up, then :func:`transform_scores`.

    Returns float32 [R, C], logit units.  Raises ArgumentError.
    """
    check_tensor("token_ids", token_ids, (None, None), None, "int")
    check_head(head, direction, token_ids.shape[0], token_ids.device)
    return backend(token_ids.device).score_candidates(direction, head, token_ids, transform=transform)


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
    neutral: bool = False,
) -> Reweighted:
    """The formula: ``novelty = model_weight * model_logit - projection``, ``new = logit + beta * novelty``.

    With model_weight 1 and projection = distilled logits this is the paper's ``(1 + beta) * logit - beta * distilled``.
    In the general form ``logit + a * model_logit + b * (W[c] . v)``: a = beta * model_weight, b = -beta.

    candidates: from :func:`select_candidates`.  projection: float32 [R, C].  model_logits: [R, C] the candidates'
    untouched logits where ``logits`` were edited (penalties, bans); default the candidates' own.
    neutral: take from novelty its regression on the candidates' logits under ``softmax(logits / temperature)``: a small
    beta then changes the entropy neither way, ``dH/dbeta = -Cov_p(novelty, log p) = 0``.
    Rows with beta 0 come back bit-equal.  Rows whose novelty, or largest new logit, is not finite come back unexplored
    and flagged; other new logits are no less than the least float32.  In capped rows the scored logits are shifted by
    one number that keeps their base probability mass.

    Returns :class:`Reweighted`.  Raises ArgumentError.
    """
    require(is_real(model_weight), "model_weight", "be a finite number", model_weight)
    require(isinstance(neutral, bool), "neutral", "be True or False", neutral)
    rows, width, device = check_candidates(candidates)
    check_tensor("projection", projection, (rows, width), device)
    if model_logits is not None:
        check_tensor("model_logits", model_logits, (rows, width), device)
    resolved = check_params(params, rows, device)
    return backend(device).reweight(
        candidates, projection, resolved, model_logits=model_logits, model_weight=model_weight, neutral=neutral
    )


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
    check_logits(logits, rows=rows, device=device)
    require(isinstance(reweighted, Reweighted), "reweighted", "come from reweight", type(reweighted).__name__)
    check_tensor("reweighted.logits", reweighted.logits, (rows, width), device)
    check_tensor("reweighted.novelty", reweighted.novelty, (rows, width), device)
    check_tensor("reweighted.status", reweighted.status, (rows,), device, "int")
    check_codes(codes, params, rows, device)
    if model_logits is not None:
        check_logits(model_logits, "model_logits", logits)
    return backend(device).draw(
        candidates,
        reweighted,
        logits,
        check_params(params, rows, device),
        check_row_integers("seed", seed, rows, device),
        check_row_integers("position", position, rows, device),
        codes=codes,
        model_logits=model_logits,
    )


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
    neutral: bool = False,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    active: Tensor | None = None,
) -> Draw:
    """The whole step, fused: select_candidates, score_candidates, reweight and draw.

    direction: [R, H], the Distiller's prediction of the deep hidden state (or another direction v); None, or beta 0,
    is vanilla sampling, bit for bit.  head: needed with direction.  model_logits: [R, V].  The rest as above.

    Returns :class:`Draw`.  Raises ArgumentError.
    """
    options: dict[str, Any] = {
        "direction": direction,
        "head": head,
        "model_logits": model_logits,
        "model_weight": model_weight,
        "neutral": neutral,
        "filter_order": filter_order,
        "max_candidates": max_candidates,
        "active": active,
    }
    rows = check_step(logits, params, seed, position, **options)
    check_codes(codes, params, len(logits), logits.device)
    return backend(logits.device).explore(logits, *rows, codes=codes, **options)


def replay(
    logits: Tensor,
    distilled: Tensor,
    token_ids: Tensor,
    params: Params,
    *,
    model_logits: Tensor | None = None,
    model_weight: float = 1.0,
    neutral: bool = False,
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
    require(isinstance(neutral, bool), "neutral", "be True or False", neutral)
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
        neutral=neutral,
        filter_order=filter_order,
        max_candidates=max_candidates,
    )
