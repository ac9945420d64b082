"""A small Explorer and one decode step, for the tests of its verbs."""

from __future__ import annotations

import torch

from esamp_core.sample import DistillerConfig, Draw, Explorer, Head, Rows, SamplingParams

HIDDEN, VOCAB = 16, 50
PARAMS = SamplingParams(temperature=0.9, min_p=0.01, beta=0.5, seed=5)


def make(config: DistillerConfig | None = None, device: str = "cpu", **options: object) -> Explorer:
    weight = torch.randn(
        VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    ).to(device)
    config = config or DistillerConfig(rank=4, deep_scale=1.0, gate=False)
    return Explorer(Head(weight), HIDDEN, config, **({"max_groups": 4, "max_rows": 32} | options))  # type: ignore


def taps(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    shallow = torch.randn(
        rows, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu"
    )
    return shallow, torch.nn.functional.layer_norm(shallow.roll(1, -1), (HIDDEN,))


def logits_of(explorer: Explorer, deep: torch.Tensor) -> torch.Tensor:
    return (deep[:, None] * explorer.head.weight).sum(-1)


def step(explorer: Explorer, rows: Rows, seed: int = 0) -> Draw:
    shallow, deep = taps(len(rows), seed)
    explorer.predict(shallow, rows)
    draw = explorer.sample(logits_of(explorer, deep), rows)
    explorer.learn(deep, rows)
    return draw
