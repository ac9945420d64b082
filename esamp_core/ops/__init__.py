"""The functional ops: arguments checked, then sent to a backend.

``ESAMP_BACKEND=auto|triton|torch`` is the one switch.  auto (default) takes Triton for CUDA tensors where it is
installed and PyTorch elsewhere.  Every op has a plain-PyTorch twin of the same name in ``esamp_core.reference``.
"""

from esamp_core.ops.backends import DistillerOps, backend, backend_name
from esamp_core.ops.distiller import (
    distiller_forward,
    distiller_scratch,
    distiller_step_,
    gauge_,
    group_rows,
    mix,
    warm_up,
)
from esamp_core.ops.sampling import (
    draw,
    explore,
    replay,
    reweight,
    score_candidates,
    select_candidates,
    transform_scores,
)
from esamp_core.ops.siblings import explore_children, grow

__all__ = [
    "DistillerOps",
    "backend",
    "backend_name",
    "distiller_forward",
    "distiller_scratch",
    "distiller_step_",
    "draw",
    "explore",
    "explore_children",
    "gauge_",
    "group_rows",
    "grow",
    "mix",
    "replay",
    "reweight",
    "score_candidates",
    "select_candidates",
    "transform_scores",
    "warm_up",
]
