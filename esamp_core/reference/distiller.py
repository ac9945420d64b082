"""The Distiller in plain PyTorch: row grouping, forward, and one step of its learning rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esamp_core.base.atomic import whole
from esamp_core.base.config import DistillerConfig
from esamp_core.base.philox import DOMAIN_ROUNDING, philox
from esamp_core.base.tensors import (
    Activations,
    DistillerState,
    DistillerWeights,
    Head,
    Mixed,
    RowGroups,
    Status,
)

LAYER_NORM_EPS = 1e-5
RMS_FLOOR = 1e-6
INIT_STD = 0.02  # of A and G at the start


def group_rows(slots: Tensor, num_slots: int, rank: Tensor | None = None) -> RowGroups:
    rows = slots.shape[0]
    valid = (slots >= 0) & (slots < num_slots)
    key = torch.where(valid, slots, num_slots).long()
    order = torch.arange(rows, device=slots.device) if rank is None else torch.argsort(rank, stable=True)
    order = order[torch.argsort(key[order], stable=True)]
    key = key[order]

    groups = min(rows, num_slots)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    # One spare place collects the rows without a slot, and is cut off.
    place = torch.where(key < num_slots, first.long().cumsum(0) - 1, groups)
    sizes = torch.zeros(groups + 1, dtype=torch.long, device=slots.device).index_add_(0, place, torch.ones_like(place))
    group_slots = torch.full_like(sizes, -1).index_copy_(0, place, key)
    offsets = torch.nn.functional.pad(sizes[:groups].cumsum(0), (1, 0))
    return RowGroups(order.int(), group_slots[:groups].int(), offsets.int())


def each_group(groups: RowGroups) -> list[tuple[int, Tensor]]:
    """(slot, row numbers) of every group in use."""
    offsets, order = groups.offsets.tolist(), groups.order.long()
    slots = groups.slots.tolist()
    return [(s, order[a:b]) for s, a, b in zip(slots, offsets, offsets[1:], strict=False) if s >= 0]


def _wide(t: Tensor) -> Tensor:
    """float32, or float64 where that comes in: the tests' exact arithmetic."""
    return t if t.dtype == torch.float64 else t.float()


def _matrix(weights: Tensor, slot: int) -> Tensor:
    """One slot's matrix in float32, in memory aligned like any fresh tensor.

    BLAS may round differently for differently aligned operands; a result must not depend on the slot's number.
    """
    matrix = _wide(weights[slot])
    return matrix if matrix.data_ptr() % 64 == 0 else matrix.clone()


def distiller_scratch(weights: DistillerWeights, rows: int) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=weights.up.device)  # these functions allocate as they go


def distiller_forward(
    shallow: Tensor,
    groups: RowGroups,
    weights: DistillerWeights,
    scale: Tensor,
    *,
    out: Activations | None = None,
    scratch: Tensor | None = None,
    norm: bool = True,
) -> Activations:
    """norm: False leaves mean, rstd and pred of rows with a slot to :func:`mix` or :func:`distiller_norm_`."""
    saved = out
    if saved is None:
        rows, hidden = shallow.shape
        saved = Activations.empty(rows, hidden, weights.up.shape[2], shallow.device, _wide(shallow[:0]).dtype)
    for field in saved:
        field.zero_()  # rows without a slot
    for slot, members in each_group(groups):
        x = _wide(shallow[members])
        # A floor, not an added epsilon: multiplying shallow by a constant then changes nothing.
        x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(RMS_FLOOR)
        up = x @ _matrix(weights.up, slot)
        gate = x @ _matrix(weights.gate, slot) + weights.gate_bias[slot]
        y = x + (up * torch.nn.functional.silu(gate)) @ _matrix(weights.down, slot)
        for name, value in dict(x=x, up=up, gate=gate, y=y).items():
            getattr(saved, name).index_copy_(0, members, value)
    if norm:
        distiller_norm_(saved, groups, weights, scale)
    return saved


def _layer_norm(y: Tensor, weights: DistillerWeights, slot: int, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean [R], rstd [R] and pred [R, H] of one slot's rows y [R, H]."""
    mean = y.mean(-1)
    rstd = torch.rsqrt(y.var(-1, correction=0) + LAYER_NORM_EPS)
    normed = (y - mean[:, None]) * rstd[:, None]
    return mean, rstd, scale * (weights.norm_weight[slot] * normed + weights.norm_bias[slot])


def distiller_norm_(activations: Activations, groups: RowGroups, weights: DistillerWeights, scale: Tensor) -> None:
    """The forward's last part: mean, rstd and pred from y, in place."""
    for slot, members in each_group(groups):
        mean, rstd, pred = _layer_norm(activations.y[members], weights, slot, scale)
        for name, value in dict(mean=mean, rstd=rstd, pred=pred).items():
            getattr(activations, name).index_copy_(0, members, value)


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
    hidden, flags = mixed_memory(deep, out, status)
    for slot, members in each_group(groups):
        mean, rstd, pred = _layer_norm(activations.y[members], weights, slot, scale)
        activations.mean.index_copy_(0, members, mean)
        activations.rstd.index_copy_(0, members, rstd)
        mix_rows_(hidden, flags, deep, pred, members, beta, active)
    return Mixed(hidden, flags)


def mixed_memory(deep: Tensor, out: Tensor | None, status: Tensor | None) -> tuple[Tensor, Tensor]:
    """A copy of deep, to be mixed, and flags to add to: in what is given, or in new memory."""
    hidden = torch.empty_like(deep) if out is None else out
    flags = torch.zeros(deep.shape[0], dtype=torch.int32, device=deep.device) if status is None else status
    return hidden.copy_(deep), flags


def mix_rows_(
    hidden: Tensor, flags: Tensor, deep: Tensor, pred: Tensor, rows: Tensor, beta: Tensor, active: Tensor | None
) -> None:
    """Write the mixed states of these rows, of which pred is the prediction, and their flags."""
    strength = beta[rows, None].to(pred.dtype)
    mixed = ((1 + strength) * deep[rows].to(pred.dtype) - strength * pred).to(deep.dtype)
    explores = beta[rows] != 0
    if active is not None:
        explores = explores & active[rows]
    # Also a state that leaves its dtype: float16 ends at 65504.
    bad = explores & ~torch.isfinite(mixed).all(-1)
    flags.index_copy_(0, rows, flags[rows] | torch.where(bad, int(Status.NONFINITE_NOVELTY), 0).int())
    hidden.index_copy_(0, rows, torch.where((explores & ~bad)[:, None], mixed, deep[rows]))


def feature_size(rank: int, hidden_size: int) -> float:
    """|h|^2 of the r gated features at the start weights, about r H (0.02 silu(1))^2."""
    return rank * hidden_size * (INIT_STD * 0.7311) ** 2


class LearningRates(NamedTuple):
    """A number for each tensor of :class:`DistillerWeights`."""

    up: float
    gate: float
    down: float
    gate_bias: float
    norm_weight: float
    norm_bias: float


def learning_rates(config: DistillerConfig, hidden_size: int) -> LearningRates:
    """The rate of each tensor: lr over the squared size of what the tensor multiplies.

    |x|^2 is H, that of the gated features is :func:`feature_size`.  So one step moves the prediction by about lr times
    its error, whatever H and r are.  w and c multiply numbers of size 1; they learn
    10 and 3 times slower, or they would follow the few rows of the moment before A, G and B can tell rows apart.
    """
    return LearningRates(
        up=config.lr / hidden_size,
        gate=config.lr / hidden_size,
        down=config.lr / feature_size(config.rank, hidden_size),
        gate_bias=config.lr / config.rank,
        norm_weight=config.lr / 10,
        norm_bias=config.lr / 3,
    )


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
    if config.lr == 0:
        return
    if head is not None:
        known = (target >= 0) & (target < head.vocab_size)
        active = known if active is None else active & known
        target = token_targets(head, target)
    rates = learning_rates(config, target.shape[-1])
    for slot, members in each_group(groups):
        taught = members if active is None else members[active[members]]
        if taught.numel() == 0:
            continue
        loss, grads = slot_gradients(state.weights, slot, activations, taught, target, scale, config.clip)
        finite = torch.isfinite(loss)
        for g in grads:
            finite = finite & torch.isfinite(g).all()
        if not bool(finite):
            state.nonfinite[slot] += 1
            continue
        first = torch.where(state.updates[slot] == 0, loss, state.first_loss[slot])
        new = [(state.first_loss, first), (state.loss, loss), (state.updates, state.updates[slot] + 1)]
        for index, (weight, grad, rate) in enumerate(zip(state.weights, grads, rates, strict=True)):
            if state.momentum is not None:
                velocity = state.momentum[index]
                grad = velocity[slot] * config.momentum + grad
                new.append((velocity, grad))
            updated = _wide(weight[slot]) - rate * grad
            if weight.dtype == torch.bfloat16:
                updated = stochastic_round(updated, state.seed[slot], state.updates[slot], index)
            new.append((weight, updated))
        write_slot(slot, new)


def write_slot(slot: int, new: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write values into a slot of tensors, all of them or, where an interrupt comes before, none."""

    def commit() -> None:
        for column, value in new:
            column[slot] = value

    whole(commit)


def token_targets(head: Head, token_ids: Tensor) -> Tensor:
    """float32 [R, H]: the centred, scaled head rows of tokens; of any row where there is no such token."""
    rows = _wide(head.weight.detach()[token_ids.long().clamp(0, head.vocab_size - 1)])
    return (rows if head.center is None else rows - head.center) * head.scale


def row_errors(
    weights: DistillerWeights, slot: int, activations: Activations, rows: Tensor, target: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one slot's rows: normed y, target and error of the prediction, in units of s [n, H]; |target|^2 [n, 1]."""
    x = activations.x
    rstd = activations.rstd[rows, None]
    normed = (activations.y[rows] - activations.mean[rows, None]) * rstd
    deep = target[rows].to(x.dtype) / scale
    error = weights.norm_weight[slot] * normed + weights.norm_bias[slot] - deep
    return normed, deep, error, deep.square().sum(-1, keepdim=True)


def slot_gradients(
    weights: DistillerWeights,
    slot: int,
    activations: Activations,
    rows: Tensor,
    target: Tensor,
    scale: Tensor,
    clip: float,
) -> tuple[Tensor, DistillerWeights]:
    """Mean relative squared error of one slot's rows, and the gradient of (H / 2) times it, clipped per row.

    The factor H / 2 makes the gradient with respect to the prediction (in units of s) the error itself, whatever H.
    """
    x, up, gate = activations.x[rows], activations.up[rows], activations.gate[rows]
    rstd, norm_weight = activations.rstd[rows, None], weights.norm_weight[slot]
    normed, deep, error, energy = row_errors(weights, slot, activations, rows, target, scale)
    loss = (error.square().sum(-1, keepdim=True) / energy).mean()

    g = error * (deep.shape[-1] / energy)
    d_normed = g * norm_weight
    dy = d_normed - d_normed.mean(-1, keepdim=True) - normed * (d_normed * normed).mean(-1, keepdim=True)
    dy = dy * rstd
    # One factor for the whole row, so that no single row can throw the weights away.
    size = torch.maximum(g.square().mean(-1), dy.square().mean(-1)).sqrt()[:, None]
    factor = (clip / size).clamp_max(1.0) / rows.numel()
    g, dy = g * factor, dy * factor

    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dh = dy @ _matrix(weights.down, slot).T
    d_up = dh * silu
    d_gate = dh * up * (sigmoid + silu * (1 - sigmoid))
    grads = DistillerWeights(
        up=x.T @ d_up,
        gate=x.T @ d_gate,
        down=(up * silu).T @ dy,
        gate_bias=d_gate.sum(0),
        norm_weight=(g * normed).sum(0),
        norm_bias=g.sum(0),
    )
    return loss, grads


def stochastic_round(x: Tensor, seed: Tensor, update: Tensor, tensor_index: int) -> Tensor:
    """float32 to bfloat16, up or down at random so that the mean is x; keyed by (seed, update, tensor, element)."""
    element = torch.arange(x.numel(), device=x.device)
    domain = torch.full_like(element, DOMAIN_ROUNDING + (tensor_index << 8))
    words = philox(element >> 2, domain, update & 0xFFFFFFFF, update >> 32, seed)
    noise = torch.stack(words, -1).gather(-1, (element & 3)[:, None])[:, 0] & 0xFFFF
    bits = (x.contiguous().view(torch.int32).flatten() + noise.int()) & ~0xFFFF
    rounded = bits.view(torch.float32).view_as(x)
    return torch.where(torch.isfinite(x), rounded, x).bfloat16()


def warm_up(head: Head, config: DistillerConfig, max_candidates: int, dtype: torch.dtype, neutral: bool) -> None:
    """Nothing here is compiled."""


def warm_up_mixing(hidden_size: int, config: DistillerConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Nor here."""
