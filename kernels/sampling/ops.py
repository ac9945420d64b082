"""The launches in order, as one opaque torch op for each public one (so that torch.compile looks at none of them).

    select_candidates   block_max, select, finalise, beyond
    score_candidates    score
    reweight            reweight
    draw                block_max (for base_logprob), tail, draw
    explore             block_max, select, finalise, beyond, score, tail, draw (which reweights)
    children            children

`beyond` and `tail` are launches that ordinary rows leave at once, so nothing here waits for the device.
Tensors are flat arguments: [R] tensors contiguous, logits with unit column stride.
"""

import torch
from torch import Tensor

from esamp_core.kernels.sampling.beyond import beyond_triton
from esamp_core.kernels.sampling.block_max import block_max_triton
from esamp_core.kernels.sampling.children import children_triton
from esamp_core.kernels.sampling.draw import draw_triton
from esamp_core.kernels.sampling.finalise import finalise_triton
from esamp_core.kernels.sampling.reweight import reweight_triton
from esamp_core.kernels.sampling.score import score_triton
from esamp_core.kernels.sampling.select import select_triton
from esamp_core.kernels.sampling.tail import tail_triton
from esamp_core.kernels.tuning import Config, config_for, generation_of, sort_width


def _config(logits: Tensor, hidden: int, width: int) -> Config:
    return config_for(generation_of(logits.device), logits.shape[1], hidden, width, logits.element_size())


def candidates_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    beta: Tensor,
    active: Tensor | None,
    config: Config,
    *,
    width: int,
    vllm: bool,
    log_sum: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Candidates (finalise_triton's dictionary) and the scan of the logits (with log sums if asked)."""
    scan = block_max_triton(logits, temperature, top_p, active, config, log_sum=log_sum)
    sort = sort_width(logits.shape[1], width)
    survivors = select_triton(
        logits, temperature, top_k, top_p, min_p, beta, active, scan, config, width=width, sort=sort, vllm=vllm
    )
    found = finalise_triton(logits, top_k, top_p, min_p, survivors, config, width=width, vllm=vllm)
    beyond_triton(logits, temperature, top_k, top_p, min_p, survivors, found, config, vllm=vllm)
    return found, scan


@torch.library.custom_op("esamp::select", mutates_args=())
def select_op(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    beta: Tensor,
    active: Tensor | None,
    width: int,
    vllm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """token_ids, logits, count, threshold, tie_id, status."""
    if logits.shape[0] == 0:
        return _select_shapes(logits, width)
    config = _config(logits, 0, width)
    found, _ = candidates_triton(
        logits, temperature, top_k, top_p, min_p, beta, active, config, width=width, vllm=vllm, log_sum=False
    )
    return (
        found["token_ids"], found["logits"], found["count"], found["threshold"], found["tie_id"], found["status"]
    )  # fmt: skip


def _select_shapes(logits: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, new = logits.shape[0], logits.new_empty
    return (
        new((rows, width), dtype=torch.int64),
        new((rows, width), dtype=torch.float32),
        new(rows, dtype=torch.int64),
        new(rows, dtype=torch.float32),
        new(rows, dtype=torch.int64),
        new(rows, dtype=torch.int32),
    )


@select_op.register_fake
def _(logits, temperature, top_k, top_p, min_p, beta, active, width, vllm):
    return _select_shapes(logits, width)


@torch.library.custom_op("esamp::score", mutates_args=())
def score_op(
    direction: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    scale: float,
    softcap: float | None,
    clip: float | None,
    first_id: int,
    transform: bool,
) -> Tensor:
    if token_ids.numel() == 0:
        return direction.new_empty(token_ids.shape, dtype=torch.float32)
    vocab, hidden = weight.shape
    config = config_for(generation_of(weight.device), vocab, hidden, token_ids.shape[1], 4)
    return score_triton(
        direction, weight, token_ids, config, bias=bias, scale=scale, softcap=softcap, center=center, clip=clip,
        first_id=first_id, transform=transform,
    )  # fmt: skip


@score_op.register_fake
def _(direction, weight, token_ids, *_):
    return direction.new_empty(token_ids.shape, dtype=torch.float32)


@torch.library.custom_op("esamp::reweight", mutates_args=())
def reweight_op(
    token_ids: Tensor,
    logits: Tensor,
    status: Tensor,
    projection: Tensor,
    beta: Tensor,
    temperature: Tensor,
    original: Tensor | None,
    model_weight: float,
    neutral: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits, novelty, status."""
    if token_ids.numel() == 0:
        return torch.empty_like(logits), torch.empty_like(logits), torch.empty_like(status)
    config = config_for(generation_of(logits.device), 0, 0, token_ids.shape[1], 4)
    return reweight_triton(
        token_ids, logits, status, projection, beta, temperature, original, model_weight, neutral, config
    )


@reweight_op.register_fake
def _(token_ids, logits, status, *_):
    return torch.empty_like(logits), torch.empty_like(logits), torch.empty_like(status)


@torch.library.custom_op("esamp::draw", mutates_args=["codes"])
def draw_op(
    token_ids: Tensor,
    chosen: Tensor,
    count: Tensor,
    threshold: Tensor,
    tie_id: Tensor,
    status: Tensor,
    new: Tensor,
    novelty: Tensor,
    logits: Tensor,
    model_logits: Tensor | None,
    temperature: Tensor,
    beta: Tensor,
    seed: Tensor,
    position: Tensor,
    codes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """token, logprob, base_logprob, novelty, kl."""
    if logits.shape[0] == 0:
        return _draw_shapes(logits)[:5]
    config = _config(logits, 0, token_ids.shape[1])
    raw = logits if model_logits is None else model_logits
    scan = block_max_triton(raw, None, None, None, config, log_sum=True)
    tail = tail_triton(logits, temperature, seed, position, token_ids, chosen, threshold, tie_id, status, config)
    drawn = draw_triton(
        token_ids, chosen, count, status, raw, scan, tail, temperature, beta, seed, position, config,
        codes=codes, new=new, novelty=novelty,
    )  # fmt: skip
    return drawn[:5]


def _draw_shapes(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """token, logprob, base_logprob, novelty, kl, count, status of R rows."""
    rows, new = logits.shape[0], logits.new_empty
    return (
        new(rows, dtype=torch.int64),
        new(rows, dtype=torch.float32),
        new(rows, dtype=torch.float32),
        new(rows, dtype=torch.float32),
        new(rows, dtype=torch.float32),
        new(rows, dtype=torch.int64),
        new(rows, dtype=torch.int32),
    )


@draw_op.register_fake
def _(token_ids, chosen, count, threshold, tie_id, status, new, novelty, logits, *_):
    return _draw_shapes(logits)[:5]


@torch.library.custom_op("esamp::children", mutates_args=())
def children_op(
    token_ids: Tensor,
    chosen: Tensor,
    threshold: Tensor,
    tie_id: Tensor,
    status: Tensor,
    new: Tensor,
    novelty: Tensor,
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    drawn: Tensor,
    drawn_logprob: Tensor,
    drawn_novelty: Tensor,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_ids, logprob, perturbed, novelty."""
    if logits.shape[0] == 0:
        return _children_shapes(logits, width)
    config = _config(logits, 0, max(width, token_ids.shape[1]))
    return children_triton(
        token_ids, chosen, threshold, tie_id, status, new, novelty, logits, temperature, seed, position, drawn,
        drawn_logprob, drawn_novelty, config, width=width,
    )  # fmt: skip


def _children_shapes(logits: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, new = (logits.shape[0], width), logits.new_empty
    return (
        new(shape, dtype=torch.int64),
        new(shape, dtype=torch.float32),
        new(shape, dtype=torch.float32),
        new(shape, dtype=torch.float32),
    )


@children_op.register_fake
def _(token_ids, chosen, threshold, tie_id, status, new, novelty, logits, *rest):
    return _children_shapes(logits, rest[-1])


def explore_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    beta: Tensor,
    seed: Tensor,
    position: Tensor,
    codes: Tensor | None,
    active: Tensor | None,
    model_logits: Tensor | None,
    direction: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    center: Tensor | None,
    head_scale: float,
    softcap: float | None,
    clip: float | None,
    first_id: int,
    model_weight: float,
    neutral: bool,
    width: int,
    vllm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """token, logprob, base_logprob, novelty, kl, count, status."""
    if logits.shape[0] == 0:
        return _draw_shapes(logits)
    config = _config(logits, 0 if weight is None else weight.shape[1], width)
    found, scan = candidates_triton(
        logits, temperature, top_k, top_p, min_p, beta, active, config, width=width, vllm=vllm,
        log_sum=model_logits is None,
    )  # fmt: skip
    raw = logits if model_logits is None else model_logits
    if model_logits is not None:
        scan = block_max_triton(model_logits, None, None, active, config, log_sum=True)
    projection = None
    if direction is not None and weight is not None:
        projection = score_triton(
            direction, weight, found["token_ids"], config, bias=bias, scale=head_scale, softcap=softcap,
            center=center, clip=clip, first_id=first_id, beta=beta,
        )  # fmt: skip
    tail = tail_triton(
        logits, temperature, seed, position, found["token_ids"], found["logits"], found["threshold"],
        found["tie_id"], found["status"], config,
    )  # fmt: skip
    drawn = draw_triton(
        found["token_ids"], found["logits"], found["count"], found["status"], raw, scan, tail, temperature, beta,
        seed, position, config, codes=codes, projection=projection, model_weight=model_weight, neutral=neutral,
        raw_is_model=model_logits is not None,
    )  # fmt: skip
    token, logprob, base_logprob, novelty, kl, status = drawn
    return token, logprob, base_logprob, novelty, kl, found["count"], status


explore_op = torch.library.custom_op("esamp::explore", explore_triton, mutates_args=["codes"])


@explore_op.register_fake
def _(logits, *_):
    return _draw_shapes(logits)
