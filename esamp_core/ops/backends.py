"""Which backend runs: the one switch between the Triton kernels and their plain-PyTorch twins."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Protocol

import torch
from torch import Tensor

from esamp_core import reference
from esamp_core.base.checks import require
from esamp_core.base.config import DistillerConfig, FilterOrder
from esamp_core.base.errors import ArgumentError
from esamp_core.base.tensors import (
    Activations,
    Candidates,
    Children,
    DistillerState,
    DistillerWeights,
    Draw,
    Gauge,
    Head,
    Mixed,
    Reweighted,
    RowGroups,
    RowParams,
)

BACKENDS = ("auto", "triton", "torch")


class ExploreOp(Protocol):
    """The type of ``explore`` behind the checks: a whole sampling step for rows whose parameters are tensors."""

    def __call__(
        self,
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
    ) -> Draw: ...


class DistillerOps(Protocol):
    """The Distiller's ops of one backend, or of one published recipe.  The public ops document them."""

    def distiller_scratch(self, weights: DistillerWeights, rows: int) -> Tensor: ...

    def distiller_forward(
        self,
        shallow: Tensor,
        groups: RowGroups,
        weights: DistillerWeights,
        scale: Tensor,
        *,
        out: Activations | None = None,
        scratch: Tensor | None = None,
        norm: bool = True,
    ) -> Activations: ...

    def distiller_norm_(
        self, activations: Activations, groups: RowGroups, weights: DistillerWeights, scale: Tensor
    ) -> None: ...

    def mix(
        self,
        deep: Tensor,
        activations: Activations,
        groups: RowGroups,
        weights: DistillerWeights,
        scale: Tensor,
        beta: Tensor,
        *,
        active: Tensor | None = None,
        out: Tensor | None = None,
        status: Tensor | None = None,
    ) -> Mixed: ...

    def distiller_step_(
        self,
        state: DistillerState,
        activations: Activations,
        target: Tensor,
        groups: RowGroups,
        scale: Tensor,
        config: DistillerConfig,
        *,
        head: Head | None = None,
        active: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> None: ...

    def gauge_(
        self,
        gauge: Gauge,
        activations: Activations,
        target: Tensor,
        groups: RowGroups,
        weights: DistillerWeights,
        scale: Tensor,
        *,
        active: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> None: ...


class Backend(DistillerOps, Protocol):
    """The ops of one backend.  Their arguments have been checked; the public ops document them."""

    @property
    def explore(self) -> ExploreOp: ...

    def select_candidates(
        self,
        logits: Tensor,
        params: RowParams,
        *,
        filter_order: FilterOrder = "transformers",
        max_candidates: int = 256,
        active: Tensor | None = None,
    ) -> Candidates: ...

    def score_candidates(
        self, direction: Tensor, head: Head, token_ids: Tensor, *, transform: bool = True
    ) -> Tensor: ...

    def reweight(
        self,
        candidates: Candidates,
        projection: Tensor,
        params: RowParams,
        *,
        model_logits: Tensor | None = None,
        model_weight: float = 1.0,
        neutral: bool = False,
    ) -> Reweighted: ...

    def draw(
        self,
        candidates: Candidates,
        reweighted: Reweighted,
        logits: Tensor,
        params: RowParams,
        seed: Tensor,
        position: Tensor,
        *,
        codes: Tensor | None = None,
        model_logits: Tensor | None = None,
    ) -> Draw: ...

    def children(
        self,
        candidates: Candidates,
        reweighted: Reweighted,
        logits: Tensor,
        params: RowParams,
        seed: Tensor,
        position: Tensor,
        draw: Draw,
        width: int,
    ) -> Children: ...

    def warm_up(
        self, head: Head, config: DistillerConfig, max_candidates: int, dtype: torch.dtype, neutral: bool
    ) -> None: ...

    def warm_up_mixing(
        self, hidden_size: int, config: DistillerConfig, dtype: torch.dtype, device: torch.device
    ) -> None: ...


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def backend_name(device: torch.device | str) -> str:
    """ "triton" or "torch": what runs for tensors on this device, by ``ESAMP_BACKEND``."""
    choice = os.environ.get("ESAMP_BACKEND", "auto")
    require(choice in BACKENDS, "ESAMP_BACKEND", f"be one of {', '.join(BACKENDS)}", choice)
    if choice == "triton" and not _installed("triton"):
        raise ArgumentError("ESAMP_BACKEND=triton, but triton is not installed")
    if choice == "auto":
        choice = "triton" if torch.device(device).type == "cuda" and _installed("triton") else "torch"
    return choice


def backend(device: torch.device) -> Backend:
    """The module whose ops take tensors of this device."""
    if backend_name(device) == "torch":
        return reference
    from esamp_core.ops import triton_backend  # needs triton

    return triton_backend
