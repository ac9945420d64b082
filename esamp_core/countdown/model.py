"""The Countdown model and its tokenizer: how they are made, saved and loaded."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from esamp_core.base.errors import ArgumentError
from esamp_core.countdown.task import BOS, EOS, MAX_NEW_TOKENS, PAD, PROMPT_TOKENS, TOKEN_ID, WORDS


@dataclass(frozen=True)
class ModelShape:
    """The sizes of the transformer; the defaults are the embedded model's (about a million parameters)."""

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ArgumentError(f"{name} must be an integer >= 1, got {value!r}")
        if self.heads % self.kv_heads:
            raise ArgumentError(f"heads must be a multiple of kv_heads ({self.kv_heads}), got {self.heads}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, begin-of-sequence added in front, padding on the left.

    There is no unknown token: a word outside the task's vocabulary is an error instead of a silent guess.
    """
    backend = Tokenizer(WordLevel(vocab=TOKEN_ID))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, TOKEN_ID[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=PROMPT_TOKENS + MAX_NEW_TOKENS,
        # the clean-up would glue " ," to the word before it, and decoding would no longer undo encoding
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(shape: ModelShape, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised float32 model; the same seed gives the same weights. Torch's global RNG is left alone."""
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=TOKEN_ID[BOS],
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[PAD],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    # model.generate() then samples plainly: whoever wants filters asks for them
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        bos_token_id=TOKEN_ID[BOS],
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[PAD],
    )
    return model


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write bfloat16 weights, configuration and tokenizer to a folder; the model itself stays as it is."""
    deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def load_folder(
    folder: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (evaluation mode, float32 unless told) and tokenizer from a folder, without asking the network."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
