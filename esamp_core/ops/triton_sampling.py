"""The sampling ops on Triton kernels: NamedTuples become the flat tensors that the kernels' torch ops take."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from esamp_core.base.config import DistillerConfig, FilterOrder
from esamp_core.base.errors import ArgumentError
from esamp_core.base.tensors import Candidates, Children, Draw, Head, Reweighted, RowParams, unit_stride
from esamp_core.kernels.sampling import ops as torch_ops
from esamp_core.kernels.warm_up import warm_up as warm_up_kernels


def _check_device(tensor: Tensor) -> None:
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ArgumentError(
            "Triton kernels need a GPU, got tensors on cpu: set ESAMP_BACKEND=torch, or TRITON_INTERPRET=1 before "
            "starting Python to run them in Triton's (slow) interpreter"
        )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _flat(params: RowParams) -> list[Tensor]:
    return [column.contiguous() for column in params]


def select_candidates(
    logits: Tensor,
    params: RowParams,
    *,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    active: Tensor | None = None,
) -> Candidates:
    _check_device(logits)
    width = min(max_candidates, logits.shape[1])
    active = None if active is None else active.contiguous()
    return Candidates(*torch_ops.select_op(unit_stride(logits), *_flat(params), active, width, filter_order == "vllm"))


def score_candidates(direction: Tensor, head: Head, token_ids: Tensor, *, transform: bool = True) -> Tensor:
    _check_device(direction)
    result: Tensor = torch_ops.score_op(
        direction.detach(),
        head.weight.detach(),
        token_ids.long().contiguous(),
        _detached(head.bias),
        _detached(head.center),
        head.scale,
        head.softcap,
        head.clip,
        head.vocab_start,
        transform,
    )
    return result


def reweight(
    candidates: Candidates,
    projection: Tensor,
    params: RowParams,
    *,
    model_logits: Tensor | None = None,
    model_weight: float = 1.0,
    neutral: bool = False,
) -> Reweighted:
    _check_device(projection)
    temperature, _, _, _, beta = _flat(params)
    ids, logits, _, _, _, status = candidates
    return Reweighted(
        *torch_ops.reweight_op(
            ids, logits, status, projection, beta, temperature, model_logits, float(model_weight), neutral
        )
    )


def draw(
    candidates: Candidates,
    reweighted: Reweighted,
    logits: Tensor,
    params: RowParams,
    seed: Tensor,
    position: Tensor,
    *,
    codes: Tensor | None = None,
    model_logits: Tensor | None = None,
) -> Draw:
    _check_device(logits)
    temperature, _, _, _, beta = _flat(params)
    ids, chosen, count, threshold, tie_id, _ = candidates
    new, novelty, status = reweighted
    token, logprob, base_logprob, token_novelty, kl = torch_ops.draw_op(
        ids,
        chosen,
        count,
        threshold,
        tie_id,
        status,
        new.contiguous(),
        novelty.contiguous(),
        unit_stride(logits),
        None if model_logits is None else unit_stride(model_logits),
        temperature,
        beta,
        seed.contiguous(),
        position.contiguous(),
        codes,
    )
    return Draw(token, logprob, base_logprob, token_novelty, kl, count, status)


def children(
    candidates: Candidates,
    reweighted: Reweighted,
    logits: Tensor,
    params: RowParams,
    seed: Tensor,
    position: Tensor,
    draw: Draw,
    width: int,
) -> Children:
    _check_device(logits)
    ids, chosen, _, threshold, tie_id, status = candidates
    return Children(
        *torch_ops.children_op(
            ids,
            chosen,
            threshold,
            tie_id,
            status,
            reweighted.logits.contiguous(),
            reweighted.novelty.contiguous(),
            unit_stride(logits),
            params.temperature.contiguous(),
            seed.contiguous(),
            position.contiguous(),
            draw.token_ids.contiguous(),
            draw.logprob.contiguous(),
            draw.novelty.contiguous(),
            width,
        )
    )


def explore(
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
    neutral: bool = False,
    filter_order: FilterOrder = "transformers",
    max_candidates: int = 256,
    active: Tensor | None = None,
) -> Draw:
    _check_device(logits)
    temperature, top_k, top_p, min_p, beta = _flat(params)
    return Draw(
        *torch_ops.explore_op(
            logits=unit_stride(logits),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            beta=beta,
            seed=seed.contiguous(),
            position=position.contiguous(),
            codes=codes,
            active=None if active is None else active.contiguous(),
            model_logits=None if model_logits is None else unit_stride(model_logits),
            direction=None if direction is None else direction.detach(),
            weight=None if head is None else head.weight.detach(),
            bias=None if head is None else _detached(head.bias),
            center=None if head is None else _detached(head.center),
            head_scale=1.0 if head is None else float(head.scale),
            softcap=None if head is None else head.softcap,
            clip=None if head is None else head.clip,
            first_id=0 if head is None else head.vocab_start,
            model_weight=float(model_weight),
            neutral=neutral,
            width=min(max_candidates, logits.shape[1]),
            vllm=filter_order == "vllm",
        )
    )


def warm_up(head: Head, config: DistillerConfig, max_candidates: int, dtype: torch.dtype, neutral: bool) -> None:
    """Run every kernel once as an Explorer with this head and config would."""
    warm_up_kernels(
        head.vocab_size,
        head.hidden_size,
        max_candidates,
        device=head.weight.device,
        dtype=dtype,
        weight=head.weight.detach(),
        bias=_detached(head.bias),
        scale=float(head.scale),
        softcap=head.softcap,
        center=_detached(head.center),
        clip=head.clip,
        rank=config.rank,
        distiller_dtype=config.weight_dtype,
        momentum=config.momentum > 0,
        neutral=neutral,
    )
