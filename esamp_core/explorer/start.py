"""What every Distiller starts with: the identity path, or a file that calibration wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from esamp_core.base.checks import require
from esamp_core.base.config import DistillerConfig
from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import read_safetensors, write_safetensors
from esamp_core.base.schema import POSITIVE, Kept, Within, check_tensors
from esamp_core.base.tensors import DistillerWeights, Gauge, Head
from esamp_core.reference import published
from esamp_core.reference.distiller import INIT_STD
from esamp_core.reference.gauge import WINDOW

FORMAT = "esamp-distiller-start-1"


class Start(NamedTuple):
    """One Distiller before it has learned, without the dimension of slots."""

    weights: DistillerWeights
    gauge: Gauge


def start_weights(hidden_size: int, config: DistillerConfig, device: torch.device) -> DistillerWeights:
    """The weights of :func:`start_of`."""
    return start_of(hidden_size, config, device).weights


class Judged(NamedTuple):
    """What calibration found on states that it did not fit."""

    mean: Tensor  # float32 [H], of the deep states, in units of s
    error: float  # relative squared error of the calibrated Distiller
    baseline: float  # of the mean


def start_of(hidden_size: int, config: DistillerConfig, device: torch.device) -> Start:
    """One Distiller before it has learned: A, G ~ N(0, 0.02^2), b = 1, and pred = s * LayerNorm(x), the identity path.

    With target "choice" pred starts at 0 instead (w = 0): nothing was chosen yet.  Drawn on the CPU, so that every
    device starts from the same bits.  With ``config.start`` it is read from that file, and trusted as far as it was
    better than a constant there.
    """
    h, r = hidden_size, config.rank
    judged = None
    if config.published:
        weights = published.start_weights(h, config)
    elif config.start is not None:
        weights, judged = _read_start(config.start, h, r)
    else:
        generator = torch.Generator().manual_seed(config.seed)
        up, gate = (
            torch.randn(h, r, generator=generator, dtype=torch.float32, device="cpu") * INIT_STD for _ in range(2)
        )
        down, bias, norm_bias = (
            torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in ((r, h), (r,), (h,))
        )
        norm_weight = norm_bias + (0.0 if config.target == "choice" else 1.0)
        weights = DistillerWeights(up, gate, down, bias + 1, norm_weight, norm_bias)
    weights = weights._replace(**{k: getattr(weights, k).to(config.weight_dtype) for k in ("up", "gate", "down")})
    if config.gated and judged is None and config.lr == 0:
        raise ArgumentError("gate must be False where lr is 0 and no start was judged: nothing would ever be explored")
    gauge = _unjudged(h) if judged is None else _as_judged(judged)
    return Start(DistillerWeights(*(t.to(device) for t in weights)), Gauge(*(t.to(device) for t in gauge)))


def _unjudged(hidden_size: int) -> Gauge:
    nothing, zero = (torch.tensor(value, dtype=torch.float32, device="cpu") for value in (math.nan, 0.0))
    return Gauge(zero.expand(hidden_size).clone(), zero.long(), nothing, nothing, zero)


def _as_judged(judged: Judged) -> Gauge:
    """As after so many steps as the running means remember."""
    error, baseline = (
        torch.tensor(value, dtype=torch.float32, device="cpu") for value in (judged.error, judged.baseline)
    )
    steps = torch.tensor(WINDOW + 1, dtype=torch.int64, device="cpu")
    return Gauge(judged.mean, steps, error, baseline, (1 - error / baseline).clamp_min(0))


def _open_start(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Its tensors, and what it says of itself.  Raises ArgumentError."""
    tensors, metadata = read_safetensors(path, "start")
    if metadata.get("format") != FORMAT:
        raise ArgumentError(f"start must be a file written by `esamp calibrate`, got {path!r}")
    return tensors, metadata


def _read_start(path: str, hidden_size: int, rank: int) -> tuple[DistillerWeights, Judged | None]:
    tensors, metadata = _open_start(path)
    where = f"start {path!r}"
    if "up" in tensors and tuple(tensors["up"].shape) != (hidden_size, rank):  # the mistake that people make
        got = tuple(tensors["up"].shape)
        raise ArgumentError(f"start must be for H={hidden_size} and rank={rank}, got {got} in {path!r}")
    known = metadata.get("target", "deep")
    # Files of earlier versions have not all of these.
    others = {"mean": Kept((hidden_size,), torch.float32), "head": Kept((None, None), torch.float32)}
    wanted = kept_weights(hidden_size, rank, Within()) | {name: others[name] for name in others.keys() & tensors.keys()}
    check_tensors(tensors, wanted, where)
    require(known == "deep", f"target in {where}", 'be "deep"', known)
    if "deep_scale" in metadata:
        _number(metadata, "deep_scale", POSITIVE, where)
    judged = None
    if "mean" in tensors:
        error, baseline = _number(metadata, "error", Within(0.0), where), _number(metadata, "baseline", POSITIVE, where)
        judged = Judged(tensors["mean"], error, baseline)
    return DistillerWeights(*(tensors[name] for name in DistillerWeights._fields)), judged


def kept_weights(hidden_size: int, rank: int, within: Within) -> dict[str, Kept]:
    """What a file must hold of one Distiller's weights, or of numbers of their shapes."""
    h, r = hidden_size, rank
    shapes = DistillerWeights((h, r), (h, r), (r, h), (r,), (h,), (h,))  # type: ignore[arg-type]
    return {name: Kept(shape, torch.float32, within) for name, shape in shapes._asdict().items()}


def _number(metadata: Mapping[str, str], name: str, within: Within, where: str) -> float:
    text = metadata.get(name, "")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    require(number in within, f"{name} in {where}", f"be a number{within}", text[:40])
    return number


def head_sample(weight: Tensor) -> Tensor:
    """float32 [up to 16, up to 16]: some numbers of a head, by which a model is known again in any dtype."""
    rows, columns = (
        torch.linspace(0, size - 1, min(size, 16), dtype=torch.float32, device="cpu").long() for size in weight.shape
    )
    return weight.detach()[rows.to(weight.device)].float().cpu()[:, columns]


def same_head(known: Tensor, mine: Tensor) -> bool:
    """Whether two samples are of one head: half precision rounds to 2^-8 of a number, twice."""
    same_kind = known.dtype == mine.dtype and known.shape == mine.shape
    return same_kind and bool((known - mine).abs().max() <= 2**-6 * known.abs().max())


def check_start(config: DistillerConfig, weight: Tensor) -> None:
    """Raises ArgumentError if config.start was calibrated for a model with another head [V, H] than this."""
    if config.start is None:
        return
    tensors, metadata = _open_start(config.start)
    if "head" in tensors and not same_head(tensors["head"], head_sample(weight)):  # else of an earlier version
        model = metadata.get("model", "another model")[:80]
        raise ArgumentError(f"start must be calibrated for this model, got that of {model} in {config.start!r}")


def write_start(path: Path, weights: DistillerWeights, judged: Judged, head: Head, about: Mapping[str, str]) -> None:
    """Write a file for ``DistillerConfig(start=path)``.  about: what else the file is to say of itself."""
    tensors = {**weights._asdict(), "mean": judged.mean, "head": head_sample(head.weight)}
    numbers = {"error": repr(judged.error), "baseline": repr(judged.baseline)}
    write_safetensors(path, tensors, {"format": FORMAT, **numbers, **about})
