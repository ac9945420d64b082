"""Memories of what siblings drew, which lower the logits of tokens that were drawn in states like this one.

Plain PyTorch, one group per row of a dense [P, n, ..] layout.  Formulas: docs/quality.md.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.quality_decode import Setting
from esamp_core.reference.distiller import token_targets
from esamp_core.sample import Head

KEY_SEED = 7  # of the random projection of keys: the same for all groups and runs


class Memory(Protocol):
    """P groups of n siblings; ``begin`` once per step, then for each round ``penalty`` and ``add``."""

    losses: list[float]  # mean relative error of a Distiller, per step; empty without one

    def begin(self, shallow: Tensor, deep: Tensor) -> None:
        """The step's states, [P, n, H]."""

    def penalty(self, siblings: Tensor) -> Tensor:
        """What to subtract from the logits, [P, len(siblings), V]."""

    def add(self, siblings: Tensor, token_ids: Tensor, taught: Tensor) -> None:
        """Remember the tokens [P, len(siblings)] of rows that are ``taught`` (bool, same shape)."""


def random_keys(states: Tensor, width: int) -> Tensor:
    """unit(LayerNorm(states) R), R a fixed random matrix [H, width]."""
    hidden = states.shape[-1]
    generator = torch.Generator("cpu").manual_seed(KEY_SEED)  # the same matrix on every device
    projection = torch.randn(hidden, width, generator=generator, device="cpu").to(states.device)
    return F.normalize(F.layer_norm(states.float(), (hidden,)) @ projection, dim=-1)


class KernelMemory:
    """s_c = sum_j w_j [token_j = c] / (1 + sum_j w_j), w_j = exp((cos(key, key_j) - 1) / tau); penalty gamma s_c.

    The latest ``window`` tokens of the group are kept (whole steps), in a ring.
    """

    def __init__(self, setting: Setting, gamma: float, window: int, tau: float = 0.05, width: int = 64) -> None:
        groups, n = setting.groups, setting.siblings
        self._gamma, self._tau, self._width, self._n = gamma, tau, width, n
        self._vocab = setting.source.parts.head.vocab_size
        self._steps = min(max(1, window // n), setting.max_new_tokens)
        self._keys = torch.zeros(groups, self._steps * n, width)
        self._tokens = torch.zeros(groups, self._steps * n, dtype=torch.long)
        self._known = torch.zeros(groups, self._steps * n)
        self._step = 0
        self.losses: list[float] = []

    def begin(self, shallow: Tensor, deep: Tensor) -> None:
        self._start = (self._step % self._steps) * self._n
        self._step += 1
        here = slice(self._start, self._start + self._n)
        keys = random_keys(deep, self._width)
        self._keys[:, here] = keys
        self._known[:, here] = 0.0
        self._used = min(self._step, self._steps) * self._n
        cosine = keys @ self._keys[:, : self._used].transpose(1, 2)
        self._weight = torch.exp((cosine - 1) / self._tau)

    def penalty(self, siblings: Tensor) -> Tensor:
        weight = self._weight[:, siblings] * self._known[:, None, : self._used]
        tokens = self._tokens[:, None, : self._used].expand_as(weight)
        counts = torch.zeros(*weight.shape[:2], self._vocab).scatter_add_(-1, tokens, weight)
        return self._gamma * counts / (1 + weight.sum(-1, keepdim=True))

    def add(self, siblings: Tensor, token_ids: Tensor, taught: Tensor) -> None:
        self._tokens[:, self._start + siblings] = token_ids.clamp_min(0)
        self._known[:, self._start + siblings] = taught.float()


class RidgeMemory:
    """The choice-Distiller by ridge regression, from the shallow state.

    z = [unit(LN(shallow) R); .3], G = lam I + sum z z', C = sum z We[token]', D = z' G^-1 C;
    penalty gamma clip(We[c] . D, +-3), We the centred lm_head rows over their mean norm.
    """

    def __init__(self, setting: Setting, gamma: float, lam: float = 0.1, width: int = 64) -> None:
        head: Head = setting.source.parts.head.centred()
        assert head.clip is not None
        self._gamma, self._clip, self._width = gamma, head.clip, width
        self.embedding = token_targets(head, torch.arange(head.vocab_size))
        groups, hidden = setting.groups, self.embedding.shape[1]
        self._gram = torch.eye(width + 1).mul(lam).repeat(groups, 1, 1)
        self._cross = torch.zeros(groups, width + 1, hidden)
        self.losses: list[float] = []

    def begin(self, shallow: Tensor, deep: Tensor) -> None:
        self._z = F.pad(random_keys(shallow, self._width), (0, 1), value=0.3)

    def predict(self, siblings: Tensor) -> Tensor:
        """D [P, len(siblings), H]."""
        return self._z[:, siblings] @ torch.linalg.solve(self._gram, self._cross)

    def penalty(self, siblings: Tensor) -> Tensor:
        return self._gamma * (self.predict(siblings) @ self.embedding.T).clamp(-self._clip, self._clip)

    def add(self, siblings: Tensor, token_ids: Tensor, taught: Tensor) -> None:
        z = self._z[:, siblings] * taught[..., None]
        self._gram += z.transpose(1, 2) @ z
        self._cross += z.transpose(1, 2) @ self.embedding[token_ids.clamp_min(0)]
