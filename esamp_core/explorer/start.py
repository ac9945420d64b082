"""The weights that every Distiller starts with: the identity path, or a file that calibration wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from esamp_core.base.config import DistillerConfig
from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import read_safetensors
from esamp_core.base.tensors import DistillerWeights
from esamp_core.reference.distiller import INIT_STD

FORMAT = "esamp-distiller-start-1"


def start_weights(hidden_size: int, config: DistillerConfig, device: torch.device) -> DistillerWeights:
    """One Distiller before it has learned: A, G ~ N(0, 0.02^2), b = 1, and pred = s * LayerNorm(x), the identity path.

    With target "choice" pred starts at 0 instead (w = 0): nothing was chosen yet.  Drawn on the CPU, so that every
    device starts from the same bits.  With ``config.start`` it is read from that file.
    """
    h, r = hidden_size, config.rank
    if config.start is not None:
        weights = _read_start(config.start, h, r)
    else:
        generator = torch.Generator().manual_seed(config.seed)
        up, gate = (torch.randn(h, r, generator=generator) * INIT_STD for _ in range(2))
        norm_weight = torch.zeros(h) if config.target == "choice" else torch.ones(h)
        weights = DistillerWeights(up, gate, torch.zeros(r, h), torch.ones(r), norm_weight, torch.zeros(h))
    weights = weights._replace(**{k: getattr(weights, k).to(config.weight_dtype) for k in ("up", "gate", "down")})
    return DistillerWeights(*(t.to(device) for t in weights))


def _read_start(path: str, hidden_size: int, rank: int) -> DistillerWeights:
    try:
        tensors, metadata = read_safetensors(path)
    except Exception as error:  # of the operating system, or safetensors' own
        raise ArgumentError(f"start cannot be read from {path!r}: {error}") from None
    if metadata.get("format") != FORMAT or set(tensors) != set(DistillerWeights._fields):
        raise ArgumentError(f"start must be a file written by `esamp calibrate`, got {path!r}")
    got = tuple(tensors["up"].shape)
    if got != (hidden_size, rank):
        raise ArgumentError(f"start must be for H={hidden_size} and rank={rank}, got {got} in {path!r}")
    return DistillerWeights(**tensors)


def write_start(path: Path, weights: DistillerWeights, about: Mapping[str, str]) -> None:
    """Write a file for ``DistillerConfig(start=path)``.  about: what else the file is to say of itself."""
    tensors = {name: t.contiguous() for name, t in weights._asdict().items()}
    save_file(tensors, path, metadata={"format": FORMAT, **about})
