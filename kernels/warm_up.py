"""warm_up: compile everything before the first request, by running each op once on a made-up row."""

import torch

from esamp_core.kernels import explore


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
) -> None:
    """Compile the kernels for logits [*, vocab_size] of `dtype` and this head, both filter orders, with and without
    model logits and active mask.  weight: lm_head [V, H]; without one only the ops that need no head are compiled.
    """
    width = min(max_candidates, vocab_size)
    # What is compiled does not depend on values: rows without a token take the shortest way through every kernel.
    logits = torch.full((2, vocab_size), float("-inf"), device=device, dtype=dtype)
    one, zero = torch.ones(2, device=device), torch.zeros(2, device=device)
    count = torch.zeros(2, device=device, dtype=torch.int64)
    direction = torch.zeros(2, hidden_size, device=device, dtype=direction_dtype)
    params = (one, count, one, zero, one)
    for vllm in (False, True):
        for active in (None, torch.ones(2, device=device, dtype=torch.bool)):
            found = explore.select_op(logits, *params, active, width, vllm)
            for model_logits in (None, logits):
                for v, w in ((None, None), (direction, weight)):
                    if v is None or w is not None:
                        explore.explore_op(
                            logits, *params, count, count, active, model_logits, v, w, bias, center, scale, softcap,
                            clip, 0, 1.0, width, vllm,
                        )  # fmt: skip
    ids, chosen, kept, threshold, tie_id, status = found
    for original in (None, chosen):
        explore.reweight_op(ids, chosen, status, chosen, one, one, original, 1.0)
    for model_logits in (None, logits):
        explore.draw_op(
            ids, chosen, kept, threshold, tie_id, status, chosen, chosen, logits, model_logits, one, one, count, count
        )
    if weight is not None:
        for transform in (True, False):
            explore.score_op(direction, weight, ids, bias, center, scale, softcap, clip, 0, transform)
