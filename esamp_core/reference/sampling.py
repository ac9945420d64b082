"""Reweighting and the draw in plain PyTorch.

On CUDA these functions may wait for the device (they choose work by looking at values); the Triton backend never does.
A row's bits do not depend on its batchmates: every reduction runs along the row in one order, or in blocks of a fixed
size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esamp_core.base.config import FilterOrder
from esamp_core.base.philox import (
    CODE_BELOW,
    LARGEST_GUMBEL,
    code_uniform,
    gumbel,
    token_bits,
    vocabulary_bits,
)
from esamp_core.base.tensors import Candidates, Draw, Head, Reweighted, RowParams, Status
from esamp_core.reference.candidates import (
    LARGEST,
    LAST_ID,
    NEG_INF,
    clean_logits,
    filter_temperature,
    join_rows,
    log_sum_exp,
    relative,
    row_chunks,
    scale_logits,
    select_candidates,
    top_and_log_sum,
)
from esamp_core.reference.scores import score_candidates

FLAT = 1e-6  # variance of logits under which a row has no slope: all its candidates are as likely as each other


def reweight(
    candidates: Candidates,
    projection: Tensor,
    params: RowParams,
    *,
    model_logits: Tensor | None = None,
    model_weight: float = 1.0,
    neutral: bool = False,
) -> Reweighted:
    logits, status = candidates.logits, candidates.status
    present = candidates.token_ids >= 0
    original = logits if model_logits is None else model_logits.float()
    # The formula.  With model_weight 1 and unedited logits: (1 + beta) * logit - beta * distilled.
    novelty = model_weight * original - projection
    t = filter_temperature(params)
    top = logits.max(-1).values.masked_fill(~present[:, 0], 0.0)[:, None]
    finite = torch.isfinite(novelty)
    if neutral:
        novelty = torch.where(finite, _neutral(novelty, 0.5 * logits - 0.5 * top, t, present & finite), novelty)
    # Here and below of halves, as in `relative`: terms may be more than float32 holds, and their sum less again.
    reweighted = 2 * (0.5 * logits + params.beta[:, None] * (0.5 * novelty))

    explored = (params.beta != 0) & (status & (Status.POS_INF_LOGITS | Status.INVALID_PARAMS) == 0)
    new_top = reweighted.masked_fill(~present, NEG_INF).amax(-1, keepdim=True)
    # Others may be too low for float32: they have no probability.  The largest may not, nor too high.
    lost_top = ~torch.isfinite(new_top)[:, 0] & present.any(-1)
    broken = explored & (lost_top | (present & ~torch.isfinite(novelty)).any(-1))
    status = status | broken.int() * Status.NONFINITE_NOVELTY
    use = (explored & ~broken)[:, None] & present
    reweighted = torch.where(use, reweighted.clamp_min(-LARGEST), logits)
    novelty = torch.where(use, novelty, 0.0)

    # A common offset of novelty must not promote or bury the tail beyond the cap: shift the scored logits so that
    # they keep their base probability mass.  Greedy rows never draw from the tail and need no shift.
    shifted = ((status & Status.CAPPED != 0) & (params.temperature > 0))[:, None]
    new_top = reweighted.amax(-1, keepdim=True).masked_fill(~present[:, :1], 0.0)
    lost = log_sum_exp(relative(logits, top, t)) - log_sum_exp(relative(reweighted, new_top, t))
    # The offset goes first: added last, a huge one would swallow the differences between candidates.
    kept_mass = 2 * ((0.5 * reweighted - 0.5 * new_top) + (0.5 * top + 0.5 * t * lost[:, None]))
    reweighted = torch.where(shifted & use, kept_mass.clamp_min(-LARGEST), reweighted)
    return Reweighted(reweighted, novelty, status.int())


def _neutral(novelty: Tensor, below: Tensor, t: Tensor, present: Tensor) -> Tensor:
    """What is left of novelty [R, C] after its regression on the logits under p = softmax(logits / t).

    below: half of logits less the row's largest.  dH/dbeta = -Cov_p(novelty, log p) is then 0.
    """
    # The largest of each row is taken off first, or of what they have in common its rounding would be left.
    below, half = torch.where(present, below, 0.0), torch.where(present, 0.5 * novelty, NEG_INF)
    half = torch.where(present, half - half.amax(-1, keepdim=True), 0.0)
    weight = torch.where(present, torch.exp(below / (0.5 * t)), 0.0)
    p = weight / weight.sum(-1, keepdim=True).clamp_min(1.0)
    below = below - (p * below).sum(-1, keepdim=True)
    half = half - (p * half).sum(-1, keepdim=True)
    # The product first: the square alone may be more than float32 holds where p is 0.
    slope = (p * half * below).sum(-1, keepdim=True) / (p * below * below).sum(-1, keepdim=True).clamp_min(FLAT / 4)
    return 2 * (half - slope * below)


class Support:
    """What a row can draw of its listed candidates, as z = (logit - the largest) / temperature, [R, C]."""

    def __init__(self, candidates: Candidates, new: Tensor, params: RowParams) -> None:
        # Subtracting the top before dividing keeps float32 fine where draws are decided.
        # The first candidate need not be it: division by the temperature may round or clamp logits to one number.
        absent = candidates.token_ids < 0
        self.top, new_top = (
            x.amax(-1, keepdim=True).masked_fill(absent[:, :1], 0.0)
            for x in (candidates.logits, new.masked_fill(absent, NEG_INF))
        )
        # New logits have a top of their own, or what novelty has in common would swallow the noise and log sum exp.
        # A tail is compared with them, and they were shifted so that they can be.
        shared = ((candidates.status & Status.CAPPED != 0) & (params.temperature > 0))[:, None]
        t = filter_temperature(params)
        # Finite: what was too far below for float32 may be likely now, and KL tells from how far.
        self.base = relative(candidates.logits, self.top, t).clamp_min(-LARGEST).masked_fill(absent, NEG_INF)
        none = absent | (new == NEG_INF)
        self.scored = relative(new, torch.where(shared, self.top, new_top), t).masked_fill(none, NEG_INF)

    def z_of(self, token_ids: Tensor, candidates: Candidates) -> Tensor:
        """z [R] of one token per row; -inf where it is not listed."""
        match = (candidates.token_ids == token_ids[:, None]) & (token_ids >= 0)[:, None]
        return torch.where(match, self.scored, NEG_INF).amax(-1)


class _Tail(NamedTuple):
    """The kept tokens beyond the listed ones, which keep their own logit, of the n capped rows."""

    rows: Tensor  # int64 [n]
    mass: Tensor  # [n] log sum exp of z
    token: Tensor  # int64 [n], one token of each, -1 for none
    z: Tensor  # [n], its z; -inf where it is not in the tail
    perturbed: Tensor  # [n], what it was picked by

    def add_mass(self, mass: Tensor) -> Tensor:
        """log mass [R] of the listed tokens, and of the tail where there is one."""
        # Not torch.logaddexp: in a vector register it rounds otherwise than alone, and rows would depend on batchmates.
        return mass.index_copy(0, self.rows, log_sum_exp(torch.stack([mass[self.rows], self.mass], -1)))


# From z [m, V] (-inf: not in the tail), its log mass [m] and which rows [m] it is of: a number for each, and the token
# that it belongs to.
_Pick = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _tail(candidates: Candidates, top: Tensor, logits: Tensor, params: RowParams, pick: _Pick) -> _Tail:
    capped = (candidates.status & Status.CAPPED != 0).nonzero()[:, 0]
    parts = []
    for part in row_chunks(len(capped), logits.shape[1], logits.device):
        rows = capped[part]
        part_params = params.take(rows)
        x, _ = clean_logits(logits[rows])
        in_tail = tail_mask(scale_logits(x, part_params), Candidates(*(f[rows] for f in candidates)))
        z = relative(x, top[rows], filter_temperature(part_params)).clamp_max(0.0).masked_fill(~in_tail, NEG_INF)
        mass = log_sum_exp(z)
        perturbed, token = pick(z, mass, rows)
        token_z = z.gather(-1, token.clamp_min(0)[:, None])[:, 0].masked_fill(token < 0, NEG_INF)
        parts.append(_Tail(rows, mass, token, token_z, perturbed))
    return join_rows(parts)


def tail_mask(scaled: Tensor, candidates: Candidates) -> Tensor:
    """bool [R, V]: kept tokens beyond the listed ones."""
    ids = torch.arange(scaled.shape[-1], device=scaled.device)
    threshold, tie_id = candidates.threshold[:, None], candidates.tie_id[:, None]
    kept = (scaled > threshold) | ((scaled == threshold) & (ids >= tie_id))
    return kept.scatter(-1, candidates.token_ids.clamp_min(0), False)


def _best(perturbed: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of every row, and its token; of equals the lowest id."""
    best = perturbed.max(-1).values
    tied = (perturbed == best[:, None]) & (token_ids >= 0)
    return best, torch.where(tied, token_ids, LAST_ID).min(-1).values


def _by_code(
    codes: Tensor, scored: Tensor, token_ids: Tensor, tail_mass: Tensor, fresh: Tensor
) -> tuple[Tensor, Tensor]:
    """The token [R] whose share of [0, 1), in the order of ids, holds the code; -1 is the tail, whose share is last.

    Second, the new codes [R, 2].  A row that no sibling is expected to be with needs its code no longer, and gets a
    fresh one [R]: so rounding, which grows with every division by a share, never grows beyond the number of siblings.
    """
    top = scored.amax(-1, keepdim=True)
    top = top.masked_fill(top == NEG_INF, 0.0).double()
    weight = torch.exp(scored.double() - top)
    rest = torch.exp(tail_mass.double() - top[:, 0])
    ids, order = token_ids.masked_fill(weight == 0, LAST_ID).sort(-1)
    weight = weight.gather(-1, order)
    upper = weight.cumsum(-1)
    total = upper[:, -1] + rest
    aim = codes[:, 0] * total
    last = (weight > 0).sum(-1) - 1  # rounding must not lead beyond the last token that can be drawn
    place = torch.minimum((upper <= aim[:, None]).sum(-1), last).clamp_min(0)[:, None]
    in_tail = (aim >= upper[:, -1]) & (rest > 0)
    share = torch.where(in_tail, rest, weight.gather(-1, place)[:, 0])
    below = torch.where(in_tail, upper[:, -1], upper.gather(-1, place)[:, 0] - share)
    siblings = codes[:, 1] * (share / total)
    code = torch.where(siblings > 1, ((aim - below) / share).clamp(0.0, CODE_BELOW), fresh)
    return torch.where(in_tail, -1, ids.gather(-1, place)[:, 0]), torch.stack([code, siblings], -1)


def _base_logprob(logits: Tensor, token_ids: Tensor) -> Tensor:
    """[R]: log-probability of one token per row under the whole vocabulary at temperature 1."""
    parts = [torch.zeros(0, dtype=torch.float32, device=logits.device)]
    for part in row_chunks(logits.shape[0], logits.shape[1], logits.device):
        x, _ = clean_logits(logits[part])
        top, rest = top_and_log_sum(x)
        own = x.gather(-1, token_ids[part].clamp_min(0)[:, None])[:, 0]
        # model_logits may be -inf, of the token or throughout: no -inf - -inf
        logprob = (relative(own, top, torch.ones_like(top)) - rest).clamp_min(-LARGEST)
        parts.append(torch.where(own == NEG_INF, NEG_INF, logprob))
    return torch.cat(parts)


def draw(
    candidates: Candidates,
    reweighted: Reweighted,
    logits: Tensor,
    params: RowParams,
    seed: Tensor,
    position: Tensor,
    *,
    codes: Tensor | None = None,
    model_logits: Tensor | None = None,
) -> Draw:
    ids, status = candidates.token_ids, reweighted.status
    support = Support(candidates, reweighted.logits, params)
    drawn, greedy = candidates.count > 0, params.temperature == 0
    noise = gumbel(token_bits(seed, position, ids.clamp_min(0)))
    perturbed = torch.where(greedy[:, None], reweighted.logits, support.scored + noise)
    best, token = _best(perturbed.masked_fill(ids < 0, NEG_INF), ids)
    if codes is not None:
        coded, fresh = (codes[:, 0] >= 0) & drawn & ~greedy, code_uniform(seed, position)

    def by_code(mass: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert codes is not None
        return _by_code(codes[rows], support.scored[rows], ids[rows], mass, fresh[rows])

    def best_of_tail(z: Tensor, mass: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        to_beat = best[rows]
        if codes is not None:  # the code has chosen between tail and list; within the tail the noise does
            in_tail = by_code(mass, rows)[0] < 0
            likeliest = z.argmax(-1, keepdim=True)
            its_noise = gumbel(token_bits(seed[rows], position[rows], likeliest))
            its_own = (z.gather(-1, likeliest) + its_noise)[:, 0]
            to_beat = torch.where(coded[rows], torch.where(in_tail, its_own, torch.inf), to_beat)
        # Whose noise is looked at: only tokens that the largest noise could lift over what is to beat; of those only
        # tokens with v <= exp(z - to_beat), because noise is at most -log(v).  One token is looked at in any case.
        near = z >= to_beat[:, None] - LARGEST_GUMBEL
        some = None
        if 4 * int(near.count_nonzero()) < z.shape[1]:
            near = near.any(0)
            near[0] = True
            some = near.nonzero()[:, 0]
            bits, z = token_bits(seed[rows], position[rows], some.expand(len(rows), -1)), z[:, some]
        else:
            bits = vocabulary_bits(seed[rows], position[rows], z.shape[1])
        can_win = (bits * 2.0**-32 <= 1.001 * torch.exp(z - to_beat[:, None])).any(0)
        can_win[0] = True
        few = can_win.nonzero()[:, 0]
        return _best(z[:, few] + gumbel(bits[:, few]), (few if some is None else some[few])[None])

    tail = _tail(candidates, support.top, logits, params, best_of_tail)
    listed, listed_best = token[tail.rows], best[tail.rows]
    wins = (tail.perturbed > listed_best) | ((tail.perturbed == listed_best) & (tail.token < listed))
    wins &= ~greedy[tail.rows]
    if codes is not None:
        every = torch.arange(len(ids), device=ids.device)
        picked, left = by_code(torch.full_like(best, NEG_INF).index_copy(0, tail.rows, tail.mass), every)
        codes.copy_(torch.where(coded[:, None], left, codes))
        token = torch.where(coded & (picked >= 0), picked, token)
        wins = torch.where(coded[tail.rows], picked[tail.rows] < 0, wins)
    token = token.index_copy(0, tail.rows, torch.where(wins, tail.token, token[tail.rows]))

    token = torch.where(drawn, token, -1)
    scored = (ids == token[:, None]) & drawn[:, None]
    novelty = torch.where(scored, reweighted.novelty, 0.0).sum(-1)
    base_mass, mass = (tail.add_mass(log_sum_exp(z)) for z in (support.base, support.scored))
    z = support.z_of(token, candidates)
    logprob = z.index_copy(0, tail.rows, torch.where(wins, tail.z, z[tail.rows])) - mass
    p = torch.exp(support.scored - mass[:, None])
    gain = torch.where(p > 0, support.scored - support.base, 0.0)
    # Clamped: where the tokens likely now were 1e38 nats below the top, their mean may be more than float32 holds.
    kl = ((p * gain).sum(-1) + base_mass - mass).clamp(0.0, LARGEST)
    stochastic = drawn & ~greedy
    return Draw(
        token_ids=token,
        logprob=torch.where(stochastic, logprob, 0.0),
        base_logprob=torch.where(drawn, _base_logprob(logits if model_logits is None else model_logits, token), 0.0),
        novelty=novelty,
        kl=torch.where(stochastic, kl, 0.0),
        count=candidates.count,
        status=status,
    )


def explore(
    logits: Tensor,
    params: RowParams,
    seed: Tensor,
    position: Tensor,
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
    candidates = select_candidates(
        logits, params, filter_order=filter_order, max_candidates=max_candidates, active=active
    )
    reweighted = _unexplored(candidates)
    if direction is not None and head is not None:
        # beta = 0 rows are not scored at all: they cost nothing, and 0 * inf cannot arise.
        rows = (params.beta != 0).nonzero()[:, 0]
        part = Candidates(*(f[rows] for f in candidates))
        projection = score_candidates(direction[rows], head, part.token_ids)
        original = None if model_logits is None else _gather(model_logits[rows], part.token_ids)
        explored = reweight(
            part, projection, params.take(rows), model_logits=original, model_weight=model_weight, neutral=neutral
        )
        reweighted = Reweighted(*(u.index_copy(0, rows, e) for u, e in zip(reweighted, explored, strict=True)))
    return draw(candidates, reweighted, logits, params, seed, position, codes=codes, model_logits=model_logits)


def _unexplored(candidates: Candidates) -> Reweighted:
    return Reweighted(candidates.logits, torch.zeros_like(candidates.logits), candidates.status)


def _gather(table: Tensor, token_ids: Tensor) -> Tensor:
    return table.gather(-1, token_ids.clamp_min(0)).float()


def replay(
    logits: Tensor,
    distilled: Tensor,
    token_ids: Tensor,
    params: RowParams,
    *,
    model_logits: Tensor | None = None,
    model_weight: float = 1.0,
    neutral: bool = False,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
) -> Tensor:
    candidates = select_candidates(logits, params, filter_order=filter_order, max_candidates=max_candidates)
    original = None if model_logits is None else _gather(model_logits, candidates.token_ids)
    projection = _gather(distilled, candidates.token_ids)

    def explored(part: Candidates, rows: Tensor) -> Reweighted:
        own = None if original is None else original[rows]
        return reweight(
            part, projection[rows], params.take(rows), model_logits=own, model_weight=model_weight, neutral=neutral
        )

    # Only what is explored: numbers that are not used, and not finite, would make the gradient NaN.
    new = _unexplored(candidates)
    with torch.no_grad():
        rows = (params.beta != 0).nonzero()[:, 0]
        broken = explored(Candidates(*(f[rows] for f in candidates)), rows).status & Status.NONFINITE_NOVELTY != 0
        rows = rows[~broken]
    found = explored(Candidates(*(f[rows] for f in candidates)), rows)
    new = Reweighted(*(u.index_copy(0, rows, e) for u, e in zip(new, found, strict=True)))
    support = Support(candidates, new.logits, params)
    known = token_ids.masked_fill(token_ids >= logits.shape[1], -1)
    tail = _tail(candidates, support.top, logits, params, lambda z, mass, rows: (z[:, 0], known[rows]))
    # A row without candidates has no mass: its -inf must be no -inf - -inf, in the gradient neither.
    mass = torch.where(candidates.count > 0, tail.add_mass(log_sum_exp(support.scored)), 0.0)
    z = support.z_of(token_ids, candidates)
    logprob = z.index_copy(0, tail.rows, torch.maximum(z[tail.rows], tail.z)) - mass
    return torch.where(params.temperature > 0, logprob, 0.0)
