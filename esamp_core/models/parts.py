"""The parts of a decoder-only transformers model: its blocks, its output head, what its forward takes.

Nothing here imports transformers: models are read through the accessors they all share (``get_decoder``,
``get_output_embeddings``, ``config``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from esamp_core.base.checks import is_int
from esamp_core.base.config import DistillerConfig
from esamp_core.base.errors import ArgumentError, UnsupportedModelError
from esamp_core.base.tensors import Head
from esamp_core.reference import transform_scores

# How far the head's logits may be from the model's, relative to the largest.  Both come from the same product; what
# is left is another tiling of it, and the rounding of a scale or a soft-cap in the model's own dtype.
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class ModelParts:
    """What the decoder needs to know of a model; made by :func:`find_parts`."""

    model: nn.Module  # unwrapped: what torch.compile was given
    block: nn.Module
    head_module: nn.Module
    head: Head
    deep_scale: float | None  # rms of the final norm's weight; None where there is none to read
    context: int | None  # most positions, prompt and generated tokens together; None is no limit
    vocab_size: int  # rows of the input embedding
    device: torch.device
    accepts: frozenset[str]  # the arguments of the model's forward
    cache_argument: str  # the one that takes the key-value cache

    def inputs(self, token_ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> dict[str, Any]:
        """The arguments of a forward that reads and extends a cache and gives the last position's logits.

        token_ids, positions: [B, T].  mask: [B, columns of the cache], None without padding.  What a model does not
        name is left out: position_ids, where positions follow from the mask (``decoder.kv_cache.check_padding``), and
        use_cache and logits_to_keep, without which nothing but time is lost.
        """
        optional = {"position_ids": positions, "use_cache": True, "logits_to_keep": 1}
        return {
            "input_ids": token_ids,
            "attention_mask": mask,
            self.cache_argument: cache,
            **{name: value for name, value in optional.items() if name in self.accepts},
        }

    def logits(self, deep: Tensor) -> Tensor:
        """float32 [B, V] of inputs of the head [B, H]: its own product, then what the config says of the logits."""
        return transform_scores(self.head_module(deep).float(), self.head)

    @property
    def hidden_size(self) -> int:
        return self.head.hidden_size

    @property
    def base_model(self) -> Any:
        """The module whose ``generate`` and ``forward`` run: PEFT's wrapper passes generate on to the model within."""
        return _base_model(self.model)

    def complete(self, config: DistillerConfig | None) -> DistillerConfig:
        """The Distillers' config, with the model's ``deep_scale`` where it has none."""
        config = config or DistillerConfig()
        if config.deep_scale is None and config.target == "deep":
            config = replace(config, deep_scale=self.deep_scale)
        return config


def find_parts(model: nn.Module, shallow_layer: int = 0) -> ModelParts:
    """Locate the block whose output is tapped, the head and its transform.

    model: a decoder-only transformers model with an output head, on one device, in eval mode.
    shallow_layer: index of the block whose output is the shallow tap; negative counts from the end.  Default 0.
    Raises UnsupportedModelError, ArgumentError.
    """
    return _find_parts(getattr(model, "_orig_mod", model), shallow_layer)


def _find_parts(model: Any, shallow_layer: int) -> ModelParts:
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ArgumentError(f"model must be a transformers model, got {name}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only decoder-only models are supported")
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} has no output embeddings (language-model head)")
    text_config = config.get_text_config(decoder=True)
    arguments = _forward_arguments(model)
    for argument in ("input_ids", "attention_mask"):
        if argument not in arguments:
            raise UnsupportedModelError(f"{name}.forward takes no {argument}")
    cache = cache_argument(model)
    if model.training:
        raise ArgumentError("model must be in eval mode (call model.eval()), got a model in training mode")
    device = _single_device(model)

    head_module = model.get_output_embeddings()
    weight = _head_weight(head_module, name)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    blocks = _find_blocks(decoder, text_config.num_hidden_layers, name)
    if not is_int(shallow_layer) or not -len(blocks) <= shallow_layer < len(blocks):
        raise ArgumentError(f"shallow_layer must be a block index below {len(blocks)}, got {shallow_layer!r}")
    scale, softcap = _head_transform(text_config)
    bias = getattr(head_module, "bias", None)
    embedding = model.get_input_embeddings()
    return ModelParts(
        model=model,
        block=blocks[shallow_layer],
        head_module=head_module,
        head=Head(weight, None if bias is None else bias.detach(), scale, softcap),
        deep_scale=_norm_scale(decoder, weight.shape[1], text_config),
        context=getattr(text_config, "max_position_embeddings", None),
        vocab_size=embedding.weight.shape[0] if hasattr(embedding, "weight") else weight.shape[0],
        device=device,
        accepts=frozenset(arguments),
        cache_argument=cache,
    )


def _forward_arguments(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_base_model(model).forward).parameters  # PEFT's wrapper names no arguments


def _base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def cache_argument(model: Any) -> str:
    """The argument of a model's forward that takes a transformers ``Cache``.

    "cache" since transformers 5.24, "past_key_values" before; code that comes with a model may have either.  XLM and
    Flaubert before 5.24 call a dict "cache".  Raises UnsupportedModelError if there is none.
    """
    arguments = _forward_arguments(model)
    if "past_key_values" in arguments:
        return "past_key_values"
    if "cache" in arguments:
        annotation = arguments["cache"].annotation
        if annotation is inspect.Parameter.empty or re.search(r"\bCache\b", str(annotation)):
            return "cache"
    raise UnsupportedModelError(
        f"{type(model).__name__}.forward takes no key-value cache (cache or past_key_values), which rows would share"
    )


def _single_device(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if any(d.type == "meta" for d in devices):
        raise UnsupportedModelError(f"{type(model).__name__} is offloaded: some of its weights are on the meta device")
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} must be on one device, got {', '.join(sorted(map(str, devices)))}"
        )
    return devices.pop()


def _head_weight(head: nn.Module, name: str) -> Tensor:
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else "none"
        raise UnsupportedModelError(
            f"{name}'s head ({type(head).__name__}) must have a float weight [V, H] whose rows can be read, got {got}; "
            "leave the head unquantised"
        )
    if weight.dtype not in HEAD_TOLERANCE:
        raise UnsupportedModelError(f"{name}'s head must be float32, bfloat16 or float16, got {weight.dtype}")
    return weight.detach()


def _find_blocks(decoder: nn.Module, layers: int, name: str) -> nn.ModuleList:
    """The outermost module list with one entry per layer; a direct child of the decoder wins over a nested one."""
    lists = [(path, m) for path, m in decoder.named_modules() if isinstance(m, nn.ModuleList)]
    paths = [path for path, _ in lists]
    outermost = [(p, m) for p, m in lists if not any(p.startswith(f"{other}.") for other in paths)]
    fitting = [(p, m) for p, m in outermost if len(m) == layers]
    direct = [(p, m) for p, m in fitting if "." not in p]
    found = direct or fitting
    if len(found) != 1:
        seen = ", ".join(f"{p} ({len(m)})" for p, m in (found or outermost)) or "none"
        what = "several lists" if found else "no list"
        raise UnsupportedModelError(f"{name} has {what} of {layers} decoder blocks; module lists: {seen}")
    return found[0][1]


def _head_transform(config: Any) -> tuple[float, float | None]:
    """Scale and soft-cap between the head's product and the logits, as the config states them."""
    scale = 1.0
    for attribute in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere, Falcon-H1, Muse
        value = getattr(config, attribute, None)
        scale *= value if isinstance(value, (int, float)) else 1.0
    scaling = getattr(config, "logits_scaling", None)
    if isinstance(scaling, (int, float)) and config.model_type != "minicpm3":  # MiniCPM3 scales before the head
        scale = scale * scaling if config.model_type == "hyperclovax" else scale / scaling  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None)
    return float(scale), None if not softcap else float(softcap)


@torch.no_grad()
def _norm_scale(decoder: nn.Module, hidden: int, config: Any) -> float | None:
    """rms of what the final norm puts out for an input of rms 1, which is the rms of its effective weight.

    Running the norm saves knowing whether it multiplies by ``weight`` or, as Gemma's, by ``1 + weight``.
    """
    if config.model_type == "minicpm3":  # the norm's output is divided before the head sees it
        return None
    norm = None
    for child in decoder.children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and tuple(weight.shape) == (hidden,):
            norm = child
    if norm is None:
        return None
    return norm_rms(norm)


@torch.no_grad()
def norm_rms(norm: nn.Module) -> float | None:
    """rms of what a norm with a weight [H] puts out for an input of rms 1; None if that is no scale."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    signs = torch.ones(1, weight.shape[0], dtype=weight.dtype, device=weight.device)
    signs[..., ::2] = -1
    rms = float(norm(signs).float().square().mean().sqrt())
    return rms if 0 < rms < float("inf") else None
