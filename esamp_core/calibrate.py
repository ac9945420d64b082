"""``esamp calibrate``: start weights for a model's Distillers, fitted once on the model's own generations.

A file of them is given as ``DistillerConfig(start=path)``; every group then begins there instead of at the identity
path.  The formula is the library's own (``reference_distiller.distiller_forward``), differentiated by autograd.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor

from esamp_core.config import DistillerConfig, SamplingParams, is_int, is_real, require
from esamp_core.decoder import Decoder
from esamp_core.distiller import START_FORMAT, start_weights
from esamp_core.errors import ArgumentError
from esamp_core.reference_distiller import distiller_forward, feature_size, group_rows
from esamp_core.structures import Activations, DistillerWeights
from esamp_core.taps import ModelParts

PROMPTS_AT_A_TIME = 16
ROWS_AT_A_TIME = 32  # sequences of one forward
EVALUATED = 4096  # held-out tokens at a time
SAVE_EVERY = 100  # steps


@dataclass(frozen=True)
class CalibrationConfig:
    """How start weights are fitted.

    rank: r of the Distillers that will start here.  samples: generations per prompt.  max_new_tokens: of each.
    held_out: share of the prompts, at least one, whose tokens only measure the error.
    steps, batch, rate: AdamW steps, tokens per step, and peak rate (cosine, a tenth of the steps warm-up).
    seed: of generations, start weights and batches.
    """

    rank: int = 64
    samples: int = 8
    max_new_tokens: int = 256
    held_out: float = 0.125
    steps: int = 1000
    batch: int = 512
    rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "samples", "max_new_tokens", "steps", "batch"):
            value = getattr(self, name)
            require(is_int(value) and value >= 1, name, "be an integer >= 1", value)
        require(is_real(self.held_out) and 0 < self.held_out < 1, "held_out", "be between 0 and 1", self.held_out)
        require(is_real(self.rate) and self.rate > 0, "rate", "be a number > 0", self.rate)
        require(is_int(self.seed) and self.seed >= 0, "seed", "be an integer >= 0", self.seed)


class States(NamedTuple):
    """Hidden states of the model's own tokens."""

    shallow: Tensor  # float32 [N, H]
    deep: Tensor  # float32 [N, H]


class Calibration(NamedTuple):
    """Fitted start weights, and the mean relative squared error on held-out tokens before and after."""

    weights: DistillerWeights
    deep_scale: float
    before: float
    after: float
    held_out_tokens: int


def calibrate(
    model: Any, tokenizer: Any, prompts: Sequence[str], config: CalibrationConfig, work: Path, console: Console
) -> Calibration:
    """Generate, collect states, fit.

    work: file of what is done so far; a run that was interrupted continues from it, and ends with the same weights.
    Raises ArgumentError: fewer than two prompts, or a work file of other settings or prompts.
    """
    if len(prompts) < 2:
        raise ArgumentError(f"prompts must be at least two, one of them held out, got {len(prompts)}")
    decoder = Decoder(model, tokenizer)
    saved = _open_work(work, config, prompts)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        sequences = _generate(decoder, prompts, config, saved, work, progress)
        held = max(1, round(config.held_out * len(prompts)))
        collect = progress.add_task("states", total=len(sequences))
        train, test = (
            _collect(decoder.parts, [s for s in sequences if (s[0] >= len(prompts) - held) == last], progress, collect)
            for last in (False, True)
        )
        scale = decoder.parts.deep_scale or float(train.deep.square().mean().sqrt())
        return _fit(train, test, scale, config, saved, work, progress)


def save_start(path: Path, calibration: Calibration, model_name: str) -> None:
    """Write a file for ``DistillerConfig(start=path)``."""
    metadata = {
        "format": START_FORMAT,
        "target": "deep",
        "deep_scale": repr(calibration.deep_scale),
        "model": model_name,
        "error_before": f"{calibration.before:.4f}",
        "error_after": f"{calibration.after:.4f}",
        "held_out_tokens": str(calibration.held_out_tokens),
    }
    tensors = {name: t.contiguous() for name, t in calibration.weights._asdict().items()}
    save_file(tensors, path, metadata=metadata)


# ---------------------------------------------------------------------------------------------- the parts


Sequence3 = tuple[int, list[int], list[int]]  # (prompt's index, its token ids, generated ids)


def _open_work(work: Path, config: CalibrationConfig, prompts: Sequence[str]) -> dict[str, Any]:
    identity = json.dumps([asdict(config), list(prompts)])
    if work.exists():
        saved: dict[str, Any] = torch.load(work, weights_only=True)
        if saved.get("identity") != identity:
            raise ArgumentError(f"{work} belongs to a run with other settings or prompts; remove it to start anew")
        return saved
    return {"identity": identity, "sequences": [], "prompts_done": 0, "step": 0}


def _save(saved: dict[str, Any], work: Path) -> None:
    partial = work.with_name(work.name + ".partial")
    torch.save(saved, partial)
    partial.replace(work)


def _generate(
    decoder: Decoder,
    prompts: Sequence[str],
    config: CalibrationConfig,
    saved: dict[str, Any],
    work: Path,
    progress: Progress,
) -> list[Sequence3]:
    """The model's own samples, temperature 1, no filters, no exploration."""
    sequences: list[Sequence3] = saved["sequences"]
    task = progress.add_task("generate", total=len(prompts), completed=saved["prompts_done"])
    for first in range(saved["prompts_done"], len(prompts), PROMPTS_AT_A_TIME):
        part = list(prompts[first : first + PROMPTS_AT_A_TIME])
        params = [SamplingParams(beta=0.0, seed=config.seed + first + i) for i in range(len(part))]
        for g in decoder.generate(part, n=config.samples, params=params, max_new_tokens=config.max_new_tokens):
            sequences.append((first + g.prompt_index, list(g.prompt_token_ids), list(g.token_ids)))
        saved["prompts_done"] = first + len(part)
        _save(saved, work)
        progress.update(task, completed=saved["prompts_done"])
    return sequences


@torch.no_grad()
def _collect(parts: ModelParts, sequences: list[Sequence3], progress: Progress, task: Any) -> States:
    """Both taps at every position that a generated token was drawn from."""
    shallow: list[Tensor] = []
    deep: list[Tensor] = []
    caught: dict[str, Tensor] = {}

    def tap_block(module: Any, inputs: Any, output: Any) -> None:
        caught["shallow"] = output if isinstance(output, Tensor) else output[0]

    def tap_head(module: Any, inputs: Any) -> None:
        caught["deep"] = inputs[0]

    handles = [
        parts.block.register_forward_hook(tap_block),
        parts.head_module.register_forward_pre_hook(tap_head),
    ]
    try:
        # Longest first, so that a batch pads little; padding on the right is never looked at by a causal model.
        for batch in _batches(sorted(sequences, key=lambda s: -len(s[1]) - len(s[2]))):
            ids = [prompt + drawn[:-1] for _, prompt, drawn in batch]
            longest = max(map(len, ids))
            tokens = torch.tensor([i + [0] * (longest - len(i)) for i in ids], device=parts.device)
            mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids], device=parts.device)
            parts.model(input_ids=tokens, attention_mask=mask, use_cache=False)
            for row, (_, prompt, _) in enumerate(batch):
                used = slice(len(prompt) - 1, len(ids[row]))
                shallow.append(caught["shallow"][row, used].float().cpu())
                deep.append(caught["deep"][row, used].float().cpu())
            progress.advance(task, len(batch))
    finally:
        for handle in handles:
            handle.remove()
    return States(torch.cat(shallow), torch.cat(deep))


def _batches(sequences: list[Sequence3]) -> list[list[Sequence3]]:
    return [sequences[i : i + ROWS_AT_A_TIME] for i in range(0, len(sequences), ROWS_AT_A_TIME)]


def _forward(shallow: Tensor, weights: DistillerWeights, scale: float) -> Activations:
    groups = group_rows(torch.zeros(len(shallow), dtype=torch.int64), 1)
    return distiller_forward(shallow, groups, DistillerWeights(*(w[None] for w in weights)), torch.tensor(scale))


def _loss(states: States, weights: DistillerWeights, scale: float) -> Tensor:
    """Mean relative squared error."""
    error = _forward(states.shallow, weights, scale).pred - states.deep
    return (error.square().sum(-1) / states.deep.square().sum(-1)).mean()


@torch.no_grad()
def _error(states: States, weights: DistillerWeights, scale: float) -> float:
    parts = range(0, len(states.deep), EVALUATED)
    sums = [float(_loss(States(*(t[i : i + EVALUATED] for t in states)), weights, scale)) for i in parts]
    sizes = [len(states.deep[i : i + EVALUATED]) for i in parts]
    return sum(s * n for s, n in zip(sums, sizes, strict=True)) / sum(sizes)


def _fit(
    train: States,
    test: States,
    scale: float,
    config: CalibrationConfig,
    saved: dict[str, Any],
    work: Path,
    progress: Progress,
) -> Calibration:
    hidden = train.deep.shape[1]
    start = start_weights(hidden, DistillerConfig(rank=config.rank, seed=config.seed), torch.device("cpu"))
    before = _error(test, start, scale)
    weights = DistillerWeights(*(w.clone().requires_grad_() for w in start))
    optimizer = torch.optim.AdamW(weights, lr=config.rate, weight_decay=0.0)
    if saved["step"]:
        with torch.no_grad():
            for weight, kept in zip(weights, saved["weights"], strict=True):
                weight.copy_(kept)
        optimizer.load_state_dict(saved["optimizer"])
    task = progress.add_task("fit", total=config.steps, completed=saved["step"])
    for step in range(saved["step"], config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate * _schedule(step, config.steps)
        chosen = torch.randint(
            len(train.deep), (config.batch,), generator=torch.Generator().manual_seed((config.seed << 32) + step)
        )
        loss = _loss(States(*(t[chosen] for t in train)), weights, scale)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            saved |= {"step": step + 1, "weights": [w.detach() for w in weights], "optimizer": optimizer.state_dict()}
            _save(saved, work)
        progress.update(task, completed=step + 1)
    fitted = _balanced(DistillerWeights(*(w.detach() for w in weights)), train, scale)
    return Calibration(fitted, scale, before, _error(test, fitted, scale), len(test.deep))


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, steps // 10)
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _balanced(weights: DistillerWeights, train: States, scale: float) -> DistillerWeights:
    """The same function, in weights that one learning rate suits.

    The gated features h are linear in A: what A is multiplied with, B may be divided by.  One step of size lr moves the
    output through B by lr |h|^2 / (the size that ``learning_rates`` counts on), and through A by at most lr times the
    largest eigenvalue of B' diag(silu^2) B.  The fit leaves these orders of magnitude apart; here they become equal.
    """
    saved = _forward(train.shallow[:EVALUATED], weights, scale)
    silu = torch.nn.functional.silu(saved.gate)
    features = float((saved.up * silu).square().sum(-1).mean())
    rank, hidden = weights.down.shape
    through_b = features / feature_size(rank, hidden)
    through_a = float(torch.linalg.matrix_norm(silu.square().mean(0).sqrt()[:, None] * weights.down, 2)) ** 2
    factor = (through_a / through_b) ** 0.25
    return weights._replace(up=weights.up * factor, down=weights.down / factor)


def run_calibrate(
    console: Console,
    *,
    model_name: str,
    prompts_file: Path,
    out: Path,
    dtype: str,
    device: str,
    config: CalibrationConfig,
) -> None:
    """The command.  Raises ArgumentError."""
    from esamp_core.cli_generate import check_writable, load_model, read_prompts

    check_writable(out, "--out")
    prompts = read_prompts([], prompts_file)
    model, tokenizer = load_model(model_name, dtype, device)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None:
        config = replace(config, max_new_tokens=min(config.max_new_tokens, context))
    work = out.with_name(out.name + ".work")
    result = calibrate(model, tokenizer, prompts, config, work, console)
    save_start(out, result, model_name)
    work.unlink(missing_ok=True)
    console.print(
        f"Relative squared error on {result.held_out_tokens} held-out tokens: {result.before:.3f} at the plain start, "
        f"{result.after:.3f} calibrated. Use it as DistillerConfig(start={str(out)!r}, rank={config.rank})."
    )
