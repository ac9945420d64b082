"""What the kernels are measured against, in the same run: the same answer by other means, or the part of it they give.

Samplers without exploration (temperature, top-k, top-p, min-p and a draw):
    eager         PyTorch as engines write it: sort, mask, softmax, multinomial
    compiled      the same under torch.compile
    transformers  its own logits warpers, and a draw
    flashinfer    its fused top-k and top-p sampling (no min-p), where that package is installed
    vllm          its Triton kernel for top-k and top-p (no min-p), and a draw, where that package is installed
Distillers:
    per_row       each row with its own copy of its group's weights, in batched products
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esamp_core.sample import DistillerConfig, DistillerState, RowParams, SamplingParams

LAYER_NORM_EPS = 1e-5
Sampler = Callable[[Tensor, RowParams], Tensor]  # logits [R, V] and parameters to token ids, int64 or int32 [R]


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
    noise = torch.empty_like(p).exponential_()
    return ids.gather(-1, (p / noise).argmax(-1, keepdim=True))[:, 0]


def draw_from(logits: Tensor) -> Tensor:
    """int64 [R]: one draw per row.  Exponential noise and an argmax: multinomial's check would wait for the device."""
    p = logits.softmax(-1, dtype=torch.float32)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def compiled() -> Sampler:
    """Its first call takes half a minute."""
    made: Sampler = torch.compile(eager, dynamic=False)
    return made


def transformers_sampler() -> Sampler:
    """Its warpers take one number for all rows: those of the first row."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    @functools.cache
    def warpers(params: RowParams) -> list[Any]:
        """Of parameters that are the same in all rows; read once, so that no later call waits for the device."""
        temperature, top_k, top_p, min_p = (float(column[0]) for column in params[:4])
        return [
            TemperatureLogitsWarper(temperature), TopKLogitsWarper(int(top_k)), TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ]  # fmt: skip

    def transformers(logits: Tensor, params: RowParams) -> Tensor:
        x = logits.float()
        for warper in warpers(params):
            x = warper(None, x)
        return draw_from(x)

    return transformers


def flashinfer_sampler() -> Sampler:
    """Of float32 logits after temperature, with a top-k above 0 and a top-p for each row.  It has no min-p.

    One top-k for all rows would take another way in it, said to be faster for few rows; its library is not carried.
    """
    import flashinfer.sampling as sampling

    @functools.cache
    def noise(device: torch.device) -> tuple[Tensor, Tensor]:
        """Its seed and offset, on the device: numbers of the host stay in a graph as they were, and so would draws."""
        return torch.randint(2**62, (1,), device=device), torch.zeros(1, dtype=torch.int64, device=device)

    def flashinfer(logits: Tensor, params: RowParams) -> Tensor:
        seed, offset = noise(logits.device)
        offset += 32 * logits.shape[0]  # as much as it moves its own generator on
        scaled = logits.float() / params.temperature[:, None]
        drawn: Tensor = sampling.top_k_top_p_sampling_from_logits(
            scaled, params.top_k.int(), params.top_p, filter_apply_order="top_k_first", deterministic=True,
            check_nan=False, seed=seed, offset=offset,
        )  # fmt: skip
        return drawn

    # Its library is loaded by the first draw, and where that fails it would be compiled, from sources that may not be
    # there: better known now.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flashinfer(torch.zeros(1, 32, device=device), RowParams.of(SamplingParams(top_k=4), 1, device))
    return flashinfer


def vllm_sampler() -> Sampler:
    """Of float32 logits after temperature, with a top-k above 0 and a top-p for each row.  It has no min-p.

    Its kernel masks them in place; the logits given are kept, since temperature makes new ones.
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton

    if not (HAS_TRITON and current_platform.is_cuda_alike()):  # without, it can be imported but not called
        raise RuntimeError("vLLM finds no GPU, or no Triton")

    def vllm(logits: Tensor, params: RowParams) -> Tensor:
        scaled = logits.float() / params.temperature[:, None]
        return draw_from(apply_top_k_top_p_triton(scaled, params.top_k.int(), params.top_p))

    return vllm


MAKERS: dict[str, Callable[[], Sampler]] = {
    "eager": lambda: eager,
    "transformers": transformers_sampler,
    "flashinfer": flashinfer_sampler,
    "vllm": vllm_sampler,
}


@functools.cache
def _made() -> tuple[dict[str, Sampler], dict[str, str]]:
    found, lacking = {}, {}
    for name, make in MAKERS.items():
        try:
            found[name] = make()
        except Exception as error:  # an engine may fail in its own ways on a machine that it was not made for
            lacking[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found, lacking


def available() -> dict[str, Sampler]:
    """The samplers that can draw here, by name.  Without a GPU those are eager and transformers."""
    return _made()[0]


def missing() -> dict[str, str]:
    """The others, and why."""
    return _made()[1]


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
