"""The head's output for chosen tokens, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from esamp_core.base.tensors import Head

_SCORE_CHUNK = 2**18  # elements of gathered head rows at a time


def score_candidates(direction: Tensor, head: Head, token_ids: Tensor, *, transform: bool = True) -> Tensor:
    rows, width = token_ids.shape
    local = token_ids - head.vocab_start
    present = (token_ids >= 0) & (local >= 0) & (local < head.vocab_size)
    local = local.clamp(0, head.vocab_size - 1)
    dots = torch.zeros(rows, width, dtype=torch.float32, device=direction.device)
    used = present.any(0).nonzero()[:, 0]  # columns that some row has a candidate in
    chunk = max(1, _SCORE_CHUNK // max(1, used.numel() * head.hidden_size))
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        v = direction[part].float()
        ids = local[part][:, used]
        vectors = head.weight.index_select(0, ids.flatten()).view(*ids.shape, head.hidden_size).float()
        scores = (vectors * v[:, None]).sum(-1)
        if head.center is not None:
            scores -= (head.center.float() * v).sum(-1, keepdim=True)
        dots[part] = dots[part].index_copy(1, used, scores)
    if head.bias is not None:
        dots += head.bias.float()[local]
    dots = torch.where(present, dots, 0.0)
    return transform_scores(dots, head) if transform else dots


def transform_scores(dots: Tensor, head: Head) -> Tensor:
    scores = dots * head.scale
    if head.softcap is not None:
        scores = head.softcap * torch.tanh(scores / head.softcap)
    return scores if head.clip is None else scores.clamp(-head.clip, head.clip)
