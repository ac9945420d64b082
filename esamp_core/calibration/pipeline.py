"""Calibration: start weights for a model's Distillers, fitted once on the model's own samples.

A file of them is given as ``DistillerConfig(start=path)``; every group then begins there instead of at the identity
path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esamp_core.base.errors import ArgumentError
from esamp_core.calibration.config import CalibrationConfig, OnProgress
from esamp_core.calibration.fit import Calibration, fit
from esamp_core.calibration.states import collect, own_samples
from esamp_core.calibration.work import Work
from esamp_core.decoder import Decoder
from esamp_core.decoder.prompts import read_prompts
from esamp_core.explorer.start import write_start
from esamp_core.models.fingerprint import model_fingerprint
from esamp_core.models.parts import find_parts


def _silent(what: str, done: int, of: int) -> None:
    pass


def calibrate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    config: CalibrationConfig,
    work: Path,
    on_progress: OnProgress = _silent,
) -> Calibration:
    """Draw samples, collect states, fit.

    work: file of what is done so far; a run that was interrupted continues from it, and ends with the same weights.
        A broken one, and one of another model, other prompts or settings, is refused.
    on_progress: called with what is being done, how much of it is done, and of how much.
    Raises ArgumentError: fewer than two prompts, or a work file that is refused.
    """
    if len(prompts) < 2:
        raise ArgumentError(f"prompts must be at least two, one of them held out, got {len(prompts)}")
    decoder = Decoder(model, tokenizer)
    parts = decoder.parts
    ids = [ids for _, ids in read_prompts(list(prompts), tokenizer, None, parts.vocab_size, parts.context)]
    file = Work(work, config, ids, model_fingerprint(model), parts.hidden_size)
    sequences = own_samples(decoder, prompts, config, file, on_progress)
    held = max(1, round(config.held_out * len(prompts)))
    collected = 0

    def on_batch(size: int) -> None:
        nonlocal collected
        collected += size
        on_progress("states", collected, len(sequences))

    train, test = (
        collect(parts, [s for s in sequences if (s[0] >= len(prompts) - held) == last], on_batch)
        for last in (False, True)
    )
    scale = parts.deep_scale or float(train.deep.square().mean().sqrt())
    return fit(train, test, scale, config, file, on_progress)


def save_start(path: Path, calibration: Calibration, model_name: str, model: Any) -> None:
    """Write a file for ``DistillerConfig(start=path)``.  By some numbers of the model's head it knows it again."""
    about = {
        "target": "deep",
        "deep_scale": repr(calibration.deep_scale),
        "model": model_name,
        "error_before": f"{calibration.before:.4f}",
        "error_after": f"{calibration.after:.4f}",
        "held_out_tokens": str(calibration.held_out_tokens),
    }
    write_start(path, calibration.weights, calibration.judged, find_parts(model).head, about)
