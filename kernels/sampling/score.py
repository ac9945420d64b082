"""score: the head's output for candidates only.

    projection[i, c] = clip(softcap(scale * (W[ids[i, c]] . v_i - center . v_i + bias[ids[i, c]])))

Grid (R, ceil(C / CANDIDATES)).  A program gathers CANDIDATES head rows and dots them with the row's direction, H in
steps of HIDDEN, in float32, always in the same order.  Ids outside the head's rows (absent candidates, another
shard's tokens) read nothing and count as a dot product of 0.  Rows that are not explored (beta 0) are skipped when
`beta` is given.  Moves one head row per candidate.
"""

import torch
import triton
import triton.language as tl

from esamp_core.kernels.tuning import Config, power_of_2


@triton.jit
def _score_kernel(
    direction_ptr, stride_vr, stride_vh, weight_ptr, stride_wv, stride_wh, bias_ptr, center_ptr, ids_ptr, beta_ptr,
    out_ptr, width, first_id, num_ids, head_scale, softcap, clip,
    H: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CENTER: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_CLIP: tl.constexpr, HAS_BETA: tl.constexpr, TRANSFORM: tl.constexpr,
    CANDIDATES: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if HAS_BETA:
        if tl.load(beta_ptr + row) == 0.0:
            return
    lane = tl.program_id(1) * CANDIDATES + tl.arange(0, CANDIDATES)
    ids = tl.load(ids_ptr + row * width + lane, mask=lane < width, other=-1)
    local = ids - first_id
    present = (ids >= 0) & (local >= 0) & (local < num_ids)
    local = tl.where(present, local, 0)
    dots = tl.zeros((CANDIDATES,), tl.float32)
    if tl.max(present.to(tl.int32), 0) != 0:
        sums = tl.zeros((CANDIDATES, HIDDEN), tl.float32)
        center_sums = tl.zeros((HIDDEN,), tl.float32)
        for start in range(0, H, HIDDEN):
            h = start + tl.arange(0, HIDDEN)
            v = tl.load(direction_ptr + row * stride_vr + h * stride_vh, mask=h < H, other=0.0).to(tl.float32)
            at = local[:, None] * stride_wv + h[None, :] * stride_wh
            w = tl.load(weight_ptr + at, mask=present[:, None] & (h < H)[None, :], other=0.0).to(tl.float32)
            sums += w * v[None, :]
            if HAS_CENTER:
                center_sums += tl.load(center_ptr + h, mask=h < H, other=0.0).to(tl.float32) * v
        dots = tl.sum(sums, 1)
        if HAS_CENTER:
            dots -= tl.sum(center_sums, 0)
        if HAS_BIAS:
            dots += tl.load(bias_ptr + local, mask=present, other=0.0).to(tl.float32)
    scores = tl.where(present, dots, 0.0)
    if TRANSFORM:
        scores = scores * head_scale
        if HAS_SOFTCAP:
            x = scores / softcap
            e = tl.exp(-2.0 * tl.abs(x))
            scores = softcap * tl.where(x < 0.0, e - 1.0, 1.0 - e) / (1.0 + e)
        if HAS_CLIP:
            scores = tl.where(scores > clip, clip, tl.where(scores < -clip, -clip, scores))
    tl.store(out_ptr + row * width + lane, scores, mask=lane < width)


def score_triton(
    direction: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    config: Config,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    center: torch.Tensor | None = None,
    clip: float | None = None,
    first_id: int = 0,
    transform: bool = True,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 [R, C] of direction [R, H], weight [V, H] and token_ids int64 [R, C]; rows with beta 0 hold anything."""
    rows, hidden = direction.shape
    width = token_ids.shape[1]
    assert weight.shape[1] == hidden and token_ids.shape[0] == rows and token_ids.is_contiguous()
    out = direction.new_empty((rows, width), dtype=torch.float32)
    _score_kernel[(rows, -(-width // config.score_candidates))](
        direction, direction.stride(0), direction.stride(1), weight, weight.stride(0), weight.stride(1), bias, center,
        token_ids, beta, out, width, first_id, weight.shape[0],
        float(scale), float(softcap or 1.0), float(clip or 1.0),
        H=hidden, HAS_BIAS=bias is not None, HAS_CENTER=center is not None, HAS_SOFTCAP=softcap is not None,
        HAS_CLIP=clip is not None, HAS_BETA=beta is not None, TRANSFORM=transform,
        CANDIDATES=config.score_candidates, HIDDEN=min(config.score_hidden, power_of_2(hidden, 16)),
        num_warps=config.score_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out
