"""Siblings drawn without replacement, in plain PyTorch: every row's first tokens, and who goes on with which.

Stochastic beam search (Kool, van Hoof, Welling 2019, arXiv 1903.06059): the n beginnings with the largest perturbed
log-probabilities are what n draws without replacement give, whatever their length.  A beginning of perturbed
log-probability G hands it on to its best token; its other tokens get less, by the law of Gumbel noise whose maximum is
known.  So only the n best tokens of each row are looked at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from esamp_core.base.philox import LARGEST_GUMBEL, gumbel, token_bits
from esamp_core.base.seeds import branch_seed
from esamp_core.base.tensors import Candidates, Children, Draw, Growth, Reweighted, RowParams, Status, Tree
from esamp_core.reference.candidates import (
    ABSENT,
    LAST_ID,
    NEG_INF,
    clean_logits,
    descending,
    filter_temperature,
    ordered,
    relative,
    row_chunks,
    scale_logits,
)
from esamp_core.reference.sampling import Support, tail_mask


def children(
    candidates: Candidates,
    reweighted: Reweighted,
    logits: Tensor,
    params: RowParams,
    seed: Tensor,
    position: Tensor,
    draw: Draw,
    width: int,
) -> Children:
    ids = candidates.token_ids
    support = Support(candidates, reweighted.logits, params)
    noise = gumbel(token_bits(seed, position, ids.clamp_min(0)))
    found = _first(_Found(ids, support.scored, support.scored + noise, reweighted.novelty), width)
    capped = ((candidates.status & Status.CAPPED != 0) & (params.temperature > 0)).nonzero()[:, 0]
    for part in row_chunks(len(capped), logits.shape[1], logits.device) if len(capped) else ():
        rows = capped[part]
        listed = _Found(*(column[rows] for column in found))
        tail = _first_of_tail(
            Candidates(*(f[rows] for f in candidates)), support.top[rows], logits[rows], params.take(rows),
            seed[rows], position[rows], listed.perturbed[:, -1], width,
        )  # fmt: skip
        both = _first(_Found(*(torch.cat(pair, -1) for pair in zip(listed, tail, strict=True))), width)
        found = _Found(*(column.index_copy(0, rows, new) for column, new in zip(found, both, strict=True)))
    token_ids, z, perturbed, novelty = found
    # Greedy rows have one child, and those that draw nothing none.
    column = torch.arange(width, device=ids.device)
    token_ids = torch.where((params.temperature == 0)[:, None], draw.token_ids[:, None], token_ids)
    here = (token_ids >= 0) & (draw.token_ids >= 0)[:, None] & ((params.temperature > 0)[:, None] | (column == 0))
    # The first child is the token of the draw, whose log-probability is known.
    first, known = z[:, :1].masked_fill(~here[:, :1], 0.0), draw.logprob[:, None]
    stochastic = here & (params.temperature > 0)[:, None]
    return Children(
        token_ids.masked_fill(~here, -1),
        torch.where(stochastic, known + (z - first), torch.where(here, 0.0, NEG_INF)),
        torch.where(stochastic, known + (perturbed - first), torch.where(here, 0.0, NEG_INF)),
        torch.where(stochastic, novelty, torch.where(here, draw.novelty[:, None], 0.0)),
    )


class _Found(NamedTuple):
    """Tokens of rows, [R, N]; id -1 or z -inf is none."""

    token_ids: Tensor
    z: Tensor
    perturbed: Tensor  # z and noise
    novelty: Tensor


def _first(found: _Found, width: int) -> _Found:
    """The ``width`` tokens with the largest ``perturbed``; of equals the lowest id first."""
    token_ids, z, perturbed, novelty = found
    missing = max(0, width - token_ids.shape[1])
    here = (token_ids >= 0) & (z > NEG_INF)
    perturbed = perturbed.masked_fill(~here, NEG_INF)
    keys = torch.where(here, (ordered(perturbed) << 32) | (LAST_ID - token_ids), ABSENT)
    keys, places = descending(F.pad(keys, (0, missing), value=ABSENT), width)
    places = places.clamp_max(token_ids.shape[1] - 1)
    here = keys != ABSENT
    return _Found(
        token_ids.gather(-1, places).masked_fill(~here, -1),
        z.gather(-1, places).masked_fill(~here, NEG_INF),
        perturbed.gather(-1, places).masked_fill(~here, NEG_INF),
        novelty.gather(-1, places).masked_fill(~here, 0.0),
    )


def _first_of_tail(
    candidates: Candidates,
    top: Tensor,
    logits: Tensor,
    params: RowParams,
    seed: Tensor,
    position: Tensor,
    to_beat: Tensor,
    width: int,
) -> _Found:
    """Of capped rows, the tokens beyond the listed ones, as :func:`_first` gives them, as far as they beat a number."""
    x, _ = clean_logits(logits)
    in_tail = tail_mask(scale_logits(x, params), candidates)
    z = relative(x, top, filter_temperature(params)).clamp_max(0.0).masked_fill(~in_tail, NEG_INF)
    near = (z >= to_beat[:, None] - LARGEST_GUMBEL).any(0)
    near[0] = True  # at least one column
    some = near.nonzero()[:, 0].expand(len(z), -1)
    z = z.gather(-1, some)
    noise = gumbel(token_bits(seed, position, some))
    return _first(_Found(some, z, z + noise, torch.zeros_like(z)), width)


def grow(children: Children, tree: Tree, families: Tensor, active: Tensor, seed: Tensor, position: Tensor) -> Growth:
    rows, width, wide = families.clamp_min(0), families.shape[1], children.token_ids.shape[1]
    real = families >= 0
    running = real & active[rows]
    own = tree.perturbed[rows].masked_fill(~real, NEG_INF)  # which its best child inherits
    noisy = children.perturbed[rows].double()
    others = _given_the_best(own[..., None], tree.logprob[rows][..., None] + noisy, noisy - noisy[..., :1])[..., 1:]
    # -inf - -inf, of rows that hold or draw nothing, would come before every number.
    nothing = ~(running & (own > NEG_INF))[..., None] | (noisy[..., 1:] == NEG_INF)
    others = others.masked_fill(nothing, NEG_INF)
    best, index = torch.cat([own, others.flatten(1)], 1).topk(width, dim=-1)
    column = torch.arange(width, device=own.device).expand_as(index)
    chosen = (best > NEG_INF) & (column < real.sum(-1, keepdim=True))

    # A row that is among the best stays where it is, with its best child; other children go where rows are free.
    kept = chosen & (index < width)
    stays = torch.zeros_like(index).scatter_add_(1, index.clamp_max(width - 1), kept.long()) > 0
    arrives = chosen & (index >= width)
    arrivals = torch.full((len(index), width + 1), -1, dtype=torch.int64, device=own.device)
    arrivals = arrivals.scatter_(1, torch.where(arrives, arrives.cumsum(1) - 1, width), column)[:, :width]
    free = real & ~stays
    number = arrivals.gather(1, (free.cumsum(1) - 1).clamp_min(0)).masked_fill(~free, -1)
    new = number >= 0
    number = number.clamp_min(0)
    other = (index.gather(1, number) - width).clamp_min(0)
    parent = torch.where(new, rows.gather(1, other // max(1, wide - 1)), rows)
    child = torch.where(new, 1 + other % max(1, wide - 1), torch.where(running & stays, 0, -1))
    perturbed = torch.where(new, best.gather(1, number), own)

    def placed(values: Tensor, others: Tensor) -> Tensor:
        """[P, W] numbers at their rows, and those of rows of no family."""
        at = torch.where(real, families, len(others)).flatten()
        return torch.cat([others, others.new_zeros(1)]).scatter_(0, at, values.flatten())[:-1]

    parents = placed(parent, torch.arange(len(active), device=own.device))
    child = placed(child, torch.where(active, 0, -1))
    drawn = children.logprob[parents].gather(-1, child.clamp_min(0)[:, None])[:, 0].double()
    token_ids = children.token_ids[parents].gather(-1, child.clamp_min(0)[:, None])[:, 0]
    known = (child >= 0) & (token_ids >= 0)
    return Growth(
        parents,
        child,
        Tree(tree.logprob[parents] + torch.where(known, drawn, 0.0), placed(perturbed, tree.perturbed)),
        torch.where(child > 0, branch_seed(seed[parents], position[parents], token_ids), seed[parents]),
    )


def _given_the_best(best: Tensor, noisy: Tensor, behind: Tensor) -> Tensor:
    """Perturbed log-probabilities of the tokens of a row, given what the largest of them must be.

    ``-log(exp(-best) - exp(-largest) + exp(-noisy))`` with largest = noisy - behind, without cancellation (their
    appendix B.3).
    """
    log_difference = torch.where(behind > -0.69, torch.log(-torch.expm1(behind)), torch.log1p(-torch.exp(behind)))
    v = best - noisy + log_difference
    return best - v.clamp_min(0.0) - torch.log1p(torch.exp(-v.abs()))
