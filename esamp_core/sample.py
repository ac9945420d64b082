"""The public face: everything a custom decoder needs.

Stateful: :class:`Explorer`, four verbs (open, predict, sample, learn) for a running batch.
Functional: the ops that it is made of, for those who keep their own state.
"""

from esamp_core.config import DistillerConfig, SamplingParams
from esamp_core.dispatch import backend_name
from esamp_core.distiller import GroupStats
from esamp_core.errors import ArgumentError, CapacityError, EsampError, StateError
from esamp_core.explorer import Explorer
from esamp_core.ops import (
    distiller_forward,
    distiller_scratch,
    distiller_step_,
    draw,
    explore,
    group_rows,
    replay,
    reweight,
    score_candidates,
    select_candidates,
    transform_scores,
    warm_up,
)
from esamp_core.philox import row_seeds, stratified_codes
from esamp_core.rows import Rows
from esamp_core.structures import (
    Activations,
    Candidates,
    DistillerState,
    DistillerWeights,
    Draw,
    Head,
    Reweighted,
    RowGroups,
    RowParams,
    Status,
)

__all__ = [
    "Activations",
    "ArgumentError",
    "Candidates",
    "CapacityError",
    "DistillerConfig",
    "DistillerState",
    "DistillerWeights",
    "Draw",
    "EsampError",
    "Explorer",
    "GroupStats",
    "Head",
    "Reweighted",
    "RowGroups",
    "RowParams",
    "Rows",
    "SamplingParams",
    "StateError",
    "Status",
    "backend_name",
    "distiller_forward",
    "distiller_scratch",
    "distiller_step_",
    "draw",
    "explore",
    "group_rows",
    "replay",
    "reweight",
    "row_seeds",
    "score_candidates",
    "select_candidates",
    "stratified_codes",
    "transform_scores",
    "warm_up",
]
