"""The public face: everything a custom decoder needs.

Stateful: :class:`Explorer`, four verbs (open, predict, sample, learn) for a running batch.
Functional: the ops that it is made of, for those who keep their own state.
"""

from esamp_core.base.config import DistillerConfig, SamplingParams
from esamp_core.base.errors import (
    ArgumentError,
    CapacityError,
    EncodingError,
    EsampError,
    StateError,
    UnsupportedModelError,
)
from esamp_core.base.presets import PRESETS, Preset
from esamp_core.base.seeds import row_seeds, stratified_codes
from esamp_core.base.tensors import (
    Activations,
    Candidates,
    DistillerState,
    DistillerWeights,
    Draw,
    Gauge,
    Head,
    Mixed,
    Reweighted,
    RowGroups,
    RowParams,
    Status,
)
from esamp_core.explorer import Explorer, GroupStats, Rows
from esamp_core.ops import (
    backend_name,
    distiller_forward,
    distiller_scratch,
    distiller_step_,
    draw,
    explore,
    gauge_,
    group_rows,
    mix,
    replay,
    reweight,
    score_candidates,
    select_candidates,
    transform_scores,
    warm_up,
)

__all__ = [
    "PRESETS",
    "Activations",
    "ArgumentError",
    "Candidates",
    "CapacityError",
    "DistillerConfig",
    "DistillerState",
    "DistillerWeights",
    "Draw",
    "EncodingError",
    "EsampError",
    "Explorer",
    "Gauge",
    "GroupStats",
    "Head",
    "Mixed",
    "Preset",
    "Reweighted",
    "RowGroups",
    "RowParams",
    "Rows",
    "SamplingParams",
    "StateError",
    "Status",
    "UnsupportedModelError",
    "backend_name",
    "distiller_forward",
    "distiller_scratch",
    "distiller_step_",
    "draw",
    "explore",
    "gauge_",
    "group_rows",
    "mix",
    "replay",
    "reweight",
    "row_seeds",
    "score_candidates",
    "select_candidates",
    "stratified_codes",
    "transform_scores",
    "warm_up",
]
