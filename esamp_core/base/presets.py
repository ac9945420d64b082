"""Whole settings by name: how rows are sampled, what their Distillers are, and who shares one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from esamp_core.base.config import DistillerConfig, SamplingParams


@dataclass(frozen=True)
class Preset:
    """``generate(model, prompts, n=16, params=preset.params, config=preset.config)``.

    one_for_all: all prompts share a Distiller, ``groups=["all"] * len(prompts)``; else each has its own.
    """

    params: SamplingParams
    config: DistillerConfig
    one_for_all: bool = False


PRESETS: Mapping[str, Preset] = MappingProxyType({
    "default": Preset(SamplingParams(min_p=0.05), DistillerConfig()),
    # arXiv 2604.24927, as we read it: temperature 1, no filters, the beta that was best on AIME25.
    "paper": Preset(
        SamplingParams(beta=0.25, distinct=False),
        DistillerConfig(recipe="paper", rank=384, gate=False),
        one_for_all=True,
    ),
    # github.com/LinesHogan/tLLM: the sampling of its guides and their first beta.
    "release": Preset(
        SamplingParams(temperature=0.8, top_p=0.95, distinct=False), DistillerConfig(recipe="release", gate=False)
    ),
})  # fmt: skip
"""What ``esamp generate --preset`` knows.  docs/quality.md says how each fares: "paper" and "release" are for
comparison, not recommended."""
