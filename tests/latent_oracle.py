"""What a model says after latent mixing, in float64, from transformers' states and the reference's formulas alone.

Also used by the tests of the vLLM binding, which run in an environment of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from esamp_core.explorer.start import Judged, start_weights, write_start
from esamp_core.reference import distiller as reference_distiller
from esamp_core.sample import DistillerConfig, DistillerState, DistillerWeights, Head, group_rows


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


def judged_start(head: Head, path: Path) -> str:
    """A start of rank 8 for this head's model, which says of itself that it is far better than a constant."""
    generator, hidden = torch.Generator().manual_seed(3), head.hidden_size
    plain = start_weights(hidden, DistillerConfig(rank=8), torch.device("cpu"))
    weights = plain._replace(down=0.3 * torch.randn(plain.down.shape, generator=generator))
    judged = Judged(0.1 * torch.randn(hidden, generator=generator), 0.1, 0.8)
    write_start(path, weights, judged, head, {"model": "a llama"})
    return str(path)


class Gate:
    """How far a Distiller is trusted, written down anew: 1 - its error / that of the mean of all it had to predict."""

    def __init__(self, config: DistillerConfig, hidden: int) -> None:
        self.trust = 0.0 if config.gate else 1.0
        self._open, self._mean, self._seen = not config.gate, torch.zeros(hidden).double(), 0
        self._errors: list[float] = []  # of the Distiller and the mean, running
        if config.gate and config.start is not None:
            with safe_open(config.start, "pt") as file:
                about = file.metadata()
                self._mean, self._seen = file.get_tensor("mean").double(), 33
            self._errors = [float(about["error"]), float(about["baseline"])]
            self.trust = 1 - self._errors[0] / self._errors[1]

    def look(self, predicted: Tensor, deep: Tensor) -> None:
        """Of one step [n, H], in units of the scale."""
        if self._open:
            return
        energy = deep.square().sum(-1)
        new = [float(((guess - deep).square().sum(-1) / energy).mean()) for guess in (predicted, self._mean)]
        if self._seen == 1:
            self._errors = new
        elif self._seen > 1:
            share = max(1 / self._seen, 1 / 32)
            self._errors = [old + (late - old) * share for old, late in zip(self._errors, new, strict=True)]
        if self._seen:
            self.trust = max(0.0, 1 - self._errors[0] / self._errors[1])
        self._mean = (self._mean * self._seen + deep.mean(0)) / (self._seen + 1)
        self._seen += 1


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
    gate = Gate(config, hidden)
    norm = reference.model.norm.weight.double()
    scale = norm.square().mean().sqrt() if config.deep_scale is None else torch.tensor(config.deep_scale).double()
    found: list[list[Tensor]] = [[] for _ in outputs]
    for step in range(max(map(len, outputs))):
        running = [i for i, output in enumerate(outputs) if step < len(output)]
        shallow, deep = (torch.stack([whole[i][k][first + step] for i in running]).double() for k in (0, 1))
        groups = group_rows(torch.zeros(len(running), dtype=torch.int64), 1)
        saved = reference_distiller.distiller_forward(shallow, groups, state.weights, scale)
        mixed = deep + gate.trust * beta * (deep - saved.pred)
        for i, row in zip(running, mixed @ reference.lm_head.weight.double().T, strict=True):
            found[i].append(row)
        gate.look(saved.pred / scale, deep / scale)
        reference_distiller.distiller_step_(state, saved, deep, groups, scale, config)
    return [torch.stack(rows) for rows in found]


def chosen(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """float64 [steps]: log-probabilities of tokens under softmax(logits)."""
    return logits.log_softmax(-1).gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
