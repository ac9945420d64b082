"""esamp_core: Exploratory Sampling (arXiv 2604.24927) with hand-written Triton kernels.

The parallel samples of one prompt explore different ideas.  What most people need can be imported from here:

    from esamp_core import Explorer, SamplingParams, generate

The rest lives in

``esamp_core.sample``    the functional ops and :class:`~esamp_core.sample.Explorer`, for custom decoders
``esamp_core.decoder``   a thin decoder for any decoder-only transformers model
``esamp_core.reference`` every op again in plain PyTorch: the truth in tests, and the CPU path

Importing esamp_core itself imports nothing else; a name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esamp_core.decoder import Decoder, Generation, generate
    from esamp_core.sample import DistillerConfig, Explorer, Head, SamplingParams

__version__ = "0.1.0"
__all__ = ["Decoder", "DistillerConfig", "Explorer", "Generation", "Head", "SamplingParams", "generate"]

_DECODER = ("Decoder", "Generation", "generate")  # these need transformers


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "esamp_core.decoder" if name in _DECODER else "esamp_core.sample"
    try:
        return getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        message = f"esamp_core.{name} needs transformers: pip install 'esamp-core[transformers]'"
        raise ModuleNotFoundError(message, name="transformers") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
