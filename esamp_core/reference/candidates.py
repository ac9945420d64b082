"""Candidate selection in plain PyTorch: cleaning, the filters, and the list of the most likely tokens.

What keeps the cost down: a row is read
in whole only for its block maxima (and its mass, for top-p alone).  They give a bound that no kept token is below, and
everything else, filters and list, looks only at the tokens that reach it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from esamp_core.base.config import MIN_TEMPERATURE, FilterOrder
from esamp_core.base.tensors import Candidates, RowParams, Status

NEG_INF = float("-inf")
LAST_ID = 2**31 - 1
LARGEST = torch.finfo(torch.float32).max
ABSENT = -(2**63)  # sorts below every key
_SUM_BLOCK = 4096
_CHUNK = 2**18  # elements at a time on a CPU: 1 MiB of float32, which stays in its cache
_BLOCK = 128  # neighbouring tokens that share one maximum
_BINS, _BINS_PER_NAT = 512, 16  # of the mass, by how far a token is below the row's top


def row_chunks(rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that are worked on together; one slice, maybe empty, where there is nothing to gain."""
    step = max(1, _CHUNK // max(1, vocab_size)) if device.type == "cpu" else max(1, rows)
    return (slice(start, start + step) for start in range(0, max(1, rows), step))


T = TypeVar("T", bound="tuple[Any, ...]")


def take_rows(fields: T, part: slice) -> T:
    """Some rows of a tuple of tensors [R, ...]."""
    return type(fields)(*(field[part] for field in fields))


def join_rows(parts: Sequence[T]) -> T:
    """All rows of several tuples of tensors."""
    return parts[0] if len(parts) == 1 else type(parts[0])(*(torch.cat(f) for f in zip(*parts, strict=True)))


def clean_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits as float32 without NaN, +inf and -0.0, and the flags [R] of what was found."""
    x = logits.float() + 0.0  # -0.0 becomes +0.0, which compares and orders as one number
    status = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    top = x.amax(-1)  # a NaN anywhere makes it NaN
    rows = (torch.isnan(top) | (top == float("inf"))).nonzero()[:, 0]
    if rows.numel():
        part = x[rows]
        nan = torch.isnan(part)
        part = part.masked_fill(nan, NEG_INF)
        pos_inf = part == float("inf")
        has_pos_inf = pos_inf.any(-1)
        only_pos_inf = torch.zeros_like(part).masked_fill(~pos_inf, NEG_INF)
        x = x.index_copy(0, rows, torch.where(has_pos_inf[:, None], only_pos_inf, part))
        flags = nan.any(-1).int() * Status.NAN_LOGITS | has_pos_inf.int() * Status.POS_INF_LOGITS
        status = status.index_copy(0, rows, flags.int())
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
    scaled = x / filter_temperature(params)
    clamped = scaled.clamp(-LARGEST, LARGEST) + 0.0  # a tiny quotient may be -0.0
    # Only where -inf came out does it matter whether -inf went in.
    rows = (scaled.amin(-1) == NEG_INF).nonzero()[:, 0]
    return clamped.index_copy(0, rows, clamped[rows].masked_fill(x[rows] == NEG_INF, NEG_INF))


def relative(x: Tensor, top: Tensor, temperature: Tensor) -> Tensor:
    """(x - top) / temperature."""
    # Of halves: the difference of two float32 may be twice what float32 holds.  Otherwise the bits are the same.
    return (0.5 * x - 0.5 * top) / (0.5 * temperature)


def log_sum_exp(x: Tensor) -> Tensor:
    """log sum exp along the row, summed in blocks of a fixed size; -inf for an empty row."""
    top, rest = top_and_log_sum(x)
    return top + rest


def top_and_log_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of every row (0 for -inf), and log sum exp of the row less it, which their sum may swallow."""
    top = x.amax(-1, keepdim=True)
    top = top.masked_fill(top == NEG_INF, 0.0)
    total = _blockwise_sum(torch.exp(x - top))
    none = total == 0  # apart, for the gradient: that of log 0 is infinite
    return top[:, 0], torch.log(total.masked_fill(none, 1.0)).masked_fill(none, NEG_INF)


def _blockwise_sum(terms: Tensor) -> Tensor:
    """Sum along the row in blocks of a fixed size: no number of threads or rows changes its order."""
    blocks = -(-terms.shape[-1] // _SUM_BLOCK)
    terms = torch.nn.functional.pad(terms, (0, blocks * _SUM_BLOCK - terms.shape[-1]))
    return terms.view(terms.shape[0], blocks, _SUM_BLOCK).sum(-1).sum(-1)


def ordered(x: Tensor) -> Tensor:
    """float32 as int64 in the same order."""
    bits = x.contiguous().view(torch.int32).long()
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def descending(keys: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest keys of every row and their places, in descending order.  Keys are unique, so ties cannot arise."""
    if 8 * n < keys.shape[-1]:
        top = keys.topk(n, dim=-1)
        return top.values, top.indices
    ordered = keys.sort(dim=-1, descending=True)
    return ordered.values[:, :n], ordered.indices[:, :n]


def _kth_largest(scaled: Tensor, top_k: Tensor) -> Tensor:
    """[R]: the k-th largest number of every row; -inf where top-k is off or asks for more than there is."""
    widest = int(top_k.clamp(max=scaled.shape[-1]).max()) if top_k.numel() else 0
    if widest <= 0:
        return torch.full_like(scaled[:, 0], NEG_INF)
    place = (top_k - 1).clamp(0, widest - 1)[:, None]
    kth = scaled.topk(widest, dim=-1).values.gather(-1, place)[:, 0]
    return kth.masked_fill((top_k <= 0) | (top_k > scaled.shape[-1]), NEG_INF)


def _top_p_mask(scaled: Tensor, kept: Tensor, top_p: Tensor, token_ids: Tensor, mass: Tensor | None) -> Tensor:
    """The nucleus of the kept tokens, renormalised.  Of tied tokens the lowest id is dropped first.

    mass: float64 [R] where more belongs to what is renormalised than ``kept`` shows, relative to the row's top; else 0.
    """
    rows = (top_p < 1).nonzero()[:, 0]
    result = kept.clone()
    if rows.numel() == 0:
        return result
    scaled, kept, top_p, token_ids = scaled[rows], kept[rows], top_p[rows], token_ids[rows]
    keys = torch.where(kept, (ordered(scaled) << 32) | token_ids, ABSENT)
    keys, places = descending(keys, max(1, int(kept.sum(-1).max())))
    x = scaled.gather(-1, places).double().masked_fill(keys == ABSENT, NEG_INF)
    weight = _weights(x, x[:, :1])
    inclusive = weight.cumsum(-1)
    total = inclusive[:, -1:]
    if mass is not None:
        total = torch.where(mass[rows, None] > 0, mass[rows, None], total)
    nucleus = ((inclusive - weight) / total < top_p[:, None].double()) & (keys != ABSENT)
    result[rows] = torch.zeros_like(kept).scatter_(-1, places, nucleus)
    return result


def _weights(x: Tensor, top: Tensor) -> Tensor:
    """exp(x - top), 0 in a row without tokens."""
    return torch.exp(x - top.masked_fill(top == NEG_INF, 0.0))


def _floor(top: Tensor, params: RowParams) -> Tensor:
    """[R]: the least scaled logit that min-p keeps, given the largest."""
    # One addition of a precomputed log, so that every backend compares with the very same float32 number.
    return top + torch.log(params.min_p)


def kept_mask(
    scaled: Tensor,
    params: RowParams,
    filter_order: FilterOrder,
    token_ids: Tensor | None = None,
    mass: Tensor | None = None,
) -> Tensor:
    """bool [R, N]: the tokens that top-k, top-p and min-p keep.

    scaled: [R, N] of these token_ids (int64 [R, N]; default 0..N-1), which must hold all tokens that can be kept; -inf
    is no token.  mass: see :func:`_top_p_mask`.
    """
    if token_ids is None:
        token_ids = torch.arange(scaled.shape[-1], device=scaled.device).expand(scaled.shape)
    floor = _floor(scaled.amax(-1), params)
    least = _kth_largest(scaled, params.top_k).clamp_min(-LARGEST)
    if filter_order == "vllm":
        least = torch.maximum(least, floor)
    kept = _top_p_mask(scaled, scaled >= least[:, None], params.top_p, token_ids, mass)
    if filter_order == "transformers":
        kept &= scaled >= floor[:, None]
    return kept


class _Near(NamedTuple):
    """The tokens of each row that can be kept, [R, N], and what the filters need to know of the others."""

    token_ids: Tensor  # int64, ascending; -1 where there are fewer
    x: Tensor  # float32, cleaned logits; -inf where there are fewer
    mass: Tensor  # float64 [R], see _top_p_mask
    status: Tensor  # int32 [R]


def _places(mask: Tensor) -> Tensor | None:
    """int64 [R, N]: where each row of a bool mask is on, ascending; -1 where there are fewer than N, the most.

    None where N is half of the row or more: then there is little to gain from looking only there.
    """
    counts = mask.count_nonzero(-1)
    n = max(1, int(counts.max())) if counts.numel() else 1
    if 2 * n >= mask.shape[1]:
        return None
    rows, places = mask.nonzero(as_tuple=True)
    column = torch.arange(places.numel(), device=mask.device) - (counts.cumsum(0) - counts)[rows]
    return torch.full((mask.shape[0], n), -1, dtype=torch.int64, device=mask.device).index_put_((rows, column), places)


def _narrow(logits: Tensor, params: RowParams, off: Tensor, filter_order: FilterOrder) -> _Near:
    x, status = clean_logits(logits)
    rows, size = x.shape
    blocks = torch.nn.functional.pad(x, (0, -size % _BLOCK), value=NEG_INF).view(rows, -(-size // _BLOCK), _BLOCK)
    maxima = blocks.amax(-1)
    status = status | (maxima.amax(-1) == NEG_INF).int() * Status.EMPTY
    # Scaling keeps the order, so a block's largest scaled logit is that of its largest logit.
    scaled_maxima = scale_logits(maxima, params)
    bound, mass = _lower_bound(x, scaled_maxima, params, filter_order)
    bound = bound.masked_fill(off, float("inf")).clamp_min(-LARGEST)[:, None]

    ids = torch.arange(size, device=x.device).expand(rows, size)
    chosen = _places(scaled_maxima >= bound)
    if chosen is not None:
        ids = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=x.device)).flatten(1)
        ids = ids.masked_fill((ids < 0) | (ids >= size), -1)
        x = x.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, NEG_INF)
    places = _places(scale_logits(x, params) >= bound)
    if places is not None:
        none, places = places < 0, places.clamp_min(0)
        ids, x = ids.gather(-1, places).masked_fill(none, -1), x.gather(-1, places).masked_fill(none, NEG_INF)
    return _Near(ids, x.masked_fill(off[:, None], NEG_INF), mass, status)


def _lower_bound(
    x: Tensor, scaled_maxima: Tensor, params: RowParams, filter_order: FilterOrder
) -> tuple[Tensor, Tensor]:
    """A number [R] that no kept token, scaled, is below, and the mass [R] that top-p renormalises by."""
    top = scaled_maxima.amax(-1)
    # The k-th largest block maximum: k tokens at least are as large.
    kth = _kth_largest(scaled_maxima, params.top_k)
    no_top_k = (params.top_k <= 0) | (params.top_k >= x.shape[-1])
    top_p, has_min_p = params.top_p < 1, params.min_p > 0
    # Under top-k and top-p, what min-p drops last still counts in what top-p renormalises over.
    use_floor = has_min_p & ((filter_order == "vllm") | ~top_p | no_top_k)
    bound = torch.maximum(kth, torch.where(use_floor, _floor(top, params), NEG_INF))

    mass = torch.zeros_like(bound, dtype=torch.float64)
    whole = (top_p & no_top_k & ~(has_min_p & (filter_order == "vllm"))).nonzero()[:, 0]
    if whole.numel():
        scaled = scale_logits(x[whole], params.take(whole)).double()
        weight = _weights(scaled, top[whole, None].double())
        mass[whole] = _blockwise_sum(weight)
        nucleus = _nucleus_bound(scaled, weight, mass[whole], params.top_p[whole])
        bound[whole] = torch.maximum(bound[whole], nucleus)
    return bound, mass


def _nucleus_bound(scaled: Tensor, weight: Tensor, mass: Tensor, top_p: Tensor) -> Tensor:
    """[R]: a number such that the tokens not below it have at least top_p of the mass; a histogram's, so not tight."""
    top = scaled.amax(-1, keepdim=True).clamp_min(-LARGEST)
    bins = ((top - scaled) * _BINS_PER_NAT).clamp_max(_BINS - 1).long()
    above = torch.zeros(len(mass), _BINS, dtype=torch.float64, device=mass.device).scatter_add_(-1, bins, weight)
    enough = above.cumsum(-1) > (top_p.double() + 1e-9)[:, None] * mass[:, None]
    bin = enough.int().argmax(-1, keepdim=True)
    bound = (top - (bin + 1) / _BINS_PER_NAT)[:, 0]
    # The last bin has no lower end.
    return bound.masked_fill(~enough.any(-1) | (bin[:, 0] == _BINS - 1), NEG_INF).float()


def select_candidates(
    logits: Tensor,
    params: RowParams,
    *,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    active: Tensor | None = None,
) -> Candidates:
    rows, vocab_size = logits.shape
    invalid = invalid_params(params)
    inactive = torch.zeros_like(invalid) if active is None else ~active
    parts = list(row_chunks(rows, vocab_size, logits.device))
    near = [_narrow(logits[part], take_rows(params, part), (invalid | inactive)[part], filter_order) for part in parts]
    if rows * max(part.x.shape[1] for part in near) <= _CHUNK:
        near, parts = [_joined(near)], [slice(0, rows)]  # many small operations cost more than one
    width = min(max_candidates, vocab_size)
    listed = join_rows(
        [_list(n, take_rows(params, part), filter_order, width) for n, part in zip(near, parts, strict=True)]
    )
    status = listed.status | invalid.int() * Status.INVALID_PARAMS | (listed.count > width).int() * Status.CAPPED
    return listed._replace(status=torch.where(inactive, int(Status.INACTIVE), status).int())


def _joined(parts: list[_Near]) -> _Near:
    width = max(part.x.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    return join_rows(
        [
            part._replace(
                token_ids=pad(part.token_ids, (0, width - part.x.shape[1]), value=-1),
                x=pad(part.x, (0, width - part.x.shape[1]), value=NEG_INF),
            )
            for part in parts
        ]
    )


def _list(near: _Near, params: RowParams, filter_order: FilterOrder, width: int) -> Candidates:
    missing = max(0, width - near.x.shape[1])
    token_ids = torch.nn.functional.pad(near.token_ids, (0, missing), value=-1)
    x = torch.nn.functional.pad(near.x, (0, missing), value=NEG_INF)
    scaled = scale_logits(x, params)
    kept = kept_mask(scaled, params, filter_order, token_ids, near.mass)
    threshold = scaled.masked_fill(~kept, float("inf")).amin(-1)
    tie_id = torch.where(kept & (scaled == threshold[:, None]), token_ids, LAST_ID).amin(-1)
    keys = torch.where(kept, (ordered(scaled) << 32) | (LAST_ID - token_ids), ABSENT)
    keys, places = descending(keys, width)
    present = keys != ABSENT
    return Candidates(
        token_ids=token_ids.gather(-1, places).masked_fill(~present, -1),
        logits=x.gather(-1, places).masked_fill(~present, NEG_INF),
        count=kept.sum(-1),
        threshold=threshold,
        tie_id=tie_id,
        status=near.status,
    )
