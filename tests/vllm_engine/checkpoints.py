"""Tiny random checkpoints with a byte tokenizer, made on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
VOCAB = 260
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # so that logits differ by more than rounding
    "dtype": "float32",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    assert len(vocab) == VOCAB
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def make(name: str, folder: Path) -> str:
    """Write the checkpoint ``qwen3``, ``llama`` or ``opt`` (which vLLM cannot tap) and return its path."""
    torch.manual_seed(0)
    if name == "qwen3":
        model: Any = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32))
    elif name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    else:
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCAB,
                hidden_size=64,
                word_embed_proj_dim=64,
                ffn_dim=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=512,
                dtype="float32",
            )
        )
    path = folder / name
    model.float().eval().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def make_adapter(model: str, folder: Path) -> str:
    """Write a LoRA adapter of this checkpoint that changes nothing, as adapters are before training."""
    import json

    from safetensors.torch import save_file

    path = folder / "adapter"
    path.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
        "task_type": "CAUSAL_LM", "base_model_name_or_path": model, "lora_dropout": 0.0,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    hidden, out = SHAPE["hidden_size"], 64
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        tensors[name.format(layer, "A")] = torch.ones(4, hidden)
        tensors[name.format(layer, "B")] = torch.zeros(out, 4)
    save_file(tensors, path / "adapter_model.safetensors")
    return str(path)
