"""What a model says after latent mixing, in float64, from transformers' states and the reference's formulas alone.

Also used by the tests of the vLLM binding, which run in an environment of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esamp_core.explorer.start import start_weights
from esamp_core.reference import distiller as reference_distiller
from esamp_core.sample import DistillerConfig, DistillerState, DistillerWeights, group_rows


@torch.no_grad()
def forward(model: Any, tokens: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Shallow states, deep states and logits, each [T, ...], of a sequence."""
    seen: dict[str, Tensor] = {}

    def keep_shallow(module: Any, inputs: Any, output: Any) -> None:
        seen["shallow"] = (output[0] if isinstance(output, tuple) else output)[-len(tokens) :]

    def keep_deep(module: Any, inputs: Any) -> None:
        seen["deep"] = inputs[0]

    hooks = [
        model.model.layers[0].register_forward_hook(keep_shallow),
        model.lm_head.register_forward_pre_hook(keep_deep),
    ]
    logits = model(torch.tensor([list(tokens)])).logits[0]
    for hook in hooks:
        hook.remove()
    return seen["shallow"].reshape(len(tokens), -1), seen["deep"].reshape(len(tokens), -1), logits


@torch.no_grad()
def expected_logits(
    reference: Any, prompt: list[int], outputs: Sequence[Sequence[int]], beta: float, config: DistillerConfig | None
) -> list[Tensor]:
    """float64 [steps, V] of each output: siblings that start together.

    config: None is the model without exploration.  deep_scale: that of the model's final norm, unless config has one.
    """
    whole = [forward(reference, [*prompt, *output]) for output in outputs]
    first = len(prompt) - 1
    if config is None:
        return [logits[first : first + len(out)].double() for out, (_, _, logits) in zip(outputs, whole, strict=True)]
    hidden = whole[0][0].shape[1]
    weights = DistillerWeights(*(w.double()[None] for w in start_weights(hidden, config, torch.device("cpu"))))
    zero = torch.zeros(1, dtype=torch.int64)
    state = DistillerState(weights, None, zero, zero.clone(), zero.double(), zero.double(), zero.clone())
    norm = reference.model.norm.weight.double()
    scale = norm.square().mean().sqrt() if config.deep_scale is None else torch.tensor(config.deep_scale).double()
    found: list[list[Tensor]] = [[] for _ in outputs]
    for step in range(max(map(len, outputs))):
        running = [i for i, output in enumerate(outputs) if step < len(output)]
        shallow, deep = (torch.stack([whole[i][k][first + step] for i in running]).double() for k in (0, 1))
        groups = group_rows(torch.zeros(len(running), dtype=torch.int64), 1)
        saved = reference_distiller.distiller_forward(shallow, groups, state.weights, scale)
        mixed = (1 + beta) * deep - beta * saved.pred
        for i, row in zip(running, mixed @ reference.lm_head.weight.double().T, strict=True):
            found[i].append(row)
        reference_distiller.distiller_step_(state, saved, deep, groups, scale, config)
    return [torch.stack(rows) for rows in found]


def chosen(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """float64 [steps]: log-probabilities of tokens under softmax(logits)."""
    return logits.log_softmax(-1).gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
