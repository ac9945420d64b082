"""A random Llama that spells: one token per letter, and a chat template."""

from __future__ import annotations

import string
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LETTERS = string.ascii_lowercase + string.digits + " .,:?=+-"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ("<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<system>")


def tiny_tokenizer() -> Any:
    names = {word: i for i, word in enumerate((*SPECIAL, *LETTERS))}
    backend = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(SPECIAL) + len(LETTERS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.15,  # so that the next token is far from uniform
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes | changes))
