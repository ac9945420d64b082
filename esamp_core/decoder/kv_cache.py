"""The key-value cache of a batch whose rows come and go: selected, cropped, padded and joined.

All rows end at the same column.  A row that is shorter than the longest has padding on its left, which the attention
mask hides; what its columns hold there does not matter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from esamp_core.base.errors import UnsupportedModelError
from esamp_core.models.parts import HEAD_TOLERANCE, ModelParts

# Layers that hold keys and values per column, or nothing but one state per row.
_JOINABLE = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DummyLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)


_STATES = ("conv_states", "recurrent_states")  # of layers that hold one state per row


class RowCache(DynamicCache):  # type: ignore[misc]
    """transformers' dynamic cache, with rows that join and leave."""

    padded = False
    """Whether some row has padding on its left; set before every forward of one token."""

    @property
    def is_compileable(self) -> bool:
        # transformers looks into the attention mask, and so waits for the device, to see whether the mask can be left
        # out, unless the cache is compileable.  With padding it cannot, and without padding no mask is given.
        return self.padded

    @staticmethod
    def of(config: Any) -> RowCache:
        """An empty cache for a model.  Raises UnsupportedModelError for layers whose rows cannot be joined."""
        cache = RowCache(config=config)
        for layer in cache.layers:
            kind = type(layer).__name__
            if kind not in _JOINABLE:
                raise UnsupportedModelError(
                    f'cache="dynamic" cannot join rows of {kind} ({config.model_type}); use cache="static"'
                )
        return cache

    def resize(self, length: int) -> None:
        """Pad or crop every row on its left to ``length`` columns."""
        for layer in self.layers:
            keys = getattr(layer, "keys", None)
            if keys is None or not layer.is_initialized:
                continue
            columns = length
            if layer.is_sliding:
                layer.cumulative_length = length
                columns = min(length, layer.sliding_window - 1)
            layer.keys, layer.values = _resized(keys, columns), _resized(layer.values, columns)

    def join(self, other: RowCache) -> None:
        """Append the rows of a cache of the same length."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if getattr(mine, "keys", None) is not None:
                mine.keys = torch.cat([mine.keys, theirs.keys])
                mine.values = torch.cat([mine.values, theirs.values])
            for states in _STATES:
                for key, state in getattr(mine, states, {}).items():
                    if state is not None:
                        getattr(mine, states)[key] = torch.cat([state, getattr(theirs, states)[key]])


def _resized(states: Tensor, columns: int) -> Tensor:
    """[R, heads, columns, D], cropped or padded with zeros on the left."""
    missing = columns - states.shape[-2]
    return F.pad(states, (0, 0, missing, 0)) if missing > 0 else states[..., -missing:, :]


class ColumnsLayer(StaticLayer):  # type: ignore[misc]
    """A sliding window's keys and values, all columns of them: the attention mask alone keeps to the window.

    transformers' own static layer keeps no more columns than the window, but counts on the host how far it has come,
    which a captured step cannot.
    """

    is_sliding = True


def static_cache(config: Any, length: int) -> StaticCache:
    """A cache of constant shape for ``length`` columns, which the first forward allocates."""
    cache = StaticCache(config=config, max_cache_len=length)
    cache.layers = [
        ColumnsLayer(max_cache_len=length) if type(layer) is StaticSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    return cache


def reorder_columns(cache: Any, rows: Tensor, start: int) -> None:
    """Rows of a static cache change places, in place: row i becomes what row ``rows[i]`` was.

    start: columns before it are equal in all rows that change places with each other, and stay.
    """
    for layer in cache.layers:
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if states is not None:
                states[:, :, start:] = states[:, :, start:][rows]
        for name in _STATES:
            for state in getattr(layer, name, {}).values():
                if state is not None:
                    state.copy_(state[rows])


def holds_nothing(cache: Any) -> bool:
    """Whether the forwards that were given this cache have left it empty."""
    states = [
        state
        for layer in cache.layers
        for kept in (getattr(layer, "keys", None), *(getattr(layer, name, {}) for name in _STATES))
        for state in (kept.values() if isinstance(kept, dict) else [kept])
    ]
    return not any(isinstance(state, Tensor) and state.numel() > 0 for state in states)


@torch.no_grad()
def check_padding(parts: ModelParts) -> None:
    """A model that takes no position_ids must find its positions in the attention mask (alibi), or have none.

    One that counts columns instead, or that misreads the mask of a row with a past, would give left-padded rows wrong
    tokens; so a padded row is tried beside a plain one.  Raises UnsupportedModelError.
    """
    if "position_ids" in parts.accepts:
        return
    ids = (torch.arange(1, 5, device=parts.device) % parts.vocab_size)[None]
    pads = 2
    padded, mask = F.pad(ids, (pads, 0)), F.pad(torch.ones_like(ids), (pads, 0))
    positions, cache = torch.zeros_like(padded), RowCache.of(parts.model.config)  # positions: not taken
    cache.padded = True
    lacks = f"{type(parts.model).__name__}.forward takes no position_ids, and"
    try:
        parts.model(**parts.inputs(padded[:, :-1], mask[:, :-1], positions, cache))
        shifted = parts.model(**parts.inputs(padded[:, -1:], mask, positions, cache)).logits[:, -1].float()
        plain = parts.model(input_ids=ids).logits[:, -1].float()
    except (IndexError, RuntimeError, TypeError, ValueError) as error:  # whatever a model trips over
        raise UnsupportedModelError(f"{lacks} fails on a row that is padded on the left: {error}") from error
    largest = plain.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    if not bool((plain - shifted).abs().max() <= HEAD_TOLERANCE[parts.head.weight.dtype] * largest):
        raise UnsupportedModelError(
            f"{lacks} padding on the left changes its logits: rows of different lengths cannot share a batch"
        )


def host_state(cache: Any) -> dict[str, object]:
    """What the host knows of a static cache: numbers it counts, and where tensors lie.

    A step that changes any of it cannot be captured: a replay would not.
    """
    return {
        f"{type(layer).__name__}.{name} of layer {i}": _plain(value)
        for i, layer in enumerate(cache.layers)
        for name, value in vars(layer).items()
    }


def _plain(value: Any) -> object:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value if isinstance(value, (bool, int, float, str)) else type(value).__name__
