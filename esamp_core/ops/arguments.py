"""Checks of the ops' own arguments.  Each raises ArgumentError with what it received."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esamp_core.base.checks import check_logits, check_tensor, describe, is_int, is_real, require
from esamp_core.base.config import FilterOrder, SamplingParams, check_options
from esamp_core.base.errors import ArgumentError
from esamp_core.base.tensors import Activations, Candidates, DistillerWeights, Gauge, Head, RowGroups, RowParams
from esamp_core.reference import invalid_params

Params = SamplingParams | Sequence[SamplingParams] | RowParams


def check_params(params: Params, rows: int, device: torch.device) -> RowParams:
    resolved = RowParams.of(params, rows, device)
    # Values on a GPU would cost a wait; the op flags such rows instead (Status.INVALID_PARAMS).
    if isinstance(params, RowParams) and device.type == "cpu":
        wrong = invalid_params(resolved)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            values = {name: column[row].item() for name, column in zip(resolved._fields, resolved, strict=True)}
            raise ArgumentError(f"params of row {row} are out of range (see SamplingParams): {values}")
    return resolved


def check_row_integers(name: str, value: Tensor | int, rows: int, device: torch.device) -> Tensor:
    if isinstance(value, int) and is_int(value):
        require(-(2**63) <= value < 2**63, name, "fit in int64", value)
        return torch.full((rows,), value, dtype=torch.int64, device=device)
    check_tensor(name, value, (rows,), device, "int")
    assert isinstance(value, Tensor)
    return value.long()


def check_codes(codes: Tensor | None, params: Params, rows: int, device: torch.device) -> None:
    if codes is not None:
        check_tensor("codes", codes, (rows, 2), device)
        require(codes.dtype == torch.float64 and codes.is_contiguous(), "codes", "be contiguous float64", codes.dtype)
        return
    given = params if isinstance(params, Sequence) else [params]
    if any(isinstance(p, SamplingParams) and p.stratified for p in given):
        raise ArgumentError("codes must be given for stratified params (stratified_codes makes them), got None")


def check_active(active: Tensor | None, rows: int, device: torch.device) -> None:
    if active is not None:
        check_tensor("active", active, (rows,), device, "bool")


def check_step(
    logits: Tensor,
    params: Params,
    seed: Tensor | int,
    position: Tensor | int,
    *,
    direction: Tensor | None,
    head: Head | None,
    model_logits: Tensor | None,
    model_weight: float,
    neutral: bool,
    filter_order: FilterOrder,
    max_candidates: int,
    active: Tensor | None,
) -> tuple[RowParams, Tensor, Tensor]:
    """What a whole sampling step takes, codes apart; parameters, seeds and positions of all rows."""
    check_logits(logits)
    require(is_real(model_weight), "model_weight", "be a finite number", model_weight)
    require(isinstance(neutral, bool), "neutral", "be True or False", neutral)
    (rows, vocab_size), device = logits.shape, logits.device
    check_options(filter_order, max_candidates)
    check_active(active, rows, device)
    if model_logits is not None:
        check_logits(model_logits, "model_logits", logits)
    if (direction is None) != (head is None):
        raise ArgumentError("direction and head must be given together, got only one of them")
    if direction is not None and head is not None:
        check_head(head, direction, rows, device)
        head.check_covers(vocab_size)
    return (
        check_params(params, rows, device),
        check_row_integers("seed", seed, rows, device),
        check_row_integers("position", position, rows, device),
    )


def check_candidates(candidates: Candidates) -> tuple[int, int, torch.device]:
    require(isinstance(candidates, Candidates), "candidates", "come from select_candidates", type(candidates).__name__)
    check_tensor("candidates.token_ids", candidates.token_ids, (None, None), None, "int")
    (rows, width), device = candidates.token_ids.shape, candidates.token_ids.device
    check_tensor("candidates.logits", candidates.logits, (rows, width), device)
    for name in ("count", "tie_id", "status"):
        check_tensor(f"candidates.{name}", getattr(candidates, name), (rows,), device, "int")
    check_tensor("candidates.threshold", candidates.threshold, (rows,), device)
    return rows, width, device


def check_head(head: Head, direction: Tensor, rows: int, device: torch.device) -> None:
    require(isinstance(head, Head), "head", "be a Head", type(head).__name__)
    if head.weight.device != device:
        raise ArgumentError(f"head.weight must be on {device}, got {describe(head.weight)}")
    check_tensor("direction", direction, (rows, head.hidden_size), device)


def check_weights(weights: DistillerWeights, name: str = "weights") -> tuple[int, int]:
    """Returns (slots, hidden size)."""
    require(isinstance(weights, DistillerWeights), name, "be DistillerWeights", type(weights).__name__)
    check_tensor(f"{name}.up", weights.up, (None, None, None), None)
    (slots, hidden, rank), device = weights.up.shape, weights.up.device
    wide, narrow = (slots, hidden, rank), (slots, rank, hidden)
    shapes = (wide, narrow, (slots, rank), (slots, hidden), (slots, hidden))
    for field, tensor, shape in zip(weights._fields[1:], weights[1:], shapes, strict=True):
        check_tensor(f"{name}.{field}", tensor, shape, device)
    return slots, hidden


def check_gauge(gauge: Gauge, slots: int, hidden: int, device: torch.device) -> None:
    require(isinstance(gauge, Gauge), "gauge", "be a Gauge", type(gauge).__name__)
    for field, tensor in zip(gauge._fields, gauge, strict=True):
        shape = (slots, hidden) if field == "mean" else (slots,)
        check_tensor(f"gauge.{field}", tensor, shape, device, "int" if field == "steps" else "float")
        dtype = torch.int64 if field == "steps" else torch.float32
        fits = tensor.is_contiguous() and tensor.dtype == dtype
        require(fits, f"gauge.{field}", f"be contiguous {dtype}", (tensor.dtype, tensor.stride()))


def check_groups(groups: RowGroups, rows: int, slots: int, device: torch.device) -> None:
    require(isinstance(groups, RowGroups), "groups", "come from group_rows", type(groups).__name__)
    size = min(rows, slots)
    for name, tensor, length in zip(groups._fields, groups, (rows, size, size + 1), strict=True):
        check_tensor(f"groups.{name}", tensor, (length,), device, "int")


def check_activations(
    name: str, activations: Activations, rows: int | None, hidden: int, rank: int, device: torch.device
) -> int:
    """rows: None is any number.  Returns the number of rows."""
    require(isinstance(activations, Activations), name, "be Activations", type(activations).__name__)
    check_tensor(f"{name}.x", activations.x, (rows, hidden), device)
    rows = activations.x.shape[0]
    wide, narrow, column = (rows, hidden), (rows, rank), (rows,)
    shapes = (narrow, narrow, wide, column, column, wide)
    for field, tensor, shape in zip(activations._fields[1:], activations[1:], shapes, strict=True):
        check_tensor(f"{name}.{field}", tensor, shape, device)
    return rows


def check_out(out: Activations | None, shallow: Tensor, rank: int) -> None:
    """Memory for the activations of shallow."""
    if out is None:
        return
    rows, hidden = shallow.shape
    check_activations("out", out, rows, hidden, rank, shallow.device)
    dtype = torch.float64 if shallow.dtype == torch.float64 else torch.float32
    for field, tensor in zip(out._fields, out, strict=True):
        fits = tensor.dtype == dtype and tensor.is_contiguous()
        require(fits, f"out.{field}", f"be contiguous and {dtype}", f"{tensor.dtype}, strides {tensor.stride()}")


def check_mixed_out(out: Tensor | None, status: Tensor | None, deep: Tensor) -> None:
    """Memory for the mixed states of deep, and for their flags."""
    if out is not None:
        check_tensor("out", out, tuple(deep.shape), deep.device)
        fits = out.dtype == deep.dtype and (out.stride(1) == 1 or out.shape[1] <= 1) and out is not deep
        got = f"{describe(out)}, strides {out.stride()}{', deep itself' if out is deep else ''}"
        require(fits, "out", f"be {deep.dtype} with a row's numbers side by side, in other memory than deep", got)
    if status is not None:
        check_tensor("status", status, (deep.shape[0],), deep.device, "int")
        require(status.dtype == torch.int32 and status.is_contiguous(), "status", "be contiguous int32", status.dtype)


def check_scratch(scratch: Tensor | None, device: torch.device) -> None:
    if scratch is not None:
        check_tensor("scratch", scratch, (None,), device)
        fits = scratch.dtype == torch.float32 and scratch.is_contiguous()
        require(fits, "scratch", "come from distiller_scratch", describe(scratch))


def check_target(target: Tensor, head: Head | None, rows: int, hidden: int, device: torch.device) -> None:
    """What a Distiller learns: numbers, or token ids with the head whose rows they name."""
    if head is None:
        check_tensor("target", target, (rows, hidden), device)
        return
    require(isinstance(head, Head), "head", "be a Head", type(head).__name__)
    check_tensor("head.weight", head.weight, (None, hidden), device)
    require(head.vocab_start == 0, "head.vocab_start", "be 0: a whole head, no shard of one", head.vocab_start)
    check_tensor("target", target, (rows,), device, "int")
