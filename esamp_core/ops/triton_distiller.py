"""The Distiller's ops on Triton kernels: NamedTuples become flat tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from esamp_core.base.config import DistillerConfig
from esamp_core.base.errors import ArgumentError
from esamp_core.base.tensors import (
    Activations,
    DistillerState,
    DistillerWeights,
    Gauge,
    Head,
    Mixed,
    RowGroups,
    unit_stride,
)
from esamp_core.kernels.distiller.ops import forward_op, gauge_op, mix_op, norm_op, scratch_size, step_op
from esamp_core.kernels.warm_up import warm_up_distiller
from esamp_core.reference.distiller import learning_rates


def _check_weights(name: str, weights: DistillerWeights, matrices: tuple[torch.dtype, ...]) -> None:
    """The kernels write in place, so nothing may be converted or copied here."""
    for field, tensor in weights._asdict().items():
        allowed = matrices if field in ("up", "gate", "down") else (torch.float32,)
        if tensor.dtype not in allowed or not tensor.is_contiguous():
            kinds = " or ".join(str(dtype) for dtype in allowed)
            got = f"{tensor.dtype}, strides {tensor.stride()} of shape {tuple(tensor.shape)}"
            raise ArgumentError(f"{name}.{field} must be contiguous and {kinds} for the Triton kernels, got {got}")
    if not weights.up.dtype == weights.gate.dtype == weights.down.dtype:
        got = f"{weights.up.dtype}, {weights.gate.dtype}, {weights.down.dtype}"
        raise ArgumentError(f"{name}.up, gate and down must have one dtype, got {got}")


def _groups(groups: RowGroups) -> tuple[Tensor, Tensor, Tensor]:
    return groups.order.contiguous(), groups.slots.contiguous(), groups.offsets.contiguous()


def distiller_scratch(weights: DistillerWeights, rows: int) -> Tensor:
    return torch.empty(scratch_size(rows, weights.up), dtype=torch.float32, device=weights.up.device)


def _scratch(given: Tensor | None, weights: DistillerWeights, rows: int) -> Tensor:
    if given is None:
        return distiller_scratch(weights, rows)
    if given.numel() < (size := scratch_size(rows, weights.up)):
        raise ArgumentError(f"scratch must be distiller_scratch(weights, {rows}), {size} numbers, got {given.numel()}")
    return given


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
    _check_weights("weights", weights, (torch.float32, torch.bfloat16))
    rows, hidden = shallow.shape
    saved = Activations.empty(rows, hidden, weights.up.shape[2], shallow.device) if out is None else out
    scratch = _scratch(scratch, weights, rows)
    forward_op(unit_stride(shallow.detach()), *_groups(groups), list(weights), scale, list(saved), scratch, norm)
    return saved


def distiller_norm_(activations: Activations, groups: RowGroups, weights: DistillerWeights, scale: Tensor) -> None:
    norm_op(*_groups(groups), list(weights), scale, list(activations))


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
    _check_weights("weights", weights, (torch.float32, torch.bfloat16))
    deep = unit_stride(deep.detach())
    hidden = torch.empty(deep.shape, dtype=deep.dtype, device=deep.device) if out is None else out
    flags = torch.zeros(deep.shape[0], dtype=torch.int32, device=deep.device) if status is None else status
    mix_op(
        deep,
        activations.y.contiguous(),
        list(weights),
        scale,
        beta.float().contiguous(),
        None if active is None else active.contiguous(),
        *_groups(groups),
        activations.mean,
        activations.rstd,
        hidden,
        flags,
    )
    return Mixed(hidden, flags)


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
    _check_weights("state.weights", state.weights, (torch.float32, torch.bfloat16))
    if state.momentum is not None:
        _check_weights("state.momentum", state.momentum, (torch.float32,))
    rows, hidden = activations.x.shape
    step_op(
        list(state.weights),
        list(state.momentum or ()),
        state.seed,
        [state.updates, state.loss, state.first_loss, state.nonfinite],
        [field.contiguous() for field in activations],
        target.detach() if head is None else head.weight.detach(),
        None if head is None else target.long().contiguous(),
        None if head is None or head.center is None else head.center.detach().contiguous(),
        1.0 if head is None else float(head.scale),
        *_groups(groups),
        scale,
        None if active is None else active.contiguous(),
        [float(rate) for rate in learning_rates(config, hidden)],
        config.momentum,
        config.clip,
        _scratch(scratch, state.weights, rows),
    )


def gauge_(
    gauge: Gauge,
    activations: Activations,
    target: Tensor,
    groups: RowGroups,
    weights: DistillerWeights,
    scale: Tensor,
    *,
    active: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    _check_weights("weights", weights, (torch.float32, torch.bfloat16))
    gauge_op(
        list(gauge),
        [field.contiguous() for field in activations],
        target.detach(),
        *_groups(groups),
        list(weights),
        scale,
        None if active is None else active.contiguous(),
        _scratch(scratch, weights, activations.x.shape[0]),
    )


def warm_up_mixing(hidden_size: int, config: DistillerConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Run every kernel of a Distiller once, and mix for deep states of this dtype."""
    warm_up_distiller(
        hidden_size, config.rank, config.weight_dtype, config.momentum > 0, device=device, mixed_dtype=dtype
    )
