"""The file that an interrupted calibration goes on from: of one model, one set of prompts, one set of settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from esamp_core.base.checks import require
from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import read_safetensors, write_safetensors
from esamp_core.base.schema import Kept, Within, check_tensors, parse, read_json
from esamp_core.base.tensors import DistillerWeights
from esamp_core.calibration.config import CalibrationConfig
from esamp_core.explorer.start import kept_weights

FORMAT = "esamp-calibration-work-1"
LARGEST_TOKEN = 2**31 - 1


class DrawnSequence(NamedTuple):
    """One of the model's own samples."""

    prompt_index: int
    prompt: list[int]  # token ids
    drawn: list[int]


class Fit(NamedTuple):
    """An AdamW run after so many steps."""

    step: int
    weights: DistillerWeights
    mean: DistillerWeights  # of the gradients, decayed
    square: DistillerWeights  # of their squares


@dataclass(frozen=True)
class About:
    """What the file says of itself."""

    config: CalibrationConfig
    model: str  # fingerprint
    prompts: str  # digest of their token ids
    prompts_done: Annotated[int, Within(0, 2**31)]
    step: Annotated[int, Within(0, 2**31)]


class Work:
    """What a run has done so far: a run that was interrupted ends with the same weights."""

    def __init__(
        self, path: Path, config: CalibrationConfig, prompts: Sequence[Sequence[int]], model: str, hidden_size: int
    ) -> None:
        """prompts: token ids.  model: its fingerprint.  Raises ArgumentError for a broken file, and another run's."""
        self._path, self._config, self._model, self._prompts = path, config, model, list(map(list, prompts))
        self._digest = hashlib.blake2b(json.dumps(self._prompts).encode(), digest_size=16).hexdigest()
        self._hidden_size = hidden_size
        self.prompts_done = 0
        self.sequences: list[DrawnSequence] = []
        self.fit: Fit | None = None
        if path.exists():
            try:
                self._read()
            except ArgumentError as error:
                raise ArgumentError(f"{error}; remove {path} to start anew") from None

    def save(self) -> None:
        about = About(
            self._config, self._model, self._digest, self.prompts_done, 0 if self.fit is None else self.fit.step
        )
        tokens = [token for s in self.sequences for token in (*s.prompt, *s.drawn)]
        sizes = [(s.prompt_index, len(s.prompt), len(s.drawn)) for s in self.sequences]
        tensors = {
            "tokens": torch.tensor(tokens, dtype=torch.int64, device="cpu"),
            "sequences": torch.tensor(sizes, dtype=torch.int64, device="cpu").view(-1, 3),
        }
        if self.fit is not None:
            for kind in ("weights", "mean", "square"):
                tensors |= {f"{kind}.{name}": t.detach() for name, t in getattr(self.fit, kind)._asdict().items()}
        write_safetensors(self._path, tensors, {"format": FORMAT, "about": json.dumps(asdict(about))})

    def _read(self) -> None:
        path, where = self._path, f"the work file {self._path}"
        tensors, metadata = read_safetensors(path, "the work file")
        require(metadata.get("format") == FORMAT, where, "be one of `esamp calibrate`", metadata.get("format"))
        about = parse(About, read_json(metadata.get("about", ""), where), where)
        now = asdict(self._config)
        others = [
            f"{name} {then!r}, now {now[name]!r}" for name, then in asdict(about.config).items() if then != now[name]
        ]
        others += ["another model"] if about.model != self._model else []
        others += ["other prompts, or another tokenizer"] if about.prompts != self._digest else []
        if others:
            raise ArgumentError(f"{path} belongs to another run ({'; '.join(others)})")
        self._take(tensors, about, where)

    def _take(self, tensors: dict[str, Tensor], about: About, where: str) -> None:
        wanted = {
            "tokens": Kept((None,), torch.int64, Within(0, LARGEST_TOKEN)),
            "sequences": Kept((None, 3), torch.int64, Within(0, LARGEST_TOKEN)),
        }
        for kind in ("weights", "mean", "square") if about.step else ():
            within = Within(0.0) if kind == "square" else Within()
            kept = kept_weights(self._hidden_size, self._config.rank, within)
            wanted |= {f"{kind}.{name}": one for name, one in kept.items()}
        check_tensors(tensors, wanted, where)
        sizes: list[list[int]] = tensors["sequences"].tolist()
        tokens: list[int] = tensors["tokens"].tolist()
        ends = [0]
        for _, prompt, drawn in sizes:
            ends += [ends[-1] + prompt, ends[-1] + prompt + drawn]
        fits = ends[-1] == len(tokens) and about.prompts_done <= len(self._prompts) and about.step <= self._config.steps
        parts = [tokens[first:last] for first, last in pairwise(ends)]
        sequences = [DrawnSequence(size[0], *parts[2 * i : 2 * i + 2]) for i, size in enumerate(sizes)]
        samples = [(s.prompt_index, s.prompt) for s in sequences]
        expected = [
            (i, ids) for i, ids in enumerate(self._prompts[: about.prompts_done]) for _ in range(self._config.samples)
        ]
        if not (fits and samples == expected and all(len(s.drawn) <= self._config.max_new_tokens for s in sequences)):
            raise ArgumentError(f"{where} must hold {self._config.samples} samples of each prompt that is done")
        self.prompts_done, self.sequences = about.prompts_done, sequences
        if about.step:
            weights, mean, square = (
                DistillerWeights(*(tensors[f"{kind}.{name}"] for name in DistillerWeights._fields))
                for kind in ("weights", "mean", "square")
            )
            self.fit = Fit(about.step, weights, mean, square)
