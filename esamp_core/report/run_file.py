"""What a run drew, as a file that ``esamp report`` turns into one HTML page.

The schema of run.json has its only home here: :class:`RunFile`.  Every part may be empty, and is then left out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from esamp_core.base.errors import ArgumentError

SCHEMA = 1


@dataclass(frozen=True)
class SampleText:
    """One sample.  tokens: as text.  novelty: one number per token, logit units.  correct: None if not checked."""

    sampler: str
    tokens: list[str]
    novelty: list[float]
    correct: bool | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.novelty):
            raise ArgumentError(f"novelty must have one number per token ({len(self.tokens)}), got {len(self.novelty)}")


@dataclass(frozen=True)
class PromptSamples:
    """A prompt and what was drawn for it."""

    prompt: str
    samples: list[SampleText]


@dataclass(frozen=True)
class Curve:
    """Pass@k of a sampler, shares in 0..1, with the bounds of an interval."""

    sampler: str
    k: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]

    def __post_init__(self) -> None:
        if len({len(self.k), len(self.mean), len(self.low), len(self.high)}) != 1:
            raise ArgumentError(f"k, mean, low and high must be equally long in the curve of {self.sampler!r}")


@dataclass(frozen=True)
class StepSeries:
    """Per decode step: KL (``RunFile.kl_is`` says of what from what) and the Distiller's relative error, means."""

    sampler: str
    kl: list[float]
    loss: list[float]


EXACT_KL = (
    "Of the distribution that was drawn from, from the model's own over the same candidates at the same temperature; "
    "nats, exact, mean over samples."
)
ESTIMATED_KL = (
    "log p - log p(model) of what was drawn, the model's at temperature 1 over all tokens; nats. Its mean over samples "
    "estimates the KL and can be negative."
)


@dataclass(frozen=True)
class RunFile:
    """What a report shows.  kl_is: what the steps' KL is, a sentence."""

    title: str
    about: dict[str, str] = field(default_factory=dict)
    prompts: list[PromptSamples] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    steps: list[StepSeries] = field(default_factory=list)
    kl_is: str = ESTIMATED_KL

    def write(self, path: Path) -> None:
        content = {"schema": SCHEMA, **asdict(self)}
        try:
            path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            raise ArgumentError(f"{path} cannot be written: {error}") from None

    @staticmethod
    def read(path: Path) -> RunFile:
        """Raises ArgumentError, in one line, for a file that is missing or not of this schema."""
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(f"{path} cannot be read: {error}") from None
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ArgumentError(f"{path} must be a run file of schema {SCHEMA}")
        try:
            return RunFile(
                title=str(content["title"]),
                about={str(k): str(v) for k, v in content["about"].items()},
                prompts=[
                    PromptSamples(p["prompt"], [SampleText(**s) for s in p["samples"]]) for p in content["prompts"]
                ],
                curves=[Curve(**c) for c in content["curves"]],
                steps=[StepSeries(**s) for s in content["steps"]],
                kl_is=str(content.get("kl_is", ESTIMATED_KL)),  # files of before had no other
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(f"{path} is not a complete run file: {error}") from None
