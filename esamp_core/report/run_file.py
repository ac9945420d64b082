"""What a run drew, as a file that ``esamp report`` turns into one HTML page.

The schema of run.json has its only home here: :class:`RunFile`.  Every part may be empty, and is then left out.  What
is made by hand is held to the same schema as what is read, so that whatever was written can be read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import LARGEST_TEXT, read_text, write_text
from esamp_core.base.schema import Within, check_fields, parse, read_json, to_json

SCHEMA = 1
# NaN is not known, and null in the file; the bounds leave room to draw a chart's axis.
Known = Annotated[float, Within(-1e300, 1e300, nan=True)]
Share = Annotated[float, Within(0, 1)]


@dataclass(frozen=True)
class SampleText:
    """One sample.  tokens: as text.  novelty: one number per token, logit units, NaN is not known.

    correct: None if not checked.  Raises ArgumentError, as all of these.
    """

    sampler: str
    tokens: list[str]
    novelty: list[Known]
    correct: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.tokens) != len(self.novelty):
            raise ArgumentError(f"novelty must have one number per token ({len(self.tokens)}), got {len(self.novelty)}")


@dataclass(frozen=True)
class PromptSamples:
    """A prompt and what was drawn for it."""

    prompt: str
    samples: list[SampleText]

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Curve:
    """Pass@k of a sampler, shares in 0..1, with the bounds of an interval.  k: numbers of samples, rising."""

    sampler: str
    k: list[Annotated[int, Within(1)]]
    mean: list[Share]
    low: list[Share]
    high: list[Share]

    def __post_init__(self) -> None:
        check_fields(self)
        if len({len(self.k), len(self.mean), len(self.low), len(self.high)}) != 1:
            raise ArgumentError(f"k, mean, low and high must be equally long in the curve of {self.sampler[:80]!r}")
        if any(a >= b for a, b in pairwise(self.k)):
            raise ArgumentError(f"k must rise in the curve of {self.sampler[:80]!r}, got {self.k[:8]}")


@dataclass(frozen=True)
class StepSeries:
    """Per decode step: KL (``RunFile.kl_is`` says of what from what) and the Distiller's relative error, means.

    NaN is not known.
    """

    sampler: str
    kl: list[Known]
    loss: list[Known]

    def __post_init__(self) -> None:
        check_fields(self)


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

    def __post_init__(self) -> None:
        check_fields(self)

    def write(self, path: Path) -> None:
        """Whole, or not at all.  Raises ArgumentError: it cannot be written, or :meth:`read` would refuse it."""
        content = {"schema": SCHEMA, **asdict(self)}
        _read(content, str(path))  # lists may have been changed since they were checked
        text = to_json(content)
        if len(text.encode()) > LARGEST_TEXT:
            raise ArgumentError(f"{path} must be at most 1 GiB, got more")
        write_text(path, text, str(path))

    @staticmethod
    def read(path: Path) -> RunFile:
        """Raises ArgumentError, in one line, for a file that is missing or not of this schema."""
        try:
            content = read_json(read_text(path, "run"), "it")
        except ArgumentError as error:
            raise ArgumentError(f"{path} cannot be read: {error}") from None
        return _read(content, str(path))


def _read(content: object, where: str) -> RunFile:
    if not isinstance(content, dict) or type(content.get("schema")) is not int or content["schema"] != SCHEMA:
        raise ArgumentError(f"{where} must be a run file of schema {SCHEMA}")
    fields = {name: value for name, value in content.items() if name != "schema"}
    # By hand each may be left out; files of before had no kl_is.
    lacking = [name for name in ("about", "prompts", "curves", "steps") if name not in fields]
    try:
        if lacking:
            raise ArgumentError(f"run must have {', '.join(lacking)}")
        return parse(RunFile, fields, "run")
    except ArgumentError as error:
        raise ArgumentError(f"{where} is not a complete run file: {error}") from None
