"""What goes into the decoder: prompts, read and checked, and the tokens that end or pad their samples."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esamp_core.base.checks import is_int
from esamp_core.base.config import SamplingParams
from esamp_core.base.errors import ArgumentError, EncodingError

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class Prompt:
    """A prompt to be run."""

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    params: SamplingParams  # with a seed
    budget: int  # most tokens to draw
    group: Hashable | None  # of prompts that share a Distiller; None is without one

    @property
    def explores(self) -> bool:
        return self.group is not None and self.params.beta != 0


def read_prompts(
    prompts: Prompts, tokenizer: Any, attention_mask: Tensor | None, vocab_size: int, context: int | None
) -> list[tuple[str | None, tuple[int, ...]]]:
    """Texts and token ids of the prompts, checked.  Raises ArgumentError."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if attention_mask is not None and not isinstance(prompts, Tensor):
        raise ArgumentError(f"attention_mask must go with a tensor of prompts, got it with {type(prompts).__name__}")
    if not isinstance(prompts, (Tensor, Sequence)):
        raise ArgumentError(f"prompts must be texts, lists of token ids or a tensor [P, T], got {prompts!r}")
    read: list[tuple[str | None, tuple[int, ...]]] = []
    if isinstance(prompts, Tensor):
        mask = torch.ones_like(prompts) if attention_mask is None else attention_mask
        if prompts.dim() != 2 or prompts.is_floating_point() or mask.shape != prompts.shape:
            raise ArgumentError(
                "prompts must be an integer tensor [P, T] with an attention_mask of the same shape, got "
                f"{prompts.dtype} {list(prompts.shape)} and {list(mask.shape)}"
            )
        pairs = zip(prompts.tolist(), mask.bool().tolist(), strict=True)
        read = [(None, tuple(i for i, on in zip(ids, kept, strict=True) if on)) for ids, kept in pairs]
    else:
        for number, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                if tokenizer is None:
                    raise ArgumentError(f"tokenizer must be given for prompts of text, got None for {prompt[:40]!r}")
                read.append((prompt, _encode(tokenizer, prompt, number)))
            elif isinstance(prompt, (list, tuple)) and all(is_int(i) for i in prompt):
                read.append((None, tuple(prompt)))
            else:
                raise ArgumentError(f"prompts[{number}] must be a text or a list of token ids, got {prompt!r}")
    for number, (_, ids) in enumerate(read):
        if not ids:
            raise ArgumentError(f"prompts[{number}] must have at least one token, got none")
        if context is not None and len(ids) >= context:
            raise ArgumentError(
                f"prompts[{number}] must leave room in the model's context of {context} tokens, got {len(ids)} tokens"
            )
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ArgumentError(
                f"prompts[{number}] must hold token ids in 0..{vocab_size - 1}, got {min(ids)}..{max(ids)}"
            )
    return read


def _encode(tokenizer: Any, prompt: str, number: int) -> tuple[int, ...]:
    try:
        return tuple(tokenizer(prompt)["input_ids"])
    except Exception as error:  # of any class: a word-level tokenizer without an unknown token raises a bare Exception
        raise EncodingError(
            f"prompts[{number}] must be a text that the tokenizer can encode, got {prompt[:40]!r}: {error}"
        ) from error


def stop_token_ids_of(model: nn.Module, given: Sequence[int] | None) -> tuple[int, ...]:
    """The token ids that end a sample: those given, or the model's.  Raises ArgumentError."""
    if given is None:
        given = eos_token_ids(getattr(model, "generation_config", None))
    if not isinstance(given, Iterable) or not all(is_int(i) and i >= 0 for i in given):
        raise ArgumentError(f"stop_token_ids must be integers >= 0, got {given!r}")
    return tuple(given)


def eos_token_ids(generation_config: Any) -> Sequence[int]:
    """The stop tokens of a GenerationConfig, which may have none, one, or several."""
    eos: Any = getattr(generation_config, "eos_token_id", None)
    return () if eos is None else [eos] if is_int(eos) else eos


def pad_token_id_of(model: nn.Module, vocab_size: int) -> int:
    """What finished rows and padding are fed; its value is never seen."""
    pad: Any = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return pad if is_int(pad) and 0 <= pad < vocab_size else 0
