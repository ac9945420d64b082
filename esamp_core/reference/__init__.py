"""The ops in plain PyTorch: the truth in tests, and the backend where there is no GPU.

Same names and signatures as in ``esamp_core.sample``, which documents them and checks arguments.
"""

from esamp_core.reference.candidates import clean_logits, invalid_params, kept_mask, scale_logits, select_candidates
from esamp_core.reference.distiller import (
    distiller_forward,
    distiller_norm_,
    distiller_scratch,
    distiller_step_,
    group_rows,
    mix,
    warm_up,
    warm_up_mixing,
)
from esamp_core.reference.gauge import gauge_
from esamp_core.reference.sampling import draw, explore, replay, reweight
from esamp_core.reference.scores import score_candidates, transform_scores
from esamp_core.reference.siblings import children, grow

__all__ = [
    "children",
    "clean_logits",
    "distiller_forward",
    "distiller_norm_",
    "distiller_scratch",
    "distiller_step_",
    "draw",
    "explore",
    "gauge_",
    "group_rows",
    "grow",
    "invalid_params",
    "kept_mask",
    "mix",
    "replay",
    "reweight",
    "scale_logits",
    "score_candidates",
    "select_candidates",
    "transform_scores",
    "warm_up",
    "warm_up_mixing",
]
