"""Whether a model is the one that a file was written with."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

NUMBERS = 1024  # of each tensor that are looked at


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """Hexadecimal digest of the names, shapes, dtypes and up to 1,024 numbers of each of the model's tensors.

    The same on every device and in every process; another after training, merging an adapter, or in another dtype.
    Weights that differ in a few numbers only may be taken for one another.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue  # what a quantised module keeps beside its weights
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // NUMBERS)].cpu().contiguous()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
