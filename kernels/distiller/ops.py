"""The Distiller's launches as opaque torch ops, so that torch.compile and graph recorders see what is written.

    distiller_forward   project, reduce, expand, norm
    distiller_norm      norm alone, where the forward left it out
    mix                 mix
    distiller_step      error, back, gates, settle, update
    gauge               compare, judge

Everything that outlives an op is the caller's: it is given, and written in place.
"""

import torch
from torch import Tensor

from esamp_core.kernels.distiller.forward import distiller_forward_triton, distiller_norm_triton, forward_scratch
from esamp_core.kernels.distiller.gauge import gauge_scratch, gauge_triton
from esamp_core.kernels.distiller.mix import mix_triton
from esamp_core.kernels.distiller.scratch import room
from esamp_core.kernels.distiller.step import distiller_step_triton, step_scratch
from esamp_core.kernels.tuning import Config, config_for, generation_of


def config_of(up: Tensor) -> Config:
    return config_for(generation_of(up.device), 0, up.shape[1], 0, up.element_size())


def scratch_size(rows: int, up: Tensor) -> int:
    """float32 numbers that an op needs for so many rows, at most; up: A [S, H, r].  The ops use the same ones."""
    (slots, hidden, rank), config = up.shape, config_of(up)
    step = step_scratch(rows, min(rows, slots), hidden, rank, config)
    return max(room(forward_scratch(rows, hidden, rank, config)), room(gauge_scratch(rows)), room(step))


@torch.library.custom_op("esamp::distiller_forward", mutates_args=("out", "scratch"))
def forward_op(
    shallow: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: list[Tensor],
    scale: Tensor,
    out: list[Tensor],
    scratch: Tensor,
    norm: bool,
) -> None:
    """out: x, up, gate, y, mean, rstd, pred."""
    distiller_forward_triton(shallow, order, slots, offsets, weights, scale, out, scratch, config_of(weights[0]), norm)


@forward_op.register_fake
def _(*_):
    pass


@torch.library.custom_op("esamp::distiller_norm", mutates_args=("out",))
def norm_op(
    order: Tensor, slots: Tensor, offsets: Tensor, weights: list[Tensor], scale: Tensor, out: list[Tensor]
) -> None:
    """out: as above."""
    distiller_norm_triton(order, slots, offsets, weights, scale, out, config_of(weights[0]))


@norm_op.register_fake
def _(*_):
    pass


@torch.library.custom_op("esamp::mix", mutates_args=("mean", "rstd", "out", "status"))
def mix_op(
    deep: Tensor,
    y: Tensor,
    weights: list[Tensor],
    scale: Tensor,
    beta: Tensor,
    active: Tensor | None,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    mean: Tensor,
    rstd: Tensor,
    out: Tensor,
    status: Tensor,
) -> None:
    up, _, _, _, norm_weight, norm_bias = weights
    mix_triton(
        deep, y, norm_weight, norm_bias, scale, beta, active, (order, slots, offsets), mean, rstd, out, status,
        up.shape[2], config_of(up),
    )  # fmt: skip


@mix_op.register_fake
def _(*_):
    pass


@torch.library.custom_op("esamp::distiller_step", mutates_args=("weights", "velocities", "columns", "scratch"))
def step_op(
    weights: list[Tensor],
    velocities: list[Tensor],
    seed: Tensor,
    columns: list[Tensor],
    saved: list[Tensor],
    target: Tensor,
    token_ids: Tensor | None,
    center: Tensor | None,
    head_scale: float,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    scale: Tensor,
    active: Tensor | None,
    rates: list[float],
    momentum: float,
    clip: float,
    scratch: Tensor,
) -> None:
    """columns: updates, loss, first_loss, nonfinite.  target: [R, H], or with token_ids the head's weight."""
    distiller_step_triton(
        weights, velocities, seed, columns, saved, target, token_ids, center, head_scale, order, slots, offsets, scale,
        active, rates, momentum, clip, scratch, config_of(weights[0]),
    )  # fmt: skip


@step_op.register_fake
def _(*_):
    pass


@torch.library.custom_op("esamp::gauge", mutates_args=("gauge", "scratch"))
def gauge_op(
    gauge: list[Tensor],
    saved: list[Tensor],
    target: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: list[Tensor],
    scale: Tensor,
    active: Tensor | None,
    scratch: Tensor,
) -> None:
    """gauge: mean, steps, error, baseline, trust."""
    config = config_of(weights[0])
    gauge_triton(gauge, saved, target, order, slots, offsets, weights, scale, active, scratch, config)


@gauge_op.register_fake
def _(*_):
    pass
