"""Samplers that bring their own loop: the library's ``generate``, and transformers' beam search as a control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bench.quality_decode import Batch
from bench.quality_tasks import Source
from esamp_core.base.tensors import Branch
from esamp_core.decoder import Decoder
from esamp_core.sample import DistillerConfig, Explorer, Rows, SamplingParams


class Counting(Explorer):
    """Counts the tokens that rows drew, those included that went on in no sample."""

    drawn = 0

    def branch(self, logits: Tensor, rows: Rows, *, model_logits: Tensor | None = None) -> Branch:
        branch = super().branch(logits, rows, model_logits=model_logits)
        self.drawn += int((branch.draw.token_ids >= 0).sum())
        return branch


@dataclass(frozen=True)
class Decoded:
    """``esamp_core.generate`` as it is shipped, with these parameters; one Distiller for each prompt."""

    name: str
    params: SamplingParams = field(default_factory=SamplingParams)
    config: DistillerConfig = field(default_factory=DistillerConfig)
    neutral: bool = False
    dependent: bool = True

    def decode(
        self, source: Source, prompts: Sequence[Sequence[int]], n: int, seeds: Tensor, max_new_tokens: int
    ) -> tuple[Batch, float]:
        """The batch, and how many tokens were drawn for a prompt."""
        parts, rows = source.parts, len(prompts) * n
        explorer = Counting(
            parts.head, parts.hidden_size, parts.complete(self.config), max_groups=len(prompts), max_rows=rows,
            neutral=self.neutral,
        )  # fmt: skip
        found = Decoder(source.model, source.tokenizer, explorer=explorer).generate(
            prompts,
            n=n,
            params=[replace(self.params, seed=seed) for seed in seeds.tolist()],
            max_new_tokens=max_new_tokens,
            stop_token_ids=source.stop_ids,
            max_batch_rows=rows,
        )
        columns = [[g.logprobs, g.base_logprobs, g.novelty] for g in found]
        drawn = explorer.drawn or sum(len(g.token_ids) for g in found)  # independent rows go by another verb
        return batch_of([g.token_ids for g in found], columns), drawn / len(prompts)


@dataclass(frozen=True)
class Beams:
    """The control of likelihood alone: the n beams of a beam search that is n wide, without filters or chance."""

    name: str
    dependent: bool = True

    @torch.no_grad()
    def decode(
        self, source: Source, prompts: Sequence[Sequence[int]], n: int, seeds: Tensor, max_new_tokens: int
    ) -> tuple[Batch, float]:
        samples: list[list[int]] = []
        numbers: list[list[list[float]]] = []
        for prompt in prompts:
            found = source.model.generate(
                torch.tensor([list(prompt)]),
                do_sample=False, num_beams=n, num_return_sequences=n, length_penalty=0.0, max_new_tokens=max_new_tokens,
                eos_token_id=source.stop_ids, pad_token_id=source.pad_id, repetition_penalty=1.0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            scores = source.model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
            for row, base in zip(found.sequences[:, len(prompt) :].tolist(), scores.tolist(), strict=True):
                ends = [i for i, token in enumerate(row) if token in source.stop_ids]
                drawn = row[: ends[0] + 1] if ends else row
                samples.append(drawn)
                numbers.append([base[: len(drawn)], base[: len(drawn)], [0.0] * len(drawn)])
        return batch_of(samples, numbers), sum(map(len, samples)) / len(prompts)


def batch_of(samples: Sequence[Sequence[int]], numbers: Sequence[Sequence[Sequence[float]]]) -> Batch:
    """Tokens, log-probabilities and novelty of samples as one padded batch; the entropy is not known."""
    width = max(map(len, samples))

    def padded(rows: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype, device="cpu")

    logprob, base_logprob, novelty = (padded([row[i] for row in numbers], 0.0, torch.float32) for i in range(3))
    return Batch(
        padded(samples, -1, torch.int64), logprob, base_logprob, novelty, torch.full_like(logprob, torch.nan), []
    )
