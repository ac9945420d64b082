"""warm_up: compile everything before the first request, by running each op once on a made-up row."""

import torch

from esamp_core.kernels.distiller.forward import distiller_forward_triton
from esamp_core.kernels.distiller.gauge import gauge_triton
from esamp_core.kernels.distiller.mix import mix_triton
from esamp_core.kernels.distiller.ops import config_of, scratch_size
from esamp_core.kernels.distiller.step import distiller_step_triton
from esamp_core.kernels.sampling import ops


def warm_up(
    vocab_size: int,
    hidden_size: int,
    max_candidates: int = 256,
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.float32,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    center: torch.Tensor | None = None,
    clip: float | None = None,
    direction_dtype: torch.dtype = torch.float32,
    rank: int | None = None,
    distiller_dtype: torch.dtype = torch.float32,
    momentum: bool = False,
    neutral: bool = False,
    siblings: int = 16,
) -> None:
    """Compile the kernels for logits [*, vocab_size] of `dtype` and this head, both filter orders, with and without
    model logits, active mask and codes.  weight: lm_head [V, H]; without one only the ops that need no head are
    compiled.  rank, distiller_dtype, momentum: of the Distiller; without a rank its kernels are left out.
    siblings: how many are drawn without replacement at most; `children` is compiled anew for each power of 2 above 16.
    """
    if rank is not None:
        warm_up_distiller(hidden_size, rank, distiller_dtype, momentum, weight, center, device=device)
    width = min(max_candidates, vocab_size)
    # What is compiled does not depend on values: rows without a token take the shortest way through every kernel.
    logits = torch.full((2, vocab_size), float("-inf"), device=device, dtype=dtype)
    one, zero = (torch.full((2,), value, device=device, dtype=torch.float32) for value in (1.0, 0.0))
    count = torch.zeros(2, device=device, dtype=torch.int64)
    direction = torch.zeros(2, hidden_size, device=device, dtype=direction_dtype)
    codes = torch.zeros(2, 2, device=device, dtype=torch.float64)
    params = (one, count, one, zero, one)
    variants = [(model_logits, used) for model_logits in (None, logits) for used in (None, codes)]
    for vllm in (False, True):
        for active in (None, torch.ones(2, device=device, dtype=torch.bool)):
            found = ops.select_op(logits, *params, active, width, vllm)
            for model_logits, used in variants:
                for v, w in ((None, None), (direction, weight)):
                    if v is None or w is not None:
                        ops.explore_op(
                            logits, *params, seed=count, position=count, codes=used, active=active,
                            model_logits=model_logits, direction=v, weight=w, bias=bias, center=center,
                            head_scale=scale, softcap=softcap, clip=clip, first_id=0, model_weight=1.0, neutral=neutral,
                            width=width, vllm=vllm,
                        )  # fmt: skip
    ids, chosen, kept, threshold, tie_id, status = found
    for original in (None, chosen):
        ops.reweight_op(ids, chosen, status, chosen, one, one, original, 1.0, neutral)
    for model_logits, used in variants:
        ops.draw_op(
            ids, chosen, kept, threshold, tie_id, status, chosen, chosen, logits, model_logits, one, one, count, count,
            used,
        )  # fmt: skip
    ops.children_op(
        ids, chosen, threshold, tie_id, status, chosen, chosen, logits, one, count, count, count, one, one, siblings
    )
    if weight is not None:
        for transform in (True, False):
            ops.score_op(direction, weight, ids, bias, center, scale, softcap, clip, 0, transform)


def warm_up_distiller(
    hidden_size: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    momentum: bool = False,
    weight: torch.Tensor | None = None,
    center: torch.Tensor | None = None,
    *,
    device: torch.device | str = "cuda",
    mixed_dtype: torch.dtype | None = None,
) -> None:
    """Compile forward and step as the learner launches them: float32 taps, contiguous, with an active mask.

    dtype: of A, G and B.  momentum: whether there is any.  Hidden states teach; with weight [V, H] token ids too.
    mixed_dtype: of the deep states that mix is compiled for too.
    """
    rows, slots = 2, 2

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    wide, narrow = (rows, hidden_size), (rows, rank)
    up, gate, down = (slots, hidden_size, rank), (slots, hidden_size, rank), (slots, rank, hidden_size)
    shapes = (up, gate, down, (slots, rank), (slots, hidden_size), (slots, hidden_size))
    weights = [zeros(*shape, dtype=dtype if i < 3 else torch.float32) for i, shape in enumerate(shapes)]
    velocities = [zeros(*shape) for shape in shapes] if momentum else []
    saved = [zeros(*shape) for shape in (wide, narrow, narrow, wide, (rows,), (rows,), wide)]
    # No row is in a group, and no group in a slot: every program ends at once.
    order, offsets = zeros(rows, dtype=torch.int32), zeros(slots + 1, dtype=torch.int32)
    group_slots = torch.full((slots,), -1, device=device, dtype=torch.int32)
    scale, config = zeros(), config_of(weights[0])
    scratch = zeros(scratch_size(rows, weights[0]))
    number, column, active = zeros(slots, dtype=torch.int64), zeros(slots), zeros(rows, dtype=torch.bool)
    targets: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = [(zeros(*wide), None, None)]
    if weight is not None:
        targets.append((weight.detach(), zeros(rows, dtype=torch.int64), center))
    distiller_forward_triton(zeros(*wide), order, group_slots, offsets, weights, scale, saved, scratch, config)
    if mixed_dtype is not None:
        deep, status = zeros(*wide, dtype=mixed_dtype), zeros(rows, dtype=torch.int32)
        _, _, _, y, mean, rstd, _ = saved
        mix_triton(
            deep, y, weights[4], weights[5], scale, zeros(rows), active, (order, group_slots, offsets), mean, rstd,
            torch.empty_like(deep), status, rank, config,
        )  # fmt: skip
    gauge_triton(
        [zeros(slots, hidden_size), number, column, column, column], saved, zeros(*wide), order, group_slots, offsets,
        weights, scale, active, scratch, config,
    )  # fmt: skip
    for target, token_ids, middle in targets:
        distiller_step_triton(
            weights, velocities, number, [number, column, column, number], saved, target, token_ids, middle, 1.0,
            order, group_slots, offsets, scale, active, [0.0] * 6, 0.0, 1.0, scratch, config,
        )  # fmt: skip
