"""The ops on Triton kernels: same names and signatures as in ``esamp_core.reference``.

On CPU tensors the kernels run only in Triton's interpreter, which must be switched on (TRITON_INTERPRET=1) before
anything imports them.
"""

from esamp_core.ops.triton_distiller import (
    distiller_forward,
    distiller_norm_,
    distiller_scratch,
    distiller_step_,
    gauge_,
    mix,
    warm_up_mixing,
)
from esamp_core.ops.triton_sampling import (
    children,
    draw,
    explore,
    reweight,
    score_candidates,
    select_candidates,
    warm_up,
)

__all__ = [
    "children",
    "distiller_forward",
    "distiller_norm_",
    "distiller_scratch",
    "distiller_step_",
    "draw",
    "explore",
    "gauge_",
    "mix",
    "reweight",
    "score_candidates",
    "select_candidates",
    "warm_up",
    "warm_up_mixing",
]
