"""The ops of siblings drawn without replacement: the first tokens of every row, and which rows go on with which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esamp_core import reference
from esamp_core.base.checks import check_tensor, is_int, require
from esamp_core.base.config import FilterOrder
from esamp_core.base.tensors import Children, Draw, Growth, Head, Reweighted, RowParams, Status, Tree
from esamp_core.ops.arguments import Params, check_row_integers, check_step
from esamp_core.ops.backends import Backend, backend


def explore_children(
    logits: Tensor,
    params: Params,
    seed: Tensor | int,
    position: Tensor | int,
    width: int,
    *,
    direction: Tensor | None = None,
    head: Head | None = None,
    model_logits: Tensor | None = None,
    model_weight: float = 1.0,
    neutral: bool = False,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    active: Tensor | None = None,
) -> tuple[Draw, Children]:
    """A whole step as in :func:`explore`, and beside the drawn token those that would come next without replacement.

    width: W >= 1, how many tokens of each row; the first is the drawn one.  The rest as for ``explore``.
    Returns :class:`Draw`, and :class:`Children` for :func:`grow`.  Raises ArgumentError.
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
    require(is_int(width) and width >= 1, "width", "be an integer >= 1", width)
    resolved, seeds, positions = check_step(logits, params, seed, position, **options)
    return draw_children(
        backend(logits.device),
        logits,
        params=resolved,
        seed=seeds,
        position=positions,
        width=width,
        codes=None,
        **options,
    )


def draw_children(
    ops: Backend,
    logits: Tensor,
    *,
    params: RowParams,
    seed: Tensor,
    position: Tensor,
    width: int,
    codes: Tensor | None,
    direction: Tensor | None,
    head: Head | None,
    model_logits: Tensor | None,
    model_weight: float,
    neutral: bool,
    filter_order: FilterOrder,
    max_candidates: int,
    active: Tensor | None,
) -> tuple[Draw, Children]:
    """:func:`explore_children`, its arguments checked.  codes: of stratified rows, whose children mean nothing."""
    candidates = ops.select_candidates(
        logits, params, filter_order=filter_order, max_candidates=max_candidates, active=active
    )
    reweighted = Reweighted(candidates.logits, candidates.logits.new_zeros(candidates.logits.shape), candidates.status)
    if direction is not None and head is not None:
        projection = ops.score_candidates(direction, head, candidates.token_ids)
        original = None if model_logits is None else model_logits.gather(-1, candidates.token_ids.clamp_min(0)).float()
        reweighted = ops.reweight(
            candidates, projection, params, model_logits=original, model_weight=model_weight, neutral=neutral
        )
    draw = ops.draw(candidates, reweighted, logits, params, seed, position, codes=codes, model_logits=model_logits)
    return draw, ops.children(candidates, reweighted, logits, params, seed, position, draw, width)


def taken(growth: Growth, draw: Draw, children: Children, logits: Tensor, model_logits: Tensor | None = None) -> Draw:
    """The draw of rows that have grown: what each goes on with, instead of its parent's best.

    draw, children: of :func:`draw_children`.  logits, model_logits: as given to it.
    """
    parent, at = growth.parent, growth.child.clamp_min(0)[:, None]
    first = Draw(*(column[parent] for column in draw))
    drawn, other = growth.child >= 0, growth.child > 0
    token_ids, logprob, novelty = (
        torch.where(other, column[parent].gather(-1, at)[:, 0], own)
        for column, own in (
            (children.token_ids, first.token_ids), (children.logprob, first.logprob),
            (children.novelty, first.novelty),
        )
    )  # fmt: skip
    least = torch.finfo(torch.float32).min
    if model_logits is None:  # what is taken from a logit is known from that of the drawn token
        mine, best = (logits[parent, ids.clamp_min(0)].double() for ids in (token_ids, first.token_ids))
        further = torch.where(mine == best, 0.0, mine - best)
        base_logprob = (first.base_logprob.double() + further).clamp(least, 0.0).float()
    else:
        x = model_logits.float()
        x = torch.where(torch.isnan(x), -torch.inf, x)
        infinite = (x == torch.inf).any(-1, keepdim=True)
        x = torch.where(infinite, torch.where(x == torch.inf, 0.0, -torch.inf), x)
        top = x.amax(-1, keepdim=True)
        top = torch.where(top == -torch.inf, 0.0, top)
        # Apart: their sum would swallow the second where the first is large.
        rest = (x - top).logsumexp(-1).double()
        mine = x[parent, token_ids.clamp_min(0)].double()
        base_logprob = (mine - top[:, 0].double()[parent] - rest[parent]).clamp_min(least).float()
        base_logprob = torch.where(mine == -torch.inf, -torch.inf, base_logprob)
    return Draw(
        torch.where(drawn, token_ids, -1),
        torch.where(drawn, logprob, 0.0),
        torch.where(drawn, torch.where(other, base_logprob, first.base_logprob), 0.0),
        torch.where(drawn, novelty, 0.0),
        torch.where(drawn, first.kl, 0.0),
        torch.where(drawn, first.count, 0),
        torch.where(drawn, first.status, int(Status.INACTIVE)).int(),
    )


def grow(children: Children, tree: Tree, families: Tensor, active: Tensor, seed: Tensor, position: Tensor) -> Growth:
    """Which beginnings are drawn without replacement, one token longer.

    Stochastic beam search: of all that a family's rows hold and could go on with, the largest perturbed
    log-probabilities, as many as it has rows.  A row that is switched off holds a finished sample, which stays as long
    as it is among them; one whose perturbed log-probability is -inf holds nothing.  A row that is among them stays
    where it is and goes on with its best child; other children go to free rows, in order.

    children: [R, W], W at least the largest family's size, of :func:`explore_children`.  tree: :class:`Tree`; a family
    begins with one row at ``root_noise`` and the others at -inf.  families: int64 [P, W'], row numbers, each in one
    place at most; -1 where a family has fewer.  active: bool [R].  seed, position: int64 [R], as the children had.
    Rows of no family go on by themselves.  Always runs in PyTorch, without waiting for a device.

    Returns :class:`Growth`.  Raises ArgumentError.
    """
    require(isinstance(children, Children), "children", "be Children", type(children).__name__)
    require(isinstance(tree, Tree), "tree", "be a Tree", type(tree).__name__)
    check_tensor("children.token_ids", children.token_ids, (None, None), None, "int")
    (rows, width), device = children.token_ids.shape, children.token_ids.device
    for name in ("logprob", "perturbed"):
        check_tensor(f"children.{name}", getattr(children, name), (rows, width), device)
        check_tensor(f"tree.{name}", getattr(tree, name), (rows,), device)
    check_tensor("families", families, (None, None), device, "int")
    require(families.shape[1] <= width, "families", f"be at most {width} wide, as the children", families.shape[1])
    check_tensor("active", active, (rows,), device, "bool")
    return reference.grow(
        children,
        tree,
        families,
        active,
        check_row_integers("seed", seed, rows, device),
        check_row_integers("position", position, rows, device),
    )
