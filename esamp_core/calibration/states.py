"""The model's own samples, and its hidden states at every position that a token was drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esamp_core.base.config import SamplingParams
from esamp_core.base.seeds import prompt_seed
from esamp_core.calibration.config import CalibrationConfig, OnProgress
from esamp_core.calibration.work import DrawnSequence, Work
from esamp_core.decoder import Decoder
from esamp_core.models.parts import ModelParts
from esamp_core.models.taps import Taps

PROMPTS_AT_A_TIME = 16
ROWS_AT_A_TIME = 32  # sequences of one forward


class States(NamedTuple):
    """Hidden states of the model's own tokens."""

    shallow: Tensor  # float32 [N, H]
    deep: Tensor  # float32 [N, H]


def own_samples(
    decoder: Decoder, prompts: Sequence[str], config: CalibrationConfig, work: Work, on_progress: OnProgress
) -> list[DrawnSequence]:
    """The model's samples at temperature 1, without filters and exploration."""
    sequences = list(work.sequences)
    for first in range(work.prompts_done, len(prompts), PROMPTS_AT_A_TIME):
        part = list(prompts[first : first + PROMPTS_AT_A_TIME])
        seeds = [prompt_seed(config.seed, first + i) for i in range(len(part))]
        params = [SamplingParams(beta=0.0, distinct=False, seed=seed) for seed in seeds]
        for g in decoder.generate(part, n=config.samples, params=params, max_new_tokens=config.max_new_tokens):
            sequences.append(DrawnSequence(first + g.prompt_index, list(g.prompt_token_ids), list(g.token_ids)))
        work.sequences, work.prompts_done = list(sequences), first + len(part)
        work.save()
        on_progress("generate", work.prompts_done, len(prompts))
    return sequences


@torch.no_grad()
def collect(parts: ModelParts, sequences: list[DrawnSequence], on_batch: Callable[[int], None]) -> States:
    """Both taps at every position that a token was drawn from.  on_batch: called with how many sequences it had."""
    shallow: list[Tensor] = []
    deep: list[Tensor] = []
    with Taps(parts.model, parts) as taps:
        # Longest first, so that a batch pads little; padding on the right is never looked at by a causal model.
        for batch in _batches(sorted(sequences, key=lambda s: -len(s[1]) - len(s[2]))):
            ids = [prompt + drawn[:-1] for _, prompt, drawn in batch]
            longest = max(map(len, ids))
            tokens = torch.tensor([i + [0] * (longest - len(i)) for i in ids], dtype=torch.int64, device=parts.device)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(ids):
                mask[row, : len(i)] = 1
            tapped = taps.states(tokens, mask)
            for row, (_, prompt, _) in enumerate(batch):
                used = slice(len(prompt) - 1, len(ids[row]))
                for kept, states in zip((shallow, deep), tapped, strict=True):
                    kept.append(states[row, used].float().cpu())
            on_batch(len(batch))
    return States(torch.cat(shallow), torch.cat(deep))


def _batches(sequences: list[DrawnSequence]) -> list[list[DrawnSequence]]:
    return [sequences[i : i + ROWS_AT_A_TIME] for i in range(0, len(sequences), ROWS_AT_A_TIME)]
