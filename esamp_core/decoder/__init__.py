"""The thin decoder: exploratory sampling with any decoder-only transformers model, unchanged."""

from esamp_core.decoder.api import Decoder, generate
from esamp_core.decoder.loop import CacheKind
from esamp_core.decoder.results import Generation, Token

__all__ = ["CacheKind", "Decoder", "Generation", "Token", "generate"]
