"""The log-probability of a finished sample's tokens again, under logits that a trainer has computed."""

from __future__ import annotations

import torch
from torch import Tensor

from esamp_core.base.checks import check_logits
from esamp_core.base.config import Apply, FilterOrder
from esamp_core.base.errors import ArgumentError, UnsupportedModelError
from esamp_core.base.tensors import Head, RowParams
from esamp_core.decoder.results import Generation
from esamp_core.models.parts import ModelParts
from esamp_core.ops import replay, score_candidates, select_candidates


def replay_sample(
    parts: ModelParts,
    head: Head,
    sample: Generation,
    logits: Tensor,
    apply: Apply,
    model_weight: float,
    neutral: bool,
    filter_order: FilterOrder,
    max_candidates: int,
) -> Tensor:
    """See ``Decoder.replay``.  head: what candidates were scored by."""
    tokens = torch.tensor(sample.token_ids, dtype=torch.int64, device=logits.device)
    check_logits(logits, rows=len(tokens))
    params = RowParams.of(sample.params, len(tokens), logits.device)
    unexplored = params._replace(beta=torch.zeros_like(params.beta))
    if sample.params.beta == 0 and sample.distilled is None:
        return replay(logits, logits.detach(), tokens, unexplored, filter_order=filter_order)
    if sample.distilled is None:
        raise ArgumentError("generation must come from generate(return_distilled=True), or have beta 0, to be replayed")
    prediction, strength = (t.to(logits.device) for t in sample.distilled)
    if apply == "latent":
        if head.softcap is not None:
            name = type(parts.model).__name__
            raise UnsupportedModelError(f"{name} caps its logits: those before the cap, which mixing changes, are gone")
        # As hidden states are mixed in front of a linear head; a row without finite ones was left as it is.
        distilled = _all_distilled(parts, prediction)[:, : logits.shape[1]]
        explores = (strength != 0) & distilled.isfinite().all(-1)
        mixed = torch.where(explores[:, None], logits + strength[:, None] * (logits - distilled), logits)
        return replay(mixed, distilled, tokens, unexplored, filter_order=filter_order)
    candidates = select_candidates(
        logits.detach(), params, filter_order=filter_order, max_candidates=max_candidates
    ).token_ids
    scores = score_candidates(prediction, head, candidates)
    there, at = torch.where(candidates >= 0)
    distilled = torch.zeros_like(logits, dtype=torch.float32)
    distilled[there, candidates[there, at]] = scores[there, at]
    return replay(
        logits,
        distilled,
        tokens,
        params._replace(beta=strength),
        model_weight=model_weight,
        neutral=neutral,
        filter_order=filter_order,
        max_candidates=max_candidates,
    )


@torch.no_grad()
def _all_distilled(parts: ModelParts, prediction: Tensor) -> Tensor:
    return parts.logits(prediction.to(parts.head.weight.dtype))
