"""What the kernels are measured against, in the same run: the same answer by other means, or the part of it they give.

Samplers without exploration (temperature, top-k, top-p, min-p and a draw):
    eager       PyTorch as engines write it: sort, mask, softmax, multinomial
    compiled    the same under torch.compile
    flashinfer  its fused top-k and top-p sampling, where that package is installed (no min-p)
Distillers:
    per_row     each row with its own copy of its group's weights, in batched products
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esamp_core.sample import DistillerConfig, DistillerState, RowParams

LAYER_NORM_EPS = 1e-5


def eager(logits: Tensor, params: RowParams) -> Tensor:
    """int64 [R]: one draw per row after temperature, top-k, top-p, min-p, with one sort; no wait for the device."""
    x = logits.float() / params.temperature[:, None]
    x, ids = x.sort(dim=-1, descending=True)
    places = torch.arange(x.shape[1], device=x.device)
    x = x.masked_fill(places >= torch.where(params.top_k > 0, params.top_k, x.shape[1])[:, None], float("-inf"))
    p = x.softmax(-1)
    x = x.masked_fill(p.cumsum(-1) - p >= params.top_p[:, None], float("-inf"))
    p = x.softmax(-1)
    p = torch.where(p >= params.min_p[:, None] * p[:, :1], p, 0.0)
    # Exponential noise and an argmax: multinomial without its check, which waits for the device.
    noise = torch.empty_like(p).exponential_()
    return ids.gather(-1, (p / noise).argmax(-1, keepdim=True))[:, 0]


def compiled() -> Any:
    return torch.compile(eager, dynamic=False)


def has_flashinfer() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def flashinfer(logits: Tensor, params: RowParams) -> Tensor:
    """Its kernel takes float32 logits; temperature is applied before it."""
    import flashinfer.sampling as sampling

    scaled = logits.float() / params.temperature[:, None]
    drawn: Tensor = sampling.top_k_top_p_sampling_from_logits(
        scaled, params.top_k.int(), params.top_p, filter_apply_order="top_k_first", check_nan=False
    )
    return drawn


# ---------------------------------------------------------------------------------------------- Distiller


class PerRow(NamedTuple):
    """Saved by the forward for the step."""

    slots: Tensor  # int64 [R]
    x: Tensor  # [R, H]
    up: Tensor  # [R, r]
    gate: Tensor  # [R, r]
    normed: Tensor  # [R, H]
    rstd: Tensor  # [R, 1]
    pred: Tensor  # [R, H]


def per_row_forward(shallow: Tensor, slots: Tensor, state: DistillerState, scale: Tensor) -> PerRow:
    """The Distiller's forward on a copy of each row's weights."""
    up_w, gate_w, down_w, gate_b, norm_w, norm_b = (w[slots] for w in state.weights)
    x = shallow / shallow.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    up = torch.bmm(x[:, None], up_w)[:, 0]
    gate = torch.bmm(x[:, None], gate_w)[:, 0] + gate_b
    y = x + torch.bmm((up * torch.nn.functional.silu(gate))[:, None], down_w)[:, 0]
    rstd = torch.rsqrt(y.var(-1, correction=0, keepdim=True) + LAYER_NORM_EPS)
    normed = (y - y.mean(-1, keepdim=True)) * rstd
    return PerRow(slots, x, up, gate, normed, rstd, scale * (norm_w * normed + norm_b))


def per_row_step_(
    state: DistillerState,
    saved: PerRow,
    target: Tensor,
    scale: Tensor,
    config: DistillerConfig,
    rates: tuple[float, ...],
) -> None:
    """Autograd's formulas by hand, a gradient per row, added up by slot: one SGD step in place."""
    w, slots = state.weights, saved.slots
    share = 1.0 / torch.zeros(w.up.shape[0], device=target.device).index_add_(0, slots, torch.ones_like(target[:, 0]))
    deep = target / scale
    error = saved.pred / scale - deep
    g = error * (deep.shape[-1] / deep.square().sum(-1, keepdim=True))
    d = g * w.norm_weight[slots]
    dy = (d - d.mean(-1, keepdim=True) - saved.normed * (d * saved.normed).mean(-1, keepdim=True)) * saved.rstd
    size = torch.maximum(g.square().mean(-1), dy.square().mean(-1)).sqrt()[:, None]
    factor = (config.clip / size).clamp_max(1.0) * share[slots][:, None]
    g, dy = g * factor, dy * factor
    sigmoid = torch.sigmoid(saved.gate)
    silu = saved.gate * sigmoid
    dh = torch.bmm(dy[:, None], w.down[slots].transpose(1, 2))[:, 0]
    d_up, d_gate = dh * silu, dh * saved.up * (sigmoid + silu * (1 - sigmoid))
    grads = (
        saved.x[:, :, None] * d_up[:, None],
        saved.x[:, :, None] * d_gate[:, None],
        (saved.up * silu)[:, :, None] * dy[:, None],
        d_gate,
        g * saved.normed,
        g,
    )
    for weight, grad, rate in zip(w, grads, rates, strict=True):
        weight.index_add_(0, slots, grad, alpha=-rate)
