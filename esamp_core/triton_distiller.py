"""The Distiller's ops on Triton kernels: same names and signatures as ``esamp_core.reference_distiller``."""

from __future__ import annotations

import torch
from torch import Tensor

from esamp_core.config import DistillerConfig
from esamp_core.errors import ArgumentError
from esamp_core.kernels.distiller_forward import distiller_forward_triton
from esamp_core.kernels.distiller_step import distiller_step_triton
from esamp_core.kernels.tuning import Config, config_for, generation_of
from esamp_core.reference_distiller import learning_rates
from esamp_core.structures import Activations, DistillerState, DistillerWeights, RowGroups


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


def _config(weights: DistillerWeights) -> Config:
    up = weights.up
    return config_for(generation_of(up.device), 0, up.shape[1], 0, up.element_size())


def _rows(tensor: Tensor) -> Tensor:
    """Rows may have any distance, but the kernels want a row's numbers side by side."""
    return tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _groups(groups: RowGroups) -> tuple[Tensor, Tensor, Tensor]:
    return groups.order.contiguous(), groups.slots.contiguous(), groups.offsets.contiguous()


def distiller_forward(shallow: Tensor, groups: RowGroups, weights: DistillerWeights, scale: Tensor) -> Activations:
    _check_weights("weights", weights, (torch.float32, torch.bfloat16))
    saved = distiller_forward_triton(
        _rows(shallow.detach()), *_groups(groups), weights=weights, scale=scale, config=_config(weights)
    )
    return Activations(*saved)


def distiller_step_(
    state: DistillerState,
    activations: Activations,
    target: Tensor,
    groups: RowGroups,
    scale: Tensor,
    config: DistillerConfig,
    *,
    active: Tensor | None = None,
) -> None:
    if config.lr == 0:
        return
    _check_weights("state.weights", state.weights, (torch.float32, torch.bfloat16))
    if state.momentum is not None:
        _check_weights("state.momentum", state.momentum, (torch.float32,))
    rates = [float(rate) for rate in learning_rates(config, target.shape[1])]
    distiller_step_triton(
        state.weights,
        state.momentum,
        state.seed,
        state.updates,
        state.loss,
        state.first_loss,
        state.nonfinite,
        Activations(*(field.contiguous() for field in activations)),
        _rows(target.detach()),
        *_groups(groups),
        scale=scale,
        active=None if active is None else active.contiguous(),
        rates=tuple(rates),
        momentum=config.momentum,
        clip=config.clip,
        config=_config(state.weights),
    )
