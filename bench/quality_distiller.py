"""The library's Distiller for many groups of equally many siblings at once, in batched products.

The library's reference goes from group to group, which is slow for hundreds of small groups; this is the same
arithmetic (``esamp_core.reference.distiller``, its formulas' home) in another order of summation.  Tests hold that it
predicts, learns and draws as the library does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.quality_decode import Setting
from esamp_core.explorer.start import start_weights
from esamp_core.reference.distiller import LAYER_NORM_EPS, RMS_FLOOR, learning_rates, token_targets
from esamp_core.sample import DistillerConfig, DistillerWeights

STUDY_LR = 0.3  # of the tables in docs/quality.md, where a start has no rate of its own


class _Saved(NamedTuple):
    x: Tensor  # [P, n, H]
    up: Tensor  # [P, n, r]
    gate: Tensor  # [P, n, r]
    normed: Tensor  # [P, n, H]
    rstd: Tensor  # [P, n, 1]


class DenseDistillers:
    """One Distiller per group.

    start: one Distiller's weights that all begin with; default the library's start.  Weights are float32.
    """

    def __init__(
        self, groups: int, hidden: int, config: DistillerConfig, scale: float, start: DistillerWeights | None = None
    ) -> None:
        self.config, self.scale = config, scale
        start = start_weights(hidden, config, torch.device("cpu")) if start is None else start
        start = DistillerWeights(*(w.float().to(torch.get_default_device()) for w in start))
        self.weights = DistillerWeights(*(w.expand(groups, *w.shape).clone() for w in start))
        self._rates = learning_rates(config, hidden)
        self._velocity = [torch.zeros_like(w) for w in self.weights] if config.momentum else None

    def predict(self, shallow: Tensor) -> Tensor:
        """[P, n, H] from [P, n, H]."""
        w = self.weights
        x = shallow / shallow.square().mean(-1, keepdim=True).sqrt().clamp_min(RMS_FLOOR)
        up, gate = x @ w.up, x @ w.gate + w.gate_bias[:, None]
        y = x + (up * torch.nn.functional.silu(gate)) @ w.down
        rstd = torch.rsqrt(y.var(-1, correction=0, keepdim=True) + LAYER_NORM_EPS)
        normed = (y - y.mean(-1, keepdim=True)) * rstd
        self._saved = _Saved(x, up, gate, normed, rstd)
        return self.scale * (w.norm_weight[:, None] * normed + w.norm_bias[:, None])

    def errors(self, target: Tensor) -> Tensor:
        """Relative squared error [P, n] of the latest prediction."""
        w, deep = self.weights, target / self.scale
        error = w.norm_weight[:, None] * self._saved.normed + w.norm_bias[:, None] - deep
        return error.square().sum(-1) / deep.square().sum(-1).clamp_min(1e-30)

    def learn(self, target: Tensor, taught: Tensor) -> None:
        """One step on the latest prediction.  target [P, n, H], taught bool [P, n]; groups without a row stay."""
        if self.config.lr == 0:
            return
        saved, w = self._saved, self.weights
        use = taught[..., None].float()
        deep = target / self.scale
        g = w.norm_weight[:, None] * saved.normed + w.norm_bias[:, None] - deep
        g = g * (deep.shape[-1] / deep.square().sum(-1, keepdim=True).clamp_min(1e-30))
        d = g * w.norm_weight[:, None]
        d = d - d.mean(-1, keepdim=True) - saved.normed * (d * saved.normed).mean(-1, keepdim=True)
        d = d * saved.rstd
        size = torch.maximum(g.square().mean(-1), d.square().mean(-1)).sqrt()[..., None]
        factor = (self.config.clip / size).clamp_max(1.0) * use / use.sum(1, keepdim=True).clamp_min(1)
        g, d = g * factor, d * factor

        sigmoid = torch.sigmoid(saved.gate)
        silu = saved.gate * sigmoid
        d_hidden = d @ w.down.transpose(1, 2)
        d_up, d_gate = d_hidden * silu, d_hidden * saved.up * (sigmoid + silu * (1 - sigmoid))
        x = saved.x.transpose(1, 2)
        grads = (
            x @ d_up,
            x @ d_gate,
            (saved.up * silu).transpose(1, 2) @ d,
            d_gate.sum(1),
            (g * saved.normed).sum(1),
            g.sum(1),
        )
        steps = DistillerWeights(*grads)
        if self._velocity is not None:
            learns = taught.any(1)
            for velocity, step in zip(self._velocity, steps, strict=True):
                shape = (-1,) + (1,) * (step.dim() - 1)
                velocity.copy_(torch.where(learns.view(shape), velocity * self.config.momentum + step, velocity))
            steps = DistillerWeights(*(v * learns.view((-1,) + (1,) * (v.dim() - 1)) for v in self._velocity))
        for weight, step, rate in zip(self.weights, steps, self._rates, strict=True):
            weight.sub_(step * rate)


class DistillerMemory:
    """ESamp, as a memory of what siblings' states were: the penalty is -beta (logit - distilled logit).

    random: control; the error is replaced by a random direction of the same norm, fresh for every row and step.
    start: see :class:`DenseDistillers`.
    """

    def __init__(
        self,
        setting: Setting,
        beta: float,
        config: DistillerConfig,
        random: bool = False,
        start: DistillerWeights | None = None,
    ) -> None:
        parts = setting.source.parts
        assert parts.deep_scale is not None and parts.head.bias is None, "a study of models with a plain head"
        self._beta, self._random = beta, random
        self._weight = parts.head.weight.float()
        self._distillers = DenseDistillers(setting.groups, parts.hidden_size, config, parts.deep_scale, start)
        self._noise = torch.Generator("cpu").manual_seed(int(setting.request_seeds[0]) & (2**63 - 1))
        self.losses: list[float] = []

    def begin(self, shallow: Tensor, deep: Tensor) -> None:
        self._deep = deep
        self._error = deep - self._distillers.predict(shallow)

    def penalty(self, siblings: Tensor) -> Tensor:
        error = self._error[:, siblings]
        if self._random:
            noise = torch.randn(error.shape, generator=self._noise, device="cpu").to(error.device)
            error = noise * error.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return -self._beta * (error @ self._weight.T)

    def add(self, siblings: Tensor, token_ids: Tensor, taught: Tensor) -> None:
        assert len(siblings) == self._deep.shape[1], "the deep state teaches once per step: no rounds"
        self.losses.append(float(self._distillers.errors(self._deep)[taught].mean()))
        self._distillers.learn(self._deep, taught)


class ChoiceMemory:
    """The choice-Distiller by SGD: the penalty is gamma clip(We[c] . pred, +-3), the target We[drawn token]."""

    def __init__(self, setting: Setting, gamma: float, config: DistillerConfig) -> None:
        head = setting.source.parts.head.centred()
        assert head.clip is not None and config.target == "choice"
        self._gamma, self._clip = gamma, head.clip
        self._embedding = token_targets(head, torch.arange(head.vocab_size))
        hidden = self._embedding.shape[1]
        self._distillers = DenseDistillers(setting.groups, hidden, config, hidden**-0.5)
        self.losses: list[float] = []

    def begin(self, shallow: Tensor, deep: Tensor) -> None:
        self._pred = self._distillers.predict(shallow)

    def penalty(self, siblings: Tensor) -> Tensor:
        return self._gamma * (self._pred[:, siblings] @ self._embedding.T).clamp(-self._clip, self._clip)

    def add(self, siblings: Tensor, token_ids: Tensor, taught: Tensor) -> None:
        assert len(siblings) == self._pred.shape[1], "the choice-Distiller learns once per step: no rounds"
        target = self._embedding[token_ids.clamp_min(0)]
        self.losses.append(float(self._distillers.errors(target)[taught].mean()))
        self._distillers.learn(target, taught)
