"""The ops in plain PyTorch: the truth in tests, and the backend where there is no GPU.

Same names and signatures as ``esamp_core.sample``, which documents them and checks arguments.  On CUDA these functions
may wait for the device (they choose work by looking at values); the Triton backend never does.  A row's bits do not
depend on its batchmates: every reduction runs along the row in one order, or in blocks of a fixed size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esamp_core.config import MIN_TEMPERATURE, FilterOrder
from esamp_core.philox import gumbel, token_bits, vocabulary_bits
from esamp_core.reference_distiller import distiller_forward, distiller_step_, group_rows
from esamp_core.structures import Candidates, Draw, Head, Reweighted, RowParams, Status

__all__ = [
    "distiller_forward",
    "distiller_step_",
    "draw",
    "explore",
    "group_rows",
    "replay",
    "reweight",
    "score_candidates",
    "select_candidates",
    "transform_scores",
]

_NEG_INF = float("-inf")
_LAST_ID = 2**31 - 1
_ABSENT = -(2**63)  # sorts below every key
_SUM_BLOCK = 4096
_SCORE_CHUNK = 2**24  # elements of gathered head rows at a time, 64 MiB in float32


# ---------------------------------------------------------------------------------------------- candidates


def clean_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits as float32 without NaN, +inf and -0.0, and the flags [R] of what was found."""
    x = logits.float() + 0.0  # -0.0 becomes +0.0, which compares and orders as one number
    nan = torch.isnan(x)
    x = x.masked_fill(nan, _NEG_INF)
    pos_inf = x == float("inf")
    has_pos_inf = pos_inf.any(-1)
    only_pos_inf = torch.zeros_like(x).masked_fill(~pos_inf, _NEG_INF)
    x = torch.where(has_pos_inf[:, None], only_pos_inf, x)
    status = nan.any(-1).int() * Status.NAN_LOGITS | has_pos_inf.int() * Status.POS_INF_LOGITS
    return x, status


def invalid_params(params: RowParams) -> Tensor:
    """bool [R]: rows whose parameters are out of range."""
    t, k, top_p, min_p, beta = params
    t_ok = (t == 0) | ((t >= MIN_TEMPERATURE) & torch.isfinite(t))
    return ~(t_ok & (k >= 0) & (top_p > 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1) & torch.isfinite(beta))


def filter_temperature(params: RowParams) -> Tensor:
    """[R, 1]: the temperature that filters see; greedy rows are filtered at temperature 1."""
    t = params.temperature
    return torch.where(t > 0, t, 1.0)[:, None]


def scale_logits(x: Tensor, params: RowParams) -> Tensor:
    """logits / temperature of cleaned logits, kept finite where x is."""
    largest = torch.finfo(torch.float32).max
    scaled = (x / filter_temperature(params)).clamp(-largest, largest) + 0.0  # a tiny quotient may be -0.0
    return scaled.masked_fill(x == _NEG_INF, _NEG_INF)


def _ordered(x: Tensor) -> Tensor:
    """float32 as int64 in the same order."""
    bits = x.contiguous().view(torch.int32).long()
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _descending(keys: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest keys of every row and their places, in descending order.  Keys are unique, so ties cannot arise."""
    if 8 * n < keys.shape[-1]:
        top = keys.topk(n, dim=-1)
        return top.values, top.indices
    ordered = keys.sort(dim=-1, descending=True)
    return ordered.values[:, :n], ordered.indices[:, :n]


def _top_k_mask(scaled: Tensor, top_k: Tensor) -> Tensor:
    """Tokens that are no less than the k-th largest: ties with it stay."""
    widest = int(top_k.clamp(max=scaled.shape[-1]).max()) if top_k.numel() else 0
    if widest <= 0:
        return torch.ones_like(scaled, dtype=torch.bool)
    largest = scaled.topk(widest, dim=-1).values
    place = (top_k - 1).clamp(0, widest - 1)[:, None]
    kth = largest.gather(-1, place)[:, 0].masked_fill((top_k == 0) | (top_k > scaled.shape[-1]), _NEG_INF)
    return scaled >= kth[:, None]


def _top_p_mask(scaled: Tensor, kept: Tensor, top_p: Tensor) -> Tensor:
    """The nucleus of the kept tokens, renormalised.  Of tied tokens the lowest id is dropped first."""
    rows = (top_p < 1).nonzero()[:, 0]
    result = kept.clone()
    if rows.numel() == 0:
        return result
    scaled, kept, top_p = scaled[rows], kept[rows], top_p[rows]
    ids = torch.arange(scaled.shape[-1], device=scaled.device)
    keys = torch.where(kept, (_ordered(scaled) << 32) | ids, _ABSENT)
    keys, places = _descending(keys, max(1, int(kept.sum(-1).max())))
    x = scaled.gather(-1, places).double().masked_fill(keys == _ABSENT, _NEG_INF)
    top = x[:, :1].masked_fill(x[:, :1] == _NEG_INF, 0.0)
    mass = torch.exp(x - top)
    inclusive = mass.cumsum(-1)
    above = (inclusive - mass) / inclusive[:, -1:]
    nucleus = (above < top_p[:, None].double()) & (keys != _ABSENT)
    result[rows] = torch.zeros_like(kept).scatter_(-1, places, nucleus)
    return result


def kept_mask(scaled: Tensor, params: RowParams, filter_order: FilterOrder) -> Tensor:
    """bool [R, V]: the tokens that top-k, top-p and min-p keep."""
    # One addition of a precomputed log, so that every backend compares with the very same float32 number.
    floor = scaled.max(-1, keepdim=True).values + torch.log(params.min_p)[:, None]
    kept = scaled > _NEG_INF
    if filter_order == "vllm":
        kept &= scaled >= floor
    kept &= _top_k_mask(scaled, params.top_k)
    kept = _top_p_mask(scaled, kept, params.top_p)
    if filter_order == "transformers":
        kept &= scaled >= floor
    return kept


def select_candidates(
    logits: Tensor,
    params: RowParams,
    *,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    active: Tensor | None = None,
) -> Candidates:
    x, status = clean_logits(logits)
    vocab_size = x.shape[-1]
    invalid = invalid_params(params)
    inactive = torch.zeros_like(invalid) if active is None else ~active
    status |= invalid.int() * Status.INVALID_PARAMS
    status |= (x == _NEG_INF).all(-1).int() * Status.EMPTY
    status = torch.where(inactive, int(Status.INACTIVE), status)

    scaled = scale_logits(x, params).masked_fill((invalid | inactive)[:, None], _NEG_INF)
    kept = kept_mask(scaled, params, filter_order)
    count = kept.sum(-1)
    width = min(max_candidates, vocab_size)
    status |= (count > width).int() * Status.CAPPED

    ids = torch.arange(vocab_size, device=x.device)
    threshold = scaled.masked_fill(~kept, float("inf")).min(-1).values
    tie_id = torch.where(kept & (scaled == threshold[:, None]), ids, _LAST_ID).min(-1).values
    keys = torch.where(kept, (_ordered(scaled) << 32) | (_LAST_ID - ids), _ABSENT)
    keys, token_ids = _descending(keys, width)
    present = keys != _ABSENT
    chosen = torch.where(present, x.gather(-1, token_ids), _NEG_INF)
    return Candidates(token_ids.masked_fill(~present, -1), chosen, count, threshold, tie_id, status.int())


# ---------------------------------------------------------------------------------------------- novelty


def score_candidates(direction: Tensor, head: Head, token_ids: Tensor, *, transform: bool = True) -> Tensor:
    rows, width = token_ids.shape
    local = token_ids - head.vocab_start
    present = (token_ids >= 0) & (local >= 0) & (local < head.vocab_size)
    local = local.clamp(0, head.vocab_size - 1)
    chunk = max(1, _SCORE_CHUNK // max(1, width * head.hidden_size))
    dots = torch.empty(rows, width, device=direction.device)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        v = direction[part].float()
        dots[part] = (head.weight[local[part]].float() * v[:, None]).sum(-1)
        if head.center is not None:
            dots[part] -= (head.center.float() * v).sum(-1, keepdim=True)
    if head.bias is not None:
        dots += head.bias.float()[local]
    dots = torch.where(present, dots, 0.0)
    return transform_scores(dots, head) if transform else dots


def transform_scores(dots: Tensor, head: Head) -> Tensor:
    scores = dots * head.scale
    if head.softcap is not None:
        scores = head.softcap * torch.tanh(scores / head.softcap)
    return scores if head.clip is None else scores.clamp(-head.clip, head.clip)


def reweight(
    candidates: Candidates,
    projection: Tensor,
    params: RowParams,
    *,
    model_logits: Tensor | None = None,
    model_weight: float = 1.0,
) -> Reweighted:
    logits, status = candidates.logits, candidates.status
    present = candidates.token_ids >= 0
    original = logits if model_logits is None else model_logits.float()
    # The formula.  With model_weight 1 and unedited logits: (1 + beta) * logit - beta * distilled.
    novelty = model_weight * original - projection
    reweighted = logits + params.beta[:, None] * novelty

    explored = (params.beta != 0) & (status & (Status.POS_INF_LOGITS | Status.INVALID_PARAMS) == 0)
    # What the draw exponentiates must be finite too: a finite novelty may overflow when divided by the temperature.
    t = filter_temperature(params)
    top = logits.max(-1).values.masked_fill(~present[:, 0], 0.0)[:, None]
    finite = torch.isfinite(novelty) & torch.isfinite((reweighted - top) / t)
    broken = explored & (present & ~finite).any(-1)
    status = status | broken.int() * Status.NONFINITE_NOVELTY
    use = (explored & ~broken)[:, None] & present
    reweighted, novelty = torch.where(use, reweighted, logits), torch.where(use, novelty, 0.0)

    # A common offset of novelty must not promote or bury the tail beyond the cap: shift the scored logits so that
    # they keep their base probability mass.  Greedy rows never draw from the tail and need no shift.
    shifted = ((status & Status.CAPPED != 0) & (params.temperature > 0))[:, None]
    top, new_top = (torch.where(shifted, m, 0.0) for m in (top, reweighted.max(-1, keepdim=True).values))
    lost = _log_sum_exp((logits - top) / t) - _log_sum_exp((reweighted - new_top) / t)
    # The offset goes first: added last, a huge one would swallow the differences between candidates.
    kept_mass = (reweighted - new_top) + (top + t * lost[:, None])
    reweighted = torch.where(shifted & use, kept_mass, reweighted)
    return Reweighted(reweighted, novelty, status.int())


# ---------------------------------------------------------------------------------------------- draw


def _log_sum_exp(x: Tensor) -> Tensor:
    """log sum exp along the row, summed in blocks of a fixed size; -inf for an empty row."""
    top = x.max(-1, keepdim=True).values
    top = top.masked_fill(top == _NEG_INF, 0.0)
    terms = torch.exp(x - top)
    blocks = -(-terms.shape[-1] // _SUM_BLOCK)
    terms = torch.nn.functional.pad(terms, (0, blocks * _SUM_BLOCK - terms.shape[-1]))
    terms = terms.view(terms.shape[0], blocks, _SUM_BLOCK)
    return top[:, 0] + torch.log(terms.sum(-1).sum(-1))


def tail_mask(scaled: Tensor, candidates: Candidates) -> Tensor:
    """bool [R, V]: kept tokens beyond the scored ones, for rows that are capped."""
    ids = torch.arange(scaled.shape[-1], device=scaled.device)
    threshold, tie_id = candidates.threshold[:, None], candidates.tie_id[:, None]
    kept = (scaled > threshold) | ((scaled == threshold) & (ids >= tie_id))
    return kept.scatter(-1, candidates.token_ids.clamp_min(0), False)


class _Support:
    """Everything that a row can draw, as z = (logit - the row's largest logit) / temperature.

    The scored candidates [R, C], and for capped rows the tail [rows, V], which keeps its own logit.
    """

    def __init__(self, candidates: Candidates, new: Tensor, logits: Tensor, params: RowParams) -> None:
        # Subtracting the top before dividing keeps float32 fine where draws are decided.
        # The first candidate need not be it: division by the temperature may round or clamp logits to one number.
        top = candidates.logits.max(-1, keepdim=True).values.masked_fill(candidates.token_ids[:, :1] < 0, 0.0)
        t = filter_temperature(params)
        absent = candidates.token_ids < 0
        self.base = ((candidates.logits - top) / t).masked_fill(absent, _NEG_INF)
        self.scored = ((new - top) / t).masked_fill(absent, _NEG_INF)
        self.base_mass, self.mass = _log_sum_exp(self.base), _log_sum_exp(self.scored)
        self.rows = (candidates.status & Status.CAPPED != 0).nonzero()[:, 0]
        if self.rows.numel():
            part, part_params = Candidates(*(f[self.rows] for f in candidates)), params.take(self.rows)
            x, _ = clean_logits(logits[self.rows])
            in_tail = tail_mask(scale_logits(x, part_params), part)
            self.tail = ((x - top[self.rows]) / t[self.rows]).clamp_max(0.0).masked_fill(~in_tail, _NEG_INF)
            tail_mass = _log_sum_exp(self.tail)
            self.base_mass, self.mass = (
                mass.index_copy(0, self.rows, torch.logaddexp(mass[self.rows], tail_mass))
                for mass in (self.base_mass, self.mass)
            )

    def z_of(self, token_ids: Tensor, candidates: Candidates) -> Tensor:
        """z [R] of one token per row; -inf outside the support."""
        match = (candidates.token_ids == token_ids[:, None]) & (token_ids >= 0)[:, None]
        z = torch.where(match, self.scored, _NEG_INF).max(-1).values
        if self.rows.numel():
            wanted = token_ids[self.rows]
            known = (wanted >= 0) & (wanted < self.tail.shape[-1])
            tail_z = self.tail.gather(-1, torch.where(known, wanted, 0)[:, None])[:, 0].masked_fill(~known, _NEG_INF)
            z = z.index_copy(0, self.rows, torch.maximum(z[self.rows], tail_z))
        return z


def _best(perturbed: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of every row, and its token; of equals the lowest id."""
    best = perturbed.max(-1).values
    tied = (perturbed == best[:, None]) & (token_ids >= 0)
    return best, torch.where(tied, token_ids, _LAST_ID).min(-1).values


def draw(
    candidates: Candidates,
    reweighted: Reweighted,
    logits: Tensor,
    params: RowParams,
    seed: Tensor,
    position: Tensor,
    *,
    model_logits: Tensor | None = None,
) -> Draw:
    ids, status = candidates.token_ids, reweighted.status
    support = _Support(candidates, reweighted.logits, logits, params)
    greedy = params.temperature == 0
    noise = gumbel(token_bits(seed, position, ids.clamp_min(0)))
    perturbed = torch.where(greedy[:, None], reweighted.logits, support.scored + noise)
    best, token = _best(perturbed.masked_fill(ids < 0, _NEG_INF), ids)
    if support.rows.numel():
        rows = support.rows
        noise = gumbel(vocabulary_bits(seed[rows], position[rows], logits.shape[-1]))
        tail_best, tail_token = _best(support.tail + noise, torch.arange(logits.shape[-1], device=ids.device)[None])
        tail_wins = (tail_best > best[rows]) | ((tail_best == best[rows]) & (tail_token < token[rows]))
        tail_wins &= ~greedy[rows]
        token = token.index_copy(0, rows, torch.where(tail_wins, tail_token, token[rows]))

    drawn = candidates.count > 0
    token = torch.where(drawn, token, -1)
    scored = (ids == token[:, None]) & drawn[:, None]
    novelty = torch.where(scored, reweighted.novelty, 0.0).sum(-1)
    logprob = support.z_of(token, candidates) - support.mass
    p = torch.exp(support.scored - support.mass[:, None])
    gain = torch.where(p > 0, support.scored - support.base, 0.0)
    kl = (p * gain).sum(-1) + support.base_mass - support.mass
    raw, _ = clean_logits(logits if model_logits is None else model_logits)
    total = _log_sum_exp(raw)
    total = total.masked_fill(total == _NEG_INF, 0.0)  # nothing but -inf in model_logits: no -inf - -inf
    base = raw.gather(-1, token.clamp_min(0)[:, None])[:, 0] - total
    stochastic = drawn & ~greedy
    return Draw(
        token_ids=token,
        logprob=torch.where(stochastic, logprob, 0.0),
        base_logprob=torch.where(drawn, base, 0.0),
        novelty=novelty,
        kl=torch.where(stochastic, kl, 0.0).clamp_min(0.0),
        count=candidates.count,
        status=status,
    )


def explore(
    logits: Tensor,
    params: RowParams,
    seed: Tensor,
    position: Tensor,
    *,
    direction: Tensor | None = None,
    head: Head | None = None,
    model_logits: Tensor | None = None,
    model_weight: float = 1.0,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    active: Tensor | None = None,
) -> Draw:
    candidates = select_candidates(
        logits, params, filter_order=filter_order, max_candidates=max_candidates, active=active
    )
    unexplored = Reweighted(candidates.logits, torch.zeros_like(candidates.logits), candidates.status)
    reweighted = unexplored
    if direction is not None and head is not None:
        # beta = 0 rows are not scored at all: they cost nothing, and 0 * inf cannot arise.
        rows = (params.beta != 0).nonzero()[:, 0]
        part = Candidates(*(f[rows] for f in candidates))
        projection = score_candidates(direction[rows], head, part.token_ids)
        original = None if model_logits is None else _gather(model_logits[rows], part.token_ids)
        explored = reweight(part, projection, params.take(rows), model_logits=original, model_weight=model_weight)
        reweighted = Reweighted(*(u.index_copy(0, rows, e) for u, e in zip(unexplored, explored, strict=True)))
    return draw(candidates, reweighted, logits, params, seed, position, model_logits=model_logits)


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
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
) -> Tensor:
    candidates = select_candidates(logits, params, filter_order=filter_order, max_candidates=max_candidates)
    original = None if model_logits is None else _gather(model_logits, candidates.token_ids)
    projection = _gather(distilled, candidates.token_ids)
    new = reweight(candidates, projection, params, model_logits=original, model_weight=model_weight)
    support = _Support(candidates, new.logits, logits, params)
    # A row without candidates has no mass: its -inf must be no -inf - -inf, in the gradient neither.
    mass = torch.where(candidates.count > 0, support.mass, 0.0)
    logprob = support.z_of(token_ids, candidates) - mass
    return torch.where(params.temperature > 0, logprob, 0.0)
