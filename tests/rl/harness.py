"""A tiny model that spells, and requests of lm-evaluation-harness for it; whoever imports this needs lm_eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from esamp_core.base.config import DistillerConfig
from esamp_core.base.tensors import Head
from esamp_core.bindings.lm_eval import ExploringLM
from esamp_core.explorer.start import Judged, start_weights, write_start

torch.set_num_threads(1)

SPECIAL = ("<pad>", "<eos>", "<bos>", "<end>")
LETTERS = "abcdefghij =;\n"
SHAPE: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": False, "dtype": "float32"},
    **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.3},
}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0}


def letters() -> PreTrainedTokenizerFast:
    """One token per letter; four are special, and <end> is one that ends nothing by itself."""
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate((*SPECIAL, *LETTERS))}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "additional_special_tokens": ["<end>"]},
        clean_up_tokenization_spaces=False,
    )


def make_checkpoint(path: Path) -> str:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(SPECIAL) + len(LETTERS), **SHAPE)).eval().save_pretrained(path)
    letters().save_pretrained(path)
    return str(path)


def exploring(checkpoint: str, **arguments: Any) -> ExploringLM:
    return ExploringLM(checkpoint, device="cpu", **arguments)


def request(context: str, doc_id: int = 0, repeats: int = 1, **gen_kwargs: Any) -> Instance:
    gen_kwargs = {"max_gen_toks": 6, **gen_kwargs}
    return Instance("generate_until", {}, (context, gen_kwargs), 0, ("task", doc_id, repeats))


def asked(lm: Any, requests: Sequence[Instance]) -> list[str]:
    texts = lm.generate_until(list(requests), disable_tqdm=True)
    assert len(texts) == len(requests)
    return list(texts)


def start_file(checkpoint: str, path: Path) -> str:
    """A start of rank 64 that says of itself that it is far better than a constant, so exploration begins at once."""
    head = Head(LlamaForCausalLM.from_pretrained(checkpoint).lm_head.weight.detach())
    weights = start_weights(head.hidden_size, DistillerConfig(), torch.device("cpu"))
    noise = torch.Generator().manual_seed(3)
    weights = weights._replace(down=0.3 * torch.randn(weights.down.shape, generator=noise))
    write_start(path, weights, Judged(torch.zeros(head.hidden_size), 0.1, 0.8), head, {"model": "a llama"})
    return str(path)
