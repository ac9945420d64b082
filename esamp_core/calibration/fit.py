"""The fit: start weights with the least error on the model's own states.

The formula is the library's own (``reference.distiller_forward``), differentiated by autograd.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from esamp_core.base.config import DistillerConfig
from esamp_core.base.tensors import Activations, DistillerWeights
from esamp_core.calibration.config import CalibrationConfig, OnProgress
from esamp_core.calibration.states import States
from esamp_core.calibration.work import Fit, Work
from esamp_core.explorer.start import Judged, start_weights
from esamp_core.reference import distiller_forward, group_rows
from esamp_core.reference.distiller import feature_size

EVALUATED = 4096  # held-out tokens at a time
SAVE_EVERY = 100  # steps


class Calibration(NamedTuple):
    """Fitted start weights, and what they are worth on held-out tokens."""

    weights: DistillerWeights
    deep_scale: float
    before: float  # mean relative squared error of the plain start
    after: float  # of these weights
    baseline: float  # of the mean deep state of the tokens that were fitted
    mean: Tensor  # [H], that mean, in units of deep_scale
    held_out_tokens: int

    @property
    def judged(self) -> Judged:
        return Judged(self.mean, self.after, self.baseline)


def _forward(shallow: Tensor, weights: DistillerWeights, scale: float) -> Activations:
    groups = group_rows(torch.zeros(len(shallow), dtype=torch.int64, device="cpu"), 1)
    slots, size = DistillerWeights(*(w[None] for w in weights)), torch.tensor(scale, dtype=torch.float32, device="cpu")
    return distiller_forward(shallow, groups, slots, size)


def _loss(states: States, weights: DistillerWeights, scale: float) -> Tensor:
    """Mean relative squared error."""
    error = _forward(states.shallow, weights, scale).pred - states.deep
    return (error.square().sum(-1) / states.deep.square().sum(-1)).mean()


@torch.no_grad()
def _error(states: States, weights: DistillerWeights, scale: float) -> float:
    parts = range(0, len(states.deep), EVALUATED)
    sums = [float(_loss(States(*(t[i : i + EVALUATED] for t in states)), weights, scale)) for i in parts]
    sizes = [len(states.deep[i : i + EVALUATED]) for i in parts]
    return sum(s * n for s, n in zip(sums, sizes, strict=True)) / sum(sizes)


def fit(
    train: States,
    test: States,
    scale: float,
    config: CalibrationConfig,
    work: Work,
    on_progress: OnProgress,
) -> Calibration:
    """AdamW on the mean relative squared error of ``train``; goes on from where ``work`` is."""
    hidden = train.deep.shape[1]
    start = start_weights(hidden, DistillerConfig(rank=config.rank, seed=config.seed), torch.device("cpu"))
    before = _error(test, start, scale)
    weights = DistillerWeights(*(w.clone().requires_grad_() for w in start))
    optimizer = torch.optim.AdamW(weights, lr=config.rate, weight_decay=0.0)
    if (done := work.fit) is not None:
        for weight, kept, mean, square in zip(weights, done.weights, done.mean, done.square, strict=True):
            with torch.no_grad():
                weight.copy_(kept)
            made = torch.tensor(float(done.step), dtype=torch.float32, device="cpu")
            optimizer.state[weight] = {"step": made, "exp_avg": mean.clone(), "exp_avg_sq": square.clone()}
    for step in range(0 if done is None else done.step, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate * _schedule(step, config.steps)
        generator = torch.Generator().manual_seed((config.seed << 32) + step)
        chosen = torch.randint(len(train.deep), (config.batch,), generator=generator, device="cpu")
        loss = _loss(States(*(t[chosen] for t in train)), weights, scale)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            moments = (
                DistillerWeights(*(optimizer.state[w][name] for w in weights)) for name in ("exp_avg", "exp_avg_sq")
            )
            work.fit = Fit(step + 1, weights, *moments)
            work.save()
        on_progress("fit", step + 1, config.steps)
    fitted = balanced(DistillerWeights(*(w.detach() for w in weights)), train, scale)
    mean = train.deep.mean(0)
    baseline = float(((test.deep - mean).square().sum(-1) / test.deep.square().sum(-1)).mean())
    after = _error(test, fitted, scale)
    return Calibration(fitted, scale, before, after, baseline, mean / scale, len(test.deep))


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, steps // 10)
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def balanced(weights: DistillerWeights, train: States, scale: float) -> DistillerWeights:
    """The same function, in weights that one learning rate suits.

    The gated features h are linear in A: what A is multiplied with, B may be divided by.  One step of size lr moves the
    output through B by lr |h|^2 / (the size that ``learning_rates`` counts on), and through A by at most lr times the
    largest eigenvalue of B' diag(silu^2) B.  The fit leaves these orders of magnitude apart; here they become equal.
    """
    saved = _forward(train.shallow[:EVALUATED], weights, scale)
    silu = torch.nn.functional.silu(saved.gate)
    features = float((saved.up * silu).square().sum(-1).mean())
    rank, hidden = weights.down.shape
    through_b = features / feature_size(rank, hidden)
    through_a = float(torch.linalg.matrix_norm(silu.square().mean(0).sqrt()[:, None] * weights.down, 2)) ** 2
    factor = (through_a / through_b) ** 0.25
    return weights._replace(up=weights.up * factor, down=weights.down / factor)
