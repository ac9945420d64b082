"""The Explorer of a vLLM engine: the model's head as vLLM holds it, in shards under tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from esamp_core.base.config import FilterOrder
from esamp_core.base.errors import UnsupportedModelError
from esamp_core.base.tensors import Draw, Head, RowParams
from esamp_core.bindings.vllm_config import PluginConfig
from esamp_core.explorer import Explorer
from esamp_core.models.parts import HEAD_TOLERANCE, norm_rms
from esamp_core.ops import backend, transform_scores


def explore_sharded(
    logits: Tensor,
    params: RowParams,
    seed: Tensor,
    position: Tensor,
    *,
    codes: Tensor | None = None,
    direction: Tensor | None = None,
    head: Head | None = None,
    model_logits: Tensor | None = None,
    model_weight: float = 1.0,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    active: Tensor | None = None,
) -> Draw:
    """``explore`` where the head is this rank's rows of the vocabulary.

    Candidates come from the gathered logits, so they are the same on all ranks.  Each rank scores those it has rows
    for, the others count 0, and one all-reduce [R, C] gives every rank the same sums; so all ranks draw the same
    tokens, and their Distillers, which see replicated hidden states, stay equal bit for bit.
    """
    from vllm.distributed import tensor_model_parallel_all_reduce

    ops = backend(logits.device)
    candidates = ops.select_candidates(
        logits, params, filter_order=filter_order, max_candidates=max_candidates, active=active
    )
    if direction is None or head is None:
        params = params._replace(beta=torch.zeros_like(params.beta))
        projection = torch.zeros_like(candidates.logits)
    else:
        dots = ops.score_candidates(direction, head, candidates.token_ids, transform=False)
        projection = transform_scores(tensor_model_parallel_all_reduce(dots), head)
    original = None if model_logits is None else model_logits.gather(-1, candidates.token_ids.clamp_min(0))
    reweighted = ops.reweight(candidates, projection, params, model_logits=original, model_weight=model_weight)
    return ops.draw(candidates, reweighted, logits, params, seed, position, codes=codes, model_logits=model_logits)


@torch.inference_mode(False)
@torch.no_grad()
def make_explorer(model: Any, compute_logits: Callable[[Tensor], Tensor], vllm_config: Any) -> Explorer:
    """Read the head of a loaded model, check it against the model's own logits, and make the engine's Explorer.

    compute_logits: the model's own, of deep states [R, H].  Raises UnsupportedModelError.
    """
    config = PluginConfig.read(vllm_config)
    head, shards = _read_head(model), vllm_config.parallel_config.tensor_parallel_size
    _check_head(head, compute_logits, _name(model))
    distiller = config.distiller
    if distiller.deep_scale is None and distiller.target == "deep":
        distiller = replace(distiller, deep_scale=_norm_scale(model, head))
    return Explorer(
        head,
        head.hidden_size,
        distiller,
        max_groups=config.max_groups,
        max_rows=vllm_config.scheduler_config.max_num_seqs,
        max_candidates=config.max_candidates,
        filter_order="vllm",
        on_full="evict",
        explore=explore_sharded if shards > 1 else None,
    )


def _name(model: Any) -> str:
    return type(model).__name__.removeprefix("Explored_")


def _read_head(model: Any) -> Head:
    name = _name(model)
    lm_head: Any = getattr(model, "lm_head", None)
    processor = getattr(model, "logits_processor", None)
    shard = getattr(lm_head, "shard_indices", None)
    weight = getattr(lm_head, "weight", None)
    if processor is None or shard is None or not isinstance(weight, Tensor):
        raise UnsupportedModelError(f"esamp cannot read {name}'s output head: it has no lm_head and logits_processor")
    method = type(lm_head.quant_method).__name__
    if not method.startswith("Unquantized") or weight.dtype not in HEAD_TOLERANCE or weight.dim() != 2:
        raise UnsupportedModelError(
            f"esamp needs {name}'s lm_head unquantised, so that its rows can be read, got {weight.dtype} by {method}"
        )
    if processor.scale != 1.0 and processor.soft_cap is not None:
        raise UnsupportedModelError(f"esamp does not know {name}'s head: it scales after its soft-cap")
    rows = shard.num_org_elements
    bias = getattr(lm_head, "bias", None)
    return Head(
        weight.detach()[:rows],
        None if bias is None else bias.detach()[:rows],
        float(processor.scale),
        processor.soft_cap,
        vocab_start=shard.org_vocab_start_index,
    )


def _check_head(head: Head, compute_logits: Callable[[Tensor], Tensor], name: str) -> None:
    """Whether the head, applied to a deep state, gives the model's logits.  Every rank looks at its own columns."""
    generator = torch.Generator().manual_seed(0)
    # Small ones show the scale, large ones a soft-cap that a model applies itself, outside what was read.
    sizes = torch.tensor([[1.0], [1.0], [16.0], [16.0]])
    deep = torch.randn(4, head.hidden_size, generator=generator) * sizes
    deep = deep.to(head.weight.device, head.weight.dtype)
    logits = compute_logits(deep)[:, head.vocab_start : head.vocab_start + head.vocab_size].float()
    if logits.numel() == 0:
        return  # a small vocabulary on many ranks: this one has none of it
    dots = nn.functional.linear(deep, head.weight, head.bias)[:, : logits.shape[1]].float()
    expected = transform_scores(dots, head)
    error = float(((logits - expected).abs().amax(-1) / logits.abs().amax(-1).clamp_min(1e-30)).max())
    if not error <= HEAD_TOLERANCE[head.weight.dtype]:
        raise UnsupportedModelError(
            f"esamp does not know {name}'s head: as read (scale {head.scale:.4g}, softcap {head.softcap}, "
            f"{'a' if head.bias is not None else 'no'} bias) its logits differ by up to {error:.2g} of the largest"
        )


def _norm_scale(model: Any, head: Head) -> float | None:
    """rms of what the final norm puts out for an input of rms 1; None (measured later) where there is no such norm."""
    norm = getattr(getattr(model, "model", None), "norm", None)
    weight = getattr(norm, "weight", None)
    if norm is None or not isinstance(weight, Tensor) or tuple(weight.shape) != (head.hidden_size,):
        return None
    return norm_rms(norm)
