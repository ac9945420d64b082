"""Distillers as they were published, in plain PyTorch on every device: for comparison, not for speed.

``DistillerConfig(recipe=...)`` names one.  Both learn the mean squared error of the deep state itself, with autograd
and an ordinary optimizer, from shallow states as they are; nothing here is in units of s.  Like all plain PyTorch of
this library they wait for a GPU where the rows' groups lie on one, so their steps are not captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from esamp_core.base.config import DistillerConfig
from esamp_core.base.tensors import Activations, DistillerState, DistillerWeights, Gauge, Head, Mixed, RowGroups
from esamp_core.reference.distiller import INIT_STD, LAYER_NORM_EPS, each_group, mix_rows_, mixed_memory, write_slot


@dataclass(frozen=True)
class Recipe:
    """A network, ``layers`` times ``y = y + ((y A) * silu(y G + b)) B``, and how it learns; see ``RECIPES``."""

    layers: int
    affine: bool  # b, and a LayerNorm with w and c behind the last layer; else neither
    first_row: bool  # of a group's rows that may teach, the first alone does
    adam: bool  # else plain SGD
    eps: float = 1e-8  # Adam's
    clip: float | None = None  # most of the norm of all gradients of a Distiller together

    @property
    def trained(self) -> tuple[str, ...]:
        return DistillerWeights._fields if self.affine else ("up", "gate", "down")


RECIPES: dict[str, Recipe] = {
    # arXiv 2604.24927 as we read it: two gated layers (SwiGLU) of width 384, Adam 4e-4, eps 1e-4, clipped at 0.5.
    # Starts as torch.nn.Linear does.
    "paper": Recipe(layers=2, affine=False, first_row=False, adam=True, eps=1e-4, clip=0.5),
    # github.com/LinesHogan/tLLM with its model bank and captured training: rank 64, SGD 1e-3, a prompt's first row.
    # Starts at N(0, 0.02^2).  It taps the last block before the final norm; here the target is the head's input.
    "release": Recipe(layers=1, affine=True, first_row=True, adam=False),
}
BETAS = (0.9, 0.999)  # Adam's


def start_weights(hidden_size: int, config: DistillerConfig) -> DistillerWeights:
    """One Distiller, without the dimension of slots: [L, ...] where the default has [...]."""
    recipe, h, r = RECIPES[config.recipe], hidden_size, config.rank
    generator = torch.Generator().manual_seed(config.seed)

    def matrices(inputs: int, outputs: int) -> Tensor:
        weights = torch.empty(recipe.layers, inputs, outputs, dtype=torch.float32, device="cpu")
        if recipe.affine:
            return weights.normal_(0, INIT_STD, generator=generator)
        bound = 1 / math.sqrt(inputs)
        return weights.uniform_(-bound, bound, generator=generator)

    up, gate, down = matrices(h, r), matrices(h, r), matrices(r, h)
    bias = torch.full((recipe.layers, r), 1.0 if recipe.affine else 0.0, dtype=torch.float32, device="cpu")
    ones = torch.ones(h, dtype=torch.float32, device="cpu")
    return DistillerWeights(up, gate, down, bias, ones, torch.zeros_like(ones))


def predict(shallow: Tensor, weights: DistillerWeights, recipe: Recipe) -> Tensor:
    """[n, H] from [n, H], with one Distiller's weights."""
    y = shallow
    for up, gate, down, bias in zip(weights.up, weights.gate, weights.down, weights.gate_bias, strict=True):
        y = y + ((y @ up) * torch.nn.functional.silu(y @ gate + bias)) @ down
    if not recipe.affine:
        return y
    return torch.nn.functional.layer_norm(y, y.shape[-1:], weights.norm_weight, weights.norm_bias, LAYER_NORM_EPS)


class Published:
    """The Distiller's ops of one recipe, as the reference has them; weights have a dimension of layers after that of
    slots.  Of the activations only x, the shallow state, and pred mean anything."""

    def __init__(self, config: DistillerConfig) -> None:
        self._recipe = RECIPES[config.recipe]

    def distiller_scratch(self, weights: DistillerWeights, rows: int) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device=weights.up.device)

    def distiller_forward(
        self, shallow: Tensor, groups: RowGroups, weights: DistillerWeights, scale: Tensor, *,
        out: Activations | None = None, scratch: Tensor | None = None, norm: bool = True,
    ) -> Activations:  # fmt: skip
        assert out is not None
        out.x.copy_(shallow)
        out.pred.zero_()  # rows without a slot
        for slot, members in each_group(groups):
            mine = DistillerWeights(*(w[slot] for w in weights))
            out.pred.index_copy_(0, members, predict(out.x[members], mine, self._recipe))
        return out

    def distiller_norm_(
        self, activations: Activations, groups: RowGroups, weights: DistillerWeights, scale: Tensor
    ) -> None:
        """The forward has left nothing to do."""

    def mix(
        self, deep: Tensor, activations: Activations, groups: RowGroups, weights: DistillerWeights, scale: Tensor,
        beta: Tensor, *, active: Tensor | None = None, out: Tensor | None = None, status: Tensor | None = None,
    ) -> Mixed:  # fmt: skip
        hidden, flags = mixed_memory(deep, out, status)
        for _, members in each_group(groups):
            mix_rows_(hidden, flags, deep, activations.pred[members], members, beta, active)
        return Mixed(hidden, flags)

    def gauge_(
        self, gauge: Gauge, activations: Activations, target: Tensor, groups: RowGroups, weights: DistillerWeights,
        scale: Tensor, *, active: Tensor | None = None, scratch: Tensor | None = None,
    ) -> None:  # fmt: skip
        raise AssertionError("published recipes have no gate")

    def distiller_step_(
        self, state: DistillerState, activations: Activations, target: Tensor, groups: RowGroups, scale: Tensor,
        config: DistillerConfig, *, head: Head | None = None, active: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> None:  # fmt: skip
        """As ``distiller_step_`` of the reference.  state.loss is the relative error there too, not what is learned."""
        if config.lr == 0:
            return
        for slot, members in each_group(groups):
            taught = members if active is None else members[active[members]]
            taught = taught[:1] if self._recipe.first_row else taught
            if taught.numel() > 0:
                self._learn(state, slot, activations.x[taught], target[taught].to(activations.x.dtype), config.lr)

    def _learn(self, state: DistillerState, slot: int, shallow: Tensor, deep: Tensor, lr: float) -> None:
        recipe = self._recipe
        mine = DistillerWeights(*(w[slot].detach().requires_grad_() for w in state.weights))
        with torch.enable_grad():
            error = predict(shallow, mine, recipe) - deep
            grads = torch.autograd.grad(error.square().mean(), [getattr(mine, name) for name in recipe.trained])
        norm = torch.stack([g.norm() for g in grads]).norm()
        loss = (error.detach().square().sum(-1) / deep.square().sum(-1)).mean()
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            state.nonfinite[slot] += 1
            return
        first, updates = torch.where(state.updates[slot] == 0, loss, state.first_loss[slot]), state.updates[slot] + 1
        new = [(state.first_loss, first), (state.loss, loss), (state.updates, updates)]
        factor = 1.0 if recipe.clip is None else (recipe.clip / (norm + 1e-6)).clamp_max(1.0)  # torch's clip_grad_norm_
        for name, grad in zip(recipe.trained, grads, strict=True):
            weight, grad = getattr(state.weights, name), grad * factor
            change = lr * grad
            if recipe.adam:
                assert state.momentum is not None
                column = getattr(state.momentum, name)
                moments, change = _adam(grad, column[slot], updates, lr, recipe.eps)
                new.append((column, moments))
            new.append((weight, weight[slot] - change))
        write_slot(slot, new)


def _adam(grad: Tensor, moments: Tensor, step: Tensor, lr: float, eps: float) -> tuple[Tensor, Tensor]:
    """One step of Adam (Kingma and Ba 2015, arXiv 1412.6980): new moments, and what is taken off the weights."""
    first = moments[0].lerp(grad, 1 - BETAS[0])
    second = (moments[1] * BETAS[1]).addcmul(grad, grad, value=1 - BETAS[1])
    corrected = [1 - beta ** step.double() for beta in BETAS]
    size = second.sqrt() / corrected[1].sqrt().to(second.dtype) + eps
    return torch.stack([first, second]), lr * first / (size * corrected[0].to(first.dtype))
