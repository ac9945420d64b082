"""Scratch memory: one flat float32 buffer, cut into the pieces that a launcher asks for.

The same buffer serves every launch, so that a step allocates nothing and a captured one finds it where it was.  What is
in it between two launchers means nothing: a launcher writes every piece before it reads it.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Shape = tuple[int, ...]
ALIGNMENT = 64  # numbers; pieces begin at multiples of 256 bytes, like tensors of their own


def room(shapes: Iterable[Shape]) -> int:
    """How many numbers pieces of these shapes take."""
    return sum(-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for shape in shapes)


def cut(scratch: Tensor, shapes: Iterable[Shape]) -> list[Tensor]:
    """Contiguous pieces of these shapes, side by side."""
    assert scratch.dtype == torch.float32 and scratch.dim() == 1 and scratch.is_contiguous()
    pieces, start = [], 0
    for shape in shapes:
        pieces.append(scratch[start : start + math.prod(shape)].view(shape))
        start += room([shape])
    assert start <= scratch.numel(), f"scratch has {scratch.numel()} numbers, {start} are needed"
    return pieces
