"""How much better than a constant a Distiller predicts, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from esamp_core.base.tensors import Activations, DistillerWeights, Gauge, RowGroups
from esamp_core.reference.distiller import each_group, row_errors, write_slot

WINDOW = 32  # steps that the running means remember


def gauge_(
    gauge: Gauge,
    activations: Activations,
    target: Tensor,
    groups: RowGroups,
    weights: DistillerWeights,
    scale: Tensor,
    *,
    active: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    for slot, members in each_group(groups):
        rows = members if active is None else members[active[members]]
        if rows.numel() == 0:
            continue
        _, deep, error, energy = row_errors(weights, slot, activations, rows, target, scale)
        steps, mean = gauge.steps[slot], gauge.mean[slot]
        loss = (error.square().sum(-1) / energy[:, 0]).mean()
        constant = ((deep - mean).square().sum(-1) / energy[:, 0]).mean()
        if not bool(torch.isfinite(loss) & torch.isfinite(constant)):
            continue
        new = [(gauge.mean, mean + (deep.mean(0) - mean) / (steps + 1)), (gauge.steps, steps + 1)]
        if steps > 0:  # the first step has nothing to compare with
            share = (1 / steps.to(deep.dtype)).clamp_min(1 / WINDOW)
            means = []
            for running, value in ((gauge.error, loss), (gauge.baseline, constant)):
                before = torch.where(steps == 1, value, running[slot])
                means.append((before + (value - before) * share).to(running.dtype))
            new += [(gauge.error, means[0]), (gauge.baseline, means[1])]
            new.append((gauge.trust, (1 - means[0] / means[1]).clamp_min(0).nan_to_num(0.0)))
        write_slot(slot, new)
